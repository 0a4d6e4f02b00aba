"""Patching: what a part of the network carries of the difference between two prompts, exactly and by gradients.

Two prompts of one pair differ in some tokens and have equally many. A run on one of them (the base) is given, at a
node, what the other one (the source) has there, and a metric tells how far it goes:

    denoising   base corrupt, source clean     what is enough to bring the behaviour back
    noising     base clean, source corrupt     what cannot be done without
    share       (L_patched - L_base) / (L_source - L_base)          0 nothing, 1 all of the way

The two ways are not each other's mirror, so each is asked by name. Exact patching costs a pass for every node.
Attribution patching takes  I = (n_source - n_base) . d L / d n  at the base: two forward passes and one backward pass
for all nodes. A node far from linear is misjudged, and so is one whose direct and indirect effects cancel: GradDrop
averages sizes over backward passes in each of which one block's contribution to the stream lets no gradient through,

    c(n in block l) = (l |I| + sum over d > l of |I_d|) / (L - 1)

Dropping block d changes gradients of earlier blocks only, and a node's own block would give none at all, so the
backward pass for d starts behind block d from the gradient that is there already: half the work of whole passes.

Attribution patching: Nanda (2023); Kramar, Lieberum, Shah, Nanda (2024), "AtP*: An efficient and scalable method for
localizing LLM behaviour to components", arXiv 2403.00745. On metrics, corruption and the two ways: Zhang, Nanda (2023),
"Towards Best Practices of Activation Patching in Language Models", arXiv 2309.16042: replace tokens by others of the
same kind, without noise, and measure a difference of logits, which also sees parts that work against the behaviour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from steerkit.activations.reading import position_inputs
from steerkit.errors import DataError
from steerkit.evaluate.attribution.prompt_pairs import PromptPairs
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.fitting.training import frozen
from steerkit.maths.probes import head_count
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import Decoder, execution_device, find_decoder
from steerkit.network.sites import Site, layers_text
from steerkit.network.tap import Tap, locate
from steerkit.prompts.batching import Batch

__all__ = ["Metric", "Node", "Patched", "Way", "attribution_patching", "exact_patching"]

Way: TypeAlias = Literal["denoising", "noising"]
Metric: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits [b, v] behind the prompts, float32, and which pairs they are of [b], to one number each [b]."""


@dataclass(frozen=True)
class Node:
    """A part of the network that is patched as one.

    Attributes:
        sites: where; several are patched together, which overstates each of them.
        part: one head (of `z`) or coordinate (of other kinds), counted from 0; None takes the whole site.
    """

    sites: tuple[Site, ...]
    part: int | None = None

    def __str__(self) -> str:
        if len(self.sites) == 1:
            return str(self.sites[0]) + ("" if self.part is None else f"[{self.part}]")
        kinds = sorted({site.kind for site in self.sites})
        return f"{', '.join(kinds)} {layers_text(sorted({site.layer for site in self.sites}))} together"


@dataclass(frozen=True, eq=False)
class Patched:
    """What patching a node did, or is said to do by its gradient.

    Attributes:
        node: the node.
        way: which prompt was the base.
        change: [n] by pair: the metric with the node patched, minus that of the base.
        span: [n] the metric of the source, minus that of the base.
        parts: [n, p] the change by head (of `z`) or coordinate; None where it is not told.
    """

    node: Node
    way: Way
    change: Tensor
    span: Tensor
    parts: Tensor | None = field(default=None, repr=False)

    @property
    def share(self) -> Estimate:
        """The change as a share of the span, over all pairs, with its 95 % interval.

        Raises:
            DataError: the span is not clear of 0, so that a share of it says nothing.
        """
        span, count = self.span.double(), len(self.span)
        error = float(span.std() / count**0.5) if count > 1 else float("inf")
        if not abs(float(span.mean())) > 3 * error:
            raise DataError(
                f"{self.node}: the metric differs by {float(span.mean()):.3g} (s.e. {error:.2g}) between the prompts "
                f"of {count} pairs, less than 3 standard errors; give other prompts, more of them, or another metric"
            )
        return interval(self.change.double() / span.mean(), shares=False)


def exact_patching(
    model: nn.Module,
    pairs: PromptPairs,
    metric: Metric,
    nodes: Sequence[Node | Site],
    *,
    way: Way,
    positions: Sequence[int] | None = None,
) -> list[Patched]:
    """Patch one node after the other and measure.

    Args:
        model: any decoder-only transformers model.
        pairs: clean and corrupt prompts.
        metric: of the logits [b, v] behind each prompt and the pairs' numbers [b]; use `logit_difference`.
        nodes: what is patched, each on its own.
        way: `denoising` or `noising`.
        positions: tokens that are patched, counted from each prompt's end (-1 is the last); None patches all.

    Returns:
        One for each node.

    Raises:
        DataError: no such way, a position outside of a prompt, or a part that a node does not have.
        SiteError: the model lacks a site.
    """
    decoder, listed = find_decoder(model), [one if isinstance(one, Node) else Node((one,)) for one in nodes]
    taps = locate(decoder.model, [site for node in listed for site in node.sites])
    changes: list[list[Tensor]] = [[] for _ in listed]
    spans: list[Tensor] = []
    with torch.no_grad(), _running(decoder):
        for base, source in pairs.batches(way, positions):
            values, aim = _recorded(decoder, source, taps, metric)
            _, start = _recorded(decoder, base, {}, metric)
            spans.append((aim - start).cpu())
            written = _written(base, positions, execution_device(decoder))
            for node, found in zip(listed, changes, strict=True):
                with contextlib.ExitStack() as stack:
                    for site in node.sites:
                        tap = _tap(taps, site, decoder)
                        part = None if node.part is None else _slice(decoder, tap, node.part)
                        change = _replaced(tap, values[tap.site], written, part)
                        stack.callback(tap.attach(change).remove)
                    found.append((_measured(decoder, base, metric) - start).cpu())
    span = pairs.in_order(spans)
    return [Patched(node, way, pairs.in_order(found), span) for node, found in zip(listed, changes, strict=True)]


def attribution_patching(
    model: nn.Module,
    pairs: PromptPairs,
    metric: Metric,
    sites: Sequence[Site],
    *,
    way: Way,
    positions: Sequence[int] | None = None,
    grad_drop: bool = False,
) -> dict[Site, Patched]:
    """Estimate from gradients what patching each site, head and coordinate would do.

    Args:
        model: any decoder-only transformers model.
        pairs: clean and corrupt prompts.
        metric: see `exact_patching`; gradients go through it.
        sites: where.
        way: `denoising` or `noising`.
        positions: see `exact_patching`.
        grad_drop: give mean sizes over backward passes that each leave a block out, against effects that cancel. They
            have no sign, and cost a backward pass from each block down.

    Returns:
        By canonical site; `parts` holds heads at `z`, coordinates elsewhere.

    Raises:
        DataError: see `exact_patching`; or `grad_drop` at the residual stream itself, or in a model of one block.
        SiteError: the model lacks a site.
    """
    decoder = find_decoder(model)
    taps = locate(decoder.model, sites)
    if grad_drop and (decoder.num_layers < 2 or any(site.kind.startswith("resid_") for site in taps)):
        raise DataError(
            "grad_drop leaves out what a block adds to the residual stream: give sites inside of blocks, such as z or "
            f"mlp_post, of a model of several; got {', '.join(map(str, taps))} of {decoder.num_layers}"
        )
    found: dict[Site, list[Tensor]] = {site: [] for site in taps}
    spans: list[Tensor] = []
    with _running(decoder):
        for base, source in pairs.batches(way, positions):
            with torch.no_grad():
                values, aim = _recorded(decoder, source, taps, metric)
            written = _written(base, positions, execution_device(decoder))
            with torch.enable_grad():
                start, gradients = _gradients(decoder, base, taps, metric, grad_drop)
            spans.append((aim - start).cpu())
            for site, tap in taps.items():
                node, passes = gradients[site]
                difference = (values[site] - node.detach()) * written
                found[site].append(_effects(decoder, tap, difference.float(), passes, grad_drop))
    span = pairs.in_order(spans)
    parts = {site: pairs.in_order(own) for site, own in found.items()}
    return {site: Patched(Node((site,)), way, own[:, 0], span, own[:, 1:]) for site, own in parts.items()}


def _effects(decoder: Decoder, tap: Tap, difference: Tensor, passes: Sequence[Tensor], grad_drop: bool) -> Tensor:
    """[b, 1 + p] of the site and by head or coordinate: of one backward pass, or mean sizes over several."""
    products = [(difference * gradient.float()).sum(dim=1).cpu() for gradient in passes]
    heads = head_count(decoder.model) if tap.site.kind == "z" else 0
    if heads and tap.width % heads == 0:
        products = [one.reshape(len(one), heads, -1).sum(dim=-1) for one in products]
    products = [torch.cat([one.sum(dim=1, keepdim=True), one], dim=1) for one in products]
    if not grad_drop:
        return products[0]
    whole, *dropped = (one.abs() for one in products)
    return (tap.site.layer * whole + sum(dropped, torch.zeros_like(whole))) / (decoder.num_layers - 1)


def _gradients(
    decoder: Decoder, batch: Batch, taps: Mapping[Site, Tap], metric: Metric, grad_drop: bool
) -> tuple[Tensor, dict[Site, tuple[Tensor, list[Tensor]]]]:
    """The base's metric [b]; by site its tensor [b, t, d] and gradients, of the whole and without each later block."""
    stream: dict[Site, Tap] = {}
    if grad_drop:
        stream = locate(decoder.model, [Site(at, kind) for at in range(decoder.num_layers) for kind in _STREAM])
    kept: dict[Site, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for site, tap in {**stream, **taps}.items():
            stack.callback(tap.attach(_keeping(site, tap, kept, batch)).remove)
        values = _measured(decoder, batch, metric)
    sites = list(taps)
    posts = [Site(at) for at in range(decoder.num_layers)] if grad_drop else []
    wanted = [kept[site] for site in (*sites, *posts)]
    first = torch.autograd.grad(values.sum(), wanted, retain_graph=grad_drop, allow_unused=True)
    gradients = [torch.zeros_like(one) if got is None else got for one, got in zip(wanted, first, strict=True)]
    found = {site: [gradient] for site, gradient in zip(sites, gradients, strict=False)}
    for dropped, behind in zip(posts, gradients[len(sites) :], strict=True):
        before = [site for site in sites if site.layer < dropped.layer]
        if not before:
            continue
        start = kept[Site(dropped.layer, "resid_pre")]
        got = torch.autograd.grad(start, [kept[site] for site in before], behind, retain_graph=True, allow_unused=True)
        for site, gradient in zip(before, got, strict=True):
            found[site].append(torch.zeros_like(kept[site]) if gradient is None else gradient)
    return values.detach(), {site: (kept[site], own) for site, own in found.items()}


_STREAM = ("resid_pre", "resid_post")


def _keeping(site: Site, tap: Tap, kept: dict[Site, Tensor], batch: Batch) -> Callable[[Tensor], Tensor]:
    """Keep a site's tensor [b, t, d] as it is read there and nowhere else, so that gradients can be asked of it."""

    def keep(h: Tensor) -> Tensor:
        own = h if h.requires_grad else h.detach().requires_grad_(True)
        kept[site] = own.reshape(*batch.input_ids.shape, -1) if tap.flat else own.view_as(own)
        return kept[site].reshape(h.shape)

    return keep


def _replaced(tap: Tap, source: Tensor, written: Tensor, part: slice | None) -> Callable[[Tensor], Tensor]:
    """Put the source's values [b, t, d] in the place of the base's, at the written tokens [b, t, 1]."""

    def replace(h: Tensor) -> Tensor:
        mask = written if part is None else written & _inside(part, source.shape[-1], h.device)
        return torch.where(mask, source, h.reshape(source.shape)).reshape(h.shape)

    return replace


def _inside(part: slice, width: int, device: torch.device) -> Tensor:
    """[d] which coordinates belong to a part."""
    inside = torch.zeros(width, device=device, dtype=torch.bool)
    inside[part] = True
    return inside


def _slice(decoder: Decoder, tap: Tap, part: int) -> slice:
    """The coordinates of a head or of a single one.

    Raises:
        DataError: the site has no such part.
    """
    heads = head_count(decoder.model) if tap.site.kind == "z" else tap.width
    width = tap.width // heads if heads else 1
    if not 0 <= part < (heads or tap.width):
        raise DataError(f"{tap.site}[{part}]: it has parts 0 to {(heads or tap.width) - 1}")
    return slice(part * width, (part + 1) * width)


def _tap(taps: Mapping[Site, Tap], site: Site, decoder: Decoder) -> Tap:
    """The tap of a site, by whatever name it was asked for."""
    return taps[site] if site in taps else next(iter(locate(decoder.model, [site]).values()))


def _recorded(
    decoder: Decoder, batch: Batch, taps: Mapping[Site, Tap], metric: Metric
) -> tuple[dict[Site, Tensor], Tensor]:
    """The tensors [b, t, d] at some sites, and the metric [b]."""
    kept: dict[Site, Tensor] = {}
    shape = batch.input_ids.shape
    with contextlib.ExitStack() as stack:
        for site, tap in taps.items():

            def keep(h: Tensor, site: Site = site) -> Tensor:
                kept[site] = h.reshape(*shape, -1)
                return h

            stack.callback(tap.attach(keep).remove)
        return kept, _measured(decoder, batch, metric)


def _measured(decoder: Decoder, batch: Batch, metric: Metric) -> Tensor:
    """The metric [b] of a batch that is padded at the left."""
    ids, mask = (one.to(execution_device(decoder)) for one in (batch.input_ids, batch.attention_mask))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **position_inputs(decoder.model, mask)}
    logits: Tensor = decoder.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    return metric(logits, torch.tensor(batch.rows, device=logits.device, dtype=torch.long))


def _written(batch: Batch, positions: Sequence[int] | None, device: torch.device) -> Tensor:
    """[b, t, 1] the tokens that are patched."""
    mask = batch.attention_mask.to(device) != 0
    if positions is not None:
        chosen = torch.zeros(mask.shape[1], device=device, dtype=torch.bool)
        chosen[list(positions)] = True
        mask = mask & chosen
    return mask[..., None]


@contextlib.contextmanager
def _running(decoder: Decoder) -> Iterator[None]:
    """The model as it is when it answers, its weights asking for no gradients."""
    with frozen(decoder.model), evaluation_mode(decoder.model), torch.inference_mode(mode=False):
        yield
