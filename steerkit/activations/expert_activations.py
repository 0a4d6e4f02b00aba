"""What the experts of a block read on average, each over the tokens that were routed to it.

The mean is that of `response_mean` and the other readouts (every text counts once, its tokens equally) given that a
token was routed to the expert:

    sum over texts of (sum of its routed x) / T   over   sum over texts of (number of them) / T

with T the tokens read of a text.

Router weights do not enter: they say how loud an expert is, not what it reads. An expert to which every token is routed
has the plain mean, which is how a shared expert is counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations.reading import forward_body
from steerkit.activations.readout import Readout
from steerkit.errors import DataError
from steerkit.network.block_trace import argument_of
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import Decoder, execution_device
from steerkit.network.experts import Experts
from steerkit.network.sites import Site
from steerkit.prompts.batching import Batch, batches, run_batches
from steerkit.prompts.rendering import Rendered

__all__ = ["ExpertMeans", "expert_means"]


@dataclass(frozen=True)
class ExpertMeans:
    """What the experts of one block read, as means of each side.

    Attributes:
        experts: which they are, and their matrices.
        inputs: [2, e, i] float32, the positive side first; zero where an expert had no token.
        tokens: [2, e] share of a side's tokens that were routed to an expert.
        shared: [2, j] what the shared expert reads; None where there is none.
    """

    experts: Experts
    inputs: Tensor
    tokens: Tensor
    shared: Tensor | None


def expert_means(
    decoder: Decoder,
    sides: tuple[Sequence[Rendered], Sequence[Rendered]],
    experts: Mapping[Site, Experts],
    *,
    readout: str | int | tuple[int, int],
    batch_size: int,
    pad_id: int,
) -> dict[Site, ExpertMeans]:
    """Run texts and average what experts read; no activation is kept.

    Args:
        decoder: the model's decoder.
        sides: the positive and the negative texts.
        experts: by site, what is watched.
        readout: which tokens.
        batch_size: texts per pass.
        pad_id: what shorter texts are filled up with.

    Returns:
        The means by site.

    Raises:
        DataError: a text has no token to be read, or massive ones are to be left out.
    """
    if not experts:
        return {}
    texts = [*sides[0], *sides[1]]
    check_lengths(decoder, texts, named("text", texts))
    plan = Readout.parse(readout)
    if plan.no_massive or plan.pool != "mean":
        raise DataError(f"readout '{plan}': experts are read token by token; give a plain mean, or one token")
    chosen = [plan.tokens(text) for text in texts]
    watches = {site: _Watch(one) for site, one in experts.items()}
    taps = {site: one.tap for site, one in experts.items()}
    device = execution_device(decoder)
    with contextlib.ExitStack() as stack:
        for watch in watches.values():
            stack.enter_context(watch)

        def run(batch: Batch) -> list[_Read]:
            weights = _weights(batch, chosen)
            rows = torch.tensor([int(row >= len(sides[0])) for row in batch.rows], dtype=torch.long)
            for watch in watches.values():
                watch.weights = weights.flatten()
                watch.sides = rows[:, None].expand_as(weights).flatten()
            forward_body(decoder, taps, batch.input_ids.to(device), batch.attention_mask.to(device), _ignore)
            return [watch.taken() for watch in watches.values()]

        for _, found in run_batches(batches(texts, batch_size, pad_id=pad_id), run):
            for watch, read in zip(watches.values(), found, strict=True):
                watch.add(read)
    return {site: watch.result() for site, watch in watches.items()}


def _ignore(_site: Site, _h: Tensor) -> None:
    """The watches have read already; the taps only say how far to run."""


def _weights(batch: Batch, chosen: Sequence[Sequence[int]]) -> Tensor:
    """[b, t] what every token counts: each text 1 in all."""
    starts = (batch.attention_mask != 0).long().argmax(dim=1).tolist()
    weights = torch.zeros(batch.input_ids.shape, dtype=torch.float32)
    for place, (row, start) in enumerate(zip(batch.rows, starts, strict=True)):
        tokens = chosen[row]
        weights[place, [start + token for token in tokens]] = 1.0 / len(tokens)
    return weights


class _Read(NamedTuple):
    """What the experts of one block read in one pass; a pass that does not fit into memory is run again.

    Attributes:
        sums: [2, e, d] float64 of what each expert read, by side.
        counts: [2, e] float64 tokens that each got.
        texts: [2] float64 texts that were read.
        shared: [2, d] float64 of what the shared expert read; None where there is none.
    """

    sums: Tensor
    counts: Tensor
    texts: Tensor
    shared: Tensor | None


@dataclass(eq=False)
class _Watch(contextlib.AbstractContextManager["_Watch"]):
    """Adds up what the experts of one block read in every pass."""

    experts: Experts
    weights: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    sides: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def __post_init__(self) -> None:
        module, stack = self.experts.tap.module, self.experts.stack
        count, *rest = module.get_parameter(stack.name).shape
        self._sums = torch.zeros(2, count, rest[0 if stack.transposed else 1], dtype=torch.float64)
        self._counts = torch.zeros(2, count, dtype=torch.float64)
        self._shared: Tensor | None = None
        self._texts = torch.zeros(2, dtype=torch.float64)
        self._routed_now: tuple[Tensor, Tensor, Tensor] | None = None
        self._shared_now: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        module, experts = self.experts.tap.module, self.experts
        owners = [(experts.stack.owner, self._note_routed)]
        owners += [] if experts.shared is None else [(experts.shared.owner, self._note_shared)]
        for name, note in owners:
            hook = module.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *_error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _note_routed(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add up what each expert reads of each side, weighted by how much a token counts."""
        places = self.weights.nonzero()[:, 0]
        device = argument_of(args, kwargs).device
        routed = self.experts.routed(args, kwargs, places.to(device))
        weights = self.weights.to(device)[routed.token]
        count = self._counts.shape[1]
        bins = self.sides.to(device)[routed.token] * count + routed.expert
        sums = torch.zeros(2 * count, routed.inputs.shape[1], device=device, dtype=torch.float32)
        sums.index_add_(0, bins, routed.inputs * weights[:, None])
        shares = torch.zeros(2 * count, device=device, dtype=torch.float32).index_add_(0, bins, weights)
        texts = torch.zeros(2, dtype=torch.float64)
        texts.index_add_(0, self.sides[places], self.weights[places].double())
        read = sums.cpu().double().reshape(self._sums.shape), shares.cpu().double().reshape(2, count)
        self._routed_now = (*read, texts)

    def _note_shared(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same for an expert that reads every token."""
        read = argument_of(args, kwargs)
        read = read.reshape(-1, read.shape[-1])
        places = self.weights.nonzero()[:, 0]
        kept = read[places.to(read.device)].float() * self.weights[places].to(read.device)[:, None]
        sums = torch.zeros(2, read.shape[1], device=read.device, dtype=torch.float32)
        sums.index_add_(0, self.sides[places].to(read.device), kept)
        self._shared_now = sums.cpu().double()

    def taken(self) -> _Read:
        """What was read in the pass that has just ended."""
        assert self._routed_now is not None
        found = _Read(*self._routed_now, self._shared_now)
        self._routed_now = self._shared_now = None
        return found

    def add(self, read: _Read) -> None:
        """Count a pass."""
        self._sums += read.sums
        self._counts += read.counts
        self._texts += read.texts
        if read.shared is not None:
            self._shared = read.shared if self._shared is None else self._shared + read.shared

    def result(self) -> ExpertMeans:
        """The means."""
        texts = self._texts[:, None].clamp_min(torch.finfo(torch.float64).tiny)
        counts = self._counts[..., None]
        means = torch.where(counts > 0, self._sums / counts.where(counts > 0, 1.0), 0.0)
        shared = None if self._shared is None else (self._shared / texts).float()
        return ExpertMeans(self.experts, means.float(), (self._counts / texts).float(), shared)
