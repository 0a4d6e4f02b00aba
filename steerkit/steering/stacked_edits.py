"""Rows of one batch under different vectors: one edit for all of them, in which every row finds its own.

Vectors of one method at one site, for different rows, differ in what `prepare` gives and in nothing else. Where that
may be [b, 1, d] (`Method.takes_rows`), each row's own is gathered once, when the edit is prepared; a pass then costs as
much as under one vector. Other methods keep one edit for each vector, which writes its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerkit.network.sites import Site
from steerkit.steering.edits_at_sites import Edit
from steerkit.tokens.forward_pass import Pass

__all__ = ["StackedEdit", "share_rows", "stacked"]


@dataclass(eq=False)
class StackedEdit(Edit):
    """Several vectors of one method at one site, each for rows of its own."""

    parts: Sequence[Edit] = field(kw_only=True)

    @property
    def all_row_strengths(self) -> tuple[Any, ...]:
        """The strengths of all its vectors."""
        return tuple(part.row_strengths for part in self.parts)

    def activity(self) -> list[bool]:
        """Which rows are changed."""
        return [any(of_row) for of_row in zip(*(part.activity() for part in self.parts), strict=True)]

    def keep_compiled(self, device: torch.device) -> None:
        """Keep the present strengths of all its vectors where compiled code finds them.

        Args:
            device: of the site, as far as is known.
        """
        for part in self.parts:
            part.keep_compiled(device)

    def prepare_compiled(self, h: Tensor, facts: Pass) -> tuple[dict[str, Tensor], Tensor]:
        """What `prepare` gives, as part of compiled code: no row has two vectors.

        Args:
            h: [b, t, d] activations.
            facts: the pass.
        """
        prepared, active = self.parts[0].prepare_compiled(h, facts)
        for part in self.parts[1:]:
            other, acts = part.prepare_compiled(h, facts)
            prepared = {name: torch.where(acts, other[name], value) for name, value in prepared.items()}
            active = active | acts
        return prepared, active

    def _prepare(
        self, device: torch.device, dtype: torch.dtype, facts: Pass | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        with torch.inference_mode(mode=False), torch.no_grad():
            active = torch.tensor(self.activity(), device=device, dtype=torch.bool)
            owners = [self._owner(row) for row in range(len(active))]
            order = sorted(range(len(owners)), key=owners.__getitem__)
            made = [
                part.prepare_rows([row for row in order if owners[row] == place], device, dtype)
                for place, part in enumerate(self.parts)
            ]
            back = torch.tensor(order, device=device, dtype=torch.long).argsort()
            rows = {name: torch.cat([one[name] for one in made if one])[back] for name in next(filter(None, made))}
            if facts is not None:
                rows = {name: facts.expand(value, "rows") for name, value in rows.items()}
                active = facts.expand(active, "rows")
            return rows, active[:, None, None]

    def _owner(self, row: int) -> int:
        """Which of its vectors is the row's; any where none is."""
        return next((place for place, part in enumerate(self.parts) if part.row_strengths.acts_on(row)), 0)


def stacked(edits: Sequence[Edit]) -> list[Edit]:
    """Edits in which those of different rows that differ in their vector alone are one.

    Args:
        edits: of one steering, in order. The edits of each row stay in their order.
    """
    found: list[list[Edit]] = []
    at: dict[Site, list[int]] = {}  # by site the places of its groups
    for edit in edits:
        places = at.setdefault(edit.tap.site, [])
        place = next((number for number in reversed(places) if _fits(edit, found[number])), None)
        later = [one for number in places if place is not None and number > place for one in found[number]]
        if place is None or any(share_rows(edit, one) for one in later):
            places.append(len(found))
            found.append([edit])
        else:
            found[place].append(edit)
    return [group[0] if len(group) == 1 else _joined(group) for group in found]


def _fits(edit: Edit, group: Sequence[Edit]) -> bool:
    """Whether an edit differs from others at its site in its vector and its rows alone."""
    first = group[0]
    is_plain = all(type(one) is Edit and one.source is None and not one.row_strengths.varies for one in (edit, first))
    if (
        not is_plain
        or not edit.method.takes_rows
        or edit.row_strengths.rows is None
        or first.row_strengths.rows is None
    ):
        return False
    same = edit.method == first.method and edit.scope == first.scope
    shapes = [{name: value.shape for name, value in one.params.items()} for one in (edit, first)]
    return same and shapes[0] == shapes[1] and not any(share_rows(edit, one) for one in group)


def share_rows(one: Edit, other: Edit) -> bool:
    """Whether two edits may write a row in common.

    Args:
        one: an edit.
        other: another one of the same steering.
    """
    if one.row_strengths.rows is None or other.row_strengths.rows is None:
        return True
    return any(both == (True, True) for both in zip(one.row_strengths.rows, other.row_strengths.rows, strict=False))


def _joined(group: Sequence[Edit]) -> StackedEdit:
    """Edits of one method at one place as a single one, whose rows differ."""
    first = group[0]
    plan = (
        first.method,
        first.params,
        first.tap,
        first.scope,
        first.row_strengths,
        first.factor,
        first.lengths,
        first.block,
    )
    return StackedEdit(*plan, parts=tuple(group))
