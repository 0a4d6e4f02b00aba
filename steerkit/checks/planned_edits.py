"""Where `steer` would write, on which tokens and how strongly, or why it cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from steerkit.errors import SteerError
from steerkit.methods._registry import default_strength, method_of
from steerkit.network.decoder import Decoder, execution_device
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, locate
from steerkit.steering.steering import steer
from steerkit.steering.strengths import strength_value
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["PlannedEdit", "edits_of", "shape_of"]


@dataclass(frozen=True)
class PlannedEdit:
    """One vector at one site.

    Attributes:
        vector: which of the vectors given, from 1.
        method: its method.
        site: where it is applied.
        module: name of the hooked module inside the transformers model; None where there is none.
        module_class: its class.
        side: whether its input or its output is written.
        shape: of the tensor in the pass over the prompt, [b, t, d] ([b*t, d] where the module has it flat); a decoding
            step has t = 1.
        device: where the module runs.
        dtype: of the tensor.
        scope: which tokens are written.
        paper: the strength in the method's own unit; a list where every row has its own.
        norm: the same in typical activation norms; None where the file knows no norm or the method no length.
        problem: why this cannot be done; None where it can.
    """

    vector: int
    method: str
    site: str
    module: str | None = None
    module_class: str | None = None
    side: str | None = None
    shape: tuple[int, ...] | None = None
    device: str | None = None
    dtype: str | None = None
    scope: str | None = None
    paper: float | tuple[float, ...] | None = None
    norm: float | tuple[float, ...] | None = None
    problem: str | None = None


def edits_of(
    model: nn.Module,
    decoder: Decoder,
    vector: SteeringVector,
    number: int,
    options: dict[str, Any],
    tokenizer: Any,
) -> tuple[list[PlannedEdit], list[str]]:
    """Plan one vector at each of its sites, and say why where that cannot be done."""
    try:
        vector.check(model, tokenizer)
    except SteerError as error:
        return [PlannedEdit(number, vector.method, str(site), problem=str(error)) for site in vector.sites], [
            str(error)
        ]
    try:
        steer(model, vector, **options)
    except SteerError:
        edits = [_edit(model, decoder, vector, number, site, options) for site in vector.sites]
    else:
        taps = locate(model, vector.sites).values()  # all at once: a pass for each would take its time
        edits = [
            _described(decoder, vector, number, site, tap, options)
            for site, tap in zip(vector.sites, taps, strict=True)
        ]
    problems = [edit.problem for edit in edits if edit.problem is not None]
    if all(edit.module is None for edit in edits):
        problems.append(f"vector {number} matches nothing in {type(decoder.model).__name__}; nothing would be written")
    return edits, problems


def _edit(
    model: nn.Module, decoder: Decoder, vector: SteeringVector, number: int, site: Site, options: dict[str, Any]
) -> PlannedEdit:
    """One vector at one site, by itself, with what is wrong there."""
    try:
        tap = next(iter(locate(model, [site]).values()))
    except SteerError as error:
        return PlannedEdit(number, vector.method, str(site), problem=str(error))
    mine = {name: tensor for name, tensor in vector.tensors.items() if name.startswith((f"{site}/", "shared/"))}
    try:
        steer(model, replace(vector, sites=(site,), tensors=mine), **options)
    except SteerError as error:
        place = _placed(decoder, vector, number, site, tap)
        return replace(place, problem=str(error))
    return _described(decoder, vector, number, site, tap, options)


def _placed(decoder: Decoder, vector: SteeringVector, number: int, site: Site, tap: Tap) -> PlannedEdit:
    """Where one vector would write at one site."""
    device, dtype = _place(decoder, tap.module)
    return PlannedEdit(
        vector=number,
        method=vector.method,
        site=str(site),
        module=tap.name,
        module_class=type(tap.module).__name__,
        side=tap.side,
        shape=(-1, tap.width) if tap.flat else (-1, -1, tap.width),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )


def _described(
    decoder: Decoder, vector: SteeringVector, number: int, site: Site, tap: Tap, options: dict[str, Any]
) -> PlannedEdit:
    """The same, with how strongly and on which tokens; `steer` has agreed to it."""
    scope, unit = options["scope"], options["unit"]
    given = vector.strength if vector.strength is not None else options["strength"]
    if vector.hold is not None:
        given = vector.hold.most
    if given is None:
        given = default_strength(vector)
    value = strength_value(given)
    counted = vector.unit if vector.own_unit or unit is None else unit
    length, norm = method_of(vector).length(vector.params(site)), vector.typical(site)
    # One typical norm is `norm / length` of the method's own.
    factor = norm / length if length and norm else None
    paper = value if counted == "paper" else _times(value, factor)
    return replace(
        _placed(decoder, vector, number, site, tap),
        scope=vector.scope if vector.own_scope or scope is None else scope,
        paper=paper,
        norm=value if counted == "norm" else _times(value, None if factor is None else 1 / factor),
    )


def _times(value: float | tuple[float, ...], factor: float | None) -> float | tuple[float, ...] | None:
    """A strength in the method's own unit; None where the model has not been measured."""
    if factor is None:
        return None
    return tuple(row * factor for row in value) if isinstance(value, tuple) else value * factor


def shape_of(edit: PlannedEdit, rows: int, tokens: int) -> tuple[int, ...] | None:
    """The shape with numbers for rows and tokens."""
    if edit.shape is None:
        return None
    return (rows, tokens, edit.shape[-1]) if len(edit.shape) == 3 else (rows * tokens, edit.shape[-1])


def _place(decoder: Decoder, module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a module runs and in which dtype, as far as its parameters tell, else the model's."""
    first = next((entry for entry in module.parameters() if entry.is_floating_point()), None)
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)  # accelerate's
    if device is None:
        known = first is not None and not first.is_meta
        device = first.device if known and first is not None else execution_device(decoder)
    return torch.device(device), decoder.model.dtype if first is None else first.dtype
