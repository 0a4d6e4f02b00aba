"""Conformance: what every method has to hold, run on any model. Shipped, so that outside methods can run it too.

from steerkit.checks import conformance
assert all(finding.passed for finding in conformance(MyMethod(), model, tokenizer, data))
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from steerkit.checks._bitwise import bitwise, hooks_of, largest_gap, raise_error
from steerkit.checks.fitted_method import TEXTS, Finding, FittedMethod
from steerkit.errors import SteerError
from steerkit.fitting.fitting import fit
from steerkit.fitting.held_out import separation
from steerkit.methods._base import Method
from steerkit.methods._protocols import ReadsInput, read_direction
from steerkit.prompts.batching import pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.steering.steering import steer
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["CHECKS", "conformance"]

TOLERANCE = 1e-5


def conformance(
    method: Method, model: nn.Module, tokenizer: Any, data: ContrastSet, *, strength: float = 1.0
) -> list[Finding]:
    """Fit a method and run every check on it.

    Args:
        method: the method with its settings.
        model: a decoder-only transformers model; a tiny random one will do.
        tokenizer: its tokenizer.
        data: what the method is fitted on.
        strength: one that changes the logits.

    Returns:
        One finding per check; a method passes when all have passed.
    """
    vector = fit(model, tokenizer, data, method=method)
    subject = FittedMethod(method, model, tokenizer, data, vector, strength)
    findings = []
    for check in CHECKS:
        try:
            reason = check(subject) or ""
            findings.append(Finding(check.__name__, True, reason))
        except (AssertionError, SteerError) as error:
            findings.append(Finding(check.__name__, False, f"{type(error).__name__}: {error}"))
    return findings


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
    tokens = facts.tokens(Scope.parse(subject.vector.scope))
    generator = torch.Generator().manual_seed(0)
    site = subject.vector.sites[0]
    params = subject.vector.params(site)
    width = subject.vector.widths.get(site, subject.vector.hidden_size)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h = torch.randn(2, 6, width, generator=generator, dtype=torch.float32).to(dtype)
        before = h.clone()
        prepared = subject.method.prepare(params, torch.tensor(subject.strength, dtype=torch.float32), dtype, h.device)
        if isinstance(subject.method, ReadsInput):
            source = subject.method.inputs_at(subject.model, subject.vector)[site]
            prepared["input"] = torch.randn(2, 6, source.width, generator=generator, dtype=torch.float32).to(dtype)
        after = subject.method.edit(h, prepared, tokens)
        _hold(after.shape == h.shape, f"shape {tuple(h.shape)} became {tuple(after.shape)}")
        _hold(torch.equal(before, h), "the input was changed in place")
        _hold(bool(torch.isfinite(after.float()).all()), f"not finite in {dtype}")
    ids, mask = subject.rows()
    model = copy.deepcopy(subject.model).to(torch.bfloat16)
    other = replace(subject, model=model)
    found, baseline = other.logits(ids, mask, subject.vector), other.logits(ids, mask, None)
    _hold(found.dtype == baseline.dtype, f"logits became {found.dtype} on a model of {baseline.dtype}")
    _hold(bool(torch.isfinite(found.float()).all()), "logits are not finite in bfloat16")


def neutral_strength_is_the_identity(subject: FittedMethod) -> str | None:
    """At the neutral strength, for the batch or for a row, logits are bitwise those of the baseline model."""
    neutral = subject.method.neutral
    if neutral is None:
        return "declares no neutral strength"
    ids, mask = subject.rows()
    baseline = subject.logits(ids, mask, None)
    _hold(bitwise(subject.logits(ids, mask, subject.vector, neutral), baseline), "one neutral number is not")
    mixed = subject.logits(ids, mask, subject.vector, [neutral, subject.strength, neutral])
    _hold(bitwise(mixed[[0, 2]], baseline[[0, 2]]), "neutral rows beside another are not")
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
    neutral_strength_is_the_identity,
    rows_are_independent,
    cached_equals_uncached,
    nothing_stays_behind,
    positive_side_lies_further_along,
)


def _hold(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
