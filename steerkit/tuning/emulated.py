"""Emulated finetuning: what finetuning did to small models, done to a large one while it decodes.

    log p = log softmax( z_large + sum_i lambda_i (log p_tuned,i - log p_base,i) )

Mitchell, Rafailov, Sharma, Finn, Manning (2024), "An Emulator for Fine-Tuning Large Language Models using Small
Language Models", arXiv 2310.12962. One pair and 1 is up-scaling; two pairs with lambda and 1 - lambda trade one
finetuning for another. Where this file departs: the small models keep caches of their own, which follow beams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from steerkit.activations.reading import position_inputs
from steerkit.errors import ModelError, StrengthError
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import inner_model
from steerkit.tokens.transformers_facts import cache_argument, cache_left_by

__all__ = ["EmulatedFinetuning"]

SmallPair = tuple[Any, Any, float]
"""A finetuned small model, its base, and lambda."""


class EmulatedFinetuning(LogitsProcessor):  # type: ignore[misc]
    """A logits processor for `generate` of the large model, in `logits_processor=[...]`; nothing of a model is changed.

    Args:
        pairs: finetuned small model, its base, and by what their difference is multiplied; all of one vocabulary.
        pad_id: the token that pads rows at the left; None where none are padded.

    Raises:
        ModelError: there is no pair, or vocabularies differ.
        StrengthError: a factor is not finite.

    Example:
        large.generate(**inputs, logits_processor=[EmulatedFinetuning([(tuned, base, 1.0)])])
    """

    def __init__(self, pairs: Sequence[SmallPair], *, pad_id: int | None = None) -> None:
        if not pairs:
            raise ModelError("emulated finetuning: got no pair; give (finetuned, base, factor) at least once")
        for _, _, factor in pairs:
            if not math.isfinite(factor):
                raise StrengthError(f"emulated finetuning: the factor is {factor}; give a finite number")
        sizes = {one.config.get_text_config().vocab_size for pair in pairs for one in pair[:2]}
        if len(sizes) > 1:
            raise ModelError(f"emulated finetuning: vocabularies of {sorted(sizes)}; all models need the same one")
        self._size, self._pairs = sizes.pop(), tuple(pairs)
        self._readers = [(_Reader(tuned, pad_id), _Reader(base, pad_id)) for tuned, base, _ in pairs]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Move the large model's scores.

        Args:
            input_ids: [b, t] what has been written.
            scores: [b, v] the large model's logits.

        Returns:
            [b, v] float32 log-probabilities.

        Raises:
            ModelError: the large model has another vocabulary.
        """
        if scores.shape[-1] != self._size:
            raise ModelError(
                f"emulated finetuning: the large model has {scores.shape[-1]} tokens and the small ones {self._size}; "
                "all models need the same vocabulary"
            )
        moved = scores.float()
        for (tuned, base), (_, _, factor) in zip(self._readers, self._pairs, strict=True):
            moved = moved + factor * (tuned(input_ids) - base(input_ids)).to(moved.device)
        return torch.log_softmax(moved, dim=-1)


class _Reader:
    """A small model that reads along, and its cache."""

    def __init__(self, model: Any, pad_id: int | None) -> None:
        self._model, self._pad_id = model, pad_id
        self._seen: Tensor | None = None
        self._cache: Any = None
        self._named = cache_argument(inner_model(model))

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """Log-probabilities [b, v] of the next token, float32."""
        new = ids if not self._goes_on(ids) else ids[:, -1:]
        mask = torch.ones_like(ids)
        if self._pad_id is not None:
            mask = (ids != self._pad_id).long().cummax(dim=1).values  # pads are in front; behind them it is a token
        places = position_inputs(self._model, mask)
        given = {name: value[:, -new.shape[1] :] for name, value in places.items()}
        with evaluation_mode(self._model):
            found = self._model(
                input_ids=new.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                use_cache=True,
                **{self._named: self._cache},
                **{name: value.to(self._model.device) for name, value in given.items()},
            )
        self._seen, self._cache = ids.clone(), cache_left_by(found)
        return torch.log_softmax(found.logits[:, -1].float(), dim=-1).to(ids.device)

    def _goes_on(self, ids: Tensor) -> bool:
        """Whether each row is one that was read, with one token more; the cache's rows are put in its order."""
        seen = self._seen
        if seen is None or self._cache is None or ids.shape[1] != seen.shape[1] + 1:
            self._cache = None
            return False
        same = (ids[:, None, :-1] == seen[None]).all(dim=-1)  # [b, rows read]
        if not bool(same.any(dim=1).all()):
            self._cache = None
            return False
        order = same.int().argmax(dim=1)
        if not torch.equal(order, torch.arange(len(seen), device=order.device)):
            self._cache.batch_select_indices(order.to(self._model.device))
        return True
