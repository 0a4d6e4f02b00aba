"""Checks of what steering costs: nothing is compiled anew, and decoding stays fast."""

from __future__ import annotations

import statistics

import torch

from steerkit.checks._bitwise import largest_gap
from steerkit.checks.doctor.case import Case
from steerkit.checks.doctor.compiling import compiled_model, seconds
from steerkit.checks.doctor.decoding_checks import PER_ROW
from steerkit.checks.doctor.judging import hold, why_baseline_fails, worst_of
from steerkit.steering.dispatch import forget_compiled
from steerkit.steering.steering import steer

__all__ = ["compile", "speed"]

SLOWEST = 1.5
PAIRS = 5


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
        forget_compiled(case.decoder.model)
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
