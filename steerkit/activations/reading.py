"""Running the decoder body as far as the deepest place asked for, and handing on what is read on the way."""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from steerkit._support.progress import bar
from steerkit.activations.moments import token_norms
from steerkit.activations.readout import Pool, Readout
from steerkit.activations.shared_prompts import Stretch, may_share, stretches
from steerkit.activations.token_scale import PassScale, TokenScale, TokenScales, massive_tokens
from steerkit.errors import FitError
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import Decoder, execution_device
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.prompts.batching import Batch, run_batches
from steerkit.tokens.clock import PassClock
from steerkit.tokens.transformers_facts import cache_argument

__all__ = ["Reads", "attach_reader", "forward_body", "position_inputs", "read_passes"]

T = TypeVar("T")


class Reads(Protocol):
    """What runs texts and reads them: `read_passes`, or an engine that runs the same weights."""

    def __call__(
        self,
        decoder: Decoder,
        taps: Mapping[Site, Tap],
        work: Sequence[Batch],
        chosen: Sequence[Sequence[int]],
        take: Callable[[Site, Tensor, Batch], None],
        progress: bool,
        plan: Readout,
        *,
        shares: bool = False,
    ) -> dict[Site, TokenScale]:
        """See `read_passes`; `take` gets one row [d] per text, [b, d] float32."""


class _Stop(BaseException):
    """Ends a forward pass when all that was asked for has been read. Not an `Exception`, so that nothing eats it."""


def forward_body(
    decoder: Decoder,
    taps: Mapping[Site, Tap],
    input_ids: Tensor,
    attention_mask: Tensor,
    read: Callable[[Site, Tensor], None],
    past: Any = None,
    *,
    gradients: bool = False,
) -> None:
    """Run the decoder body, hand every tap's tensor [b, t, d] to `read`, and stop after the deepest.

    Args:
        decoder: whose body runs.
        taps: where to read.
        input_ids: [b, t].
        attention_mask: [b, t], or [b, past + t] over what the cache holds too.
        read: called once per site; it must not keep the tensor (Falcon changes one in place afterwards).
        past: a cache that the pass goes on from, and adds to.
        gradients: record the pass for gradients, where they are on.

    Raises:
        FitError: the model never ran one of the places.
    """
    left, entry = set(taps), decoder.entry

    def notice(site: Site, h: Tensor) -> None:
        read(site, h.reshape(*input_ids.shape, h.shape[-1]) if h.dim() == 2 else h)
        left.discard(site)
        if not left and entry is decoder.body:  # FSDP would keep the weights of a pass that is broken off
            raise _Stop

    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "use_cache": past is not None,
        **{name: ids[:, -input_ids.shape[1] :] for name, ids in position_inputs(entry, attention_mask).items()},
    }
    if past is not None:
        inputs[cache_argument(entry)] = past
    with contextlib.ExitStack() as stack:
        for site, tap in taps.items():
            stack.callback(attach_reader(tap, site, notice).remove)
        if not gradients:
            stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(decoder.body))
        if "torch._dynamo" in sys.modules:  # a compiled block would not stop, nor call hooks it has not seen
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        with contextlib.suppress(_Stop):
            entry(**inputs)
            if not left:
                return
            raise FitError(f"the model never ran {', '.join(map(str, sorted(left)))}; it cannot be read there")


def position_inputs(module: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Position ids as an argument of a forward pass, where the module takes them.

    GPT-2 is wrong without them when rows are padded at the left, and no model minds.

    Args:
        module: the model or decoder body to be called.
        attention_mask: [b, t].
    """
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return {}
    return {"position_ids": (attention_mask.cumsum(dim=1) - 1).clamp_min(0)}


def attach_reader(tap: Tap, site: Site, notice: Callable[[Site, Tensor], None]) -> Any:
    """Hook a place so that what flows on from it is read, edits included.

    Args:
        tap: the place.
        site: what it is called.
        notice: called with the site and its tensor [b, t, d], or rows and tokens in one dimension, in every pass.

    Returns:
        A handle whose `remove` takes the hook off.
    """
    # Appended, so that the value is read as it flows on, edits included.
    if tap.side == "input":
        return tap.module.register_forward_pre_hook(
            lambda _module, args, kwargs: notice(site, tap.read(args, kwargs)), with_kwargs=True
        )
    return tap.module.register_forward_hook(
        lambda _module, args, kwargs, output: notice(site, tap.read(args, kwargs, output)), with_kwargs=True
    )


def read_passes(
    decoder: Decoder,
    taps: Mapping[Site, Tap],
    work: Sequence[Batch],
    chosen: Sequence[Sequence[int]],
    take: Callable[[Site, Tensor, Batch], None],
    progress: bool,
    plan: Readout,
    *,
    shares: bool = False,
    around: Callable[[Batch], contextlib.AbstractContextManager[Any]] | None = None,
) -> dict[Site, TokenScale]:
    """Run all batches and pool what is read to one row per text.

    Args:
        decoder: whose body runs.
        taps: where to read.
        work: the batches.
        chosen: by text the tokens that are read.
        take: called with each site's rows [b, d] of a batch, float32.
        progress: show a progress bar on stderr.
        plan: how the tokens of a text become one row, and whether massive ones are left out, of norms too.
        shares: run what texts have in common once, where that is possible (`steerkit.activations.shared_prompts`).
        around: the context that each pass runs in; None runs it as it is.

    Returns:
        By site how long activations are.
    """
    scales = {site: TokenScales() for site in taps}
    device = execution_device(decoder)
    clock = PassClock.of(decoder.model)  # the model is being steered: values given per item follow their items

    # What is steered may differ between texts that begin alike, and what is massive is told of whole texts.
    is_sum = plan.pool == "mean" and not plan.no_massive
    shares = shares and clock is None and around is None and is_sum and may_share(decoder)

    def run(batch: Batch) -> list[tuple[Site, list[PassScale], Tensor]]:
        passes = stretches(batch, device) if shares else None
        if passes is not None:
            return _read_stretches(decoder, taps, passes, [chosen[row] for row in batch.rows])
        pool = _Pool(batch, [chosen[row] for row in batch.rows], device, plan.pool)
        found: list[tuple[Site, list[PassScale], Tensor]] = []

        def read(site: Site, h: Tensor) -> None:
            massive = pool.massive(h) if plan.no_massive else None
            found.append((site, [pool.scale(h, massive)], pool(h, massive)))

        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.nullcontext() if clock is None else clock.items(batch.rows))
            stack.enter_context(contextlib.nullcontext() if around is None else around(batch))
            forward_body(decoder, taps, batch.input_ids.to(device), batch.attention_mask.to(device), read)
        return found

    # What is read is counted once its pass has ended: one that does not fit into memory is run again.
    for batch, found in _with_progress(run_batches(work, run), work, progress):
        for site, seen, rows in found:
            for scale in seen:
                scales[site].add(scale)
            take(site, rows, batch)
    return {site: scale.result() for site, scale in scales.items()}


def _read_stretches(
    decoder: Decoder, taps: Mapping[Site, Tap], passes: Iterator[Stretch], chosen: Sequence[Sequence[int]]
) -> list[tuple[Site, list[PassScale], Tensor]]:
    """What is read of a batch, by site, in passes that each hold a stretch of every text."""
    scales: dict[Site, list[PassScale]] = {site: [] for site in taps}
    pooled: dict[Site, Tensor] = {}
    for one in passes:
        weights = one.weights(chosen)

        def read(site: Site, h: Tensor, one: Stretch = one, weights: Tensor | None = weights) -> None:
            scales[site].append(PassScale.of(h, one.counted.to(h.device)))
            if weights is None:
                return
            values = h if one.rows == tuple(range(len(h))) else h[list(one.rows)]
            part = _weighted(weights.to(h.device)[:, None], values.float(), is_padded=True)
            pooled[site] = pooled[site] + part if site in pooled else part

        forward_body(decoder, taps, one.ids, one.mask, read, one.past)
    return [(site, scales[site], pooled[site]) for site in taps]


def _weighted(weights: Tensor, values: Tensor, *, is_padded: bool) -> Tensor:
    """[b, d] weighted sums over tokens, of weights [b, 1, t] and values [b, t, d]."""
    with torch.autocast(values.device.type, enabled=False):  # it would give products in half precision
        # Times zero keeps what is not finite on pads. Masking costs a copy, looking costs an accelerator a stop.
        if is_padded and values.device.type != "cpu":
            values = values.masked_fill(weights.mT == 0, 0.0)
        pooled = torch.bmm(weights, values)[:, 0]
        if is_padded and values.device.type == "cpu" and not math.isfinite(float(pooled.sum())):
            pooled = torch.bmm(weights, values.masked_fill(weights.mT == 0, 0.0))[:, 0]
    return pooled


class _Pool:
    """Turns [b, t, d] into one row [b, d] per text: one token, or what is pooled of several, in float32."""

    def __init__(self, batch: Batch, chosen: Sequence[Sequence[int]], device: torch.device, how: Pool) -> None:
        self._how = how
        starts = (batch.attention_mask != 0).long().argmax(dim=1).tolist()
        places = [[start + token for token in tokens] for start, tokens in zip(starts, chosen, strict=True)]
        self._single = all(len(tokens) == 1 for tokens in places)
        rows, width = batch.input_ids.shape
        self._index = torch.tensor([tokens[0] for tokens in places], device=device, dtype=torch.long)
        weights = torch.zeros(rows, 1, width, dtype=torch.float32)
        counted = batch.attention_mask.float()
        for row, tokens in enumerate(places):
            weights[row, 0, tokens] = 1.0 / len(tokens)
            counted[row, starts[row]] = 0.0
        self._weights, self._counted = weights.to(device), counted.to(device)
        self._padded = bool((batch.attention_mask == 0).any())

    def massive(self, h: Tensor) -> Tensor:
        """[b, t] whether a token is many times as long as the median of its text; a mean of such alone keeps them."""
        return massive_tokens(token_norms(h), self._counted.to(h.device), self._weights.to(h.device)[:, 0] > 0)

    def scale(self, h: Tensor, massive: Tensor | None) -> PassScale:
        """What the pass says of the site's scale; massive tokens do not count."""
        counted = self._counted.to(h.device)
        if massive is None:
            return PassScale.of(h, counted)
        left_out = (massive & (self._weights.to(h.device)[:, 0] > 0)).sum()
        return PassScale.of(h, counted * ~massive)._replace(left_out=left_out)

    def __call__(self, h: Tensor, massive: Tensor | None = None) -> Tensor:
        if self._how == "share":
            h = (h != 0).float()
        if self._single:
            index = self._index.to(h.device)
            return h[torch.arange(h.shape[0], device=h.device), index].float()
        weights, values = self._weights.to(h.device), h.float()
        if massive is not None:
            weights = weights * ~massive[:, None]
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if self._how in ("max", "min"):
            sign = 1.0 if self._how == "max" else -1.0
            return sign * (sign * values).masked_fill(weights.mT == 0, -torch.inf).amax(dim=1)
        return _weighted(weights, values, is_padded=self._padded)


def _with_progress(runs: Iterator[tuple[Batch, T]], work: Sequence[Batch], progress: bool) -> Iterator[tuple[Batch, T]]:
    """The same, with a bar that counts texts."""
    if not progress:
        yield from runs
        return
    with bar("reading", sum(len(batch.rows) for batch in work)) as step:
        for batch, found in runs:
            yield batch, found
            for _ in batch.rows:
                step()
