"""`steer`: run a model with its activations changed. The only file that attaches hooks that change anything.

Everything is planned and checked before anything is touched; then all hooks are attached or none, and they always come
off. Each hooked module gets one dispatcher with an ordered list of edits, so that nested contexts and several vectors
keep their order; it is prepended, so that `output_hidden_states` and other people's hooks see the steered value.
Steering belongs to the model, whichever thread runs it; the state of a pass belongs to its thread.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError, ScopeError, StrengthError, VectorFileError, VectorMismatchError, near_miss
from steerkit.experts import Experts
from steerkit.linears import writers_at
from steerkit.methods._base import Method, Params
from steerkit.passes import Guide, Reading, conducted, refuse_compiled
from steerkit.registry import default_strength, method_of
from steerkit.roles import Roles
from steerkit.sites import Decoder, Site, Tap, find_decoder, locate
from steerkit.tokens import Hook, Pass, PassClock, PromptLengths, Scope, Tokens
from steerkit.vector import UNITS, SteeringVector

__all__ = ["Steering", "Strength", "steer", "strength_value", "vectors_of"]

Strength = float | Sequence[float] | Tensor
_ATTACH = threading.RLock()
_LARGEST = torch.finfo(torch.float32).max


def steer(
    model: nn.Module,
    vectors: SteeringVector | Sequence[SteeringVector],
    strength: Strength | None = None,
    *,
    scope: str | None = None,
    unit: Literal["paper", "norm"] | None = None,
    prompt_lengths: Sequence[int] | Tensor | int | None = None,
    tokenizer: Any = None,
) -> Steering:
    """Steer a model inside a `with` block.

    Args:
        model: any decoder-only transformers model, wrapped by PEFT or not. Its class, attributes and weights stay.
        vectors: one vector or several; at one site they are applied in this order.
        strength: one number, or one per row of the batch (each repeated where `generate` expands its row into beams or
            returned sequences). None takes each file's suggested strength, else the method's default. A vector's own
            (`vector.at(...)`) comes first.
        scope: which tokens are written; None takes each vector's own.
        unit: `paper` (1 is the method's own coefficient 1) or `norm` (1 is as long as a typical activation at the
            site); None takes each vector's own.
        prompt_lengths: real prompt tokens of each row, for forward passes outside `generate`, which cannot tell where
            the prompt ends.
        tokenizer: the model's, for scopes by role (`assistant`, `answer`, `after(n)`), whose marks are those of its
            chat template; or its `steerkit.roles.Roles`, to find the marks once for many calls.

    Returns:
        A context manager. Its `strength` can be changed while it is active.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        SiteError: the model lacks a site.
        ScopeError: a scope that the method does not allow, or that this model cannot know.
        StrengthError: a strength that is not finite, or a unit that the method has no length for.
        ModelError: a state of the model in which hooks would not be right; a gated vector on a compiled model.

    Example:
        with steerkit.steer(model, vector, strength=2.0):
            out = model.generate(**inputs, max_new_tokens=40)
    """
    listed = vectors_of(vectors)
    if unit not in (None, *UNITS):
        raise StrengthError(f"unknown unit {unit!r}; {near_miss(str(unit), UNITS)}")
    decoder = find_decoder(model)
    only_all = _prompt_learning(model)
    lengths = None if prompt_lengths is None else PromptLengths(prompt_lengths)
    roles = None if tokenizer is None else Roles.of(tokenizer)
    doses = [_Dose(vector, strength, unit) for vector in listed]
    edits: list[_Edit] = []
    for vector, dose in zip(listed, doses, strict=True):
        vector.check(model)
        edits += _plan(decoder, vector, dose, scope, unit, lengths, only_all, roles)
    _refuse_twice(edits)
    _refuse_compiled_model(model, decoder, edits)
    return Steering(decoder, edits, [dose for dose in doses if not dose.fixed])


def vectors_of(vectors: Any) -> list[SteeringVector]:
    """One vector or several as a list.

    Args:
        vectors: what the caller gave.

    Raises:
        VectorFileError: something else than vectors, or none.
    """
    listed = list(vectors) if isinstance(vectors, list | tuple) else [vectors]
    for one in listed:
        if not isinstance(one, SteeringVector):
            raise VectorFileError(f"got {one!r} for a vector; load a file with SteeringVector.load(path)")
    if not listed:
        raise VectorFileError("got an empty list of vectors; give at least one")
    return listed


class Steering:
    """A planned steering; attach it with `with`. Made by `steer`."""

    def __init__(self, decoder: Decoder, edits: Sequence[_Edit], doses: Sequence[_Dose]) -> None:
        self._decoder, self._edits, self._doses = decoder, tuple(edits), tuple(doses)
        self._entered: list[contextlib.ExitStack] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the model is written, in the order of the vectors."""
        return tuple(edit.tap.site for edit in self._edits)

    @property
    def strength(self) -> float | tuple[float, ...] | None:
        """The strength in use; None where every vector has its own."""
        return self._doses[0].value if self._doses else None

    @strength.setter
    def strength(self, value: Strength) -> None:
        """Change the strength in place; a compiled model is not compiled again.

        Raises:
            StrengthError: every vector has its own strength, or the value is not finite.
        """
        if not self._doses:
            raise StrengthError("strength: every vector has its own (vector.at); make new ones")
        checked = strength_value(value)
        for dose in self._doses:
            dose.value = checked
        for edit in self._edits:
            if any(edit.dose is dose for dose in self._doses):
                edit.refresh()

    def __enter__(self) -> Steering:
        with _ATTACH, contextlib.ExitStack() as stack:
            model = self._decoder.model
            clock = PassClock.of(model) or PassClock(model, self._decoder.body)
            if clock.users and clock.owner != threading.get_ident():
                raise ModelError(
                    "steer: this model object is being steered from another thread; leave that context first, "
                    "or load the model twice"
                )
            _make_compiled_code_see_hooks()
            clock.attach()
            stack.callback(clock.detach)
            guided: set[int] = set()
            for edit in self._edits:
                if isinstance(edit, _GuidedEdit) and id(edit.guide) not in guided:
                    guided.add(id(edit.guide))
                    stack.enter_context(conducted(self._decoder, clock, edit.guide))
                    for tap in edit.guide.taps.values():
                        stack.enter_context(_attached(Reading(edit.guide, tap, clock)))
                edit.clock = clock
                edit.refresh()
                stack.enter_context(_attached(edit))
            self._entered.append(stack.pop_all())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _ATTACH:
            self._entered.pop().close()


class _Dose:
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
class _Edit:
    """One vector at one site."""

    method: Method
    params: Params
    tap: Tap
    scope: Scope
    dose: _Dose
    factor: float
    lengths: PromptLengths | None
    block: nn.Module | None
    clock: PassClock | None = None
    experts: Experts | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._reader: tuple[Any, Callable[[Tensor], Tensor]] | None = None
        self._ready: dict[tuple[torch.device, torch.dtype, int], tuple[dict[str, Tensor], Tensor]] = {}
        self._minimum = self.method.minimum_prompt(self.params)
        self._inert = self._some_inert = self._per_row = False
        self._active: list[bool] | bool = True

    def refresh(self) -> None:
        """Bring everything prepared to the present strength, in place."""
        self._per_row = isinstance(self.dose.value, tuple)
        rows = self.dose.value if isinstance(self.dose.value, tuple) else (self.dose.value,)
        active = [not self.method.is_neutral(value * self.factor) for value in rows]
        self._inert, self._some_inert = not any(active), not all(active)
        self._active = active if self._per_row else active[0]
        if self.experts is not None and (self._reader is None or self._reader[0] != self.experts.place):
            with torch.inference_mode(mode=False), torch.no_grad():
                reader = self.experts.reader(*self.method.expert_gates(self.params))
            self._reader = self.experts.place, reader
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
        if not self._ready:
            device, dtype = _guess_place(self.tap.module)
            if device.type != "meta":
                self._ready[device, dtype, len(rows) if self._per_row else 0] = self._prepare(device, dtype, None)

    def __call__(self, h: Tensor, args: tuple[Any, ...] = ()) -> Tensor:
        """Write the tokens of this pass that the scope means; `args` is what the module was called with."""
        compiling = torch.compiler.is_compiling()
        # Compiled code may not look at what changes with the strength, or it would be compiled again.
        if not compiling and self._inert:
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
        if facts.bare:
            return h
        tokens = facts.tokens(self.scope, self.lengths)
        if tokens.nothing:
            return h
        if self._minimum:
            tokens.require_prompt(self._minimum)
        read = args[0] if self.method.reads_input else None
        if self._reader is not None and read is not None:
            read = self._reader[1](read)
        if self.tap.flat:  # OPT runs its MLP on rows and tokens in one dimension
            shape = facts.batch, facts.width, -1
            read = None if read is None else read.reshape(shape)
            return self._write(h.reshape(shape), read, facts, tokens, compiling).reshape(h.shape)
        return self._write(h, read, facts, tokens, compiling)

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens, compiling: bool) -> Tensor:
        prepared, active = self._prepared(h, facts)
        if read is not None:
            prepared = {**prepared, "input": read}
        edited = self.method.edit(h, prepared, tokens)
        if edited.dtype != h.dtype:
            edited = edited.to(h.dtype)
        written = None if tokens.written is None else tokens.written[..., None]
        if compiling or self._some_inert:
            written = active if written is None else written & active
        if written is not None:
            edited = torch.where(written, edited, h)
        return edited

    @property
    def is_inert(self) -> bool:
        """Whether every row is at its neutral strength."""
        return self._inert

    def _prepared(self, h: Tensor, facts: Pass) -> tuple[dict[str, Tensor], Tensor]:
        """What `prepare` gave for this pass: made once per device, dtype and number of rows."""
        if self._per_row and facts.rows is not None:
            return self._prepare(h.device, h.dtype, facts)
        key = (h.device, h.dtype, h.shape[0] if self._per_row else 0)
        if key not in self._ready:
            self._ready[key] = self._prepare(h.device, h.dtype, facts)
        return self._ready[key]

    def _prepare(
        self, device: torch.device, dtype: torch.dtype, facts: Pass | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        if torch.compiler.is_compiling():
            return self._prepare_here(device, dtype, facts)
        # Not under inference_mode or autograd of whoever happens to run the first pass.
        with torch.inference_mode(mode=False), torch.no_grad():
            return self._prepare_here(device, dtype, facts)

    def _prepare_here(
        self, device: torch.device, dtype: torch.dtype, facts: Pass | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        value = torch.tensor(self.dose.value, dtype=torch.float32, device=device) * self.factor
        active = torch.tensor(self._active, device=device)
        if value.dim() == 1:
            if facts is not None:
                value, active = facts.expand(value, "strength"), facts.expand(active, "strength")
            value, active = value[:, None, None], active[:, None, None]
        return self.method.prepare(self.params, value, dtype, device), active


@dataclass(eq=False)
class _GuidedEdit(_Edit):
    """One gated vector at one site."""

    guide: Guide = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.siblings: list[_Edit] = [self]

    def refresh(self) -> None:
        """Bring everything prepared to the present strength, and stop reading where nothing would be written."""
        super().refresh()
        self.guide.inert = all(edit.is_inert for edit in self.siblings)
        rows = self.dose.value if isinstance(self.dose.value, tuple) else ()
        active = tuple(any(not self.method.is_neutral(value * edit.factor) for edit in self.siblings) for value in rows)
        self.guide.active = None if all(active) else active

    def _write(self, h: Tensor, read: Tensor | None, facts: Pass, tokens: Tokens, compiling: bool) -> Tensor:
        refuse_compiled()
        guide = self.guide
        if guide in facts.held:
            return h
        prepared, active = self._prepared(h, facts)
        edited = guide.editor.write(self.tap.site, h, prepared, tokens, guide.state(facts))
        if edited is h:
            return h
        written = None if tokens.written is None else tokens.written[..., None]
        if self._some_inert:
            written = active if written is None else written & active
        edited = edited.to(h.dtype)
        return edited if written is None else torch.where(written, edited, h)


class _Dispatcher(Hook):
    """The one steering hook of a module and side: applies its edits in order."""

    def __init__(self) -> None:
        self.edits: list[_Edit | Reading] = []
        self.handle: Any = None


class _InputDispatcher(_Dispatcher):
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tap = self.edits[0].tap
        before = h = tap.read(args, kwargs)
        for edit in self.edits:
            h = edit(h)
        return None if h is before else tap.write_input(args, kwargs, h)


class _OutputDispatcher(_Dispatcher):
    def __call__(self, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tap, plain = self.edits[0].tap, type(output) is Tensor
        before = h = output if plain else tap.read((), {}, output)
        for edit in self.edits:
            h = edit(h, args)
        if h is before:
            return None
        return h if plain else tap.write_output(output, h)


@contextlib.contextmanager
def _attached(edit: _Edit | Reading) -> Iterator[None]:
    """Append an edit to its module's dispatcher, which comes with its first edit and goes with its last."""
    module, is_input = edit.tap.module, edit.tap.side == "input"
    kind = _InputDispatcher if is_input else _OutputDispatcher
    hooks = module._forward_pre_hooks if is_input else module._forward_hooks
    dispatcher = next((hook for hook in hooks.values() if isinstance(hook, kind)), None)
    if dispatcher is None:
        dispatcher = kind()
        dispatcher.handle = (
            module.register_forward_pre_hook(dispatcher, prepend=True, with_kwargs=True)
            if is_input
            else module.register_forward_hook(dispatcher, prepend=True)
        )
    dispatcher.edits.append(edit)
    try:
        yield
    finally:
        # By identity and from the end: one plan may be attached twice.
        place = max(index for index, other in enumerate(dispatcher.edits) if other is edit)
        del dispatcher.edits[place]
        if not dispatcher.edits:
            dispatcher.handle.remove()


def _plan(
    decoder: Decoder,
    vector: SteeringVector,
    dose: _Dose,
    scope: str | None,
    unit: str | None,
    lengths: PromptLengths | None,
    only_all: str | None,
    roles: Roles | None,
) -> list[_Edit]:
    """Turn one vector into edits, checking all that can be checked."""
    method = method_of(vector)
    written = Scope.parse(vector.scope if vector.own_scope or scope is None else scope)
    if written.kind not in method.scopes:
        raise ScopeError(f"{method.name}: scope '{written}' is not one of its own: {', '.join(method.scopes)}")
    if only_all is not None and written.kind != "all":
        raise ScopeError(f"scope '{written}': {only_all}; use scope='all'")
    written = written.marked(roles)
    counted = vector.unit if vector.own_unit or unit is None else unit
    writers = writers_at(decoder, vector.sites) if method.reads_input else {}
    taps = {site: one.tap for site, one in writers.items()} or locate(decoder.model, vector.sites)
    edits: list[_Edit] = []
    method.check_model(vector, decoder)
    editor = method.editor(vector)
    if editor is not None and only_all is not None:
        raise ScopeError(f"{method.name}: {only_all}, so a gate cannot find the prompt's end; leave the adapter out")
    guide = None
    if editor is not None:
        guide = Guide(editor, written, lengths, vector.sites, locate(decoder.model, editor.reads))
    for site, tap in zip(vector.sites, taps.values(), strict=True):
        params = vector.params(site)
        method.check(site, params)
        factor = 1.0 if counted == "paper" else _norm_factor(method, vector, site, params)
        block = None if site.kind in ("resid_pre", "resid_post") else decoder.blocks[site.layer]
        if guide is None:
            writer = writers.get(tap.site)
            experts = writer if isinstance(writer, Experts) else None
            edits.append(_Edit(method, params, tap, written, dose, factor, lengths, block, experts=experts))
        else:
            edits.append(_GuidedEdit(method, params, tap, written, dose, factor, lengths, block, guide=guide))
    for edit in edits:
        if isinstance(edit, _GuidedEdit):
            edit.siblings = edits
    return edits


def _refuse_twice(edits: Sequence[_Edit]) -> None:
    """Refuse two gates that add one direction at one site: a row that opens both would get it twice."""
    gated = [edit for edit in edits if isinstance(edit, _GuidedEdit)]
    for number, edit in enumerate(gated):
        for other in gated[:number]:
            if edit.tap.site == other.tap.site and torch.equal(edit.params["direction"], other.params["direction"]):
                raise VectorMismatchError(
                    f"{edit.tap.site}: two gated vectors add the same direction, twice to a row that opens both; join "
                    "their conditions with | (steerkit.methods.conditional.combine)"
                )


def _refuse_compiled_model(model: nn.Module, decoder: Decoder, edits: Sequence[_Edit]) -> None:
    """Refuse gated vectors on a compiled model: compiled code would keep the first prompt's decision.

    Raises:
        ModelError: the model or one of its blocks is compiled.
    """
    if not any(isinstance(edit, _GuidedEdit) for edit in edits):
        return
    modules = [model, decoder.model, decoder.body, *decoder.blocks]
    if any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in modules):
        raise ModelError("a gated vector cannot steer a compiled model: load it anew, without torch.compile")


def _norm_factor(method: Method, vector: SteeringVector, site: Site, params: Params) -> float:
    """What one typical activation norm at the site is in the method's own strength."""
    length, norm = method.length(params), vector.norms.get(site)
    if not length:
        raise StrengthError(
            f"{method.name}: unit 'norm' needs an edit with a length, which this one has not; use 'paper'"
        )
    if norm is None or not math.isfinite(norm):
        raise StrengthError(f"{site}: the vector file holds no activation norm, so unit 'norm' is unknown; use 'paper'")
    return norm / length


def strength_value(value: Strength) -> float | tuple[float, ...]:
    """A finite number, or a tuple of them, one per row.

    Args:
        value: what the caller gave.

    Raises:
        StrengthError: not a number, not finite, or no row.
    """
    listed: Any = value.tolist() if hasattr(value, "tolist") else value  # tensors and numpy's numbers
    rows = list(listed) if isinstance(listed, Sequence) and not isinstance(listed, str) else [listed]
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, int | float) or not abs(row) <= _LARGEST:
            raise StrengthError(f"strength: got {row!r}; give a finite number, or one per row of the batch")
    if not rows:
        raise StrengthError("strength: got an empty list; give a finite number, or one per row of the batch")
    return tuple(map(float, rows)) if isinstance(listed, Sequence) else float(rows[0])


def _prompt_learning(model: nn.Module) -> str | None:
    """Why only scope `all` is known on this model, if so: virtual tokens stand before the text."""
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        return f"a {config.peft_type} adapter puts virtual tokens before the text, so positions are not known"
    return None


def _guess_place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the module runs and in which dtype, as far as its parameters tell; the first pass knows for certain."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    floats = (entry for entry in module.parameters() if entry.is_floating_point())
    first = next(floats, None)
    if first is None:
        return torch.device("meta"), torch.float32
    return torch.device(first.device if device is None else device), first.dtype


def _make_compiled_code_see_hooks() -> None:
    """Make compiled code look at hooks; by default code compiled before they were attached ignores them silently.

    torch.compile skips guards on hooks unless told otherwise before it compiles, so what is compiled already has to go
    (once per process). torch 2.13 keeps this setting per thread, hence the default as well: streamers run `generate`
    in a thread of their own.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is None or not dynamo.config.skip_nnmodule_hook_guards:
        return
    dynamo.config.skip_nnmodule_hook_guards = False
    entries: Mapping[str, Any] = getattr(dynamo.config, "_config", {})
    if "skip_nnmodule_hook_guards" in entries:
        with contextlib.suppress(AttributeError):
            entries["skip_nnmodule_hook_guards"].default = False
    dynamo.reset()
