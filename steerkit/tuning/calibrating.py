"""`calibrate_scale`: the strongest scale of a task vector inside a budget of costs, and what it brings about there.

1. On half of the neutral texts the scale is found at which the KL divergence from the unchanged model spends the
   budget, as `steerkit.suggest_strength` finds a strength (`steerkit.evaluate.kl_search`). It counts with the upper end
   of its interval, so that the other half, which confirms, seldom says otherwise.
2. On the items of a contrast set, which chose nothing, the change of the preference margin is measured at that scale
   and at half of it, with intervals, and on the other half of the neutral texts the costs.
3. Beside it stands what the same search makes of the same differences with random signs (`steerkit.tuning.signs`):
   changes of the weights in which nothing is learned, at the scale at which they cost as much. What harms a model moves
   margins too; an effect that is not clear of these is none of what finetuning has learned.

The controls are a calibration's random directions of the same norm (`steerkit.evaluate.curve.random_like`) and the
random tensors of Ilharco et al. (2023), with one difference: the cost is the same, not the norm. At the norm of a task
vector signs cost a fiftieth of what it costs (see `signs`), so that nearly every effect would be clear of them.

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi (2023), "Editing Models with Task Arithmetic",
arXiv 2212.04089, choose the scale on held-out data, the largest that leaves a control task 95 % of its accuracy; here a
KL divergence on neutral texts stands in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerkit.errors import DataError, StrengthError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.calibration.verdict import judged
from steerkit.evaluate.controls import FEWEST
from steerkit.evaluate.intervals import NotScored
from steerkit.evaluate.kl_search import MAX_KL, KlSearch, check_max_kl
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.setup import Setup
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.tuning.changed_trial import changed
from steerkit.tuning.signs import random_signs
from steerkit.tuning.task_vector import TaskVector

__all__ = ["AtScale", "CalibratedScale", "calibrate_scale"]

EFFECT = PreferenceMargin.name
_FIRST = 0.5
_REACH = 64.0  # times where a search begins, at least 1: no scale beyond is tried


@dataclass(frozen=True)
class AtScale:
    """What a task vector does at one scale.

    Attributes:
        scale: what it is multiplied by.
        scores: the preference margin on the held-out items (`preference_margin`), and what it costs on the neutral
            texts that confirm (`kl`).
    """

    scale: float
    scores: Mapping[str, Measured]

    def as_row(self) -> dict[str, Any]:
        """Plain data."""
        return {"scale": self.scale, **{name: one.as_row() for name, one in self.scores.items()}}


@dataclass(frozen=True)
class CalibratedScale:
    """The scale that was found for a task vector, and what it does.

    Attributes:
        works: whether the effect is clear of every control, inside the budget.
        verdict: the same in one line, with the figures.
        scale: what to multiply the vector by, as `added` and `merge` take it.
        max_kl: the budget, nats per token.
        costs: by scale tried, the KL divergence on the texts that chose.
        confirmed: what the vector does at the scale.
        half: what it does at half of it.
        controls: what it does with random signs, draw by draw, at the scale that spends the same budget.
    """

    works: bool
    verdict: str
    scale: float
    max_kl: float
    costs: Mapping[float, Measured]
    confirmed: AtScale
    half: AtScale
    controls: tuple[AtScale, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "works": self.works,
            "verdict": self.verdict,
            "scale": self.scale,
            "max_kl": self.max_kl,
            "costs": [{"scale": scale, **one.as_row()} for scale, one in sorted(self.costs.items())],
            "confirmation": self.confirmed.as_row(),
            "half": self.half.as_row(),
            "controls": [one.as_row() for one in self.controls],
        }


def calibrate_scale(
    model: nn.Module,
    tokenizer: Any,
    vector: TaskVector,
    data: ContrastSet,
    *,
    max_kl: float = MAX_KL,
    texts: int = 32,
    controls: int = 5,
    seed: int = 0,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    step: Callable[[str], None] = lambda note: None,
) -> CalibratedScale:
    """Find the strongest scale of a task vector inside a budget, and measure what it does on held-out items.

    The model is changed in memory while it is measured; afterwards, and after an error, each weight is bitwise what it
    was. Weights are written some dozens of times, and differences on the disk are read as often.

    Args:
        model: what the vector is to be added to, in memory and not quantised.
        tokenizer: its tokenizer.
        vector: the task vector, with its sign: `-tau` takes away.
        data: pairs of answers to the same prompts, of which neither finetuning nor `learn_coefficients` has seen any.
            The positive answers are those that the vector is to make likelier; beside `-tau` those without the trait.
        max_kl: the budget, nats per answer token on neutral texts.
        texts: how many of the shipped neutral texts are read: half of them choose, half confirm.
        controls: draws of random signs.
        seed: fixes the signs and the intervals.
        batch_size: texts per pass.
        chat_template_kwargs: passed on to the chat template.
        step: called with a few words before measurements, for a progress line.

    Returns:
        The scale, above 0, with what it costs and brings about; whether that is more than the controls do is in
        `works` and `verdict`.

    Raises:
        StrengthError: the budget is not above 0, or no scale spends it, because the vector changes next to nothing.
        DataError: too few items, texts or controls, or a pair lacks an answer or has two prompts.
        ModelError: the vector is of another model, or a weight is offloaded or quantised.

    Example:
        found = calibrate_scale(model, tokenizer, -tau, data)
        if found.works:
            merge("tuned", -tau, "milder", scale=found.scale)
    """
    check_max_kl(max_kl)
    _check(vector, data, texts, controls)
    setup = Setup(model, tokenizer, data, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs)
    choosing, confirming = (setup.first_neutral(texts).half(number) for number in (0, 1))
    PreferenceMargin().texts(confirming)  # mistakes in the data are told first

    def strongest(one: TaskVector, first: float, note: str = "") -> tuple[float, dict[float, Measured]]:
        return _strongest(choosing, one, max_kl, first, seed, lambda scale: step(f"{note}scale {scale:g}"))

    scale, costs = strongest(vector, _FIRST)
    step("held-out items")
    confirmed, half = (_does(confirming, vector, one, seed) for one in (scale, scale / 2))
    beside, first = list[AtScale](), scale
    for number in range(1, controls + 1):
        one = random_signs(vector, seed=seed + number)
        first, _ = strongest(one, first, f"random signs {number} of {controls}, ")
        beside.append(_does(confirming, one, first, seed))
    means = [one.scores[EFFECT].estimate.mean for one in beside]
    verdict = judged(EFFECT, Budget(max_kl=max_kl), confirmed.scores, means, due=["kl"])
    return CalibratedScale(
        works=verdict.works,
        verdict=verdict.words,
        scale=scale,
        max_kl=max_kl,
        costs=costs,
        confirmed=confirmed,
        half=half,
        controls=tuple(beside),
    )


def _strongest(
    setup: Setup, vector: TaskVector, max_kl: float, first: float, seed: int, tell: Callable[[float], None]
) -> tuple[float, dict[float, Measured]]:
    """The strongest scale inside the budget on a setup's neutral texts, and what the scales tried cost there.

    Raises:
        StrengthError: no scale spends the budget.
    """
    costs: dict[float, Measured] = {}

    def cost(scale: float) -> float:
        tell(scale)
        try:
            costs[scale] = measure(changed(setup, vector, scale), ["divergence"], seed=seed)["kl"]
        except NotScored:  # logits are no longer finite
            return math.inf
        return costs[scale].effect.high

    advice = "give a task vector that changes more, or another max_kl"
    return KlSearch(cost, _REACH * max(first, 1.0), advice=advice).reaching(max_kl, first).strength, costs


def _does(setup: Setup, vector: TaskVector, scale: float, seed: int) -> AtScale:
    found = measure(changed(setup, vector, scale), [EFFECT, "divergence"], seed=seed)
    return AtScale(scale, {name: found[name] for name in (EFFECT, "kl")})


def _check(vector: TaskVector, data: ContrastSet, texts: int, controls: int) -> None:
    """Refuse what cannot be calibrated, before anything is measured.

    Raises:
        DataError: too few items, texts or controls.
        StrengthError: every factor of the vector is 0.
    """
    if len(data) < FEWEST:
        raise DataError(f"calibrate_scale: {len(data)} items cannot tell an effect; give at least {FEWEST}")
    if texts < 2 * FEWEST or controls < 1:
        raise DataError(
            f"calibrate_scale: {texts} neutral texts and {controls} controls; give at least {2 * FEWEST} texts, half "
            "of which confirm, and 1 control"
        )
    if not any(vector.touches(name) for name in vector.shapes):
        raise StrengthError("calibrate_scale: the task vector changes nothing, for every factor is 0; give another")
