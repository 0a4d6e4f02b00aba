"""Which tokens a forward pass holds, and which of them a scope means.

This is the only file that knows about positions. A `PassClock` hooks the outermost transformers model (and its decoder
body, for people who call that one alone) and notes, before every forward pass, which columns of the sequence the pass
carries, which of them are real tokens, and where the prompt ends. A `Scope` is then a question to that `Pass`.

Columns count from the left edge of the padded sequence; positions count from each row's first real token. Where the
prompt ends is certain inside `generate`: the expanded prompt is a local variable of the outermost `generate` frame, in
every mode (beams, chunked prefill, assisted decoding, `use_cache=False`, ...). In any other forward pass nobody can
know, so scopes that depend on it need `prompt_lengths`.

Scopes by role (`assistant`, `answer`, `after(n)`) need the ids of the whole text so far, in every pass. Inside
`generate` they are a local variable of the frame that decodes, whichever rows beams and rejected candidates have moved;
elsewhere they are in the pass itself, or kept with its cache.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.tokens.forward_pass import PACKED, Pass
from steerkit.tokens.transformers_facts import (
    Call,
    columns_cached,
    decoding_codes,
    first_of_real,
    generate_code,
    is_used_recurrent_cache,
    real_of_diagonal,
)

__all__ = ["Hook", "PassClock"]

_RUNNING = ("candidate_input_ids", "flat_running_sequences", "input_ids")


class Hook:
    """Base of every hook on a model: a copy of it does nothing, so a deep copy of a steered model is not steered."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_hook, ()


def _inert(*_args: Any, **_kwargs: Any) -> None:
    """What a copy of a hook does."""


def _inert_hook() -> Any:
    """What a pickled hook comes back as."""
    return _inert


class PassClock:
    """Two hooks on a model that note the facts of every forward pass, per thread.

    Args:
        model: the transformers model itself (not a wrapper around it).
        body: its decoder body, which people also call alone; the outer model's facts win.
    """

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        # Weak: a hook must not keep a model alive.
        self._model, self._body = weakref.ref(model), weakref.ref(body)
        self._local = threading.local()
        self._handles: list[Any] = []
        self._names = {id(module): tuple(inspect.signature(module.forward).parameters) for module in (model, body)}
        self._generate_code, self._decoding_codes = generate_code(), decoding_codes()
        self.owner = threading.get_ident()
        self.users = 0

    @staticmethod
    def of(model: nn.Module) -> PassClock | None:
        """The clock that already hangs on a transformers model, if any."""
        for hook in model._forward_pre_hooks.values():
            holder = getattr(hook, "clock", None)
            if isinstance(holder, PassClock):
                return holder
        return None

    def attach(self) -> None:
        """Hang the hooks on the model; the first attachment of several does it."""
        self.users += 1
        if self.users > 1:
            return
        model, body = self._model(), self._body()
        try:
            for module in {id(model): model, id(body): body}.values():
                if module is not None:
                    before, after = _Before(self), _After(self)
                    self._handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                    self._handles.append(module.register_forward_hook(after, always_call=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take the hooks off when their last user goes."""
        self.users -= 1
        if self.users <= 0:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @property
    def now(self) -> Pass | None:
        """The pass this thread is in; None outside of one."""
        live: _Live | None = getattr(self._local, "live", None)
        return None if live is None else live.facts

    @contextlib.contextmanager
    def items(self, rows: tuple[int, ...]) -> Iterator[None]:
        """Say which items the rows of this thread's next passes are, for values given one per item.

        Args:
            rows: one item index per row.
        """
        self._local.rows = rows
        try:
            yield
        finally:
            self._local.rows = None

    @property
    def settings(self) -> Any:
        """The settings of the `generate` call of this model that this thread is in; None outside of one."""
        return self._prompt()[1]

    @property
    def is_suspended(self) -> bool:
        """Whether this thread has switched the edits off."""
        return getattr(self._local, "suspended", False)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run forward passes of this thread without any edit, for probes and recordings of the baseline model."""
        before = self.is_suspended
        self._local.suspended = True
        try:
            yield
        finally:
            self._local.suspended = before

    @contextlib.contextmanager
    def aside(self, facts: Pass, held: tuple[Any, ...]) -> Iterator[None]:
        """Run passes of this thread beside the one that is about to run: they share its store and move nothing on.

        Args:
            facts: the pass about to run.
            held: whose writes wait meanwhile.
        """
        live = getattr(self._local, "live", None)
        call: Call | None = getattr(self._local, "call", None)
        columns = 0 if call is None else call.columns
        self._local.aside = {"store": facts.store, "held": held, "is_probe": True}
        if call is not None and isinstance(facts.past, int):
            call.columns = facts.past
        try:
            yield
        finally:
            self._local.aside = None
            self._local.live = live  # the probe may have been stopped half-way, without its closing hooks
            if call is not None:
                call.columns = columns

    @contextlib.contextmanager
    def again(self, facts: Pass, columns: int) -> Iterator[None]:
        """Run the end of a pass once more, on a cache that has been cut back.

        Args:
            facts: the pass.
            columns: how many the cache holds.
        """
        call: Call | None = getattr(self._local, "call", None)
        if call is not None:
            call.columns = columns
        self._local.aside = {"store": facts.store}
        try:
            yield
        finally:
            self._local.aside = None

    def arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a pass by name.

        Args:
            module: the model or its decoder body.
            args: positional ones.
            kwargs: named ones.
        """
        return dict(zip(self._names.get(id(module), ()), args, strict=False)) | dict(kwargs)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the facts of a pass that is about to run.

        Raises:
            ModelError: the model itself gets this mode wrong (a Mamba cache continued by a second `generate`).
        """
        live = self._live()
        given = self.arguments(module, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        facts: Pass | None = None
        if isinstance(tokens, Tensor) and tokens.dim() >= 2:
            if live is not None and module is not live.module and module is self._body():
                facts = live.facts  # the body inside its model: the outer facts win (it saw the 2-D mask)
                if facts is not None and (facts.batch, facts.width) != (tokens.shape[0], tokens.shape[1]):
                    facts = None
            facts = self._read(tokens, given) if facts is None else facts
        frame = None if torch.compiler.is_compiling() else sys._getframe(2)
        self._local.live = _Live(module, facts, frame, live)

    def leave(self, module: nn.Module, output: Any = None) -> None:
        """Forget the facts of the pass that has just run.

        Args:
            module: what ran.
            output: what it gave; what the pass kept goes on with a cache that was made in it.
        """
        live: _Live | None = getattr(self._local, "live", None)
        if live is not None and live.facts is not None and live.facts.store and not torch.compiler.is_compiling():
            self._hand_on(live.facts.store, output)
        while live is not None:
            done, live = live.module is module, live.outer
            if done:
                break
        self._local.live = live

    def _hand_on(self, store: dict[Any, Any], output: Any) -> None:
        """Keep a pass's store with the cache it gave, where no call or cache keeps it yet."""
        cache = getattr(output, "past_key_values", None)
        call: Call | None = getattr(self._local, "call", None)
        stores: dict[int, _Kept] = getattr(self._local, "stores", {})
        known = (call is not None and call.store is store) or any(kept.store is store for kept in stores.values())
        if cache is not None and not known:
            self._local.stores = {**stores, id(cache): _Kept(weakref.ref(cache), store)}

    def _store_of(self, call: Call | None, cache: Any, past: int | Tensor) -> dict[Any, Any]:
        """What is kept from pass to pass of the text that this pass belongs to."""
        if call is not None:
            return call.store
        stores: dict[int, _Kept] = getattr(self._local, "stores", {})
        if stores:
            self._local.stores = stores = {key: kept for key, kept in stores.items() if kept.cache() is not None}
        if cache is None or (isinstance(past, int) and past == 0):
            return {}
        return stores[id(cache)].store if id(cache) in stores else {}

    def _live(self) -> _Live | None:
        """The pass this thread is in, without those an interrupt left behind (torch calls no closing hook then)."""
        live: _Live | None = getattr(self._local, "live", None)
        if live is None or torch.compiler.is_compiling():
            return live
        stack: set[int] = set()
        frame: Any = sys._getframe(1)
        while frame is not None:
            stack.add(id(frame))
            frame = frame.f_back
        while live is not None and live.frame is not None and id(live.frame) not in stack:
            live = live.outer
        return live

    # What follows reads one pass. See the table of modes in the tests for what each branch is for.

    def _read(self, tokens: Tensor, given: Mapping[str, Any]) -> Pass:
        batch, width = tokens.shape[0], tokens.shape[1]
        cache = given.get("past_key_values")
        cache = given.get("cache_params") if cache is None else cache
        mask = given.get("attention_mask")
        compiling = torch.compiler.is_compiling()
        prompt, settings = (None, None) if compiling else self._prompt()
        call = self._call_of(prompt, settings, cache, compiling)
        ids = given.get("input_ids")
        past = columns_cached(cache, mask, width, call, compiling)
        facts: dict[str, Any] = {"batch": batch, "width": width, "device": tokens.device}
        facts["rows"] = getattr(self._local, "rows", None)
        facts["suspended"] = self.is_suspended
        facts["given"] = ids if isinstance(ids, Tensor) and ids.shape[:2] == (batch, width) else None
        facts["expands"] = compiling or call is not None or cache is not None
        if past is None:
            reason = "a recurrent cache does not say how many tokens it has seen; pass attention_mask over all of them"
            return Pass(**facts, past=0, only_all=reason)
        facts["past"] = past
        if given.get("cu_seq_lens_q") is not None or given.get("block_table") is not None:
            return Pass(**facts, only_all=PACKED)
        keep = given.get("logits_to_keep")
        # `generate` always says how many logits it wants, where the model's forward can be told.
        tells = "logits_to_keep" in self._names.get(id(self._model()), ())
        own_sequence = call is not None and not compiling and keep is None and tells
        facts["is_apart"] = own_sequence
        if call is not None and not compiling and not own_sequence:
            call.note(past, width, keep)
            facts["boundary"] = call.boundary
            facts["decode"] = cache is not None and width == 1 and call.past_prompt(past)
            facts |= {"call": call, "cache": cache}
            call.running = self._running
        elif compiling:
            facts["decode"] = call is not None and cache is not None and width == 1
            facts["call"] = call if facts["decode"] else None
        else:
            facts["boundary"] = self._boundary_of_cache(cache, past, width, keep, given, own_sequence)
        if not compiling:
            facts["store"] = self._store_of(None if own_sequence else call, cache, past)
            facts |= getattr(self._local, "aside", None) or {}
        self._read_pads(facts, mask, cache, call, given)
        return Pass(**facts)

    def _read_pads(
        self, facts: dict[str, Any], mask: Any, cache: Any, call: Call | None, given: Mapping[str, Any]
    ) -> None:
        if isinstance(mask, Mapping):
            mask, layer = self._mask_of_layers(mask)
        else:
            layer = 0
        if isinstance(mask, Tensor) and mask.dim() == 2:
            facts["attention"] = mask
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            if not facts.get("decode"):
                facts["real"] = real_of_diagonal(mask, facts["past"], facts["width"], cache, layer, facts["batch"])
            facts["first"] = first_of_real(facts.get("real"), facts["past"], call)
        elif mask is None and facts["batch"] == 1 and facts["width"] > 1 and call is None:
            facts["position_ids"] = given.get("position_ids")

    def _mask_of_layers(self, masks: Mapping[str, Any]) -> tuple[Any, int]:
        """One mask of a dict by layer type, and a layer that it belongs to; a 2-D one says the most."""
        known = {kind: mask for kind, mask in masks.items() if isinstance(mask, Tensor)}
        model = self._model()
        config: Any = getattr(model, "config", None)
        types = list(getattr(config.get_text_config(), "layer_types", None) or []) if config is not None else []
        ranked = sorted(known, key=lambda kind: (known[kind].dim() != 2, kind != "full_attention"))
        if not ranked:
            return None, 0
        return known[ranked[0]], types.index(ranked[0]) if ranked[0] in types else 0

    def _prompt(self) -> tuple[Tensor | None, Any]:
        """The expanded prompt of the `generate` call of this model that this pass belongs to, and its settings.

        The innermost one on the stack, unless a draft is being made for an outer one: a model that drafts for itself
        calls its own `generate` on prompt and answer so far, whose prompt is the outer one's.
        """
        found, settings, drafts = None, None, False
        frame: Any = sys._getframe(1)
        model = self._model()
        while frame is not None:
            code = frame.f_code
            if code is self._generate_code:
                if (found is None or drafts) and frame.f_locals.get("self") is model:
                    names = frame.f_locals
                    found, settings, drafts = names.get("input_ids"), names.get("generation_config"), False
            elif code.co_name == "get_candidates":
                drafts = True
            frame = frame.f_back
        return (found, settings) if isinstance(found, Tensor) else (None, None)

    def _running(self) -> Tensor | None:
        """The ids of the whole text in the innermost decoding of this model on the stack.

        Innermost, because a model that drafts for itself decodes inside its own decoding.
        """
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code in self._decoding_codes and frame.f_locals.get("self") is self._model():
                names = frame.f_locals
                return next((names[name] for name in _RUNNING if isinstance(names.get(name), Tensor)), None)
            frame = frame.f_back
        return None

    def _call_of(self, prompt: Tensor | None, settings: Any, cache: Any, compiling: bool) -> Call | None:
        """The state of the `generate` call this pass belongs to."""
        last: Call | None = getattr(self._local, "call", None)
        if compiling:
            return last
        if prompt is None:
            self._local.call = None
            return None
        # One `generate` may run inside another (a logits processor that asks about another text).
        calls: dict[int, Call] = getattr(self._local, "calls", {})
        for key in [key for key, call in calls.items() if call.prompt() is None]:
            del calls[key]
        self._local.calls = calls
        if id(prompt) not in calls or not calls[id(prompt)].belongs_to(settings):
            if is_used_recurrent_cache(cache):
                raise ModelError(
                    "generate: this model's recurrent cache was filled by an earlier call, and transformers continues "
                    "such caches wrongly; pass the whole conversation again without past_key_values / cache_params"
                )
            calls[id(prompt)] = Call(prompt, settings)
        self._local.call = calls[id(prompt)]
        return calls[id(prompt)]

    def _boundary_of_cache(
        self, cache: Any, past: int | Tensor, width: int, keep: Any, given: Mapping[str, Any], own_sequence: bool
    ) -> int | None:
        """Where the prompt ends in a pass without a `generate` frame of its own.

        Either guidance's extra passes for the negative prompt inside `generate` (an own sequence with an own cache),
        or a decoding loop that names `logits_to_keep` as `generate` does. Anything else: unknown.
        """
        if not isinstance(past, int):
            return None
        known: dict[int, tuple[weakref.ref[Any], int]] = getattr(self._local, "caches", {})
        self._local.caches = known
        for key in [key for key, (ref, _) in known.items() if ref() is None]:
            del known[key]
        if cache is not None and id(cache) in known and past > 0:  # an emptied cache begins a new text
            return known[id(cache)][1]
        if own_sequence:
            if cache is None:
                return width if given.get("use_cache") else None
            boundary = past if past > 0 else width
        elif cache is not None and isinstance(keep, int) and keep > 0 and (width > 1 or past == 0):
            boundary = past + width - (keep - 1)
        else:
            return None
        known[id(cache)] = (weakref.ref(cache), boundary)
        return boundary


class _Live(NamedTuple):
    """A pass under way: which module noted it, in which frame, and the pass around it."""

    module: nn.Module
    facts: Pass | None
    frame: Any
    outer: Any


class _Kept(NamedTuple):
    """What is kept with a cache."""

    cache: weakref.ref[Any]
    store: dict[Any, Any]


class _Before(Hook):
    """The pre-hook of a clock."""

    def __init__(self, clock: PassClock) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clock.enter(module, args, kwargs)

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """See `PassClock.suspended`."""
        return self.clock.suspended()


class _After(Hook):
    """The closing hook of a clock."""

    def __init__(self, clock: PassClock) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        self.clock.leave(module, output)
