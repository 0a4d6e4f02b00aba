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
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from steerkit.errors import ModelError, StrengthError, near_miss
from steerkit.network.decoder import Decoder
from steerkit.network.placement import Placement
from steerkit.network.sites import Site
from steerkit.steering.dispatch import attached_edits, make_compiled_code_see_hooks, settle
from steerkit.steering.edits_at_sites import Edit, GuidedEdit, RowStrengths
from steerkit.steering.planning import Target, joined, planned
from steerkit.steering.replay import Reading, replaying
from steerkit.steering.shared_prefixes import drop_shared_prefixes, refuse_running_batches
from steerkit.steering.strengths import strength_value, vectors_of
from steerkit.steering.uncompiled import gates_uncompiled, refuse_compiled_model
from steerkit.tokens.clock import PassClock
from steerkit.tokens.scope import PromptLengths
from steerkit.vector.steering_vector import UNITS

if TYPE_CHECKING:
    from steerkit.steering.strengths import Strength, Vectors
    from steerkit.tokens.decoding import Decoding

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
    target = Target.of(model, None if prompt_lengths is None else PromptLengths(prompt_lengths), tokenizer)
    listed_strengths = [RowStrengths(vector, strength, unit) for vector in listed]
    edits: list[Edit] = []
    for vector, row_strengths in zip(listed, listed_strengths, strict=True):
        edits += planned(target, vector, row_strengths, scope, unit)
    edits = joined(edits)
    refuse_compiled_model(model, target.decoder, edits)
    return Steering(target.decoder, edits, [one for one in listed_strengths if not one.fixed])


class Steering:
    """A planned steering; attach it with `with`. Made by `steer`."""

    def __init__(self, decoder: Decoder, edits: Sequence[Edit], row_strengths: Sequence[RowStrengths]) -> None:
        self._decoder, self._edits, self._row_strengths = decoder, tuple(edits), tuple(row_strengths)
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
        return all(edit.scope.leaves_prompts for edit in self._edits) and not any(
            isinstance(edit, GuidedEdit) for edit in self._edits
        )

    @property
    def strength(self) -> float | tuple[float, ...] | None:
        """The strength in use; None where every vector has its own."""
        return self._row_strengths[0].value if self._row_strengths else None

    @strength.setter
    def strength(self, value: Strength) -> None:
        """Change the strength in place; a compiled model is not compiled again.

        Raises:
            StrengthError: every vector has its own strength, or the value is not finite.
            ModelError: continuous batching runs at present and shares what was made with the old strength.
        """
        if not self._row_strengths:
            raise StrengthError("strength: every vector has its own (vector.at); make new ones")
        checked = strength_value(value)
        if self._entered:
            refuse_running_batches(self._decoder.model, "strength")
            drop_shared_prefixes(self._decoder.model)
        for one in self._row_strengths:
            one.value = checked
        changed = [
            edit
            for edit in self._edits
            if any(own is one for own in edit.all_row_strengths for one in self._row_strengths)
        ]
        for edit in changed:
            edit.refresh()
        if self._entered:
            with _ATTACH:
                settle(tap for edit in changed for tap in edit.taps)

    def decoding(self, rows: Decoding) -> contextlib.AbstractContextManager[None]:
        """Say what the rows of the next passes are, where a loop of one's own runs them and not `generate`.

        Args:
            rows: where their prompts end, and what their cache holds. Passes inside the context go on with it.

        Returns:
            A context manager, to be entered inside this one and in the thread that runs the model.

        Raises:
            ModelError: this steering is not active.
        """
        clock = PassClock.of(self._decoder.model)
        if clock is None or not self._entered:
            raise ModelError("decoding: this steering is not active; enter it first")
        return clock.decoding(rows)

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
            stack.enter_context(gates_uncompiled(self._decoder, self._edits))
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
