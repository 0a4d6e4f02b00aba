"""`Passes`: forward passes of the model that is served, each under the steering of its rows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.network.decoder import execution_device, find_decoder
from steerkit.serve.probe import Probe, reading
from steerkit.steering.row_plans import PlannedRow, RowPlans
from steerkit.steering.steering import Steering
from steerkit.tokens.decoding import Decoding
from steerkit.tokens.transformers_facts import cache_argument, cache_left_by

__all__ = ["Pass", "Passes", "Under"]


class Under(NamedTuple):
    """What some rows run under, as long as they stay together.

    Attributes:
        steering: of all of them; None where none is steered.
        decoding: where their prompts end.
    """

    steering: Steering | None
    decoding: Decoding


class Pass(NamedTuple):
    """What a pass gave.

    Attributes:
        logits: [b, v] float32 of the last column.
        cache: of all columns so far.
        readings: [b] of each probe at the last column.
    """

    logits: Tensor
    cache: Any
    readings: dict[Probe, Tensor]


class Passes:
    """Runs a model. Steering that is attached stays so until other rows run: rows seldom change from step to step.

    All of it belongs to one thread.

    Args:
        model: any decoder-only transformers model.
        tokenizer: the model's, for scopes by role.

    Attributes:
        plans: of the vectors.
        device: where ids go.
        entered: how often another steering was attached.
        count: how many passes were run.
        tokens: how many tokens they carried, pads included.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None) -> None:
        self.model, self.decoder = model, find_decoder(model)
        self.plans = RowPlans(model, tokenizer)
        self.device = execution_device(self.decoder)
        self._named = set(inspect.signature(self.decoder.model.forward).parameters)
        self._cache = cache_argument(self.decoder.model)
        self._active: Steering | None = None
        self._stack = contextlib.ExitStack()
        self.entered = self.count = self.tokens = 0

    def under(
        self,
        rows: Sequence[PlannedRow],
        prompts: Sequence[int],
        texts: Sequence[Sequence[int]] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Under:
        """What rows run under.

        Args:
            rows: how each is steered.
            prompts: real tokens of each prompt.
            texts: ids of each row that the cache holds; None where it holds nothing.
            lengths: real tokens of each row when the next pass is over, where that one holds more than prompts.
        """
        return Under(self.plans.steering(rows), Decoding(prompts, texts, lengths))

    def run(
        self,
        under: Under,
        ids: Tensor,
        *,
        mask: Tensor | None,
        positions: Tensor,
        cache: Any = None,
        probes: Sequence[Probe] = (),
    ) -> Pass:
        """Run one pass.

        Args:
            under: what its rows run under.
            ids: [b, t].
            mask: [b, columns] 1 on real tokens, past ones included; None where no row has pads.
            positions: [b, t] place of each token in its text.
            cache: what earlier passes of the same rows left.
            probes: what is read.
        """
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if "position_ids" in self._named:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._named:
            inputs["logits_to_keep"] = 1
        if cache is not None:
            inputs[self._cache] = cache
        self.count, self.tokens = self.count + 1, self.tokens + ids.numel()
        self._enter(under.steering)
        told = contextlib.nullcontext() if under.steering is None else under.steering.decoding(under.decoding)
        with torch.no_grad(), told, reading(probes, len(ids)) as values:
            out = self.model(**inputs)
        return Pass(out.logits[:, -1].float(), cache_left_by(out), values)

    def release(self) -> None:
        """Take all steering off the model."""
        self._stack.close()
        self._active = None

    def _enter(self, steering: Steering | None) -> None:
        """Have this steering on from now on, and only this; entering anew costs, so the same one stays on."""
        if steering is self._active:
            return
        self.release()
        if steering is not None:
            self.entered += 1
            self._stack.enter_context(steering)
            self._active = steering
