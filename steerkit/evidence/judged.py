"""A judge's ratings of a vector's answers, which take the place of the scores that need none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steerkit.evaluate.judges.judge import Judge
from steerkit.evaluate.judges.judging import judge_of, rate
from steerkit.evaluate.judges.rubric import fill
from steerkit.evaluate.scorers.concept import RUBRICS
from steerkit.evaluate.store_identity import digest_of
from steerkit.evidence.answering import Row
from steerkit.evidence.behaviours import Behaviour
from steerkit.evidence.folder import Folder, Part, texts_of
from steerkit.evidence.formulas import Scores, overall

__all__ = ["judge_all", "judged_scores", "part_of_judge"]

HIGHEST = 2


def part_of_judge(name: str) -> str:
    """The part that holds a judge's ratings of a vector's answers.

    Args:
        name: of the vector.
    """
    return f"judged-{name}"


def judge_all(folder: Folder, behaviours: Mapping[str, Behaviour], names: Sequence[str], judge: str | Judge) -> None:
    """Have every vector's answers rated, those that are not yet.

    Args:
        folder: of a run.
        behaviours: all of them.
        names: vectors.
        judge: as for `judge_of`.

    Raises:
        SteerError: the judge cannot be had, or rates nothing.
    """
    rating, there = judge_of(judge), set(folder.names())
    for name in names:
        if name not in there:
            continue
        part = folder.read(name)
        rows = [row for rows in texts_of(folder, part).values() for row in rows]
        key = digest_of([rating.name, RUBRICS["concept"], [(row.question, row.text) for row in rows]])
        if not folder.has(part_of_judge(name), key):
            told = behaviours[str(part.facts["behaviour"])].described
            facts = {"key": key, "of": part_of_judge(name), "judge": rating.name}
            folder.write(part_of_judge(name), facts, _rated(rating, told, rows))


def _rated(judge: Judge, described: str, rows: Sequence[Row]) -> list[Row]:
    """The rows with three ratings each, from 0 to 1; what the judge could not rate is left out of them."""
    from dataclasses import replace

    prompts = [
        fill(rubric, {"behaviour": described, "question": row.question, "answer": row.text})
        for row in rows
        for rubric in RUBRICS.values()
    ]
    ratings = rate(judge, prompts, low=0, high=HIGHEST).view(len(rows), len(RUBRICS)).tolist()
    return [
        replace(row, ratings={name: one / HIGHEST for name, one in zip(RUBRICS, found, strict=True) if one == one})
        for row, found in zip(rows, ratings, strict=True)
    ]


def judged_scores(part: Part, *, gated: bool) -> dict[str, list[Scores]]:
    """Scores by condition. An answer that is empty, or that the judge could not rate, is 0.

    Args:
        part: of a judge's ratings.
        gated: where the behaviour is not wanted, its absence counts.
    """
    found: dict[str, list[Scores]] = {}
    for row in part.rows:
        found.setdefault(row.condition, []).append(_scores(row, gated=gated))
    return found


def _scores(row: Row, *, gated: bool) -> Scores:
    ratings = row.ratings or {}
    if not row.text.strip() or len(ratings) < len(RUBRICS):
        return Scores(0.0, 0.0, 0.0, 0.0, failed=True)
    concept = 1.0 - ratings["concept"] if gated and not row.wanted else ratings["concept"]
    fluent, fits = ratings["fluency"], ratings["instruction"]
    return Scores(concept, fluent, fits, overall(concept, fluent, fits))
