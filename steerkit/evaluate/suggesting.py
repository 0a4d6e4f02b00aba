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
from dataclasses import replace
from typing import Any

from torch import nn

from steerkit.errors import StrengthError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.kl_search import MAX_KL, KlSearch, check_max_kl
from steerkit.evaluate.scorers._answers import answer_kl, calm_pairs
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.methods._registry import is_gated, method_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["LIMIT_KL", "MAX_KL", "can_be_suggested", "suggest_strength", "with_suggestion"]

logger = logging.getLogger(__name__)

LIMIT_KL = Budget().max_kl
"""What a calibration allows; the file says at which strength it is reached, and whoever steers harder is told."""
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
    check_max_kl(max_kl)
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
    search = KlSearch(
        lambda strength: _kl(setup.trial(plain, strength)),
        furthest,
        advice="give a strength, or let `steerkit calibrate` choose",
    )
    found = search.reaching(max_kl, _first_strength(plain))
    limit = search.reaching(max(LIMIT_KL, max_kl), found.strength)
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


def _first_strength(vector: SteeringVector) -> float:
    """Where to begin: a tenth of the spread where the method's edit has a length, else the method's weakest."""
    method = method_of(vector)
    for site in vector.sites:
        length, typical = method.length(vector.params(site)), vector.typical(site)
        if length and typical:
            return 0.1 * typical / length
    return method.ladder[0]


def _kl(trial: Trial) -> float:
    """The KL divergence on the neutral texts, nats per answer token; infinite where the logits are not finite."""
    total, tokens = 0.0, 0
    texts, plain = calm_pairs(trial.setup)
    for kl in trial.over_answers(texts, answer_kl, beside=plain):
        total, tokens = total + float(kl.sum()), tokens + len(kl)
    return total / tokens if math.isfinite(total) else math.inf
