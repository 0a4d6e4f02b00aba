"""`suggest_strength`: a first strength where nobody has measured one, as much as a budget of KL divergence allows.

    KL(s) = mean over answer tokens of neutral texts of sum over v of p_base(v) (log p_base(v) - log p_s(v))   nats

The KL divergence grows about with the square of the strength, so a few passes over a few texts find the strength at
which it reaches the budget, on a line between the logarithms of both. That says what a strength costs and nothing of
what it brings about: `calibrate` measures that, on held-out items and beside controls.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from steerkit.errors import StrengthError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.scorers._answers import answer_kl, calm_pairs
from steerkit.evaluate.setup import Setup
from steerkit.methods._registry import is_gated, method_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["LIMIT_KL", "MAX_KL", "can_be_suggested", "suggest_strength", "with_suggestion"]

logger = logging.getLogger(__name__)

MAX_KL = 0.15
"""Nats per token: half of what a calibration allows, since nothing reads the texts for loops here."""
LIMIT_KL = Budget().max_kl
"""What a calibration allows; the file says at which strength it is reached, and whoever steers harder is told."""
_CLOSE = 0.9  # of the budget: near enough
_PASSES = 16
_FURTHEST = 64.0  # times the end of the method's ladder


def can_be_suggested(vector: SteeringVector) -> bool:
    """Whether neutral texts can tell a strength for this vector.

    They cannot where the method brings a strength of its own (a share, an angle), nor where a gate stays closed on
    them.

    Args:
        vector: the vector.

    Raises:
        UnknownNameError: its method is not installed.
    """
    method = method_of(vector)
    return method.natural_strength is None and method.neutral_strength == 0.0 and not is_gated(vector)


def suggest_strength(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    *,
    max_kl: float = MAX_KL,
    texts: int = 8,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """Find the strength at which a vector costs a budget of KL divergence on a few neutral texts.

    Args:
        model: the model it was fitted on.
        tokenizer: its tokenizer.
        vector: the vector; it is measured with its own scope.
        max_kl: the budget, in nats per answer token, on average.
        texts: how many of the shipped neutral texts are read, every second one.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Returns:
        The vector with that strength suggested, in the unit `paper`, and in `calibration` what it cost and that nobody
        has confirmed it.

    Raises:
        StrengthError: the budget is not above 0, the vector takes no such suggestion (see `can_be_suggested`), or no
            strength moves the predictions that far.

    Example:
        vector = steerkit.suggest_strength(model, tokenizer, steerkit.fit(model, tokenizer, data))
    """
    if not math.isfinite(max_kl) or max_kl <= 0:
        raise StrengthError(f"max_kl: got {max_kl!r}; give a number of nats per token above 0, such as {MAX_KL}")
    if not can_be_suggested(vector):
        raise StrengthError(
            f"{vector.method}: neutral texts tell no strength for it (a gate, or strengths that mean a share or an "
            "angle); give one, or let `steerkit calibrate` choose"
        )
    setup = (
        Setup(model, tokenizer, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs)
        .half(0)
        .first_neutral(texts)
    )
    plain = replace(vector, unit="paper", suggested_strength=None, strength=None, own_unit=False)
    method = method_of(vector)
    # A factor may be any; an angle or a share ends where the method's ladder does.
    furthest = max(method.ladder) * (_FURTHEST if method.strength_unit == "factor" else 1.0)
    costs = _Costs(setup, plain, furthest)
    found = costs.reaching(max_kl, _first_strength(plain))
    limit = costs.reaching(max(LIMIT_KL, max_kl), found.strength)
    return replace(
        plain,
        suggested_strength=found.strength,
        strength=vector.strength,
        calibration={
            "by": "suggest_strength",
            "confirmed": False,
            "kl": found.kl,
            "max_kl": max_kl,
            "limit": limit.strength,
            "texts": len(setup.calm),
        },
    )


def with_suggestion(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    *,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> SteeringVector:
    """The vector with a suggested strength, where it has none and one can be found; else as it is, and that is said.

    Args:
        model: the model it was fitted on.
        tokenizer: its tokenizer.
        vector: the vector.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
    """
    if vector.suggested_strength is not None or not can_be_suggested(vector):
        return vector
    try:
        return suggest_strength(
            model, tokenizer, vector, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
        )
    except StrengthError as error:
        logger.warning("no strength is suggested: %s", error)
        return vector


@dataclass(frozen=True)
class _Point:
    """A strength and what it costs."""

    strength: float
    kl: float


def _first_strength(vector: SteeringVector) -> float:
    """Where to begin: a tenth of the spread where the method's edit has a length, else the method's weakest."""
    method = method_of(vector)
    for site in vector.sites:
        length, typical = method.length(vector.params(site)), vector.typical(site)
        if length and typical:
            return 0.1 * typical / length
    return method.ladder[0]


class _Costs:
    """What a vector costs by strength, measured as far as asked.

    Args:
        setup: the neutral texts.
        vector: the vector.
        furthest: no strength above it is tried.
    """

    def __init__(self, setup: Setup, vector: SteeringVector, furthest: float) -> None:
        self._setup, self._vector, self._furthest = setup, vector, furthest
        self._points: list[_Point] = []

    def reaching(self, max_kl: float, first: float) -> _Point:
        """The strongest strength found that stays inside a budget.

        Args:
            max_kl: the budget, nats per token.
            first: where to begin.

        Raises:
            StrengthError: none comes near the budget, or none stays inside it.
        """
        strength, inside = first, None
        for _ in range(_PASSES):
            strength = float(f"{min(strength, self._furthest):.3g}")  # what a file holds should be readable
            if strength not in {point.strength for point in self._points}:
                self._points.append(_Point(strength, self._kl(strength)))
            # What lies beyond a strength that is too costly is not trusted, however little it costs.
            self._points.sort(key=lambda point: point.strength)
            outside = next((point for point in self._points if not point.kl <= max_kl), None)
            inside = next(
                (one for one in reversed(self._points) if outside is None or one.strength < outside.strength), None
            )
            if inside is not None and (inside.kl >= _CLOSE * max_kl or inside.strength >= self._furthest):
                break
            strength = _next(inside, outside, max_kl)
        if inside is None or inside.kl < 0.1 * max_kl:
            tried = inside or self._points[0]
            raise StrengthError(
                f"no strength with a KL divergence near {max_kl:g} was found: {tried.strength:g} gives {tried.kl:.3g}; "
                "give a strength, or let `steerkit calibrate` choose"
            )
        return inside

    def _kl(self, strength: float) -> float:
        """The KL divergence at a strength, nats per answer token; infinite where the logits are not finite."""
        total, tokens = 0.0, 0
        texts, plain = calm_pairs(self._setup)
        for kl in self._setup.trial(self._vector, strength).over_answers(texts, answer_kl, beside=plain):
            total, tokens = total + float(kl.sum()), tokens + len(kl)
        return total / tokens if math.isfinite(total) else math.inf


def _next(inside: _Point | None, outside: _Point | None, max_kl: float) -> float:
    """The strength to try next: on the line between the logarithms, or where a square root leads."""
    aim = math.log(0.95 * max_kl)
    if inside is None or outside is None:
        only = inside or outside
        assert only is not None
        steps = 0.5 * (aim - math.log(max(only.kl, 1e-12))) if math.isfinite(only.kl) else -1.0
        return only.strength * math.exp(min(max(steps, -2.0), 2.0))
    low, high = math.log(inside.strength), math.log(outside.strength)
    if not math.isfinite(outside.kl):
        return math.exp((low + high) / 2)
    below, above = math.log(max(inside.kl, 1e-12)), math.log(outside.kl)
    share = min(max((aim - below) / (above - below), 0.1), 0.9)
    return math.exp(low + share * (high - low))
