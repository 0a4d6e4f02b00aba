"""The biases through which a constant can be added to what a block gives, for baking an addition into weights."""

from __future__ import annotations

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.decoder import Decoder
from steerkit.network.expert_matrices import are_close, shifts_output, stacked_matrices
from steerkit.network.tap import anatomies

__all__ = ["output_biases"]


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
    """Names of the biases, there or to be made, that add to what a block writes last."""
    if not anatomy.halves:
        raise SiteError(f"block {anatomy.layer} of {anatomy.owner} has no part that writes to the residual stream")
    half = anatomy.halves[-1]  # a later half of the block would read what an earlier one adds
    added = anatomy.added_by(half)
    kind = f"{anatomy.output_kind(half)}.{anatomy.layer}"
    if not half.experts:
        call = anatomy.projection(half)
        if (
            call.gave is None
            or added.gave is None
            or not are_close(call.gave.values, added.gave.values, call.gave.tensor)
        ):
            raise SiteError(f"{kind}: what `{call.name}` of {anatomy.owner} gives is multiplied before it is added")
        return [f"{block}.{call.name}.bias"]
    matrices = stacked_matrices(f"{block}.{half.first.name}", half)
    biases = [matrix.name for matrix in matrices if matrix.name.endswith("bias")]
    if not biases or not shifts_output(f"{block}.{half.first.name}", biases, half):
        raise SiteError(f"{kind}: {half} of {anatomy.owner} routes tokens to experts, which have no bias for all of it")
    return biases
