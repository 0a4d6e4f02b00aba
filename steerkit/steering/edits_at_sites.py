"""One vector at one site: what is prepared for it, and how it writes the tokens of a pass that its scope means."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
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
from steerkit.steering.holding import HeldStrength
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
        self.fixed = vector.strength is not None or vector.hold is not None
        own = vector.strength if vector.hold is None else vector.hold.most
        given = own if self.fixed else strength
        if given is None:
            if unit not in (None, vector.unit) and not vector.own_unit and vector.suggested_strength is not None:
                raise StrengthError(
                    f"unit '{unit}': the suggested strength {vector.suggested_strength:g} counts in unit "
                    f"'{vector.unit}'; give a strength too"
                )
            given = default_strength(vector)
        self.value = strength_value(given)
        self.fade, self.rows = vector.fade, vector.rows
        self.varies = vector.fade is not None or vector.hold is not None  # from token to token

    def at(self, value: tuple[float, ...], rows: tuple[bool, ...]) -> RowStrengths:
        """The same vector on other rows.

        Args:
            value: one strength per row.
            rows: which of them it acts on.
        """
        other = copy.copy(self)
        other.fixed, other.value, other.rows = True, value, rows
        return other

    def acts_on(self, row: int) -> bool:
        """Whether the vector acts on a row of the batch."""
        return self.rows is None or self.rows[row]


@dataclass(eq=False)
class Edit:
    """One vector at one site.

    Attributes:
        method: applies the vector.
        params: the vector's tensors at the site.
        tap: the module that is hooked, and which of its values is changed.
        scope: which tokens are written.
        row_strengths: the strength, shared by all sites of the vector.
        factor: what the strength is multiplied with to be in the method's own unit.
        lengths: prompt tokens of each row, where the caller told them.
        block: the block that the site lies inside of; None at the residual stream.
        clock: tells which tokens the pass holds; set when attached.
        source: gives the method what the hooked module reads; None where the method does not ask.
        held: finds the strength by a reading; None where it is given.
    """

    method: Method
    params: Params
    tap: Tap
    scope: Scope
    row_strengths: RowStrengths
    factor: float
    lengths: PromptLengths | None
    block: nn.Module | None
    clock: PassClock | None = None
    source: LayerInput | None = field(default=None, kw_only=True)
    held: HeldStrength | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._ready: dict[tuple[torch.device, torch.dtype, int], tuple[dict[str, Tensor], Tensor]] = {}
        self._latest: tuple[Any, Any, int, tuple[dict[str, Tensor], Tensor] | None] = (None, None, 0, None)
        self._minimum = self.method.minimum_prompt(self.params) if isinstance(self.method, NeedsPrompt) else 0
        self._inert = self._some_inert = self._per_row = False
        self._active: list[bool] | bool = True
        self._compiled: CompiledStrength | None = None
        self._gate: GatePlan | None = None

    def refresh(self) -> None:
        """Bring everything prepared to the present strength, in place."""
        active = self.activity()
        self._per_row = isinstance(self.row_strengths.value, tuple) or self.row_strengths.rows is not None
        self._inert, self._some_inert = not any(active), not all(active) or self.row_strengths.varies
        self._active = active if self._per_row else active[0]
        if self.source is not None:
            self.source.refresh()
        self._latest = (None, None, 0, None)
        for key in list(self._ready):
            device, dtype, batch = key
            old, old_active = self._ready.pop(key)
            if batch not in (0, len(active)):
                continue  # expanded rows: made again when they come
            new, new_active = self._prepare(device, dtype, None)
            if all(name in new and value.shape == new[name].shape for name, value in old.items()):
                for name, value in new.items():
                    old[name].copy_(value)
                self._ready[key] = (old, old_active.copy_(new_active))
        device, dtype = _guess_place(self.tap.module)
        if not self._ready and device.type != "meta":
            self._ready[device, dtype, len(active) if self._per_row else 0] = self._prepare(device, dtype, None)
        if device.type != "meta":
            for one in (self.lengths, self.held):
                if one is not None:
                    one.place(device)
        self.keep_compiled(device)

    def keep_compiled(self, device: torch.device) -> None:
        """Keep the present strength where compiled code finds it.

        Args:
            device: of the site, as far as is known.
        """
        values, active = [strength * self.factor for strength in self._strengths()], self.activity()
        if self._compiled is None or not self._compiled.set(values, active):
            self._compiled = CompiledStrength(self.params, values, active, device)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All modules that are hooked for it."""
        return (self.tap,)

    @property
    def all_row_strengths(self) -> tuple[RowStrengths, ...]:
        """The strengths of its vectors."""
        return (self.row_strengths,)

    def _strengths(self) -> tuple[float, ...]:
        """The strength of each row; one where all rows are treated alike.

        Raises:
            StrengthError: another number of strengths than of rows.
        """
        values, rows = self.row_strengths.value, self.row_strengths.rows
        listed = values if isinstance(values, tuple) else (values,) * (1 if rows is None else len(rows))
        if rows is not None and len(rows) != len(listed):
            raise StrengthError(f"strength: got {len(listed)} numbers for {len(rows)} rows; give one, or one per row")
        return listed

    def activity(self) -> list[bool]:
        """Which rows are changed; one entry where all rows are treated alike.

        Raises:
            StrengthError: another number of strengths than of rows.
        """
        acts = self.row_strengths.acts_on
        return [acts(row) and not self._stays_neutral(one) for row, one in enumerate(self._strengths())]

    def _stays_neutral(self, strength: float) -> bool:
        """Whether a strength that the vector begins with, and all that it fades to, changes nothing."""
        fade = self.row_strengths.fade
        if self.held is not None or (fade is not None and fade.to != strength):
            return False
        return self.method.is_neutral(strength * self.factor)

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
        if tokens.nothing or (self.row_strengths.fade is not None and self._has_faded(tokens)):
            return h
        if self._minimum:
            tokens.require_prompt(self._minimum, self._rows_of(facts))
        read = None if self.source is None else self.source(args[0])
        if self.tap.flat:  # OPT runs its MLP on rows and tokens in one dimension
            apart = facts.batch, facts.width, -1
            read = None if read is None else read.reshape(apart)
            return self._write(h.reshape(apart), read, facts, tokens).reshape(h.shape)
        shape = h.shape
        if len(shape) != 3 or shape[0] != facts.batch or shape[1] != facts.width:  # no mask is laid over anything else
            raise SiteError(
                f"{self.tap.site}: {list(h.shape)} came from {self.tap.name} in a pass of {facts.batch} rows and "
                f"{facts.width} tokens; steerkit writes [b, t, d]"
            )
        return self._write(h, read, facts, tokens)

    def _rows_of(self, facts: Pass) -> Tensor | None:
        """[b, 1, 1] which rows of a pass are written; None where all are."""
        if isinstance(self._active, bool) or all(self._active):
            return None
        active = torch.tensor(self._active, device=facts.device, dtype=torch.bool)
        return facts.expand(active, "rows")[:, None, None]

    def _has_faded(self, tokens: Tokens) -> bool:
        """Whether this is a decoding step in which nothing is left of a strength that fades to the neutral one."""
        fade = self.row_strengths.fade
        if fade is None or not self.method.is_neutral(fade.to * self.factor):
            return False
        step = tokens.chooses_from()
        return step is not None and fade.ends_before(step)

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens) -> Tensor:
        """Write the tokens that the scope means, [b, t, d]; all other values stay bitwise."""
        is_compiling = torch.compiler.is_compiling()
        prepared, active = self._prepared(h, facts, tokens, is_compiling)
        if read is not None:
            prepared = {**prepared, "input": read}
        gate = self._gate
        if gate is None:
            edited = self.method.edit(h, prepared, tokens)
        else:
            edited = gate.editor.write(self.tap.site, h, prepared, tokens, gate.state(facts))
            if edited is h:
                return h
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

    def _prepared(self, h: Tensor, facts: Pass, tokens: Tokens, is_compiling: bool) -> tuple[dict[str, Tensor], Tensor]:
        """What `prepare` gives for this pass, and which rows [b, 1, 1] or tokens [b, t, 1] it changes."""
        if is_compiling:
            made = self.prepare_compiled(h, facts)
        elif self._per_row and facts.rows is not None:
            made = self._prepare(h.device, h.dtype, facts)
        else:  # once per device, dtype and number of rows; a key of these three takes longer to make than to compare
            device, dtype, rows, latest = self._latest
            if latest is None or h.dtype is not dtype or h.device != device or (self._per_row and facts.batch != rows):
                key = (h.device, h.dtype, facts.batch if self._per_row else 0)
                latest = self._ready.get(key)
                if latest is None:
                    latest = self._ready[key] = self._prepare(h.device, h.dtype, facts)
                self._latest = (*key, latest)
            made = latest
        return self._at_tokens(h, *made, tokens) if self.row_strengths.varies else made

    def _at_tokens(
        self, h: Tensor, start: dict[str, Tensor], active: Tensor, tokens: Tokens
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What `prepare` gives for the strength of each token: what is left of it, or what a reading asks for."""
        fade = self.row_strengths.fade
        assert self._compiled is not None
        with contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(mode=False):
            if self.held is not None:
                strength = self.held.at(h, tokens)
            else:
                assert fade is not None
                end = fade.to * self.factor
                strength = end + (start["strength"] - end) * fade.share(tokens.step)[..., None]
            neutral = self.method.neutral_strength
            if neutral is not None:
                active = active & (strength != neutral)
            return self.method.prepare(self._compiled.params_on(h.device), strength, h.dtype, h.device), active

    def prepare_compiled(self, h: Tensor, facts: Pass) -> tuple[dict[str, Tensor], Tensor]:
        """The same as part of compiled code, which is then right for any strength.

        Args:
            h: [b, t, d] activations.
            facts: the pass.
        """
        assert self._compiled is not None
        value, active = self._compiled.of_rows(facts, h.device)
        if self.row_strengths.varies:
            return {"strength": value}, active
        return self.method.prepare(self._compiled.params_on(h.device), value, h.dtype, h.device), active

    def _prepare(
        self, device: torch.device, dtype: torch.dtype, facts: Pass | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the method needs at the present strength, and which rows are active, on a device."""
        # Not under inference_mode or autograd of whoever happens to run the first pass.
        with torch.inference_mode(mode=False), torch.no_grad():
            value = torch.tensor(self.row_strengths.value, dtype=torch.float32, device=device) * self.factor
            active = torch.tensor(self._active, device=device, dtype=torch.bool)
            value, active = (
                one if one.dim() == 0 else (one if facts is None else facts.expand(one, "strength"))[:, None, None]
                for one in (value, active)
            )
            if self.row_strengths.varies:
                return {"strength": value}, active
            return self.method.prepare(self.params, value, dtype, device), active

    def prepare_rows(self, rows: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What `prepare` gives for some rows of the batch, [n, 1, d] each; nothing for none.

        Args:
            rows: their numbers.
            device: of the activations.
            dtype: of the activations.
        """
        if not rows:
            return {}
        strengths = [self._strengths()[row] for row in rows]
        value = torch.tensor(strengths, dtype=torch.float32, device=device)[:, None, None] * self.factor
        made = self.method.prepare(self.params, value, dtype, device)
        return {name: one if one.dim() == 3 else one.expand(len(rows), 1, -1) for name, one in made.items()}


@dataclass(eq=False)
class GuidedEdit(Edit):
    """One gated vector at one site."""

    guide: GatePlan = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.siblings: list[Edit] = [self]
        self._gate = self.guide

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All modules that are hooked for it: those that its gate reads, and its own."""
        return (*self.guide.taps.values(), self.tap)

    def refresh(self) -> None:
        """Bring everything prepared to the present strength, and stop reading where nothing would be written."""
        super().refresh()
        self.guide.inert = all(edit.is_inert for edit in self.siblings)
        of_rows = zip(*(edit.activity() for edit in self.siblings), strict=True) if self._per_row else ()
        active = tuple(any(of_row) for of_row in of_rows)
        self.guide.active = None if all(active) else active

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens) -> Tensor:
        refuse_compiled(facts)
        return h if self.guide in facts.held else super()._write(h, read, facts, tokens)


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
