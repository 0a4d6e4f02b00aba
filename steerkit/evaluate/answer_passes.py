"""Passes over texts with answers (teacher forcing), in which nothing is computed that steering cannot have changed.

Blocks before the first steered one run once for all strengths (`steering.kept_blocks`), and so do prompts that the
scope leaves alone (`steering.kept_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steerkit.activations.reading import position_inputs
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device
from steerkit.steering.kept_prompts import Split

if TYPE_CHECKING:
    from steerkit.evaluate.trial import Trial
    from steerkit.prompts.batching import Batch
    from steerkit.prompts.rendering import Rendered

__all__ = ["AnswerPasses", "Seen"]


class Seen(NamedTuple):
    """What a pass predicts for the answers of a batch.

    Attributes:
        targets: [b, t] ids of the answers' tokens.
        logits: [b, t, v], column `i` predicts column `i` of the targets.
        baseline: [b, t, v], the same of the unsteered model; None unless it was needed.
        spans: by row, the columns of its answer.
    """

    targets: Tensor
    logits: Tensor
    baseline: Tensor | None
    spans: list[slice]


@dataclass(frozen=True, eq=False)
class _Layout:
    """How a batch is given to the model: `inputs` makes the arguments of one pass, `columns` those of the answers."""

    name: str
    inputs: Callable[[], dict[str, Any]]
    columns: slice
    targets: Tensor
    spans: list[slice]


class AnswerPasses:
    """Runs a trial's model over texts with answers.

    Args:
        trial: what steers, if anything does.
        rendered: the texts; what is called an answer here is all from `prompt_length` on.
        beside: run the unsteered model on the same batches too, where it is not known what it says.
    """

    def __init__(self, trial: Trial, rendered: Sequence[Rendered], *, beside: bool) -> None:
        self._trial, self._rendered, self._beside = trial, rendered, beside

    def __call__(self, batch: Batch) -> Seen:
        """Run one batch.

        Args:
            batch: padded at the left.
        """
        setup = self._trial.setup
        texts = tuple(self._rendered[row] for row in batch.rows)
        planned = self._trial.steering(batch.prompt_lengths)
        with torch.no_grad(), evaluation_mode(setup.decoder.model):
            layout = self._behind_prompts(batch, texts) if getattr(planned, "leaves_prompts", True) else None
            layout = layout or self._whole(batch)
            baseline: Tensor | None = None
            if self._beside and any(setup.predicted.get(text) is None for text in texts):
                baseline = setup.model(**layout.inputs()).logits[:, layout.columns]
            with planned as steering, setup.kept.around(setup.decoder, steering, (layout.name, texts)):
                logits = setup.model(**layout.inputs()).logits[:, layout.columns]
        return Seen(layout.targets.to(logits.device), logits, baseline, layout.spans)

    def _whole(self, batch: Batch) -> _Layout:
        """Whole texts, without a cache; the head runs on the answers' columns only."""
        decoder = self._trial.setup.decoder
        ids, mask = (one.to(execution_device(decoder)) for one in (batch.input_ids, batch.attention_mask))
        counts = self._counts(batch)
        keep = 1 + max(counts)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "use_cache": False,
            "logits_to_keep": keep,
            **position_inputs(decoder.model, mask),
        }
        spans = [slice(keep - 1 - count, keep - 1) for count in counts]
        return _Layout("whole", lambda: inputs, slice(-keep, -1), ids[:, 1 - keep :], spans)

    def _behind_prompts(self, batch: Batch, texts: tuple[Rendered, ...]) -> _Layout | None:
        """The answers behind what the prompts left in a cache; None where that is not possible."""
        setup = self._trial.setup
        split = Split.of(batch, execution_device(setup.decoder))
        first = None if split is None else setup.read.inputs(setup.decoder, split, texts)
        if split is None or first is None:
            return None
        ready = [first]

        def inputs() -> dict[str, Any]:
            again = ready.pop() if ready else setup.read.inputs(setup.decoder, split, texts)
            assert again is not None  # it was there a moment ago
            return again

        spans = [slice(0, count) for count in self._counts(batch)]
        return _Layout("behind prompts", inputs, slice(None), split.rest[:, 1:], spans)

    def _counts(self, batch: Batch) -> list[int]:
        """Tokens of each row's answer."""
        return [len(self._rendered[row].ids) - self._rendered[row].prompt_length for row in batch.rows]
