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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy, Half
from steerkit.network.block_trace import tensor_of
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies

__all__ = ["Matrix", "every_write", "other_uses", "output_biases", "writing_matrices"]

_DOWN = ("down_proj", "w2")  # what transformers calls the last layer of an expert
_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Matrix(NamedTuple):
    """A parameter that writes to the residual stream.

    Attributes:
        name: its name in the transformers model.
        axis: which of its dimensions is the stream's.
    """

    name: str
    axis: int


def every_write(decoder: Decoder) -> list[Site]:
    """The places at which the residual stream is written, in the order of a pass.

    Args:
        decoder: the model's decoder.

    Returns:
        For each block `resid_pre`, then `attn_out` (or `mixer_out`) and `mlp_out`, as far as the block has them.

    Raises:
        SiteError: a block's output is no sum of what its halves add, or norms stand on the stream itself and write it
            where there is no site.
    """
    sites = []
    for layer, anatomy in anatomies(decoder, set(range(decoder.num_layers))).items():
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
        SiteError: a norm or projection comes after one of them, or an adapter or an image encoder writes beside them.
    """
    config = decoder.model.config
    if config.get_text_config() is not config:
        raise SiteError(f"{type(decoder.model).__name__} writes images, too, beside its text embeddings")
    with _watching_embeddings(decoder) as seen:
        found = anatomies(decoder, set(range(decoder.num_layers)))
    matrices = _embeddings(decoder, seen, found[0].entered.values)
    for layer, anatomy in found.items():
        for half in anatomy.halves:
            if half.experts:
                matrices += _expert_matrices(decoder, layer, anatomy, half)
            else:
                call = anatomy.projection(half)
                matrices += _matrices(decoder, f"{decoder.path}.{layer}.{call.name}", call.module)
    return matrices


def output_biases(decoder: Decoder, layers: set[int]) -> dict[int, list[str]]:
    """The biases through which a constant reaches the output of a block as it is, and nothing else of that block.

    Args:
        decoder: the model's decoder.
        layers: blocks counted from 0.

    Returns:
        By layer the names of the biases that all take the constant: one (it may be absent so far), or with routed
        experts one for each.

    Raises:
        SiteError: a norm or a number comes after the last linear layer, or experts have no biases.
    """
    return {
        layer: _output_biases(f"{decoder.path}.{layer}", anatomy)
        for layer, anatomy in anatomies(decoder, layers).items()
    }


def _output_biases(block: str, anatomy: Anatomy) -> list[str]:
    if not anatomy.halves:
        raise SiteError(f"block {anatomy.layer} of {anatomy.owner} has no part that writes to the residual stream")
    half = anatomy.halves[-1]  # a later half of the block would read what an earlier one adds
    added = anatomy.added_by(half)
    kind = f"{anatomy.output_kind(half)}.{anatomy.layer}"
    if not half.experts:
        call = anatomy.projection(half)
        if call.gave is None or added.gave is None or not _close(call.gave.values, added.gave.values, call.gave.tensor):
            raise SiteError(f"{kind}: what `{call.name}` of {anatomy.owner} gives is multiplied before it is added")
        return [f"{block}.{call.name}.bias"]
    matrices = _stacks(f"{block}.{half.first.name}", half)
    biases = [matrix.name for matrix in matrices if matrix.name.endswith("bias")]
    if not biases or not _shifts(f"{block}.{half.first.name}", biases, half):
        raise SiteError(f"{kind}: {half} of {anatomy.owner} routes tokens to experts, which have no bias for all of it")
    return biases


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
    rounding = _ROUNDING.get(decoder.model.dtype, 1e-4)
    if not bool(((entered - factor * total).abs() <= rounding * abs(factor) * size).all()):
        names = ", ".join(f"`{name}`" for name in seen) or "no embedding"
        raise SiteError(
            f"what block 0 of {type(decoder.model).__name__} reads is not what its embeddings give ({names}): a norm "
            "or projection comes between"
        )
    return [Matrix(f"{name}.weight", 1) for name in seen]


def _matrices(decoder: Decoder, name: str, module: nn.Module) -> list[Matrix]:
    """Weight and bias of a linear layer.

    Raises:
        SiteError: an adapter, or a layer of another make.
    """
    if hasattr(module, "base_layer"):
        raise SiteError(
            f"`{name}` of {type(decoder.model).__name__} has an adapter that writes beside it; merge it first"
        )
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
        raise SiteError(f"`{name}` of {type(decoder.model).__name__} is {type(module).__name__}, no plain linear layer")
    weight = Matrix(f"{name}.weight", 0 if isinstance(module, nn.Linear) else 1)
    return [weight] if module.bias is None else [weight, Matrix(f"{name}.bias", 0)]


def _expert_matrices(decoder: Decoder, layer: int, anatomy: Anatomy, half: Half) -> list[Matrix]:
    """The down projections of experts, routed and shared, checked by taking a direction out of them.

    Raises:
        SiteError: they are not found by their usual names, or something else writes too.
    """
    anatomy.added_by(half)
    name, owner = f"{decoder.path}.{layer}.{half.first.name}", half.first.module
    matrices = _stacks(name, half)
    for path, module in owner.named_modules():
        if path.rpartition(".")[2] in _DOWN:
            matrices += _matrices(decoder, f"{name}.{path}", module)
    if not matrices or not _silences(owner, name, matrices, half):
        raise SiteError(
            f"{anatomy.output_kind(half)}.{layer}: the matrices with which {half} of {type(decoder.model).__name__} "
            "writes, experts and all, are not those usually named down_proj or w2"
        )
    return matrices


def _stacks(name: str, half: Half) -> list[Matrix]:
    """The parameters that hold the down projections of all experts, and their biases."""
    return [
        Matrix(f"{f'{name}.{path}'.rstrip('.')}.{leaf}", _stacked_axis(module, value))
        for path, module in half.first.module.named_modules()
        if path.rpartition(".")[2] not in _DOWN
        for leaf, value in module.named_parameters(recurse=False)
        if _is_down(leaf)
    ]


def _is_down(leaf: str) -> bool:
    return leaf.removesuffix("_bias") in _DOWN


def _stacked_axis(module: nn.Module, value: Tensor) -> int:
    """Which dimension of a stack [experts, out, in], [experts, in, out] or [experts, out] is the stream's."""
    return 2 if value.dim() == 3 and getattr(module, "is_transposed", False) else 1


def _silences(owner: nn.Module, name: str, matrices: list[Matrix], half: Half) -> bool:
    """Whether the half gives nothing along its usual output once that direction is taken out of the matrices."""
    gave = half.last.gave
    if half.first.read is None or gave is None or len(half.calls) > 1:
        return False
    usual = gave.values.reshape(-1, gave.values.shape[-1])[-1]
    along = usual / torch.linalg.vector_norm(usual)
    changed = {}
    for matrix in matrices:
        old = owner.get_parameter(matrix.name.removeprefix(f"{name}."))
        moved = old.detach().float().movedim(matrix.axis, -1)
        if moved.shape[-1] != len(along):
            return False
        taken = (moved @ along.to(moved))[..., None] * along.to(moved)
        changed[matrix.name.removeprefix(f"{name}.")] = (moved - taken).movedim(-1, matrix.axis).to(old.dtype)
    left = _again(half, changed).reshape(-1, len(along))[-1] @ along
    return float(left.abs()) <= 0.1 * float(torch.linalg.vector_norm(usual))


def _shifts(name: str, biases: Sequence[str], half: Half) -> bool:
    """Whether a constant added to the biases of all experts is added to what the half gives, at every token."""
    gave = half.last.gave
    if half.first.read is None or gave is None or len(half.calls) > 1:
        return False
    size = float(gave.values.abs().max())
    changed = {}
    for bias in biases:
        old = half.first.module.get_parameter(bias.removeprefix(f"{name}.")).detach()
        changed[bias.removeprefix(f"{name}.")] = old + size
    return _close(_again(half, changed).reshape(-1), gave.values.reshape(-1) + size, gave.tensor)


def _again(half: Half, changed: dict[str, Tensor]) -> Tensor:
    """What the half gives with some parameters replaced, in float32 on the CPU."""
    assert half.first.read is not None
    with torch.no_grad():
        output: Tensor = tensor_of(torch.func.functional_call(half.first.module, changed, (half.first.read.tensor,)))
    return output.detach().cpu().float()


def _close(one: Tensor, other: Tensor, like: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the dtype of `like`."""
    gap = (one.reshape(other.shape) - other).abs().max()
    return bool(gap <= _ROUNDING.get(like.dtype, 1e-4) * other.abs().max())
