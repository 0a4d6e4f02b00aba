"""Reading a contrast set into running sums: one pass per batch, and no activation is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steerkit.activations.moments import Accumulator
from steerkit.activations.reading import Reads, read_passes
from steerkit.activations.readout import Readout, chosen_columns, cut_to
from steerkit.activations.recording import Activations, check_finite, rendered_items, warn_of_special
from steerkit.errors import DataError
from steerkit.network.context import check_lengths, name_of
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.batching import Batch, batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet

__all__ = ["stream"]


def stream(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    accumulators: Mapping[Site, Accumulator],
    *,
    readout: str | int | tuple[int, int] = "last",
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    progress: bool = False,
    shares: bool = False,
    reads: Reads = read_passes,
) -> Activations:
    """Feed the activations of a contrast set to accumulators, batch by batch; no sample is kept.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        data: the contrast set; both sides of a pair arrive in one update.
        accumulators: one per site, under canonical sites.
        readout: which tokens.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        max_tokens: tokens of a text that are read, the rest being cut off at the right; None reads all.
        progress: show a progress bar on stderr.
        shares: run what texts have in common once: fewer tokens, and the same up to rounding instead of to the bit.
        reads: what runs the texts; the model itself where nothing else is named.

    Returns:
        What each accumulator gives for the two sides.

    Raises:
        DataError: an item has no token to be read, or more than the model has positions for.
        FitError: a result is not finite, with the site named.
    """
    decoder = find_decoder(model)
    plan = Readout.parse(readout)
    items = [side for pair in zip(data.positive, data.negative, strict=True) for side in pair] if data.paired else []
    items = items or [*data.positive, *data.negative]
    rendered = [cut_to(rendered_items(tokenizer, item, chat_template_kwargs), max_tokens) for item in items]
    if batch_size < 1:
        raise DataError(f"batch_size is at least 1, got {batch_size}")
    groups = 2 if data.paired else 1
    work = batches(rendered, max(batch_size, groups), pad_id=pad_token_id(tokenizer), groups=groups, alike=shares)
    positives = len(data.positive)

    def is_positive(row: int) -> bool:
        return row % 2 == 0 if data.paired else row < positives

    def feed(site: Site, rows: Tensor, batch: Batch) -> None:
        chosen = [place for place, row in enumerate(batch.rows) if is_positive(row)]
        others = [place for place, row in enumerate(batch.rows) if not is_positive(row)]
        accumulators[site].update(rows[chosen], rows[others])

    def name(row: int) -> str:
        number = row // 2 if data.paired else row if row < positives else row - positives
        return f"{'positive' if is_positive(row) else 'negative'} row {number}"

    def shown(row: int) -> str:
        side, size = ("positive", positives) if is_positive(row) else ("negative", len(rendered) - positives)
        number = row // 2 if data.paired else row if row < positives else row - positives
        return name_of(f"{side} item", number, size, rendered[row])

    check_lengths(decoder, rendered, shown)
    taps = locate(model, accumulators)
    chosen = chosen_columns(plan, rendered, name)
    scales = reads(decoder, taps, work, chosen, feed, progress, plan, shares=shares)
    warn_of_special(tokenizer, plan, rendered)
    results = {site: accumulator.result() for site, accumulator in accumulators.items()}
    positive = {site: pair[0] for site, pair in results.items()}
    negative = {site: pair[1] for site, pair in results.items()}
    check_finite(positive)
    check_finite(negative)
    return Activations(positive=positive, negative=negative, scales=scales, readout=str(plan), paired=data.paired)
