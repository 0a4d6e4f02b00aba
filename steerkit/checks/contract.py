"""Conformance: what every method has to hold, run on any model. Shipped, so that outside methods can run it too.

from steerkit.checks import conformance
assert all(finding.passed for finding in conformance(MyMethod(), model, tokenizer, data))
"""

from __future__ import annotations

import contextlib
import copy
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.checks._bitwise import bitwise, hooks_of, largest_gap, raise_error
from steerkit.checks.fitted_method import TEXTS, Finding, FittedMethod
from steerkit.errors import FitError, SteerError
from steerkit.fitting.fitting import fit
from steerkit.fitting.held_out import separation
from steerkit.methods._authoring import class_problem
from steerkit.methods._base import Method
from steerkit.methods._protocols import NeedsPrompt, read_direction
from steerkit.methods._registry import registration_problem
from steerkit.network.decoder import find_decoder
from steerkit.network.tap import routes_tokens
from steerkit.prompts.batching import pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Prompt
from steerkit.steering.steering import steer
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import WINDOWS, PromptLengths, Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["CHECKS", "conformance"]

TOLERANCE = 1e-5


def conformance(
    method: Method, model: nn.Module, tokenizer: Any, data: ContrastSet | Sequence[Prompt], *, strength: float = 1.0
) -> list[Finding]:
    """Fit a method and run every check on it.

    What comes first is whether it can be checked at all: it is registered, it can be fitted, and its `edit` gives
    activations. Where one of these fails, the others are not run.

    Args:
        method: the method with its settings, or its class.
        model: a decoder-only transformers model; a tiny random one will do.
        tokenizer: its tokenizer.
        data: what the method is fitted on, see `steerkit.fit`.
        strength: one that changes the logits.

    Returns:
        One finding per check; a method passes when all have passed.
    """
    kind: Any = method if isinstance(method, type) else type(method)
    found = partial(run_check, getattr(sys.modules.get(kind.__module__), "__file__", None))
    usable = found("can_be_used", lambda: can_be_used(kind))
    if not usable.passed:
        return [usable]
    made: Method = method() if isinstance(method, type) else method
    vectors: list[SteeringVector] = []
    fitted = found("can_be_fitted", lambda: vectors.append(fit(model, tokenizer, data, method=made)))
    if not fitted.passed:
        return [usable, fitted]
    subject = FittedMethod(made, model, tokenizer, data, vectors[0], strength)
    edited = found("edit_gives_activations", lambda: edit_gives_activations(subject))
    checks = CHECKS if edited.passed else ()
    return [usable, fitted, edited, *(found(check.__name__, partial(check, subject)) for check in checks)]


def can_be_used(kind: type[Method]) -> None:
    """The class has what every method has, and is the one that answers to its name.

    Args:
        kind: the method's class.

    Raises:
        FitError: with what to write.
    """
    if not issubclass(kind, Method):
        raise FitError(f"got {kind.__name__}; give a method, such as CAA(), or its class")
    problem = class_problem(kind)
    problem = f"{kind.__name__} {problem}" if problem else registration_problem(kind)
    if problem:
        raise FitError(problem)


def edit_gives_activations(subject: FittedMethod) -> None:
    """`prepare` gives tensors by name, and `edit` a float tensor of the shape it got."""
    facts = Pass(batch=2, width=6, past=0, device=torch.device("cpu"), boundary=5)
    h, after, _ = subject.edited(facts, Scope.parse(subject.vector.scope), torch.float32)
    _hold(isinstance(after, Tensor), f"`edit` gave {type(after).__name__}, a tensor [b, t, d] is allowed; return it")
    _hold(after.shape == h.shape, f"`edit` made {list(after.shape)} of {list(h.shape)}; give the shape that it got")
    _hold(after.is_floating_point(), f"`edit` gave {after.dtype} for {h.dtype}; give floats")


def same_data_same_tensors(subject: FittedMethod) -> None:
    """Fitting twice gives the same tensors, bitwise."""
    again = fit(subject.model, subject.tokenizer, subject.data, method=subject.method)
    _hold(again.tensors.keys() == subject.vector.tensors.keys(), "other tensors the second time")
    for name, tensor in subject.vector.tensors.items():
        _hold(torch.equal(tensor, again.tensors[name]), f"{name} differs")


def fitted_tensors_are_finite(subject: FittedMethod) -> None:
    """Nothing stored is infinite or nan."""
    for name, tensor in subject.vector.tensors.items():
        _hold(bool(torch.isfinite(tensor).all()), f"{name} is not finite")


def survives_the_file(subject: FittedMethod) -> None:
    """Saved and loaded, the vector steers bitwise the same."""
    loaded = SteeringVector.from_bytes(subject.vector.to_bytes())
    ids, mask = subject.rows()
    _hold(
        torch.equal(subject.logits(ids, mask, loaded), subject.logits(ids, mask, subject.vector)),
        "the loaded one differs",
    )


def steering_changes_the_logits(subject: FittedMethod) -> None:
    """A steer that does nothing fails."""
    ids, mask = subject.rows()
    _hold(
        largest_gap(subject.logits(ids, mask, subject.vector), subject.logits(ids, mask, None)) > 1e-4,
        "nothing changed",
    )


def keeps_shape_and_dtype_and_input(subject: FittedMethod) -> None:
    """`edit` gives the shape it got, `steer` the dtype, and the input is not touched."""
    facts = Pass(batch=2, width=6, past=0, device=torch.device("cpu"), boundary=5)
    scope = Scope.parse(subject.vector.scope)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h, after, before = subject.edited(facts, scope, dtype)
        _hold(torch.equal(before, h), "the input was changed in place")
        _hold(bool(torch.isfinite(after.float()).all()), f"not finite in {dtype}")
    ids, mask = subject.rows()
    model = copy.deepcopy(subject.model).to(torch.bfloat16)
    other = replace(subject, model=model)
    found, baseline = other.logits(ids, mask, subject.vector), other.logits(ids, mask, None)
    _hold(found.dtype == baseline.dtype, f"logits became {found.dtype} on a model of {baseline.dtype}")
    _hold(bool(torch.isfinite(found.float()).all()), "logits are not finite in bfloat16")


def a_window_is_all_that_is_written(subject: FittedMethod) -> str | None:
    """Under `front`, `mid` and `back` no token outside the window is changed, and its length is known.

    Raises:
        AssertionError: the method does not say how long its window is.
    """
    kinds = [kind for kind in WINDOWS if kind in subject.method.scopes]
    if not kinds:
        return "writes no window of the prompt"
    if not isinstance(subject.method, NeedsPrompt):
        raise AssertionError(
            f"scope '{kinds[0]}' needs prompts as long as the window, and nothing says how long that is: write "
            "`def minimum_prompt(self, params: Params) -> int`"
        )
    window = subject.method.minimum_prompt(subject.vector.params(subject.vector.sites[0]))
    prompt = window + 4
    lengths = PromptLengths(prompt)
    facts = Pass(batch=2, width=prompt + 3, past=0, device=torch.device("cpu"))
    for kind in kinds:
        scope = Scope.parse(kind)
        _, after, before = subject.edited(facts, scope, torch.float32, lengths)
        start = {"front": 0, "mid": prompt // 2 - window // 2, "back": prompt - window}[kind]
        moved = (after != before).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
        outside = [place for place in moved if not start <= place < start + window]
        _hold(
            not outside,
            f"scope '{kind}', a prompt of {prompt} tokens: `edit` changed tokens {outside}, its window is {start} to "
            f"{start + window - 1}; use tokens.position and tokens.prompt_length",
        )
    return None


def neutral_strength_is_the_identity(subject: FittedMethod) -> str | None:
    """At the neutral strength, for the batch or for a row, logits are bitwise those of the baseline model.

    An expert of a routed model multiplies the tokens of all rows in one product, and how that rounds depends on how
    many they are. A row beside one that is routed otherwise is then the baseline's up to this rounding.
    """
    neutral = subject.method.neutral_strength
    if neutral is None:
        return "declares no neutral strength"
    ids, mask = subject.rows()
    baseline = subject.logits(ids, mask, None)
    _hold(bitwise(subject.logits(ids, mask, subject.vector, neutral), baseline), "one neutral number is not")
    mixed = subject.logits(ids, mask, subject.vector, [neutral, subject.strength, neutral])
    rows, expected = mixed[[0, 2]], baseline[[0, 2]]
    same = bitwise(rows, expected) or (
        largest_gap(rows, expected) < TOLERANCE and routes_tokens(find_decoder(subject.model))
    )
    _hold(same, "neutral rows beside another are not")
    return None


def rows_are_independent(subject: FittedMethod) -> None:
    """A text in a padded batch (left or right), with its own strength, gets what it gets alone."""
    expected = subject.alone(subject.vector)
    for side in ("right", "left"):
        ids, mask = subject.rows(side)
        for strength in (subject.strength, [subject.strength] * len(TEXTS)):
            found = subject.logits(ids, mask, subject.vector, strength)
            for row, single in enumerate(expected):
                real = found[row][mask[row].bool()]
                _hold(
                    largest_gap(real, single) < TOLERANCE,
                    f"row {row}, pads at the {side}: off by {largest_gap(real, single):.1e}",
                )


def cached_equals_uncached(subject: FittedMethod) -> None:
    """Greedy tokens and their logits are the same with and without a cache."""
    ids, mask = subject.rows("left")
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": pad_token_id(subject.tokenizer),
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found = []
    for use_cache in (True, False):
        with steer(subject.model, subject.vector, subject.strength), torch.no_grad():
            out = subject.model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **options)  # type: ignore[operator]
        found.append((out.sequences, torch.stack(out.logits)))
    _hold(torch.equal(found[0][0], found[1][0]), "other tokens without a cache")
    _hold(largest_gap(found[0][1], found[1][1]) < TOLERANCE, "other logits without a cache")


def nothing_stays_behind(subject: FittedMethod) -> None:
    """After the context, and after an error inside it, logits are bitwise the baseline model's and no hook is left."""
    ids, mask = subject.rows()
    baseline = subject.logits(ids, mask, None)
    hooks = hooks_of(subject.model)
    subject.logits(ids, mask, subject.vector)
    _hold(hooks_of(subject.model) == hooks, "a hook stayed after the context")
    with contextlib.suppress(ZeroDivisionError), steer(subject.model, subject.vector, subject.strength):
        raise_error()
    _hold(hooks_of(subject.model) == hooks, "a hook stayed after an error")
    _hold(bitwise(subject.logits(ids, mask, None), baseline), "the baseline model changed")


def positive_side_lies_further_along(subject: FittedMethod) -> str | None:
    """Where there is one direction, the positive items lie further along it than the negative ones."""
    if (
        subject.method.readout is None
        or not isinstance(subject.data, ContrastSet)
        or read_direction(subject.method, subject.vector.params(subject.vector.reads[0])) is None
    ):
        return "has no single direction per site"
    measured = separation(subject.model, subject.tokenizer, subject.data, subject.vector)
    for site, figures in measured["sites"].items():
        _hold(figures["auc"] > 0.5, f"{site}: AUC {figures['auc']} on the items it was fitted on")
    return None


CHECKS: tuple[Callable[[FittedMethod], str | None], ...] = (
    same_data_same_tensors,
    fitted_tensors_are_finite,
    survives_the_file,
    steering_changes_the_logits,
    keeps_shape_and_dtype_and_input,
    a_window_is_all_that_is_written,
    neutral_strength_is_the_identity,
    rows_are_independent,
    cached_equals_uncached,
    nothing_stays_behind,
    positive_side_lies_further_along,
)


def run_check(home: str | None, name: str, check: Callable[[], str | None]) -> Finding:
    """Run one check. Whatever goes wrong becomes one line, an error in the method's own file with its place there.

    Args:
        home: the method's file, where it has one.
        name: the check's.
        check: gives a reason where it does not apply.
    """
    try:
        return Finding(name, True, check() or "")
    except (AssertionError, SteerError) as error:
        return Finding(name, False, f"{type(error).__name__}: {error}")
    except Exception as error:  # noqa: BLE001, the author's code may fail in any way
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == home]
        place = f" ({Path(str(home)).name}, line {places[-1]})" if places else ""
        return Finding(name, False, f"{type(error).__name__}: {' '.join(str(error).split()) or 'no text'}{place}")


def _hold(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
