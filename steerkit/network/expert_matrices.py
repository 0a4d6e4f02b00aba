"""Which parameters of a layer write to the residual stream: of a linear layer, and of an MLP with routed experts.

Of experts the usual names are tried, and then it is tested by running: with one direction taken out of those matrices,
the MLP must give nothing along it any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.block_trace import tensor_of
from steerkit.network.decoder import Decoder
from steerkit.network.halves import Half

__all__ = ["ROUNDING", "Matrix", "are_close", "expert_matrices", "linear_matrices", "shifts_output", "stacked_matrices"]

_DOWN = ("down_proj", "w2")  # what transformers calls the last layer of an expert
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative rounding by dtype; 1e-4 for any other."""


class Matrix(NamedTuple):
    """A parameter that writes to the residual stream.

    Attributes:
        name: its name in the transformers model.
        axis: which of its dimensions is the stream's.
    """

    name: str
    axis: int


def linear_matrices(decoder: Decoder, name: str, module: nn.Module) -> list[Matrix]:
    """Weight and bias of a linear layer.

    Args:
        decoder: the model's decoder.
        name: the layer's name in the transformers model.
        module: the layer.

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


def expert_matrices(decoder: Decoder, layer: int, anatomy: Anatomy, half: Half) -> list[Matrix]:
    """The down projections of experts, routed and shared, checked by taking a direction out of them.

    Args:
        decoder: the model's decoder.
        layer: the block, counted from 0.
        anatomy: of that block.
        half: its half with the experts.

    Raises:
        SiteError: they are not found by their usual names, or something else writes too; or they are offloaded.
    """
    anatomy.added_by(half)
    name, owner = f"{decoder.path}.{layer}.{half.first.name}", half.first.module
    matrices = stacked_matrices(name, half)
    for path, module in owner.named_modules():
        if path.rpartition(".")[2] in _DOWN:
            matrices += linear_matrices(decoder, f"{name}.{path}", module)
    if not matrices or not _silences(owner, name, matrices, half):
        raise SiteError(
            f"{anatomy.output_kind(half)}.{layer}: the matrices with which {half} of {type(decoder.model).__name__} "
            "writes, experts and all, are not those usually named down_proj or w2"
        )
    return matrices


def stacked_matrices(name: str, half: Half) -> list[Matrix]:
    """The parameters that hold the down projections of all experts, and their biases.

    Args:
        name: the half's name in the transformers model.
        half: of a block, with routed experts.
    """
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


def shifts_output(name: str, biases: Sequence[str], half: Half) -> bool:
    """Whether a constant added to the biases of all experts is added to what the half gives, at every token.

    Args:
        name: the half's name in the transformers model.
        biases: names of biases in it.
        half: of a block, with routed experts.

    Raises:
        SiteError: their weights are offloaded.
    """
    gave = half.last.gave
    if half.first.read is None or gave is None or len(half.calls) > 1:
        return False
    size = float(gave.values.abs().max())
    changed = {}
    for bias in biases:
        old = half.first.module.get_parameter(bias.removeprefix(f"{name}.")).detach()
        changed[bias.removeprefix(f"{name}.")] = old + size
    return are_close(_again(half, changed).reshape(-1), gave.values.reshape(-1) + size, gave.tensor)


def _again(half: Half, changed: dict[str, Tensor]) -> Tensor:
    """What the half gives with some parameters replaced, in float32 on the CPU.

    Raises:
        SiteError: its weights are offloaded, and put in their place while it runs.
    """
    assert half.first.read is not None
    if any(value.is_meta for value in half.first.module.parameters()):
        raise SiteError(
            f"`{half.first.name}` routes tokens to experts whose weights are offloaded, so what they write cannot be "
            "tried out; load the model into memory"
        )
    with torch.no_grad():
        output: Tensor = tensor_of(torch.func.functional_call(half.first.module, changed, (half.first.read.tensor,)))
    return output.detach().cpu().float()


def are_close(one: Tensor, other: Tensor, like: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the dtype of `like`.

    Args:
        one: [...] of any shape.
        other: [...] of any shape with as many numbers.
        like: whose dtype counts.
    """
    gap = (one.reshape(other.shape) - other).abs().max()
    return bool(gap <= ROUNDING.get(like.dtype, 1e-4) * other.abs().max())
