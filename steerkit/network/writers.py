"""What writes to the residual stream: the places at which it is written, and the matrices that write.

Places: what each block reads (before block 0 that is what the embeddings wrote), and what each half of a block adds to
it, after a post-norm where the family has one. Matrices: the embeddings, the last linear layer of each half with its
bias, and of routed experts each one's down projection.

A matrix writes to the stream as it stands only where nothing but a number comes between: not in families that norm a
half's output, the embeddings or the stream. Whether that is so is seen by running the model, not read off its name.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.decoder import Decoder
from steerkit.network.expert_matrices import ROUNDING, Matrix, expert_matrices, linear_matrices
from steerkit.network.linears import Linear, writers_at
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies

__all__ = ["every_write", "matrices_at", "other_uses", "writing_matrices"]


def every_write(decoder: Decoder) -> list[Site]:
    """The places at which the residual stream is written, in the order of a pass.

    Args:
        decoder: the model's decoder.

    Returns:
        For each block `resid_pre`, then `attn_out` (or `mixer_out`) and `mlp_out`, as far as the block has them.

    Raises:
        SiteError: a block's output is no sum of what its halves add, or norms stand on the stream itself and write it
            where there is no site, or there are several streams.
    """
    sites = []
    for layer, anatomy in anatomies(decoder, set(range(decoder.num_layers))).items():
        anatomy.check_one_stream()
        if anatomy.norms_the_stream:
            raise SiteError(
                f"block {layer} of {type(decoder.model).__name__} norms the residual stream itself, which writes "
                "between its halves, where there is no site; choose sites by name"
            )
        sites.append(Site(layer, "resid_pre"))
        sites += [Site(layer, anatomy.find(anatomy.output_kind(half)).kind) for half in anatomy.halves]
    return sites


def writing_matrices(decoder: Decoder) -> list[Matrix]:
    """The parameters that write to the residual stream, where each does so as it stands.

    Args:
        decoder: the model's decoder.

    Raises:
        SiteError: a norm or projection comes after one of them, an adapter or an image encoder writes beside them, or
            there are several streams.
    """
    config = decoder.model.config
    if config.get_text_config() is not config:
        raise SiteError(f"{type(decoder.model).__name__} writes images, too, beside its text embeddings")
    with _watching_embeddings(decoder) as seen:
        found = anatomies(decoder, set(range(decoder.num_layers)))
    for anatomy in found.values():
        anatomy.check_one_stream()
    matrices = _embeddings(decoder, seen, found[0].entered.values)
    for layer, anatomy in found.items():
        for half in anatomy.halves:
            if half.experts:
                matrices += expert_matrices(decoder, layer, anatomy, half)
            else:
                call = anatomy.projection(half)
                matrices += linear_matrices(decoder, f"{decoder.path}.{layer}.{call.name}", call.module)
    return matrices


def matrices_at(decoder: Decoder, sites: Sequence[Site]) -> dict[Site, list[Matrix]]:
    """The parameters that write at some sites, where what they give is the site's value, or that times a number.

    Args:
        decoder: the model's decoder.
        sites: outputs of attention, of an MLP or of a state-space module.

    Returns:
        By site its weights and biases; of routed experts those of each one.

    Raises:
        SiteError: nothing linear writes at a site, a norm comes between, an adapter writes beside it, or one weight
            writes at two of the sites.
    """
    found = anatomies(decoder, {site.layer for site in sites})
    matrices = {site: _matrices_at(decoder, found, site) for site in sites}
    parameters = dict(decoder.model.named_parameters(remove_duplicate=False))
    owners: dict[int, Site] = {}
    for site, listed in matrices.items():
        for matrix in listed:
            other = owners.setdefault(id(parameters[matrix.name]), site)
            if other != site:
                raise SiteError(f"{site}: {matrix.name} is a weight of {other} too (tied), so it would change twice")
    return matrices


def _matrices_at(decoder: Decoder, found: Mapping[int, Anatomy], site: Site) -> list[Matrix]:
    """The matrices that write at a site, an expert's each by itself."""
    anatomy = found[site.layer]
    for half in anatomy.halves:
        if anatomy.output_kind(half) == site.kind == "mixer_out":  # a state-space module has no heads to read at
            call = anatomy.projection(half)
            return linear_matrices(decoder, f"{decoder.path}.{site.layer}.{call.name}", call.module)
    (writer,) = writers_at(decoder, [site], found=found).values()
    if isinstance(writer, Linear):
        return linear_matrices(decoder, writer.tap.name, writer.tap.module)
    half = next(half for half in anatomy.halves if half.experts)
    return expert_matrices(decoder, site.layer, anatomy, half)


def other_uses(decoder: Decoder, matrices: Sequence[Matrix]) -> dict[str, str]:
    """Matrices that another part of the model uses too, as a tied head uses the embeddings.

    Args:
        decoder: the model's decoder.
        matrices: what `writing_matrices` found.

    Returns:
        Name of the matrix to the other name it goes by.
    """
    parameters = dict(decoder.model.named_parameters(remove_duplicate=False))
    mine = {matrix.name for matrix in matrices}
    return {
        name: other
        for name in sorted(mine)
        for other, value in parameters.items()
        if other not in mine and value is parameters[name]
    }


@contextlib.contextmanager
def _watching_embeddings(decoder: Decoder) -> Iterator[dict[str, Tensor]]:
    """Note what every embedding outside of the blocks gives, by its name in the model."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in decoder.model.named_modules():
        if isinstance(module, nn.Embedding) and not name.startswith(f"{decoder.path}."):

            def note(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                found = output.detach().to("cpu", torch.float32, copy=True)
                seen[name] = seen[name] + found if name in seen else found

            handles.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(decoder: Decoder, seen: Mapping[str, Tensor], entered: Tensor) -> list[Matrix]:
    """The embeddings, if their sum, times a number, is what block 0 reads.

    Raises:
        SiteError: something else comes between.
    """
    total, size = torch.zeros_like(entered), torch.zeros_like(entered)
    fits = bool(seen) and all(output.shape[-1] == entered.shape[-1] for output in seen.values())
    for output in seen.values() if fits else ():
        total, size = total + output, size + output.abs()
    factor = float((total * entered).sum() / total.square().sum()) if fits and bool(total.any()) else math.nan
    rounding = ROUNDING.get(decoder.model.dtype, 1e-4)
    if not bool(((entered - factor * total).abs() <= rounding * abs(factor) * size).all()):
        names = ", ".join(f"`{name}`" for name in seen) or "no embedding"
        raise SiteError(
            f"what block 0 of {type(decoder.model).__name__} reads is not what its embeddings give ({names}): a norm "
            "or projection comes between"
        )
    return [Matrix(f"{name}.weight", 1) for name in seen]
