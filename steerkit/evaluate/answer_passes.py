"""Passes over texts with answers (teacher forcing), in which nothing is computed that steering cannot have changed.

Blocks before the first steered one run once for all strengths (`steering.kept_blocks`), and so do prompts that the
scope leaves alone (`steering.kept_prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations.reading import position_inputs
from steerkit.errors import DataError
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.steering.kept_prompts import Split

if TYPE_CHECKING:
    from steerkit.evaluate.trial import Trial
    from steerkit.prompts.batching import Batch
    from steerkit.prompts.rendering import Rendered

__all__ = ["AnswerPasses", "Seen"]


class Seen(NamedTuple):
    """What a pass predicts for the answers of a batch, by row.

    Attributes:
        targets: [t] ids of the answer's tokens.
        logits: [t, v], row `i` predicts `targets[i]`.
        baseline: [t, v], the same of the unsteered model; None where it was not asked.
    """

    targets: list[Tensor]
    logits: list[Tensor]
    baseline: list[Tensor] | None


@dataclass(frozen=True, eq=False)
class _Layout:
    """How a batch is given to the model.

    Attributes:
        name: of the layout.
        inputs: makes the arguments of one pass.
        targets: [b, t] ids of the columns that are predicted.
        columns: those of the logits that predict them.
        spans: by row, the columns of its answer among these.
    """

    name: str
    inputs: Callable[[], dict[str, Any]]
    targets: Tensor
    columns: slice
    spans: list[slice]

    def by_row(self, values: Tensor) -> list[Tensor]:
        """The columns of each row's answer; values [b, t, ...]."""
        return [row[span] for row, span in zip(values, self.spans, strict=True)]

    def run(self, model: nn.Module) -> list[Tensor]:
        """By row the logits [t, v] of its answer."""
        return self.by_row(model(**self.inputs()).logits[:, self.columns])


class AnswerPasses:
    """Runs a trial's model over texts with answers.

    Args:
        trial: what steers, if anything does.
        rendered: the texts; what is called an answer here is all from `prompt_length` on.
        beside: the same answers as the unsteered model reads them, which then runs too where it is not known what it
            says; None leaves it out.

    Raises:
        DataError: the answers of the two are not the same tokens.
    """

    def __init__(self, trial: Trial, rendered: Sequence[Rendered], beside: Sequence[Rendered] | None) -> None:
        self._trial, self._rendered, self._plain = trial, rendered, beside
        for text, plain in zip(rendered, beside or (), strict=beside is not None):
            if text.ids[text.prompt_length :] != plain.ids[plain.prompt_length :]:
                raise DataError(
                    f"{plain.text[plain.answer_start :][:40]!r} is other tokens behind the system prompt, so "
                    "predictions cannot be compared token by token; give a system prompt or an answer that ends or "
                    "begins with a word"
                )

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
            layout = layout or self._whole(batch, texts)
            baseline = self._unsteered(batch, texts, layout)
            with planned as steering, setup.kept.around(setup.decoder, steering, (layout.name, texts)):
                logits = layout.run(setup.model)
        return Seen([ids.to(logits[0].device) for ids in layout.by_row(layout.targets)], logits, baseline)

    def baseline(self, row: int, place: int, seen: Seen) -> Tensor | None:
        """What the unsteered model says of one text, which is kept as long as there is room.

        Args:
            row: which of the texts.
            place: its place in the batch.
            seen: what the batch gave.

        Returns:
            [t, v] float32; None where it was not asked for.
        """
        if self._plain is None:
            return None
        unsteered, text = self._trial.setup.plain, self._plain[row]
        if seen.baseline is None:
            return unsteered.predicted[text]
        return unsteered.keep(text, seen.baseline[place].float())

    def _unsteered(self, batch: Batch, texts: tuple[Rendered, ...], layout: _Layout) -> list[Tensor] | None:
        """The logits of the unsteered model, if any of the batch are wanted and not known."""
        setup = self._trial.setup
        plain = () if self._plain is None else tuple(self._plain[row] for row in batch.rows)
        if all(text in setup.plain.predicted for text in plain):
            return None
        if plain != texts:  # behind a system prompt that the unsteered model does not read
            pad = pad_token_id(setup.tokenizer)
            layout = self._whole(batches(plain, len(plain), pad_id=pad, side="left", groups=len(plain))[0], plain)
        return layout.run(setup.model)

    def _whole(self, batch: Batch, texts: Sequence[Rendered]) -> _Layout:
        """Whole texts, without a cache; the head runs on the answers' columns only."""
        decoder = self._trial.setup.decoder
        ids, mask = (one.to(execution_device(decoder)) for one in (batch.input_ids, batch.attention_mask))
        counts = _counts(texts)
        keep = 1 + max(counts)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "use_cache": False,
            "logits_to_keep": keep,
            **position_inputs(decoder.model, mask),
        }
        spans = [slice(keep - 1 - count, keep - 1) for count in counts]
        return _Layout("whole", lambda: inputs, ids[:, 1 - keep :], slice(-keep, -1), spans)

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

        spans = [slice(0, count) for count in _counts(texts)]
        return _Layout("behind prompts", inputs, split.rest[:, 1:], slice(None), spans)


def _counts(texts: Sequence[Rendered]) -> list[int]:
    """Tokens of each text's answer."""
    return [len(text.ids) - text.prompt_length for text in texts]
