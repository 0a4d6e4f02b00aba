"""Passes run again: what decides about a write may be read later in the pass than the write happens.

A gate that reads block 20 and writes at block 10 knows too late for the pass it reads. Two ways around it, chosen for
each prompt before its last pass runs:

* replay. The pass runs as asked, unwritten. Where a gate opens, the cache is cut back to the last prompt token and the
  rest is fed once more, written. Rows whose gate stayed closed keep their first logits and their first cache, bitwise.
  It costs one short pass, and only where something opens. It needs a cache that can be cut back.
* probe. Where replay cannot be done (no cache, a recurrent or static one, prompt tokens that are written too) the pass
  is first run beside the real one, on a copy of the cache, as far as the deepest place that is read; then the real pass
  runs, written from the start.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ScopeError
from steerkit.methods._protocols import Editor
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.tokens.clock import Hook, PassClock
from steerkit.tokens.forward_pass import Pass, Tokens
from steerkit.tokens.scope import PromptLengths, Scope
from steerkit.tokens.transformers_facts import CACHE_ARGUMENTS, cache_of, can_be_cut, forget_past, keep_past

__all__ = ["GatePlan", "Reading", "is_before", "replaying"]

# What a replay knows how to cut to the columns it feeds again.
_CUT = ("input_ids", "inputs_embeds", "position_ids")


class _Stop(BaseException):
    """Ends a probe when all that decides has been read. Not an `Exception`, so that nothing eats it."""


@dataclass(eq=False)
class GatePlan:
    """One editor of one vector, planned or attached.

    Attributes:
        editor: what reads and decides.
        scope: which tokens are written.
        lengths: real prompt tokens of each row, where given.
        writes: where is written.
        taps: where is read.
        inert: every write is at its neutral strength, so nothing needs to be read.
        active: which rows have another strength than the neutral one; None where all have.
    """

    editor: Editor
    scope: Scope
    lengths: PromptLengths | None
    writes: tuple[Site, ...]
    taps: Mapping[Site, Tap]
    inert: bool = False
    active: tuple[bool, ...] | None = None
    is_late: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_late = not all(is_before(read, write) for read in self.editor.reads for write in self.writes)

    def tokens(self, facts: Pass) -> Tokens:
        """The tokens of a pass as the writes' scope sees them.

        Args:
            facts: the pass.
        """
        return facts.tokens(self.scope, self.lengths)

    def state(self, facts: Pass) -> Any:
        """What the editor keeps of the text that a pass belongs to; begun with its first pass.

        Args:
            facts: the pass.

        Raises:
            ScopeError: the text has another number of rows than when it began.
        """
        kept = facts.store.get(self)
        if kept is None:
            kept = facts.store[self] = (facts.batch, self.editor.begin(facts.batch, facts.device))
        if kept[0] != facts.batch:
            raise ScopeError(
                f"a gate decided about {kept[0]} rows and this pass has {facts.batch}; keep the rows of a text together"
            )
        return kept[1]

    def wanted(self, facts: Pass) -> Tensor | bool:
        """The rows [b] of a pass that are written now that it has been read: open, and not at the neutral strength.

        Args:
            facts: the pass.
        """
        opened = self.editor.finish(self.state(facts))
        if opened is False or self.active is None:
            return opened
        device = facts.device if opened is True else opened.device
        active = facts.expand(torch.tensor(self.active, device=device, dtype=torch.bool), "strength")
        return active if opened is True else opened & active

    def waits(self, facts: Pass) -> bool:
        """Whether a pass writes before it has read what decides.

        Args:
            facts: the pass.
        """
        if self.inert or not self.is_late:
            return False
        tokens = self.tokens(facts)
        return not tokens.nothing and self.editor.decides(tokens, self.state(facts))


def is_before(read: Site, write: Site) -> bool:
    """Whether a site is surely read before another is written; at one site reads come first.

    Args:
        read: a site.
        write: another one, or the same.
    """
    return read.layer < write.layer or read == write or (read.layer == write.layer and read.kind == "resid_pre")


@dataclass(eq=False)
class Reading:
    """What stands among the edits of a module and only reads for an editor."""

    guide: GatePlan
    tap: Tap
    clock: PassClock

    @property
    def is_inert(self) -> bool:
        """Whether nothing is written by what is read here, so that nothing needs to be read."""
        return self.guide.inert

    def __call__(self, h: Tensor, _args: tuple[Any, ...] = ()) -> Tensor:
        """Hand the activations of this pass to the editor.

        Raises:
            ScopeError: the module runs outside a pass of its model, or in compiled code.
        """
        guide = self.guide
        if guide.inert:
            return h
        facts = self.clock.now
        if facts is None:
            raise ScopeError(
                f"{self.tap.site}: this module was called on its own, outside a forward pass of its model; "
                "call the model (or its decoder) instead"
            )
        refuse_compiled(facts)
        if not facts.suspended:
            shaped = h.reshape(facts.batch, facts.width, h.shape[-1]) if self.tap.flat else h
            guide.editor.read(self.tap.site, shaped, guide.tokens(facts), guide.state(facts))
            if facts.is_probe and not any(other.waits(facts) for other in facts.held):
                raise _Stop
        return h


def refuse_compiled(facts: Pass) -> None:
    """Refuse to be compiled: a decision differs from prompt to prompt, and compiled code would keep the first one.

    Args:
        facts: the pass.

    Raises:
        ScopeError: this code is being compiled, or the pass is one of compiled code that gave up here.
    """
    if torch.compiler.is_compiling() or facts.is_compiled:
        raise ScopeError("a gated vector cannot steer compiled code; run the model eagerly (disable_compile=True)")


@dataclass
class _Replay:
    """One pass that may be fed again in part."""

    start: int
    given: dict[str, Any]
    recorded: list[bool | None]


class _Replayer:
    """The hooks on a model and its decoder body that see to it that every gate has decided when it is needed."""

    def __init__(self, decoder: Decoder, clock: PassClock) -> None:
        self.decoder, self.clock = decoder, clock
        self.guides: list[tuple[int, GatePlan]] = []
        self.handles: list[Any] = []

    def attach(self) -> None:
        """Hang the hooks: on the body as well, which people also call alone."""
        model, body = self.decoder.model, self.decoder.body
        for module in {id(model): model, id(body): body}.values():
            self.handles.append(module.register_forward_pre_hook(_Opening(self), with_kwargs=True))
        self.handles.append(model.register_forward_hook(_Closing(self), prepend=True, always_call=True))

    def detach(self) -> None:
        """Take them off."""
        for handle in self.handles:
            handle.remove()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Choose how a pass that is about to run gets its decisions in time."""
        if torch.compiler.is_compiling():
            return
        facts = self.clock.now
        if facts is None or facts.suspended or facts.held or facts.settled:
            return
        facts.settled = True
        waiting = tuple(guide for guide in self.clock.own(tuple(self.guides)) if guide.waits(facts))
        if not waiting:
            return
        given = self.clock.arguments(module, args, kwargs)
        start = self._start(module, given, facts, waiting)
        if start is None:
            self._probe(module, given, facts, waiting)
            return
        facts.held = waiting
        facts.replay = _Replay(start, given, keep_past(cache_of(given)))

    def after(self, module: nn.Module, output: Any) -> Any:
        """Feed the end of a pass again, where a gate opened in it."""
        facts = self.clock.now
        if facts is None or facts.replay is None:
            return None
        replay, waiting = facts.replay, facts.held
        facts.replay, facts.held = None, ()
        if output is None:  # the pass failed
            forget_past(cache_of(replay.given), replay.recorded)
            return None
        rows: Tensor | bool = False
        for guide in waiting:
            rows = _either(rows, guide.wanted(facts))
        cache = cache_of(replay.given)
        try:
            return None if rows is False else self._again(module, replay, facts, output, rows)
        finally:
            forget_past(cache, replay.recorded)

    def _again(self, module: nn.Module, replay: _Replay, facts: Pass, output: Any, rows: Tensor | bool) -> Any:
        """Run the prompt's last tokens again, and keep the new logits and cache in the rows that want them."""
        assert isinstance(facts.past, int)
        cache = cache_of(replay.given)
        count = facts.past + facts.width - replay.start
        layers = [layer for layer in cache.layers if layer.is_initialized]
        before = [(layer.keys[..., -count:, :], layer.values[..., -count:, :]) for layer in layers]
        cache.crop(-count)
        with self.clock.again(facts, replay.start):
            again = module(**{name: _end(name, value, count) for name, value in replay.given.items()})
        if rows is True:
            again.logits = _joined(output.logits, again.logits, dim=1)
            return again
        assert isinstance(rows, Tensor)
        for layer, (keys, values) in zip(layers, before, strict=True):
            layer.keys = _joined(layer.keys, _chosen(rows, layer.keys[..., -count:, :], keys), dim=-2)
            layer.values = _joined(layer.values, _chosen(rows, layer.values[..., -count:, :], values), dim=-2)
        first = output.logits[:, -again.logits.shape[1] :]
        again.logits = _joined(output.logits, _chosen(rows, again.logits, first), dim=1)
        return again

    def _probe(self, module: nn.Module, given: dict[str, Any], facts: Pass, waiting: tuple[GatePlan, ...]) -> None:
        """Run the pass on a copy of its cache until all that decides has been read.

        Raises:
            ScopeError: the cache cannot be copied.
        """
        try:
            copies = {name: copy.deepcopy(given[name]) for name in CACHE_ARGUMENTS if given.get(name) is not None}
        except (TypeError, RuntimeError) as error:
            raise ScopeError(
                f"a gate reads later than it writes, and {type(cache_of(given)).__name__} can neither be "
                f"cut back nor copied ({error}); use another cache, or read at an earlier layer"
            ) from None
        with self.clock.aside(facts, waiting), contextlib.suppress(_Stop), torch.no_grad():
            module(**{**given, **copies})

    def _start(
        self, module: nn.Module, given: Mapping[str, Any], facts: Pass, waiting: tuple[GatePlan, ...]
    ) -> int | None:
        """The first column that a replay feeds again; None where the pass cannot be replayed."""
        if module is not self.decoder.model or facts.boundary is None or not isinstance(facts.past, int):
            return None
        if any(guide.lengths is not None or guide.scope.kind not in ("response", "generated") for guide in waiting):
            return None
        start = facts.boundary - any(guide.scope.kind == "response" for guide in waiting)
        plain = all(_is_plain(name, value) for name, value in given.items())
        asked = any(getattr(self.decoder.model.config, name, False) for name in _MORE)
        if asked or not plain or not can_be_cut(cache_of(given)):
            return None
        return start if facts.past <= start < facts.past + facts.width else None


_MORE = ("output_hidden_states", "output_attentions", "output_router_logits")
_CACHE = ("cache", "past_key_values")  # whether one can be cut back is asked of itself


def _is_plain(name: str, value: Any) -> bool:
    """Whether an argument of a pass can be kept, or cut to the last columns."""
    if name in _CUT or name in _CACHE or value is None:
        return True
    if name == "attention_mask":
        return isinstance(value, Tensor) and value.dim() == 2
    if name == "return_dict":
        return bool(value)
    return isinstance(value, bool | int | float | str) and not (name in _MORE and bool(value))


def _end(name: str, value: Any, count: int) -> Any:
    """An argument of a pass, cut to its last columns."""
    if name not in _CUT or value is None:
        return value
    return value[..., -count:] if name == "position_ids" else value[:, -count:]


def _either(one: Tensor | bool, other: Tensor | bool) -> Tensor | bool:
    """Rows of one or the other; True means every row."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one | other
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        kept, flag = (one, other) if isinstance(one, Tensor) else (other, one)
        return True if flag else kept
    return one or other


def _chosen(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new values of some rows, the old ones of the others."""
    return torch.where(rows.to(new.device).reshape(-1, *[1] * (new.dim() - 1)), new, old)


def _joined(whole: Tensor, end: Tensor, dim: int) -> Tensor:
    """A tensor with its last columns replaced."""
    kept = whole.shape[dim] - end.shape[dim]
    return end if kept <= 0 else torch.cat([whole.narrow(dim, 0, kept), end], dim=dim)


class _ReplayerHook(Hook):
    """A hook of a conductor."""

    def __init__(self, conductor: _Replayer) -> None:
        self.conductor = conductor


class _Opening(_ReplayerHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.conductor.before(module, args, kwargs)


class _Closing(_ReplayerHook):
    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        return self.conductor.after(module, output)


@contextlib.contextmanager
def replaying(decoder: Decoder, clock: PassClock, guide: GatePlan, owner: int) -> Iterator[None]:
    """Have a model's conductor look after one guide; it comes with the first and goes with the last.

    Args:
        decoder: the model's decoder.
        clock: the clock on the model, attached.
        guide: the guide.
        owner: the thread that steers.
    """
    hooks = decoder.model._forward_pre_hooks.values()
    conductor = next((hook.conductor for hook in hooks if isinstance(hook, _Opening)), None)
    if conductor is None:
        conductor = _Replayer(decoder, clock)
        conductor.attach()
    conductor.guides.append((owner, guide))
    try:
        yield
    finally:
        place = max(index for index, other in enumerate(conductor.guides) if other[0] == owner and other[1] is guide)
        del conductor.guides[place]
        if not conductor.guides:
            conductor.detach()
