"""One vector at one site: what is prepared for it, and how it writes the tokens of a pass that its scope means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerkit.errors import ScopeError, SiteError, StrengthError
from steerkit.methods._base import Method
from steerkit.methods._protocols import LayerInput, NeedsPrompt, Params
from steerkit.methods._registry import default_strength
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.steering.compiled import CompiledStrength
from steerkit.steering.replay import GatePlan, refuse_compiled
from steerkit.steering.strengths import strength_value
from steerkit.tokens.clock import PassClock
from steerkit.tokens.forward_pass import Pass, Tokens
from steerkit.tokens.scope import PromptLengths, Scope
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.steering.strengths import Strength

__all__ = ["Edit", "GuidedEdit", "RowStrengths", "norm_factor"]


class RowStrengths:
    """The strength of one vector: given with `steer`, on the vector, or suggested by its file."""

    def __init__(self, vector: SteeringVector, strength: Strength | None, unit: str | None) -> None:
        self.fixed = vector.strength is not None
        given = vector.strength if self.fixed else strength
        if given is None:
            if unit not in (None, vector.unit) and not vector.own_unit and vector.suggested_strength is not None:
                raise StrengthError(
                    f"unit '{unit}': the suggested strength {vector.suggested_strength:g} counts in unit "
                    f"'{vector.unit}'; give a strength too"
                )
            given = default_strength(vector)
        self.value = strength_value(given)


@dataclass(eq=False)
class Edit:
    """One vector at one site.

    Attributes:
        method: applies the vector.
        params: the vector's tensors at the site.
        tap: the module that is hooked, and which of its values is changed.
        scope: which tokens are written.
        dose: the strength, shared by all sites of the vector.
        factor: what the strength is multiplied with to be in the method's own unit.
        lengths: prompt tokens of each row, where the caller told them.
        block: the block that the site lies inside of; None at the residual stream.
        clock: tells which tokens the pass holds; set when attached.
        source: gives the method what the hooked module reads; None where the method does not ask.
    """

    method: Method
    params: Params
    tap: Tap
    scope: Scope
    dose: RowStrengths
    factor: float
    lengths: PromptLengths | None
    block: nn.Module | None
    clock: PassClock | None = None
    source: LayerInput | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._ready: dict[tuple[torch.device, torch.dtype, int], tuple[dict[str, Tensor], Tensor]] = {}
        self._minimum = self.method.minimum_prompt(self.params) if isinstance(self.method, NeedsPrompt) else 0
        self._inert = self._some_inert = self._per_row = False
        self._active: list[bool] | bool = True
        self._compiled: CompiledStrength | None = None

    def refresh(self) -> None:
        """Bring everything prepared to the present strength, in place."""
        self._per_row = isinstance(self.dose.value, tuple)
        rows = self.dose.value if isinstance(self.dose.value, tuple) else (self.dose.value,)
        active = [not self.method.is_neutral(value * self.factor) for value in rows]
        self._inert, self._some_inert = not any(active), not all(active)
        self._active = active if self._per_row else active[0]
        if self.source is not None:
            self.source.refresh()
        for key in list(self._ready):
            device, dtype, batch = key
            old, old_active = self._ready.pop(key)
            if batch not in (0, len(rows)):
                continue  # expanded rows: made again when they come
            new, new_active = self._prepare(device, dtype, None)
            if all(name in new and value.shape == new[name].shape for name, value in old.items()):
                for name, value in new.items():
                    old[name].copy_(value)
                self._ready[key] = (old, old_active.copy_(new_active))
        device, dtype = _guess_place(self.tap.module)
        if not self._ready and device.type != "meta":
            self._ready[device, dtype, len(rows) if self._per_row else 0] = self._prepare(device, dtype, None)
        if self.lengths is not None and device.type != "meta":
            self.lengths.place(device)
        values = [value * self.factor for value in rows]
        if self._compiled is None or not self._compiled.set(values, active):
            self._compiled = CompiledStrength(self.params, values, active, device)

    def __call__(self, h: Tensor, args: tuple[Any, ...] = ()) -> Tensor:
        """Write the tokens of this pass that the scope means; `args` is what the module was called with."""
        # Compiled code may not look at what changes with the strength, or it would be compiled again.
        if not torch.compiler.is_compiling() and self._inert:
            return h
        assert self.clock is not None
        facts = self.clock.now
        if facts is None:
            raise ScopeError(
                f"{self.tap.site}: this module was called on its own, outside a forward pass of its model; "
                "call the model (or its decoder) instead"
            )
        if self.block is not None and self.block.training and getattr(self.block, "gradient_checkpointing", False):
            raise ScopeError(
                f"{self.tap.site}: a site inside a block cannot be steered under gradient checkpointing, whose second "
                "run comes after the pass; steer at resid_pre or resid_post, or switch checkpointing off"
            )
        if facts.suspended:
            return h
        tokens = facts.tokens(self.scope, self.lengths)
        if tokens.nothing:
            return h
        if self._minimum:
            tokens.require_prompt(self._minimum)
        read = None if self.source is None else self.source(args[0])
        if self.tap.flat:  # OPT runs its MLP on rows and tokens in one dimension
            shape = facts.batch, facts.width, -1
            read = None if read is None else read.reshape(shape)
            return self._write(h.reshape(shape), read, facts, tokens).reshape(h.shape)
        if h.shape[:-1] != (facts.batch, facts.width):  # no mask is laid over anything else
            raise SiteError(
                f"{self.tap.site}: {list(h.shape)} came from {self.tap.name} in a pass of {facts.batch} rows and "
                f"{facts.width} tokens; steerkit writes [b, t, d]"
            )
        return self._write(h, read, facts, tokens)

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens) -> Tensor:
        is_compiling = torch.compiler.is_compiling()
        prepared, active = self._compilable(h, facts) if is_compiling else self._prepared(h, facts)
        if read is not None:
            prepared = {**prepared, "input": read}
        edited = self.method.edit(h, prepared, tokens)
        if edited.dtype != h.dtype:
            edited = edited.to(h.dtype)
        written = tokens.mask
        if is_compiling or self._some_inert:
            written = active if written is None else written & active
        return edited if written is None else torch.where(written, edited, h)

    @property
    def is_inert(self) -> bool:
        """Whether every row is at its neutral strength."""
        return self._inert

    def _prepared(self, h: Tensor, facts: Pass) -> tuple[dict[str, Tensor], Tensor]:
        """What `prepare` gave for this pass: made once per device, dtype and number of rows."""
        if self._per_row and facts.rows is not None:
            return self._prepare(h.device, h.dtype, facts)
        key = (h.device, h.dtype, h.shape[0] if self._per_row else 0)
        found = self._ready.get(key)
        if found is None:
            found = self._ready[key] = self._prepare(h.device, h.dtype, facts)
        return found

    def _compilable(self, h: Tensor, facts: Pass) -> tuple[dict[str, Tensor], Tensor]:
        """The same as part of compiled code, which is then right for any strength."""
        assert self._compiled is not None
        value, active = self._compiled.of_rows(facts, h.device)
        params = {name: param.to(h.device) for name, param in self._compiled.params.items()}
        return self.method.prepare(params, value, h.dtype, h.device), active

    def _prepare(
        self, device: torch.device, dtype: torch.dtype, facts: Pass | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        # Not under inference_mode or autograd of whoever happens to run the first pass.
        with torch.inference_mode(mode=False), torch.no_grad():
            value = torch.tensor(self.dose.value, dtype=torch.float32, device=device) * self.factor
            active = torch.tensor(self._active, device=device, dtype=torch.bool)
            if value.dim() == 1:
                if facts is not None:
                    value, active = facts.expand(value, "strength"), facts.expand(active, "strength")
                value, active = value[:, None, None], active[:, None, None]
            return self.method.prepare(self.params, value, dtype, device), active


@dataclass(eq=False)
class GuidedEdit(Edit):
    """One gated vector at one site."""

    guide: GatePlan = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.siblings: list[Edit] = [self]

    def refresh(self) -> None:
        """Bring everything prepared to the present strength, and stop reading where nothing would be written."""
        super().refresh()
        self.guide.inert = all(edit.is_inert for edit in self.siblings)
        rows = self.dose.value if isinstance(self.dose.value, tuple) else ()
        active = tuple(any(not self.method.is_neutral(value * edit.factor) for edit in self.siblings) for value in rows)
        self.guide.active = None if all(active) else active

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens) -> Tensor:
        refuse_compiled()
        guide = self.guide
        if guide in facts.held:
            return h
        prepared, active = self._prepared(h, facts)
        edited = guide.editor.write(self.tap.site, h, prepared, tokens, guide.state(facts))
        if edited is h:
            return h
        written = tokens.mask
        if self._some_inert:
            written = active if written is None else written & active
        edited = edited.to(h.dtype)
        return edited if written is None else torch.where(written, edited, h)


def norm_factor(method: Method, vector: SteeringVector, site: Site, params: Params) -> float:
    """What one typical activation norm at the site is in the method's own strength.

    Args:
        method: the vector's method.
        vector: the vector, whose file holds the norms.
        site: where it is applied.
        params: the tensors of that site, of any shape.

    Raises:
        StrengthError: the method's edit has no length, or the file holds no norm for the site.
    """
    length, norm = method.length(params), vector.typical(site)
    if not length:
        raise StrengthError(
            f"{method.name}: unit 'norm' needs an edit with a length, which this one has not; use 'paper'"
        )
    if norm is None or not math.isfinite(norm):
        raise StrengthError(f"{site}: the vector file holds no activation norm, so unit 'norm' is unknown; use 'paper'")
    return norm / length


def _guess_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the module runs and in which dtype, as far as its parameters tell; the first pass knows for certain."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    floats = (entry for entry in module.parameters() if entry.is_floating_point())
    first = next(floats, None)
    if first is None:
        return torch.device("meta"), torch.float32
    return torch.device(first.device if device is None else device), first.dtype
