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
    """

    def __init__(self, site: Site, number: int, board: Board) -> None:
        self.site, self._board = site, board
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
        stream = h.float() if before is None else h.float() + before.float()
        if not torch.compiler.is_compiling():
            if self.reader is not None:
                self.reader(stream)
            if self.rests:
                return h
        board, count = self._board, h.shape[0]
        row, place = board.row[:count], board.place[:count]
        moved, written = torch.zeros_like(stream), torch.zeros_like(row, dtype=torch.bool)
        for level in range(board.levels):
            token = self._term[level][row] * board.tokens + place
            entry = torch.where(board.on.view(-1)[token], self._entry[level][row], 0)
            by, reached = displacement(
                stream,
                board.directions[entry],
                board.directions[board.second[entry]],
                board.weights[entry],
                board.turns.view(-1, board.turns.shape[-1])[token],
                board.threshold[entry],
            )
            here = reached & (entry > 0)
            by = torch.where(here[:, None], by, 0.0)
            stream, moved, written = stream + by, moved + by, written | here
        # Tokens that nothing writes stay bitwise, and are not rounded again.
        return torch.where(written[:, None], (h.float() + moved).to(h.dtype), h)
