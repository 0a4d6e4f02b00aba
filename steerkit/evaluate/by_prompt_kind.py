"""What a vector does to two kinds of prompts: refusals among the answers, and answers that stay as they were.

    refused   = share of answers that decline at their beginning               (the scorer `refusal`)
    unchanged = share of answers that are word for word those of the unsteered model

For methods that decide by the prompt. One kind should be refused, the other left alone, so the kinds are never mixed;
nor are harmless prompts that only sound alarming mixed with ordinary ones, about which a gate makes its promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.setup import Setup
from steerkit.methods._declining import is_refusal
from steerkit.methods._protocols import SetsOperatingPoint
from steerkit.methods._registry import method_of
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import spread
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Kind", "by_kind", "in_order", "opened_rows", "share_text"]


@dataclass(frozen=True)
class Kind:
    """One kind of prompts, answered without and with steering.

    Attributes:
        side: of the data, ``"positive"`` or ``"negative"``; of negative prompts that are not ordinary, their topic.
        items: prompts of it.
        strength: at which it was answered.
        before: share of refusals of the unsteered model.
        refused: share of refusals under steering.
        unchanged: share of answers that stayed as they were.
    """

    side: str
    items: int
    strength: float
    before: Estimate
    refused: Estimate
    unchanged: Estimate

    def as_json(self) -> dict[str, Any]:
        """Everything, shares as mean, low and high."""
        shares = {name: getattr(self, name) for name in ("before", "refused", "unchanged")}
        return {
            "side": self.side,
            "strength": self.strength,
            "items": self.items,
            **{name: [share.mean, share.low, share.high] for name, share in shares.items()},
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Kind:
        """Read what `as_json` gave.

        Args:
            plain: plain data.
        """
        shares = {name: Estimate(*plain[name]) for name in ("before", "refused", "unchanged")}
        return cls(plain["side"], plain["items"], plain["strength"], **shares)


def by_kind(
    setup: Setup, vector: SteeringVector, strength: float, *, step: Callable[[], None] | None = None
) -> tuple[Kind, ...]:
    """Answer the prompts of both sides without and with a vector.

    Prompts are taken evenly over each side, as many as the setup answers.

    Args:
        setup: with data of two kinds of prompts.
        vector: what to steer with.
        strength: how strongly.
        step: called when a side has been answered.

    Returns:
        The positive side and the negative one, and behind them the kinds of negative prompts that are not ordinary;
        intervals are Wilson's at 95 %.

    Raises:
        DataError: there is no data.
    """
    found = []
    for side, prompts in _kinds(setup, vector).items():
        there = replace(setup, prompts=spread(prompts, setup.texts))
        baseline, steered = there.baseline.texts, there.trial(vector, strength).texts
        shares = (
            [is_refusal(text) for text in baseline],
            [is_refusal(text) for text in steered],
            [before == after for before, after in zip(baseline, steered, strict=True)],
        )
        found.append(Kind(side, len(baseline), strength, *(_share(values) for values in shares)))
        if step is not None:
            step()
    return tuple(found)


def _kinds(setup: Setup, vector: SteeringVector) -> dict[str, Sequence[Conversation]]:
    """The prompts of the data, kind by kind."""
    positive, negative = (setup.side(side).prompts or () for side in ("positive", "negative"))
    method = method_of(vector)
    if setup.data is None or not isinstance(method, SetsOperatingPoint):
        return {"positive": positive, "negative": negative}
    masks = {kind: mask.tolist() for kind, mask in method.kinds(setup.data).items()}
    found = {kind: [one for one, is_one in zip(negative, mask, strict=True) if is_one] for kind, mask in masks.items()}
    return {"positive": positive, "negative": found.pop("ordinary"), **found}


def opened_rows(vector: SteeringVector) -> list[tuple[str, str]]:
    """What a gate promises, and how many held-out prompts of each kind opened it, in words.

    Args:
        vector: of a gated method.

    Returns:
        Rows of a table; none where the file says nothing of it.
    """
    rows, promise = [], vector.extra.get("gate")
    if promise:
        rows.append(
            (
                "promise",
                f"at most {100 * promise['max_false_alarm']:g} % of ordinary prompts open it, with "
                f"{100 * promise['confidence']:g} % confidence; it opened for {promise['calibration_alarms']} of "
                f"{promise['calibration_items']} that were kept apart from the fit",
            )
        )
    opened = vector.held_out.get("gate", {}).get("opened", {})
    for kind in in_order(opened):
        name = {"positive": "the positive side"}.get(kind, f"{kind} prompts")
        counts = opened[kind]
        rows.append((f"opened by {name}", f"{share_text(**counts)} % of {counts['of']} held out"))
    return rows


def in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds of prompts as tables show them: what should open a gate, what it promises about, what stands beside.

    Args:
        kinds: their names.
    """
    first = ("positive", "ordinary")
    return sorted(kinds, key=lambda kind: (first.index(kind) if kind in first else len(first), kind))


def share_text(opened: int, of: int) -> str:
    """A share in percent with Wilson's interval.

    Args:
        opened: how many.
        of: of so many.
    """
    found = _share([True] * opened + [False] * (of - opened))
    return f"{100 * found.mean:.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"


def _share(values: Sequence[bool]) -> Estimate:
    return interval(torch.tensor(values, dtype=torch.double), shares=True)
