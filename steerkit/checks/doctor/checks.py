"""A self-test on the user's own model: does steering hold here what it promises?

from steerkit.checks.doctor import doctor
assert all(finding.passed for finding in doctor(model, tokenizer))

Nothing is fitted: a random direction, half as long as a typical activation, is added after a middle block. Each check
is one identity, such as cached = uncached. Where rounding makes the baseline model itself miss it, the steered gap is
judged beside the unsteered one, so that no model is called broken for its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from steerkit.checks.doctor.case import Case
from steerkit.checks.doctor.cost_checks import compile, speed
from steerkit.checks.doctor.decoding_checks import beams, cache, pads, rows
from steerkit.checks.doctor.given_checks import pairs, sink
from steerkit.checks.doctor.judging import Broken, one_line
from steerkit.checks.doctor.pass_checks import changes, neutral, removal, runs, sites
from steerkit.checks.fitted_method import Finding
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.steering.strengths import vectors_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["CHECKS", "checks_of", "doctor"]


def doctor(
    model: nn.Module,
    tokenizer: Any,
    *,
    data: ContrastSet | None = None,
    vector: SteeringVector | Sequence[SteeringVector] | None = None,
    strength: float | None = None,
    compiled: bool = False,
    step: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """Check on a model that steering holds what it promises. The model is left as it was.

    Args:
        model: any decoder-only transformers model, wrapped or not. It is checked in evaluation mode.
        tokenizer: its tokenizer.
        data: items, of which a short and a longer one are the texts that the checks read; None takes plain sentences.
            Of pairs of answers it is told which are nearly one thing to the model.
        vector: one of yours, or several: do they break the attention sink? None leaves that out.
        strength: at which it is applied; None takes its own, else the suggested one.
        compiled: let `compile` generate code with the default backend, which takes a minute or more.
        step: called after each check, for a progress bar.

    Returns:
        One finding per check of `checks_of`, in their order. An exception inside a check is a failed check.

    Raises:
        SiteError: no decoder whose blocks can be found.
        VectorMismatchError: the vector is of another model.
    """
    decoder = find_decoder(model)
    # Out of torch.compile and DistributedDataParallel, but not out of peft, which adds something of its own.
    plain = getattr(model, "_orig_mod", model)
    called = plain if hasattr(plain, "generate") else inner_model(model)
    case = Case(called, tokenizer, compiled, decoder, data, vector, strength)
    for one in () if vector is None else vectors_of(vector):
        one.check(called, tokenizer)
    findings = []
    with evaluation_mode(decoder.model):
        for check in checks_of(data, vector):
            findings.append(_finding(check, case))
            step()
    return findings


def checks_of(data: ContrastSet | None, vector: Any) -> tuple[Callable[[Case], str], ...]:
    """The checks that `doctor` runs: those of any model, and those of what it was given besides.

    Args:
        data: items of the user's.
        vector: a vector of the user's, or several; None for none.
    """
    asked = {sink: vector is not None, pairs: data is not None}
    return (*CHECKS, *(check for check, is_asked in asked.items() if is_asked))


def _finding(check: Callable[[Case], str], case: Case) -> Finding:
    try:
        return Finding(check.__name__, True, check(case))
    except Broken as found:
        return Finding(check.__name__, False, str(found))
    except Exception as error:  # noqa: BLE001 - whatever a model raises is the finding
        return Finding(check.__name__, False, one_line(error))


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
