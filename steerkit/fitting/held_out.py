"""How well a fitted direction separates items it was not fitted on, and activations read under steering."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations.reading import Reads, read_passes
from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations, record
from steerkit.maths.directions import coordinates
from steerkit.maths.probes import auc
from steerkit.methods._protocols import Measured, SetsOperatingPoint, read_direction
from steerkit.methods._registry import resolve
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.batching import batches, pad_token_id
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import Rendered
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["apart", "figures", "record_steered", "separation"]


def separation(
    model: nn.Module,
    tokenizer: Any,
    held_out: ContrastSet,
    vector: SteeringVector,
    *,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    shares: bool = True,
    reads: Reads = read_passes,
) -> dict[str, Any]:
    """How well each site's direction separates items it was not fitted on.

    Args:
        model: the model the vector was fitted on, unsteered.
        tokenizer: its tokenizer.
        held_out: items the vector has not seen.
        vector: the vector.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        shares: see `steerkit.fit`.
        reads: what runs the items; the model itself where nothing else is named.

    Returns:
        ``{"items": n, "data_digest": ..., "sites": {site: {"auc", "cohens_d"}}}``, and under ``"gate"`` what a gated
        method measures of itself; `auc` is the share of (positive,
        negative) couples in which the positive one lies further along the direction, ties counted half.

    Raises:
        DataError: an item has no token to be read.
    """
    chat_template_kwargs = as_fitted([vector], tokenizer, chat_template_kwargs)
    acts = record(
        model,
        tokenizer,
        held_out,
        vector.reads,
        readout=Readout.parse(vector.readout or "last"),  # type: ignore[arg-type]
        batch_size=batch_size,
        chat_template_kwargs=chat_template_kwargs,
        shares=shares,
        reads=reads,
    )
    return figures(vector, held_out, acts)


def figures(vector: SteeringVector, held_out: ContrastSet, acts: Activations) -> dict[str, Any]:
    """The same from activations that have been read.

    Args:
        vector: the vector.
        held_out: items the vector has not seen.
        acts: their activations at `vector.reads`.

    Returns:
        See `separation`.
    """
    method = resolve(vector.method).from_settings(vector.settings)
    sites: dict[str, dict[str, float]] = {}
    for site in vector.reads:
        direction = read_direction(method, vector.params(site))
        if direction is None:
            continue
        along = direction.float() / torch.linalg.vector_norm(direction.float())
        positive, negative = (coordinates(side[site], along) for side in (acts.positive, acts.negative))
        area, distance = apart(positive, negative)
        sites[str(site)] = {"auc": round(area, 4), "cohens_d": round(distance, 3)}
    measured: dict[str, Any] = {"items": len(held_out), "data_digest": held_out.digest, "sites": sites}
    if isinstance(method, Measured):
        measured["gate"] = method.measure(vector, acts)
    if isinstance(method, SetsOperatingPoint):
        measured.setdefault("gate", {})["opened"] = method.opened(vector, held_out, acts)
    return measured


def apart(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    """How far two sides of projections lie apart.

    Args:
        positive: [n].
        negative: [m].

    Returns:
        The AUC (share of couples in which the positive one is larger, ties counted half), and Cohen's d, 0 where
        nothing spreads.
    """
    spread = 0.0
    if min(len(positive), len(negative)) > 1:
        spread = math.sqrt((float(positive.var()) + float(negative.var())) / 2)
    gap = float(positive.mean() - negative.mean())
    # Vector files hold this figure as single precision gives it.
    return auc(positive, negative, dtype=torch.float32), gap / spread if spread > 0 else 0.0


def record_steered(
    model: nn.Module,
    tokenizer: Any,
    rendered: Sequence[Rendered],
    sites: Sequence[Site | str],
    *,
    readout: Any,
    batch_size: int,
    steering: Callable[[Tensor], contextlib.AbstractContextManager[Any]],
) -> Activations:
    """Read activations of texts under steering whose scope may depend on where each prompt ends.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        rendered: the texts.
        sites: where to read; a site that is written gives the value after the edit.
        readout: which tokens.
        batch_size: rows per pass.
        steering: from the prompt lengths [b] of a pass's rows to the context it runs in.

    Returns:
        One row per text and site, in their order.
    """
    check_lengths(find_decoder(model), rendered, named("text", rendered))
    parts: list[tuple[tuple[int, ...], Activations]] = []
    # One batch at a time, so that every pass has the prompt lengths of its own rows.
    for batch in batches(rendered, batch_size, pad_id=pad_token_id(tokenizer)):
        rows = [rendered[row] for row in batch.rows]
        with steering(batch.prompt_lengths):
            part = record(model, tokenizer, rows, sites, readout=readout, batch_size=len(rows))
        parts.append((batch.rows, part))
    order = torch.tensor([row for rows, _ in parts for row in rows], dtype=torch.long).argsort()
    joined = {site: torch.cat([part.positive[site] for _, part in parts])[order] for site in parts[0][1].sites}
    return Activations(positive=joined, negative={}, readout=parts[0][1].readout)
