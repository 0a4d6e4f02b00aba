"""The page of what a reader sees: `python -m benchmarks.evidence` makes it of `vectors/MODEL/evidence.json`.

Those are written by `steerkit evidence --model MODEL --out vectors/MODEL`. Every figure of the page is in them, and
every figure in them can be computed again from the answers in `vectors/MODEL/evidence`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, save
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.store_identity import environment
from steerkit.report.plots.confusion import plot_confusion

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
TITLES = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma3-270m": "Gemma 3 270M, a base model"}
NOTES = {
    "gemma3-270m": (
        "No vectors ship for this model: the recipes were fitted on it as they are, blocks scaled by depth, at the "
        "quick strength that `extract` measures (KL about 0.15), not calibrated. `optimism-steer2edit` had the "
        "strength of the recipe's own model, which breaks the text here; `extract` measures one by now. The model has "
        "no chat template and was never taught to answer, so a system prompt is text before the question; traits were "
        "left out."
    )
}


def span(found: Mapping[str, float], form: str = ".2f") -> str:
    """A mean with its interval."""
    return f"{found['mean']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def scores(vectors: Mapping[str, Any]) -> dict[str, Any]:
    """One line a vector: verdict, concept, overall, who wins."""
    rows = []
    for name, one in vectors.items():
        texts = one["texts"]
        rows.append(
            [
                f"`{name}`",
                f"{one['strength']:g}",
                f"**{one['verdict']}**" if one["told"] else "cannot be told",
                f"{texts['0']['concept']['mean']:.2f}",
                span(one["change"]["concept"], "+.2f"),
                span(texts["+"]["overall"]),
                span(texts["prompt"]["overall"]),
                span(texts["prompt and steering"]["overall"]),
                one["against prompting"]["wins"],
            ]
        )
    columns = ["vector", "strength", "verdict", "concept, unsteered", "its change", "overall, steered",
               "overall, prompted", "both", "wins"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def costs(vectors: Mapping[str, Any]) -> dict[str, Any]:
    """One line a vector: what it costs, the other parts of the score, and the other way."""
    rows = []
    for name, one in vectors.items():
        up, plain = one["texts"]["+"], one["texts"]["0"]
        down = one["change"].get("concept, minus")
        marked = f"{plain['markers']:.2f}, {up['markers']:.2f}" if "markers" in up else "-"
        rows.append(
            [
                f"`{name}`",
                f"{one['kl']['mean']:.2f}",
                f"{one['perplexity_ratio']['mean']:.2f}",
                f"{one['repetition']['mean']:.2f}",
                f"{plain['fluency']['mean']:.2f}, {up['fluency']['mean']:.2f}",
                f"{plain['instruction']['mean']:.2f}, {up['instruction']['mean']:.2f}",
                marked,
                "one way" if down is None else span(down, "+.2f"),
                str(up["failed"]),
            ]
        )
    columns = ["vector", "KL, nats per token", "perplexity ratio", "repetition", "fluency: 0, +", "instruction: 0, +",
               "with a marker: 0, +", "concept from minus to 0", "empty"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def classifiers(found: Mapping[str, Any]) -> dict[str, Any]:
    """One line a behaviour: how often its classifier is right."""
    rows = []
    for name, one in found.items():
        written = one["accuracy_written"]
        rows.append(
            [
                f"`{name}`",
                one["trained_on"],
                span(one["accuracy_prompted"]),
                "-" if written is None else span(written),
                "yes" if one["accuracy"]["low"] > 0.5 else "cannot be told",
            ]
        )
    columns = [
        "behaviour",
        "trained on",
        "right on the model's answers",
        "right on written answers",
        "tells them apart",
    ]
    return {"columns": columns, "rows": rows}


def confusion(vectors: Mapping[str, Any]) -> dict[str, Any]:
    """Vectors by behaviours: mean change of the concept, bold where its interval is clear of 0."""
    traits = list(next(iter(vectors.values()))["moves"])

    def cell(found: Mapping[str, float]) -> str:
        is_clear = found["low"] > 0 or found["high"] < 0
        return f"**{found['mean']:+.2f}**" if is_clear else f"{found['mean']:+.2f}"

    rows = [[f"`{name}`", *(cell(one["moves"][trait]) for trait in traits)] for name, one in vectors.items()]
    return {"columns": ["vector", *traits], "rows": rows}


def tally(vectors: Mapping[str, Any]) -> str:
    """In a sentence: how many show, and who wins."""
    said = [one["verdict"] if one["told"] else "cannot be told" for one in vectors.values()]
    wins = [one["against prompting"]["wins"] for one in vectors.values()]
    words = {"shows": "show", "weak": "are weak", "nothing": "show nothing", "cannot be told": "cannot be told"}
    parts = [f"{said.count(one)} {told}" for one, told in words.items() if one in said]
    often = {one: "once" if wins.count(one) == 1 else f"{wins.count(one)} times" for one in wins}
    beside = [f"{one} wins {often[one]}" for one in ("steering", "prompting") if one in wins]
    beside += [f"{often['cannot be told']} it cannot be told"] if "cannot be told" in wins else []
    return f"Of {len(said)} vectors {', '.join(parts)}. Beside the system prompt, {', '.join(beside)}."


def also(vectors: Mapping[str, Any]) -> list[str]:
    """Off-diagonals that are named."""
    named = [
        f"`{name}` also moves " + ", ".join(f"{other['trait']} ({other['mean']:+.2f})" for other in one["also_moves"])
        for name, one in vectors.items()
        if one["also_moves"]
    ]
    if not named:
        return []
    return [f"Named, since they are clear of 0 and at least half of the vector's own change: {'; '.join(named)}."]


def model_parts(name: str, found: Mapping[str, Any], folder: Path) -> list[Any]:
    """The page's part on one model."""
    vectors, model = found["vectors"], found["model"]
    picture = folder / f"evidence-{name}.png"
    plot_confusion(
        {one: {trait: Estimate(**told) for trait, told in entry["moves"].items()} for one, entry in vectors.items()},
        {one: entry["behaviour"] for one, entry in vectors.items()},
        picture,
        title=f"Change of every trait's score, {TITLES.get(name, name)}",
    )
    scale = found["calibration"]
    rounded = model["quantisation"] or "not quantised"
    return [
        f"## {TITLES.get(name, name)}",
        f"`{name}`: {model['hub_id']}, {rounded}, computed in {model['dtype']}, weights `{model['digest'][:16]}`. "
        f"`{found['command']}` at commit `{found['commit']}`.",
        tally(vectors),
        *([NOTES[name]] if name in NOTES else []),
        scores(vectors),
        "What steering costs, and the parts of the score:",
        costs(vectors),
        "How often the classifiers are right on answers to questions that they were not trained on:",
        classifiers(found["classifiers"]),
        f"Instruction: the unsteered model's own pairs of question and answer have {scale['matched']:.2f} on average, "
        f"shuffled ones {scale['shuffled']:.2f}; what it is computed from tells them apart with an AUC of "
        f"{span(scale['auc'])}. Shuffling the words of an answer adds {scale['scale']:.2f} nats per token.",
        f"### Which other traits move, {name}",
        confusion(vectors),
        *also(vectors),
        f"![Change of every trait's score by every vector](evidence-{name}.png)",
    ]


INTRODUCTION = """\
Every vector answers 40 questions that nothing was fitted on, at the strength that its file suggests (greedy, 40
tokens). Refusal is asked harmful requests of sources that no gate was fitted on; vectors with a gate 20 harmful and 20
ordinary ones, and there the concept of an ordinary one is that it is *not* refused. The answers are in
`vectors/MODEL/evidence`.

- *Concept*: a classifier's probability that the answer shows the behaviour. It is trained on the unsteered model's
  answers to 40 other questions under opposite system prompts, where the model follows them, and on the recipe's own
  written answers where it has some. Its accuracy is stated on those answers of the model (by folds over questions; not
  clear of one half where the model does not follow) and on held-out written ones. Where both may be one half, the
  concept cannot be told. Refusals are found by the scorer `refusal`, whose accuracy is that on
  [labelled answers](refusals.md).
- *Fluency*: 1 where the unsteered model finds the answer as predictable as its own, 0 where as unpredictable as its own
  with the words shuffled; less the share of repeated 4-grams.
- *Instruction*: the probability that question and answer belong together, from how much likelier the answer makes the
  question than another answer does.
- *Overall*: the harmonic mean of the three for each answer, as AxBench has it. An empty answer is 0 in all of them.

A vector *shows* where the concept rises by at least 0.15 with an interval above 0, and the overall score does not fall;
it is *weak* where it rises less, or the overall score falls. *Prompted* is the unsteered model under a system prompt
that asks for the behaviour, in three wordings; *both* is steering on top of it. Whoever has the higher overall score
with an interval clear of 0 wins. Intervals are 95 %, over questions."""


def page(names: Sequence[str], folder: Path = FOLDER) -> Path:
    """Write the page of some models."""
    found = {name: json.loads((VECTORS / name / "evidence.json").read_text("utf-8")) for name in names}
    parts: list[Any] = [*INTRODUCTION.split("\n\n")]
    for name, one in found.items():
        parts += model_parts(name, one, folder)
    content = {
        "title": "What a reader sees",
        "command": shlex.join(["python", "-m", "benchmarks.evidence", *names]),
        "date": next(iter(found.values()))["date"],
        "versions": {package: environment()[package] for package in ("steerkit", "torch", "transformers")},
        "model": None,
        "vectors": {},
        "commit": next(iter(found.values()))["commit"],
        "note": "The tables are of the runs that stand above them; this page only sets them out.",
        "parts": parts,
    }
    return save("evidence", content, folder)


if __name__ == "__main__":
    print(page([name for name in TITLES if (VECTORS / name / "evidence.json").is_file()]))
