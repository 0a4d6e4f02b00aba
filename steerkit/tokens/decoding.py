"""`Decoding`: the rows of a decoding loop that is not `generate`, and what no pass of such a loop can tell.

Rows are padded at the left, so that all of them end in one column:

    pad pad  a   b   c | d             a row whose prompt ends behind c, and which has chosen d
     e   f   g | h   i   j             one that has chosen three tokens

Where each row's prompt ends, how many columns a cache holds that does not count them, and the ids of what it holds: all
that a loop knows, because it has put its rows together itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import ScopeError

__all__ = ["Decoding"]


class Decoding:
    """The rows of a decoding loop of one's own, for `Steering.decoding`.

    Rows that come or go make another one. Nothing that scopes need is lost then: what those by role have read is read
    again from `texts`. Only a gate's decision is: it lives in `store` and so with one set of rows.

    Args:
        prompt_lengths: real prompt tokens of each row, at least 1.
        texts: the ids of each row that the cache holds, without pads; None where it holds nothing yet.
        lengths: real tokens of each row when the next pass is over; None where that one ends with the prompts, or
            begins behind them.

    Attributes:
        columns: how many the cache holds, pads included; it goes on with every pass.
        boundary: the first column behind the prompts, where it is the same in all rows; else None.
        store: what is kept from pass to pass of these rows.

    Raises:
        ScopeError: no rows, a prompt without a token, or another number of texts or lengths.

    Example:
        >>> rows = Decoding([3, 3], [[5, 6, 7, 8], [5, 6, 7, 8, 9]])
        >>> rows.columns, rows.boundary, rows.ends_on(torch.device("cpu")).flatten().tolist()
        (5, None, [4, 3])
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        texts: Sequence[Sequence[int]] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        counts = {len(given) for given in (prompt_lengths, texts, lengths) if given is not None}
        if not prompt_lengths or min(prompt_lengths) < 1 or len(counts) > 1:
            raise ScopeError(
                f"decoding: got prompts of {list(prompt_lengths)} tokens for {sorted(counts)} rows; give 1 or more each"
            )
        self._texts = texts
        held = [0] * len(prompt_lengths) if texts is None else [len(text) for text in texts]
        reach = list(map(max, held, prompt_lengths)) if lengths is None else list(lengths)
        self._first = [max(reach) - own for own in reach]
        self._ends = [start + own for start, own in zip(self._first, prompt_lengths, strict=True)]
        self._placed: dict[tuple[str, torch.device], Tensor] = {}
        self.columns = max(held)
        self.boundary: int | None = self._ends[0] if len(set(self._ends)) == 1 else None
        self.store: dict[Any, Any] = {}

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self._ends)

    def is_step(self, past: int, width: int) -> bool:
        """Whether a pass is one decoding step: one token of each row, all behind their prompts.

        Args:
            past: columns before the pass.
            width: columns in it.
        """
        return width == 1 and past >= max(self._ends)

    def first_on(self, device: torch.device) -> Tensor | None:
        """[b] column of every row's first real token; None where no row has pads.

        Args:
            device: of the passes.
        """
        return self._on("first", self._first, device) if any(self._first) else None

    def ends_on(self, device: torch.device) -> Tensor:
        """[b, 1] first column behind every row's prompt.

        Args:
            device: of the passes.
        """
        return self._on("ends", self._ends, device)[:, None]

    def ids_on(self, device: torch.device) -> Tensor | None:
        """[b, columns] ids that the cache held when the rows came together, -1 for pads; None where it held nothing.

        Args:
            device: of the passes.
        """
        if self._texts is None or not any(map(len, self._texts)):
            return None
        width = max(map(len, self._texts))
        padded = [[-1] * (width - len(text)) + list(text) for text in self._texts]
        return torch.tensor(padded, dtype=torch.long, device=device)

    def _on(self, name: str, values: Sequence[int], device: torch.device) -> Tensor:
        """A number for each row, brought to a device once."""
        if (name, device) not in self._placed:
            self._placed[name, device] = torch.tensor(values, dtype=torch.long, device=device)
        return self._placed[name, device]
