"""Checks of single passes: what is read, what an edit changes, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib

import torch

from steerkit.activations.recording import record
from steerkit.checks._bitwise import bitwise, hooks_of, largest_gap, raise_error
from steerkit.checks.doctor.case import Case
from steerkit.checks.doctor.hooked import available, flat, watched
from steerkit.checks.doctor.judging import hold, unchanged
from steerkit.network.sites import KINDS
from steerkit.steering.steering import steer

__all__ = ["changes", "neutral", "removal", "runs", "sites"]


def runs(case: Case) -> str:
    """Unsteered, the model runs, its logits are finite, and the same input gives the same logits twice."""
    first, again = case.batch(None), case.batch(None)
    hold(bool(torch.isfinite(first[case.rows("right")[1].bool()]).all()), "the logits are not finite, unsteered")
    off = largest_gap(again, first)
    hold(
        off <= case.tolerance,
        f"the same input gives logits that differ by {off:.1e} the second time, unsteered: it draws at random or "
        "keeps a state",
    )
    return "the same logits twice" if bitwise(again, first) else f"equal passes differ by {off:.1e} by themselves"


def sites(case: Case) -> str:
    """At every kind of site, `record` reads bit for bit what flows there, and an edit adds just its direction to it.

    Read by plain hooks in a full pass, at the first, the middle and the last block. A kind that the model lacks is no
    failure.
    """
    layers = sorted({0, case.site.layer, case.decoder.num_layers - 1})
    taps, missing = available(case.model, layers)
    text = case.texts[1]
    token = len(text.ids) // 2
    recorded = record(case.model, case.tokenizer, [text], taps, readout=token)
    seen, again = (watched(case, taps, text.ids)[0] for _ in range(2))
    for site, tap in taps.items():
        hold(site in seen, f"{site}: a hook on {tap.name} is never called")
        flowing, once_more = (flat(found[site])[token].float().cpu() for found in (seen, again))
        if not torch.equal(recorded[site][0], flowing):
            off, own = largest_gap(recorded[site][0], flowing), largest_gap(once_more, flowing)
            hold(0 < own <= case.tolerance and off <= 3 * own, f"{site}: what is recorded is off by {off:.1e}")
    lengths = {site: 0.1 * (norm or 1.0) for site, norm in recorded.norms.items()}
    # A router has room for the experts that it chose alone, so it cannot give a sum.
    written = [site for site in taps if site.kind != "router"]
    vector = case.random_vector(written, lengths, scope="all")
    with steer(case.model, vector, 1.0):
        before, after = watched(case, taps, text.ids)
    for site in written:
        hold(site in before and site in after, f"{site}: a hook on {taps[site].name} is not called while steered")
        added = vector.params(site)["direction"].to(before[site])
        hold(
            torch.equal(after[site], before[site] + added), f"{site}: what flows on is not what was there plus the edit"
        )
    kinds = sorted({site.kind for site in taps}, key=KINDS.index)
    absent = "".join(f"; no {kind} ({reason})" for kind, reason in missing.items())
    return f"{', '.join(kinds)} at blocks {', '.join(map(str, layers))}{absent}{_massive(case)}"


def _massive(case: Case) -> str:
    """The dimensions that hold most of the squared norm after the middle block, where there are such."""
    held = case.scale.massive if case.scale is not None else {}
    if not held:
        return ""
    listed = ", ".join(f"{place} ({share:.0%} of the squared norm)" for place, share in held.items())
    return f"; massive dimensions at {case.site}: {listed}"


def changes(case: Case) -> str:
    """Steering changes the logits, and with scope `response` nothing before the last prompt token.

    Unless the model itself, which repeats its logits, lets other tokens there change those before as much.
    """
    baseline, steered = case.batch(None), case.batch(1.0)
    reached = torch.zeros_like(case.rows("right")[1], dtype=torch.bool)
    for row, prompt in enumerate(case.prompts):
        reached[row, prompt - 1 : len(case.texts[row].ids)] = True
    before = case.rows("right")[1].bool() & ~reached
    change = largest_gap(steered[reached], baseline[reached])
    hold(
        change > case.tolerance / 4, f"steering changes the logits by no more than {change:.1e}: the edit has no effect"
    )
    leak = largest_gap(steered[before], baseline[before]) if bool(before.any()) else 0.0
    if leak <= case.tolerance:
        return f"by {change:.2g} of the largest logit; before the scope by {leak:.1g}"
    repeats = largest_gap(case.batch(None)[before], baseline[before]) <= case.tolerance
    # Where activations are quantised together, a token's neighbours behind it move its own rounding.
    ids, mask = case.rows("right")
    other = ids.clone()
    other[reached] = ids[reached].roll(1)
    own = largest_gap(case.logits(other, mask, None)[before], baseline[before])
    hold(
        repeats and own > case.tolerance and leak <= 3 * own,
        f"tokens before the scope change by {leak:.1e}; allowed {case.tolerance:.1e}",
    )
    return f"by {change:.2g} of the largest logit; the model itself lets later tokens change earlier ones ({own:.1e})"


def neutral(case: Case) -> str:
    """At strength 0 the logits are bitwise those of the baseline model."""
    baseline = case.batch(None)
    return unchanged(case, "strength 0", case.batch(0.0), baseline)


def removal(case: Case) -> str:
    """After a context, and after an error inside one, logits, hooks and state dict are the baseline model's."""
    baseline, hooks, keys = case.batch(None), hooks_of(case.model), list(case.model.state_dict())
    case.batch(1.0)
    hold(hooks_of(case.model) == hooks, "a hook stayed after the context")
    handle = case.decoder.blocks[-1].register_forward_hook(raise_error)
    try:
        with contextlib.suppress(ZeroDivisionError):
            case.batch(1.0)
    finally:
        handle.remove()
    hold(hooks_of(case.model) == hooks, "a hook stayed after an error inside the context")
    hold(list(case.model.state_dict()) == keys, "the keys of the state dict changed")
    return unchanged(case, "having been steered", case.batch(None), baseline)
