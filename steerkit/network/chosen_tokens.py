"""`ChosenTokens`: how likely the model found each token that `generate` took, without a pass of its own.

The logits are those that leave the model, before temperatures, penalties and noise change them. Each pass tells in its
input what was taken of the last one's, so that the logits of one pass are kept and no more.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["ChosenTokens"]


class ChosenTokens:
    """A context around one `generate` that gives one answer to each row.

    Args:
        model: what `generate` calls token by token.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._logits: Tensor | None = None
        self._taken: list[Tensor] = []
        self._found: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> ChosenTokens:
        self._handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True),
            self._model.register_forward_hook(self._after),
        ]
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def log_probs(self, answers: Tensor) -> Tensor | None:
        """Of every token, once `generate` has ended.

        Args:
            answers: [b, t] the ids that it took.

        Returns:
            [b, t] float32, nats, on the device of the logits, what follows a row's end included; None where the answers
            were not found token by token so, as with beams.
        """
        self._take(answers[:, -1])
        taken, found = self._taken, self._found
        if not found or any(len(one) != len(answers) for one in taken):
            return None
        heard = torch.stack(taken, dim=1)
        return torch.stack(found, dim=1) if torch.equal(heard, answers.to(heard.device)) else None

    def _before(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self._logits is not None and isinstance(ids, Tensor):
            self._take(ids[:, -1])

    def _after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        logits = getattr(output, "logits", None)
        self._logits = logits[:, -1].float() if isinstance(logits, Tensor) else None

    def _take(self, tokens: Tensor) -> None:
        """Note how likely some tokens were by the last pass's logits."""
        logits, self._logits = self._logits, None
        if logits is not None and len(logits) == len(tokens):
            self._taken.append(tokens.to(logits.device))
            self._found.append(-cross_entropy(logits, self._taken[-1], reduction="none"))
