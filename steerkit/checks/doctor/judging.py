"""When a check passes: exact identities, and those that hold up to the model's own rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steerkit.checks._bitwise import bitwise, largest_gap
from steerkit.checks.doctor.case import Case, Given

__all__ = ["Broken", "hold", "judged_rows", "one_line", "unchanged", "why_baseline_fails", "worst_of"]


class Broken(Exception):
    """What a check found wrong."""


def judged_rows(
    case: Case, what: str, measure: Callable[[Given], float], strength: Given, *, may_lack: bool = False
) -> str:
    """Judge an identity that holds up to rounding, beside the same on the baseline model.

    Args:
        case: the model.
        what: what is measured, in words.
        measure: the gap at a strength.
        strength: with which it is measured.
        may_lack: whether models without this feature exist; such a model raises, steered or not.

    Returns:
        The reason to pass: the gap is small, or it is the baseline model's own and small enough for rounding.

    Raises:
        Broken: neither.
    """
    case.rows("left")  # a tokenizer that fails is not what a model may lack
    try:
        steered = measure(strength)
    except Exception:
        why = why_baseline_fails(lambda: measure(None)) if may_lack else None
        if why is None:
            raise
        return f"the model itself cannot do this, unsteered: {why}"
    if steered <= case.tolerance:
        return f"{what}: off by {steered:.1e}, allowed {case.tolerance:.1e}"
    baseline = measure(None)
    # A hundred times what is usual is still arithmetic (recurrent models have two forms of it); more is a mistake.
    if case.tolerance / 3 < baseline <= min(100 * case.tolerance, 0.25) and steered <= 3 * baseline:
        return (
            f"{what}: the model itself differs by {baseline:.1e} unsteered; steering adds nothing to it ({steered:.1e})"
        )
    whose = "the model itself is wrong there" if baseline > case.tolerance else "steering is wrong there"
    raise Broken(f"{what}: off by {steered:.1e} steered and {baseline:.1e} unsteered: {whose}")


def unchanged(case: Case, after: str, found: Tensor, baseline: Tensor) -> str:
    """Judge an identity that holds bitwise, unless the baseline model does not repeat itself to the bit either.

    Args:
        case: the model.
        after: what was done before, in words.
        found: [b, t, v] logits after it.
        baseline: [b, t, v] logits before it.

    Returns:
        The reason to pass.
    """
    if bitwise(found, baseline):
        return "bitwise the baseline model's logits"
    off, own = largest_gap(found, baseline), largest_gap(case.batch(None), baseline)
    hold(
        0 < own <= case.tolerance and off <= 3 * own,
        f"logits differ by {off:.1e} from the baseline model's after {after}; two unsteered passes by {own:.1e}",
    )
    return f"off by {off:.1e}; the model itself differs by {own:.1e} from pass to pass"


def why_baseline_fails(run: Callable[[], object]) -> str | None:
    """What the same raises on the baseline model; None where it runs.

    Args:
        run: what is tried.
    """
    try:
        run()
    except Exception as error:  # noqa: BLE001 - models say in many ways that they lack something
        return one_line(error)
    return None


def hold(condition: bool, reason: str) -> None:
    """Fail a check unless something holds.

    Args:
        condition: what has to hold.
        reason: what was seen where it does not.

    Raises:
        Broken: it does not hold.
    """
    if not condition:
        raise Broken(reason)


def worst_of(*gaps: float) -> float:
    """The largest; nan where one is."""
    return float(torch.tensor(gaps, dtype=torch.float64).max())


def one_line(error: BaseException) -> str:
    """The class and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
