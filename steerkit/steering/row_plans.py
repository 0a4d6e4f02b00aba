"""`RowPlans`: steering for batches whose rows come and go, in which each vector is planned once.

`steer` plans its vectors anew each time: it looks for their sites, checks them, reads their tensors. A loop that serves
many requests enters other rows at every arrival and every end, so here that is done when a vector is first added. For
another set of rows only the strengths are laid out anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerkit.composition.rows import shared
from steerkit.errors import StrengthError
from steerkit.methods._protocols import NeedsPrompt
from steerkit.steering.edits_at_sites import Edit, GuidedEdit, RowStrengths
from steerkit.steering.planning import Target, joined, planned, with_row_strengths
from steerkit.steering.steering import Steering
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["PlannedRow", "RowPlans"]


@dataclass(frozen=True, eq=False)
class _Planned:
    """One vector as it is applied, but for its strength.

    Attributes:
        edits: of it, at any strength.
        row_strengths: the strength that it was planned with.
        scope: which tokens are written.
        minimum: the fewest tokens of a prompt that it can write.
    """

    edits: tuple[Edit, ...]
    row_strengths: RowStrengths
    scope: Scope
    minimum: int

    @property
    def is_gated(self) -> bool:
        """Whether a prompt decides about it."""
        return any(isinstance(edit, GuidedEdit) for edit in self.edits)


@dataclass(frozen=True)
class PlannedRow:
    """How one row is steered: vectors in order, each with its strength. None of them is the unsteered model.

    Attributes:
        key: what tells it from others: rows with one key put the same into a cache.
    """

    key: tuple[Hashable, ...]
    vectors: tuple[tuple[Hashable, _Planned, float], ...]

    @property
    def is_gated(self) -> bool:
        """Whether prompts decide about it; such rows neither join others nor are joined."""
        return any(one.is_gated for _, one, _ in self.vectors)

    @property
    def minimum_prompt(self) -> int:
        """The fewest real tokens of a prompt that it can write."""
        return max((one.minimum for _, one, _ in self.vectors), default=1)

    def settled(self, prompt: int, length: int) -> int:
        """How much of a text is steered in the same way where it is the beginning of a longer prompt.

        Args:
            prompt: real tokens of its prompt.
            length: real tokens of it in all.

        Returns:
            So many tokens from its first one on.
        """
        if self.is_gated:
            return 0
        counted = [prompt for _, one, _ in self.vectors if one.row_strengths.varies]  # from the prompt's end on
        return min([length, *counted, *(one.scope.settled(prompt, length) for _, one, _ in self.vectors)])


class RowPlans:
    """The plans of vectors that were added; of very many, those that were used last.

    Args:
        model: any decoder-only transformers model, wrapped by PEFT or not.
        tokenizer: the model's, for scopes by role.
        most: how many are kept.

    Attributes:
        unsteered: a row that is not steered.

    Raises:
        SiteError: this is no model that can be steered.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, most: int = 1024) -> None:
        self._target, self._most = Target.of(model, tokenizer=tokenizer), most
        self._known: OrderedDict[Hashable, _Planned] = OrderedDict()
        self.unsteered = PlannedRow((), ())

    @property
    def count(self) -> int:
        """How many plans are kept."""
        return len(self._known)

    def add(self, vectors: Sequence[SteeringVector]) -> PlannedRow:
        """Plan how a row is steered, checking all that can be checked.

        Args:
            vectors: as they are applied, in order, each with one strength at most.

        Raises:
            StrengthError: a vector has strengths for several rows.
            SteerError: see `steerkit.steer`.
        """
        found = []
        for vector in vectors:
            key, row_strengths = vector.application, RowStrengths(vector, None, None)
            if key not in self._known:
                edits = tuple(planned(self._target, vector, row_strengths))
                scope = edits[0].scope
                needs = [one.method.minimum_prompt(one.params) for one in edits if isinstance(one.method, NeedsPrompt)]
                self._known[key] = _Planned(edits, row_strengths, scope, max(needs, default=1))
            if isinstance(row_strengths.value, tuple) or vector.rows is not None:
                raise StrengthError("a vector of one row has one strength, this one has some for several rows")
            self._known.move_to_end(key)
            found.append((key, self._known[key], row_strengths.value))
        while len(self._known) > self._most:  # scopes and fades are as many as people can write
            self._known.popitem(last=False)
        return PlannedRow(tuple((key, value) for key, _, value in found), tuple(found))

    def steering(self, rows: Sequence[PlannedRow]) -> Steering | None:
        """The steering of a batch, to be entered; None where none of its rows is steered.

        Args:
            rows: one for each row of the batch.
        """
        edits: list[Edit] = []
        for one in shared(row.vectors for row in rows):
            strengths = [one.strengths.get(row) for row in range(len(rows))]
            some = next(value for value in strengths if value is not None)
            values = tuple(some if value is None else value for value in strengths)
            row_strengths = one.vector.row_strengths.at(values, tuple(value is not None for value in strengths))
            edits += with_row_strengths(one.vector.edits, row_strengths)
        return Steering(self._target.decoder, joined(edits), []) if edits else None
