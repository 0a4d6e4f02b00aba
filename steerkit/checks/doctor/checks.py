"""A self-test on the user's own model: does steering hold here what it promises?

from steerkit.doctor import doctor
assert all(finding.passed for finding in doctor(model, tokenizer))

Nothing is fitted: a random direction, half as long as a typical activation, is added after a middle block. Each check
is one identity, such as cached = uncached. Where rounding makes the baseline model itself miss it, the steered gap is
judged beside the unsteered one, so that no model is called broken for its arithmetic.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from steerkit.activations.recording import record
from steerkit.checks.doctor.case import NEW, Case, bitwise, largest_gap
from steerkit.checks.doctor.compiling import compiled_model, seconds
from steerkit.checks.doctor.gaps import batch_gap, beside_plain, plain_of
from steerkit.checks.doctor.hooked import available, flat, hooks_of, raise_error, watched
from steerkit.checks.doctor.judging import Broken, hold, judged_rows, one_line, unchanged, why_baseline_fails, worst_of
from steerkit.checks.fitted_method import Finding
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.network.sites import KINDS
from steerkit.steering.steering import steer

if TYPE_CHECKING:
    from steerkit.checks.doctor.case import Given

__all__ = ["CHECKS", "doctor", "sites"]

"""Length of the direction, in typical activation norms."""
"""Tokens generated."""
"""The same where it is timed."""
PER_ROW = (1.0, -0.7)
SLOWEST = 1.5
PAIRS = 5
"""A strength, one for each row, or None for the baseline model."""


def doctor(
    model: nn.Module,
    tokenizer: Any,
    *,
    compiled: bool = False,
    step: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Check on a model that steering holds what it promises. The model is left as it was.

    Args:
        model: any decoder-only transformers model, wrapped or not. It is checked in evaluation mode.
        tokenizer: its tokenizer.
        compiled: let `compile` generate code with the default backend, which takes a minute or more.
        step: called after each check, for a progress bar.

    Returns:
        One finding per check of `CHECKS`, in their order. An exception inside a check is a failed check.

    Raises:
        SiteError: no decoder whose blocks can be found.
    """
    decoder = find_decoder(model)
    # Out of torch.compile and DistributedDataParallel, but not out of peft, which adds something of its own.
    plain = getattr(model, "_orig_mod", model)
    case = Case(plain if hasattr(plain, "generate") else inner_model(model), tokenizer, compiled, decoder)
    findings = []
    with evaluation_mode(decoder.model):
        for check in CHECKS:
            findings.append(_finding(check, case))
            step()
    return findings


def _finding(check: Callable[[Case], str], case: Case) -> Finding:
    try:
        return Finding(check.__name__, True, check(case))
    except Broken as found:
        return Finding(check.__name__, False, str(found))
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the finding
        return Finding(check.__name__, False, one_line(error))


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
    vector = case.random_vector(list(taps), lengths, scope="all")
    with steer(case.model, vector, 1.0):
        before, after = watched(case, taps, text.ids)
    for site in taps:
        hold(site in before and site in after, f"{site}: a hook on {taps[site].name} is not called while steered")
        added = vector.params(site)["direction"].to(before[site])
        hold(
            torch.equal(after[site], before[site] + added), f"{site}: what flows on is not what was there plus the edit"
        )
    kinds = sorted({site.kind for site in taps}, key=KINDS.index)
    absent = "".join(f"; no {kind} ({reason})" for kind, reason in missing.items())
    return f"{', '.join(kinds)} at blocks {', '.join(map(str, layers))}{absent}"


def changes(case: Case) -> str:
    """Steering changes the logits, and with scope `response` nothing before the last prompt token."""
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
    hold(leak <= case.tolerance, f"tokens before the scope change by {leak:.1e}; allowed {case.tolerance:.1e}")
    return f"by {change:.2g} of the largest logit; before the scope by {leak:.1g}"


def neutral(case: Case) -> str:
    """At strength 0 the logits are bitwise those of the baseline model."""
    baseline = case.batch(None)
    return unchanged(case, "strength 0", case.batch(0.0), baseline)


def removal(case: Case) -> str:
    """After a context, and after an error in a pass inside one, logits, hooks and state dict are the baseline model's."""
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


def cache(case: Case) -> str:
    """Greedy decoding of a left-padded batch, with and without a cache, equals one plain pass over what it produced.

    The plain pass has each row alone and without pads. Both being equal to it, the tokens can part only at a tie.
    """

    def measure(strength: Given) -> float:
        worst = 0.0
        for use_cache in (True, False):
            out = case.generate(strength, use_cache=use_cache, output_logits=True)
            worst = worst_of(worst, *(largest_gap(*pair) for pair in beside_plain(case, out, strength)))
        return worst

    return judged_rows(case, f"{NEW} tokens with and without a cache", measure, 1.0, may_lack=True)


def pads(case: Case) -> str:
    """A text in a batch padded at the left or the right gets the logits that it gets alone."""

    def measure(strength: Given) -> float:
        sides: tuple[Literal["left", "right"], ...] = ("left", "right")
        return worst_of(0.0, *(batch_gap(case, side, strength) for side in sides))

    return judged_rows(case, "pads at the left and the right", measure, 1.0)


def rows(case: Case) -> str:
    """With a strength for each row, a row in a padded batch gets what it gets alone with its own."""
    return judged_rows(case, "one strength per row", lambda strength: batch_gap(case, "left", strength), PER_ROW)


def beams(case: Case) -> str:
    """The scores of beam search, with a strength for each row, are those of a plain pass over each sequence."""

    def measure(strength: Given) -> float:
        out = case.generate(
            strength, num_beams=2, num_return_sequences=2, length_penalty=0.0, output_scores=True, use_cache=True
        )
        worst = 0.0
        for score, (answer, behind) in zip(out.sequences_scores, plain_of(case, out, strength), strict=True):
            chosen = torch.log_softmax(behind.float(), dim=-1).gather(-1, answer[:, None])
            # Log-probabilities near 0 have no size of their own; what rounding moves is the logits.
            size = behind.float().abs().max() * len(answer)
            worst = worst_of(worst, float((score.float() - chosen.sum()).abs() / size))
        return worst

    return judged_rows(case, "2 beams of 2 rows", measure, PER_ROW, may_lack=True)


def compile(case: Case) -> str:
    """The steered forward pass traces into one graph, agrees with eager, and a changed strength compiles nothing.

    Unless `compiled` was asked for, the backend generates no code, so only tracing is tried. Compiled code of this
    process is forgotten afterwards.
    """
    ids, prompt = case.texts[1].ids, case.prompts[1]
    strengths = PER_ROW
    expected = [case.alone(ids, prompt, strength) for strength in strengths]
    gaps, counts = [], []
    try:
        run, graphs = compiled_model(case)
        with steer(case.model, case.vector, 1.0, prompt_lengths=[prompt]) as steering:
            # An eager pass first: what it makes and keeps, such as lengths as a tensor, is a reason to compile anew.
            case.logits(*case.row(ids), None)
            for strength, logits in zip(strengths, expected, strict=True):
                steering.strength = strength
                gaps.append(largest_gap(run(), logits))
                counts.append(len(graphs))
    except Exception as error:
        why = why_baseline_fails(lambda: compiled_model(case)[0]())
        if why is None:
            raise
        return f"the model itself does not compile in one graph: {why} ({type(error).__name__} steered)"
    finally:
        torch._dynamo.reset()
    worst = worst_of(0.0, *gaps)
    hold(counts[0] > 0, "the model ran without being compiled")
    hold(counts[-1] == counts[0], f"a changed strength compiled {counts[-1] - counts[0]} times anew")
    hold(worst <= case.tolerance, f"compiled, the steered logits are off by {worst:.1e}; allowed {case.tolerance:.1e}")
    return f"one graph, off by {worst:.1e}; a changed strength compiles nothing"


def speed(case: Case) -> str:
    """Steered decoding takes at most 1.5 times as long as unsteered.

    One addition is nothing beside a block's matrix products, and a hook costs microseconds of Python: measured, 1.01 to
    1.04 on 30 hooked blocks of a 135M model. Beyond 1.5 something else is wrong, such as tensors moved between devices
    or code compiled anew in every pass. Interleaved pairs and their median leave other load on the machine out; where
    it is over the limit nonetheless, as many pairs again are run.
    """
    for strength in (None, 1.0):
        seconds(case, strength)
    ratios: list[float] = []
    while len(ratios) < PAIRS or (statistics.median(ratios) > SLOWEST and len(ratios) < 3 * PAIRS):
        baseline = seconds(case, None)
        ratios.append(seconds(case, 1.0) / baseline)
    ratio = statistics.median(ratios)
    hold(ratio <= SLOWEST, f"steered decoding takes {ratio:.2f} times as long as unsteered; allowed {SLOWEST}")
    return f"steered decoding takes {ratio:.2f} times as long (median of {len(ratios)} pairs)"


CHECKS: tuple[Callable[[Case], str], ...] = (
    runs,
    sites,
    changes,
    neutral,
    removal,
    cache,
    pads,
    rows,
    beams,
    compile,
    speed,
)
