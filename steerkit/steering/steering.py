"""`steer`: run a model with its activations changed. The only file that attaches hooks that change anything.

Everything is planned and checked before anything is touched; then all hooks are attached or none, and they always come
off. Each hooked module gets one dispatcher with an ordered list of edits, so that nested contexts and several vectors
keep their order; it is prepended, so that `output_hidden_states` and other people's hooks see the steered value.
Steering belongs to the model, whichever thread runs it, until a second thread steers the same model: then each has its
own. The state of a pass belongs to its thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steerkit.errors import ScopeError, StrengthError, VectorMismatchError, near_miss
from steerkit.methods._protocols import Gated, LayerInput, ReadsInput, TiedToWeights
from steerkit.methods._registry import method_of
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.placement import Placement
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.chat_roles import Roles
from steerkit.steering.dispatch import attached_edits, make_compiled_code_see_hooks, refuse_compiled_model, settle
from steerkit.steering.edits_at_sites import Edit, GuidedEdit, RowStrengths, norm_factor
from steerkit.steering.holding import HeldStrength
from steerkit.steering.readings import VectorReading
from steerkit.steering.replay import GatePlan, Reading, replaying
from steerkit.steering.shared_prefixes import drop_shared_prefixes, refuse_running_batches
from steerkit.steering.stacked_edits import share_rows, stacked
from steerkit.steering.strengths import strength_value, vectors_of, warn_beyond
from steerkit.steering.when_gates import gate_of
from steerkit.tokens.clock import PassClock
from steerkit.tokens.scope import PromptLengths, Scope
from steerkit.vector.steering_vector import UNITS, SteeringVector

if TYPE_CHECKING:
    from steerkit.steering.strengths import Strength, Vectors

__all__ = ["Steering", "steer"]

_ATTACH = threading.RLock()


def steer(
    model: nn.Module,
    vectors: Vectors,
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
        vectors: one vector or several; at one site they are applied in this order. Or a `steerkit.Composition`, or its
            text, such as ``"optimism-caa*1.5 - pirate-persona[8:40]"``; or a list of these, one per row of the batch,
            with None for a row that is not steered, and a list of vectors for one that has no text.
        strength: one number, or one per row [b] of the batch (each repeated where `generate` expands its row into beams
            or returned sequences). None takes each file's suggested strength, else the method's default. A vector's own
            (`vector.at(...)`) comes first.
        scope: which tokens are written; None takes each vector's own.
        unit: `paper` (1 is the method's own coefficient 1) or `norm` (1 is as long as a typical activation at the
            site); None takes each vector's own.
        prompt_lengths: real prompt tokens of each row, for forward passes outside `generate`, which cannot tell where
            the prompt ends.
        tokenizer: the model's, for scopes by role (`assistant`, `answer`, `after(n)`), whose marks are those of its
            chat template, and for readings (`when`, `hold`) whose scale no file holds; or its `steerkit.roles.Roles`,
            to find the marks once for many calls.

    Returns:
        A context manager. Its `strength` can be changed while it is active. What a hook refused in another thread
        (`generate_batch` gives an empty answer then) is raised when the block ends.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        SiteError: the model lacks a site.
        ScopeError: a scope that the method does not allow, or that this model cannot know.
        StrengthError: a strength that is not finite, a unit that the method has no length for, or a reading without a
            scale.
        DataError: a vector that is to be read along has no direction.
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
    doses = [RowStrengths(vector, strength, unit) for vector in listed]
    edits: list[Edit] = []
    for vector, dose in zip(listed, doses, strict=True):
        vector.check(model)
        edits += _plan(decoder, vector, dose, scope, unit, lengths, only_all, roles)
    _refuse_twice(edits)
    edits = stacked(edits)
    refuse_compiled_model(model, decoder, edits)
    return Steering(decoder, edits, [dose for dose in doses if not dose.fixed])


class Steering:
    """A planned steering; attach it with `with`. Made by `steer`."""

    def __init__(self, decoder: Decoder, edits: Sequence[Edit], doses: Sequence[RowStrengths]) -> None:
        self._decoder, self._edits, self._doses = decoder, tuple(edits), tuple(doses)
        self._entered: list[tuple[int, contextlib.ExitStack]] = []

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the model is written, in the order of the vectors."""
        return tuple(edit.tap.site for edit in self._edits)

    @property
    def untouched(self) -> int:
        """How many blocks, from the first one on, run as in the unsteered model: none where a gate reads on its own."""
        if any(isinstance(edit, GuidedEdit) for edit in self._edits):
            return 0
        sites = [edit.tap.site for edit in self._edits]
        return min((site.layer + (site.kind == "resid_post") for site in sites), default=0)

    @property
    def leaves_prompts(self) -> bool:
        """Whether every token before the last one of a prompt is left as it is, and so is what it puts into a cache."""
        return all(edit.scope.kind in ("response", "generated") for edit in self._edits) and not any(
            isinstance(edit, GuidedEdit) for edit in self._edits
        )

    @property
    def strength(self) -> float | tuple[float, ...] | None:
        """The strength in use; None where every vector has its own."""
        return self._doses[0].value if self._doses else None

    @strength.setter
    def strength(self, value: Strength) -> None:
        """Change the strength in place; a compiled model is not compiled again.

        Raises:
            StrengthError: every vector has its own strength, or the value is not finite.
            ModelError: continuous batching runs at present and shares what was made with the old strength.
        """
        if not self._doses:
            raise StrengthError("strength: every vector has its own (vector.at); make new ones")
        checked = strength_value(value)
        if self._entered:
            refuse_running_batches(self._decoder.model, "strength")
            drop_shared_prefixes(self._decoder.model)
        for dose in self._doses:
            dose.value = checked
        changed = [edit for edit in self._edits if any(own is dose for own in edit.doses for dose in self._doses)]
        for edit in changed:
            edit.refresh()
        if self._entered:
            with _ATTACH:
                settle(tap for edit in changed for tap in edit.taps)

    def __enter__(self) -> Steering:
        with _ATTACH, contextlib.ExitStack() as stack:
            model = self._decoder.model
            clock = PassClock.of(model) or PassClock(model, self._decoder.body)
            refuse_running_batches(model, "steer")
            drop_shared_prefixes(model)
            make_compiled_code_see_hooks()
            owner = clock.attach()
            stack.callback(clock.detach, owner)
            placement = Placement(model, [tap for edit in self._edits for tap in edit.taps])
            stack.enter_context(clock.checking(placement.check))
            for edit in self._edits:
                edit.clock = clock
                edit.refresh()
            guided: set[int] = set()
            for edit in self._edits:
                if isinstance(edit, GuidedEdit) and id(edit.guide) not in guided:
                    guided.add(id(edit.guide))
                    stack.enter_context(replaying(self._decoder, clock, edit.guide, owner))
                    for tap in edit.guide.taps.values():
                        stack.enter_context(attached_edits(Reading(edit.guide, tap, clock), clock, owner))
                stack.enter_context(attached_edits(edit, clock, owner))
            self._entered.append((owner, stack.pop_all()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        model = self._decoder.model
        clock = PassClock.of(model)
        with _ATTACH:
            own = [place for place, (owner, _) in enumerate(self._entered) if owner == threading.get_ident()]
            self._entered.pop(own[-1] if own else -1)[1].close()
        drop_shared_prefixes(model)
        if error is not None:
            return
        if clock is not None and (refused := clock.take_refused()) is not None:
            raise refused  # another thread has met it, and whoever waits for its answers got empty ones
        refuse_running_batches(model, "end of steer")


def _plan(
    decoder: Decoder,
    vector: SteeringVector,
    dose: RowStrengths,
    scope: str | None,
    unit: str | None,
    lengths: PromptLengths | None,
    only_all: str | None,
    roles: Roles | None,
) -> list[Edit]:
    """Turn one vector into edits, checking all that can be checked."""
    method = method_of(vector)
    written = Scope.parse(vector.scope if vector.own_scope or scope is None else scope)
    if written.kind not in method.scopes:
        raise ScopeError(f"{method.name}: scope '{written}' is not one of its own: {', '.join(method.scopes)}")
    written = written.among(method.scopes)
    if only_all is not None and written.kind != "all":
        raise ScopeError(f"scope '{written}': {only_all}{written.instead('; ', 'all')}")
    _refuse_window(vector, written)
    written = written.marked(roles)
    counted = vector.unit if vector.own_unit or unit is None else unit
    warn_beyond(vector, dose.value, counted)
    sources: Mapping[Site, LayerInput] = method.inputs_at(decoder, vector) if isinstance(method, ReadsInput) else {}
    taps = {site: one.tap for site, one in sources.items()} or locate(decoder.model, vector.sites)
    edits: list[Edit] = []
    if isinstance(method, TiedToWeights):
        method.check_model(vector, decoder)
    tokenizer = None if roles is None else roles.tokenizer
    editor = gate_of(decoder.model, vector, method, tuple(taps), tokenizer)
    if (editor is not None or vector.hold is not None) and only_all is not None:
        raise ScopeError(f"{method.name}: {only_all}, so a gate cannot find the prompt's end; leave the adapter out")
    guide = None
    if editor is not None:
        guide = GatePlan(editor, written, lengths, vector.sites, locate(decoder.model, editor.reads))
    hold = None if vector.hold is None else vector.hold.bound(SteeringVector.load)
    reading = None
    if hold is not None and hold.vector is not None:
        reading = VectorReading(decoder.model, hold.reading, hold.vector, tokenizer)
    for site, tap in zip(vector.sites, taps.values(), strict=True):
        params = vector.params(site)
        method.check(site, params)
        factor = 1.0 if counted == "paper" else norm_factor(method, vector, site, params)
        block = None if site.kind in ("resid_pre", "resid_post") else decoder.blocks[site.layer]
        more: dict[str, Any] = {"source": sources.get(tap.site)}
        if hold is not None and reading is not None:
            more["held"] = HeldStrength(hold, reading, tap.site, method, params, factor)
        plan = (method, params, tap, written, dose, factor, lengths, block)
        edits.append(Edit(*plan, **more) if guide is None else GuidedEdit(*plan, **more, guide=guide))
    for edit in edits:
        if isinstance(edit, GuidedEdit):
            edit.siblings = edits
    return edits


def _refuse_window(vector: SteeringVector, written: Scope) -> None:
    """Refuse what counts from the prompt's end on where a window of the prompt is written.

    Raises:
        ScopeError: with what counts.
    """
    per_token = vector.when is not None and vector.when.per_token
    counts = {"a fade": vector.fade is not None, "hold": vector.hold is not None, "per token": per_token}
    for name, is_set in counts.items():
        if is_set and written.is_window:
            raise ScopeError(
                f"scope '{written}' lies in the prompt, and {name} counts generated tokens; leave one of them out"
            )


def _refuse_twice(edits: Sequence[Edit]) -> None:
    """Refuse two gates that add one direction at one site: a row that opens both would get it twice."""
    gated = [edit for edit in edits if isinstance(edit.method, Gated)]
    for number, edit in enumerate(gated):
        for other in gated[:number]:
            is_there = edit.tap.site == other.tap.site and share_rows(edit, other)
            if is_there and torch.equal(edit.params["direction"], other.params["direction"]):
                raise VectorMismatchError(
                    f"{edit.tap.site}: two gated vectors add the same direction, twice to a row that opens both; join "
                    "their conditions with | (steerkit.methods.conditional.combine)"
                )


def _prompt_learning(model: nn.Module) -> str | None:
    """Why only scope `all` is known on this model, if so: virtual tokens stand before the text."""
    config: Any = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        return f"a {config.peft_type} adapter puts virtual tokens before the text, so positions are not known"
    return None
