"""`Point`: the hook at one place. It is traced into the model's graph, and reads nothing but the board."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.engines.vllm.board import Board
from steerkit.maths.rank_two import displacement
from steerkit.network.sites import Site

__all__ = ["Point"]

Reader = Callable[[Tensor], None]


class Point:
    """One place of the model, written for each token as its request wants it.

    Args:
        site: what the module's output is.
        number: of the place on the board.
        board: the numbers.
        nests: the model is compiled as a whole, so that its graph may hold graphs.
    """

    def __init__(self, site: Site, number: int, board: Board, *, nests: bool = False) -> None:
        self.site, self._board, self._nests = site, board, nests
        self._entry, self._term = board.entry[number], board.term[number]
        self.reader: Reader | None = None
        self.rests = False
        """That nothing is written here in this step; looked at where Python runs in each step."""

    def hang(self, module: nn.Module) -> None:
        """Hook a module.

        Args:
            module: whose output is written. In vLLM a block's output is the pair of what its MLP adds and of what stood
                before, both [tokens, d], whose sum is the residual stream; a half's output is one tensor.
        """
        module.register_forward_hook(self._hook)

    def _hook(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if not torch.compiler.is_compiling() and self.rests and self.reader is None:
            return output
        if isinstance(output, Tensor):
            return self._written(output, None)
        first, *rest = output
        before = rest[0] if self.site.kind == "resid_post" and rest and isinstance(rest[0], Tensor) else None
        return self._written(first, before), *rest

    def _written(self, h: Tensor, before: Tensor | None) -> Tensor:
        """What is added to `before`, [n, d], so that the sum is as the tokens' edits want it."""
        if not torch.compiler.is_compiling():
            if self.reader is not None:
                self.reader(h.float() if before is None else h.float() + before.float())
            if self.rests:
                return h
        board, count = self._board, h.shape[0]
        of_tokens = board.row[:count], board.place[:count]
        of_board = (board.on, board.lead, board.directions, board.second, board.offsets, board.threshold)
        write = _region if self._nests else _rewritten
        return write(h, before, self._entry, self._term, *of_tokens, *of_board)


def _rewritten(
    h: Tensor,
    before: Tensor | None,
    entries: Tensor,
    terms: Tensor,
    row: Tensor,
    place: Tensor,
    on: Tensor,
    lead: Tensor,
    directions: Tensor,
    second: Tensor,
    offsets: Tensor,
    threshold: Tensor,
) -> Tensor:
    """[n, d] with the edits of all levels, one after the other."""
    stream = h.float() if before is None else h.float() + before.float()
    moved, written = torch.zeros_like(stream), torch.zeros_like(row, dtype=torch.bool)
    for level in range(entries.shape[0]):
        token = terms[level][row] * on.shape[1] + place
        entry = torch.where(on.view(-1)[token], entries[level][row], 0)
        leading = lead.view(-1, lead.shape[-1])[token]
        by, reached = displacement(
            stream, directions[entry], directions[second[entry]], offsets[entry], leading, threshold[entry]
        )
        here = reached & (entry > 0)
        by = torch.where(here[:, None], by, 0.0)
        stream, moved, written = stream + by, moved + by, written | here
    # Tokens that nothing writes stay bitwise, and are not rounded again.
    return torch.where(written[:, None], (h.float() + moved).to(h.dtype), h)


# Compiled once for all places: inline, a model of 30 blocks takes minutes longer to compile.
_region = torch.compiler.nested_compile_region(_rewritten)
