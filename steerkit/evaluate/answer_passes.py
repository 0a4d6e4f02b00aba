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
from steerkit.evaluate.abreast import by_row
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.steering.kept_prompts import Split
from steerkit.steering.repeated import Repeated
from steerkit.steering.steering import Steering, steer

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
        inputs: makes the arguments of one pass over some of the rows, or over all (None).
        targets: [b, t] ids of the columns that are predicted.
        columns: those of the logits that predict them.
        spans: by row, the columns of its answer among these.
    """

    name: str
    inputs: Callable[[Tensor | None], dict[str, Any]]
    targets: Tensor
    columns: slice
    spans: list[slice]

    def run(self, model: nn.Module, rows: Tensor | None = None) -> list[Tensor]:
        """By row the logits [t, v] of its answer."""
        logits = model(**self.inputs(rows)).logits[:, self.columns]
        spans = self.spans if rows is None else [self.spans[row] for row in rows.tolist()]
        return [row[span] for row, span in zip(logits, spans, strict=True)]

    def answers(self, device: torch.device) -> list[Tensor]:
        """By row the ids [t] of its answer."""
        return [ids[span].to(device) for ids, span in zip(self.targets, self.spans, strict=True)]


class AnswerPasses:
    """Runs texts with answers under one trial, or under several that share passes (`steerkit.evaluate.abreast`).

    Args:
        trials: of one setup; of several each steers some rows.
        rendered: the texts; what is called an answer here is all from `prompt_length` on.
        beside: the same answers as the unsteered model reads them, which then runs too where it is not known what it
            says; None leaves it out.

    Raises:
        DataError: the answers of the two are not the same tokens.
    """

    def __init__(
        self, trials: Sequence[Trial], rendered: Sequence[Rendered], beside: Sequence[Rendered] | None
    ) -> None:
        self._trials, self._rendered, self._plain = trials, rendered, beside
        self._setup = trials[0].setup
        for text, plain in zip(rendered, beside or (), strict=beside is not None):
            if text.ids[text.prompt_length :] != plain.ids[plain.prompt_length :]:
                raise DataError(
                    f"{plain.text[plain.answer_start :][:40]!r} is other tokens behind the system prompt, so "
                    "predictions cannot be compared token by token; give a system prompt or an answer that ends or "
                    "begins with a word"
                )

    def work(self) -> list[Batch]:
        """The batches: row i of all is text `i // trials` under trial `i % trials`."""
        setup = self._setup
        # Padded at the left, so that all answers end in the last column and the LM head runs on those columns only.
        # Behind kept prompts a pass is as wide as its longest answer.
        is_behind = setup.read.may_have and all(one.leaves_prompts for one in self._trials)
        found = batches(
            self._rendered,
            setup.batch_size,
            pad_id=pad_token_id(setup.tokenizer),
            side="left",
            length=_count if is_behind else None,
            device=execution_device(setup.decoder),
        )
        # The same texts stand together however many trials there are: what is kept of them is kept by batch.
        return [batch.repeated(len(self._trials)) for batch in found]

    def __call__(self, batch: Batch) -> Seen:
        """Run one batch.

        Args:
            batch: one of `work`, or a part of one.
        """
        setup, numbers = self._setup, [row // len(self._trials) for row in batch.rows]
        repeated, texts = Repeated.of(numbers), [self._rendered[number] for number in numbers]
        once = tuple(texts[row] for row in repeated.firsts)
        planned = self._steering(batch)
        with torch.no_grad(), evaluation_mode(setup.decoder.model):
            layout = self._behind_prompts(batch, texts) if getattr(planned, "leaves_prompts", True) else None
            layout = layout or self._whole(batch, texts)
            key, again = (layout.name, once), repeated.again if repeated.any else None
            # What changes the model says which blocks stay as they are: a steering does, and a change of weights.
            steering = planned if hasattr(planned, "untouched") else None
            baseline = self._unsteered(numbers, once, layout, repeated, steering)
            if again is not None:
                first = repeated.once
                setup.kept.learn(setup.decoder, steering, key, lambda: setup.model(**layout.inputs(first)), len(first))
            with planned, setup.kept.around(setup.decoder, steering, key, again):
                logits = layout.run(setup.model)
        return Seen(layout.answers(logits[0].device), logits, baseline)

    def whole(self, batch: Batch) -> Seen:
        """Run one batch as it comes: whole texts, steered or watched by whoever calls, gradients and all.

        Args:
            batch: one of `work`, or a part of one.
        """
        layout = self._whole(batch, [self._rendered[row // len(self._trials)] for row in batch.rows])
        model: Any = self._setup.model
        logits = layout.run(getattr(model, "_orig_mod", model))  # compiled code has no hooks on its tensors
        return Seen(layout.answers(logits[0].device), logits, None)

    def _steering(self, batch: Batch) -> Any:
        """The steering of a batch, whose rows belong to one trial or to several."""
        trials, setup = self._trials, self._setup
        if len(trials) == 1:
            return trials[0].steering(batch.prompt_lengths)
        vectors = by_row([trials[row % len(trials)] for row in batch.rows])
        return steer(setup.model, vectors, prompt_lengths=batch.prompt_lengths, tokenizer=setup.roles)

    def baseline(self, row: int, place: int, seen: Seen) -> Tensor | None:
        """What the unsteered model says of one text, which is kept as long as there is room.

        Args:
            row: which of the texts.
            place: its place in the batch.
            seen: what the batch gave.

        Returns:
            [t, v] float32 log-probabilities; None where it was not asked for.
        """
        if self._plain is None:
            return None
        unsteered, text = self._setup.plain, self._plain[row]
        if text in unsteered.predicted:
            return unsteered.predicted[text]
        assert seen.baseline is not None
        return unsteered.keep(text, torch.log_softmax(seen.baseline[place].float(), dim=-1))

    def _unsteered(
        self,
        numbers: Sequence[int],
        once: tuple[Rendered, ...],
        layout: _Layout,
        repeated: Repeated,
        steering: Steering | None,
    ) -> list[Tensor] | None:
        """By row the logits of the unsteered model, if any of the batch are wanted and not known.

        The steered pass that follows can leave out what this one and it have in common.
        """
        setup = self._setup
        if self._plain is None:
            return None
        plain = tuple(self._plain[numbers[row]] for row in repeated.firsts)
        if all(text in setup.plain.predicted for text in plain):
            return None
        if plain == once:
            with setup.kept.around(setup.decoder, steering, (layout.name, once)):
                found = layout.run(setup.model, repeated.once if repeated.any else None)
        else:  # behind a system prompt that the unsteered model does not read
            pad = pad_token_id(setup.tokenizer)
            batch = batches(plain, len(plain), pad_id=pad, side="left", groups=len(plain))[0]
            found = self._whole(batch, plain).run(setup.model)
        return [found[place] for place in repeated.places]

    def _whole(self, batch: Batch, texts: Sequence[Rendered]) -> _Layout:
        """Whole texts, without a cache; the head runs on the answers' columns only."""
        decoder = self._setup.decoder
        ids, mask = (one.to(execution_device(decoder)) for one in (batch.input_ids, batch.attention_mask))
        counts = _counts(texts)
        keep = 1 + max(counts)

        def inputs(rows: Tensor | None) -> dict[str, Any]:
            some, shown = (ids, mask) if rows is None else (ids[rows], mask[rows])
            return {
                "input_ids": some,
                "attention_mask": shown,
                "use_cache": False,
                "logits_to_keep": keep,
                **position_inputs(decoder.model, shown),
            }

        spans = [slice(keep - 1 - count, keep - 1) for count in counts]
        return _Layout("whole", inputs, ids[:, 1 - keep :], slice(-keep, -1), spans)

    def _behind_prompts(self, batch: Batch, texts: Sequence[Rendered]) -> _Layout | None:
        """The answers behind what the prompts left in a cache; None where that is not possible."""
        setup = self._setup
        split = Split.of(batch, execution_device(setup.decoder))
        if split is None or not setup.read.has(setup.decoder, split):
            return None

        def inputs(rows: Tensor | None) -> dict[str, Any]:
            return setup.read.inputs(setup.decoder, split, rows)

        spans = [slice(0, count) for count in _counts(texts)]
        return _Layout("behind prompts", inputs, split.rest[:, 1:], slice(None), spans)


def _counts(texts: Sequence[Rendered]) -> list[int]:
    """Tokens of each text's answer."""
    return [_count(text) for text in texts]


def _count(text: Rendered) -> int:
    return len(text.ids) - text.prompt_length
