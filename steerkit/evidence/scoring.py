"""From answers to scores: the classifiers, the scales, and every answer's concept, fluency and instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from steerkit.evaluate.intervals import separability
from steerkit.evaluate.scorers.repetition import repeated_share
from steerkit.evidence.answering import Row
from steerkit.evidence.behaviours import REFUSAL, Behaviour
from steerkit.evidence.classifier import Classifier, Labelled, finds_refusals, trained
from steerkit.evidence.folder import Folder, Part, part_of_behaviour, part_of_unsteered
from steerkit.evidence.formulas import Calibration, Scores, fluency, instruction, overall

__all__ = ["Scorer", "calibrated", "classifier_of"]

LEAST_SCALE = 1.0
"""Nats per token: a model to which the order of words makes less of a difference has no fluency to lose."""


def calibrated(unsteered: Part) -> Calibration:
    """The scales of fluency and instruction, from the unsteered answers and shuffled ones.

    Args:
        unsteered: the answers to the open questions.
    """
    from sklearn.linear_model import LogisticRegression

    own = unsteered.of("0")
    plain = {row.question: row.nll for row in own}
    added = [
        row.nll - nll
        for row in unsteered.of("shuffled words")
        if row.nll is not None and (nll := plain[row.question]) is not None
    ]
    matched = [row.z for row in own if row.z is not None]
    shuffled = [row.z for row in unsteered.of("shuffled pair") if row.z is not None]
    fitted = LogisticRegression(C=1e6, class_weight="balanced").fit(
        [[z] for z in (*matched, *shuffled)], [True] * len(matched) + [False] * len(shuffled)
    )
    slope, offset = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])

    def told(values: Sequence[float]) -> float:
        return sum(instruction(z, slope, offset) for z in values) / len(values)

    auc = separability(torch.tensor(matched, dtype=torch.float64), torch.tensor(shuffled, dtype=torch.float64))
    return Calibration(max(LEAST_SCALE, sum(added) / len(added)), slope, offset, told(matched), told(shuffled), auc)


def classifier_of(behaviour: Behaviour, prompted: Part) -> Classifier:
    """The classifier of a behaviour.

    Args:
        behaviour: with its written answers.
        prompted: the model's answers under the system prompts.
    """
    if behaviour.name == REFUSAL:
        return finds_refusals()
    own = [
        Labelled(row.text, side == "positive", row.question)
        for side in ("positive", "negative")
        for row in prompted.of(side)
    ]
    written, held_out = (_labelled(sides) for sides in (behaviour.written, behaviour.written_held_out))
    return trained(own, written, held_out)


def _labelled(sides: tuple[Sequence[str], Sequence[str]]) -> list[Labelled]:
    return [
        Labelled(text, positive, str(number))
        for positive, side in zip((True, False), sides, strict=True)
        for number, text in enumerate(side)
    ]


@dataclass(frozen=True, eq=False)
class Scorer:
    """What scores answers.

    Attributes:
        classifiers: by behaviour.
        calibration: of fluency and instruction.
        unsteered: nats per token of the unsteered answer to each question.
    """

    classifiers: Mapping[str, Classifier]
    calibration: Calibration
    unsteered: Mapping[str, float | None]

    @classmethod
    def of(cls, folder: Folder, behaviours: Mapping[str, Behaviour]) -> Scorer:
        """Train and calibrate on what a folder holds.

        Args:
            folder: of a run.
            behaviours: whose classifiers are wanted, where the folder has their answers.

        Raises:
            DataError: the unsteered answers are missing.
            SteerError: scikit-learn is not installed.
        """
        there = set(folder.names())
        kept = [one for name, one in behaviours.items() if part_of_behaviour(name) in there]
        rows = [row for asked in ("questions", "requests") if part_of_unsteered(asked) in there
                for row in folder.read(part_of_unsteered(asked)).of("0")]  # fmt: skip
        return cls(
            {one.name: classifier_of(one, folder.read(part_of_behaviour(one.name))) for one in kept},
            calibrated(folder.read(part_of_unsteered("questions"))),
            {row.question: row.nll for row in rows},
        )

    def concepts(self, behaviour: str, rows: Sequence[Row], *, gated: bool = False) -> list[float]:
        """How much each answer shows a behaviour.

        Args:
            behaviour: its name.
            rows: the answers.
            gated: where the behaviour is not wanted, its absence counts.
        """
        found = self.classifiers[behaviour]([row.text for row in rows])
        return [1.0 - one if gated and not row.wanted else one for one, row in zip(found, rows, strict=True)]

    def scores(self, behaviour: str, rows: Sequence[Row], *, gated: bool = False) -> list[Scores]:
        """All scores of answers.

        Args:
            behaviour: that is looked for.
            rows: the answers.
            gated: as for `concepts`.
        """
        concepts = self.concepts(behaviour, rows, gated=gated)
        return [self._scores(row, concept) for row, concept in zip(rows, concepts, strict=True)]

    def _scores(self, row: Row, concept: float) -> Scores:
        nll, z = row.nll, row.z
        if not row.text.strip() or nll is None or z is None:
            return Scores(0.0, 0.0, 0.0, 0.0, failed=True)
        plain = self.unsteered.get(row.question)
        scale = self.calibration.scale
        fluent = fluency(nll, nll if plain is None else plain, scale, repeated_share(row.text))
        fits = instruction(z, self.calibration.slope, self.calibration.offset)
        return Scores(concept, fluent, fits, overall(concept, fluent, fits))
