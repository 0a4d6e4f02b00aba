"""What a Steer2Edit vector holds of each matrix, what is read for it while steering, and the matrix with its edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations.moments import Means
from steerkit.errors import FitError, SiteError
from steerkit.maths.directions import random_direction
from steerkit.maths.probes import head_count
from steerkit.maths.rank_one import add_in_order
from steerkit.methods._protocols import Params, WeightUpdate
from steerkit.network.decoder import Decoder
from steerkit.network.experts import Experts
from steerkit.network.linears import Linear, writers_at
from steerkit.network.sites import Site
from steerkit.network.tap import Tap
from steerkit.vector.steering_vector import SteeringVector

WRITTEN = ("attn_out", "attn_raw", "mixer_out", "mlp_out", "mlp_raw")
# What a vector holds of its matrices at a site: each [i] or, of routed experts, [e, i].
TENSORS = dict.fromkeys(("gate", "magnitude", "shared_gate", "shared_magnitude", "tokens"), "...")

__all__ = [
    "TENSORS",
    "WRITTEN",
    "MatrixPart",
    "RoundedMeans",
    "WriterInput",
    "edited_matrix",
    "expert_gates",
    "fits_width",
    "head_width_of",
    "matrix_edits",
    "nothing_edited",
    "parts_of",
    "random_edit",
    "read_and_written",
]


class MatrixPart(NamedTuple):
    """What a vector holds of one matrix, or one stack of them, at a site.

    Attributes:
        prefix: of the names of its tensors.
        gate: [i] or [e, i].
        magnitude: [a] or [e, i].
    """

    prefix: str
    gate: Tensor
    magnitude: Tensor


def parts_of(params: Params) -> list[MatrixPart]:
    """The matrices that a vector edits at a site: the one there, or routed experts and a shared one.

    Args:
        params: the tensors of one site.
    """
    empty = torch.empty(0, dtype=torch.float32)
    prefixes = [prefix for prefix in ("", "shared_") if not prefix or f"{prefix}gate" in params]
    return [
        MatrixPart(prefix, params.get(f"{prefix}gate", empty), params.get(f"{prefix}magnitude", empty))
        for prefix in prefixes
    ]


def fits_width(part: MatrixPart) -> bool:
    """Whether a gate has a magnitude for each of its components.

    Args:
        part: of one matrix or one stack of them.
    """
    gate, magnitude = part.gate, part.magnitude
    if gate.dim() == 2:
        return not part.prefix and gate.numel() > 0 and gate.shape == magnitude.shape
    return (
        gate.dim() == magnitude.dim() == 1 and len(magnitude) > 0 and len(gate) > 0 and not len(gate) % len(magnitude)
    )


def head_width_of(decoder: Decoder, site: Site, inputs: int) -> int | None:
    """Columns of one head; None for an MLP.

    Args:
        decoder: the model's decoder.
        site: that is written.
        inputs: columns of the matrix that writes there.

    Raises:
        SiteError: the config tells no number of heads that fits.
    """
    if site.kind.startswith("mlp"):
        return None
    name = "linear_num_value_heads" if site.kind == "mixer_out" else "num_attention_heads"
    heads = head_count(decoder.model, name)
    if not heads or inputs % heads:
        said = getattr(decoder.model.config.get_text_config(), name, None)
        raise SiteError(f"{site}: the config's {name} is {said!r}, which does not part {inputs} inputs into heads")
    return inputs // heads


class WriterInput:
    """What the module that writes at a site reads: a linear layer its input, routed experts what their gates find.

    Experts share one module, which gives nowhere what each of them reads: they run a second time for it.

    Args:
        writer: a linear layer, or routed experts.
        gates: gives the gates of the experts, [e, i], and of a shared one, [j] or None.
    """

    def __init__(self, writer: Linear | Experts, gates: Callable[[], tuple[Tensor, Tensor | None]]) -> None:
        self._experts = writer if isinstance(writer, Experts) else None
        self._gates, self._reader = gates, None
        self._place: Any = None
        self.tap: Tap = writer.tap
        self.width: int = writer.inputs

    _reader: Callable[[Tensor], Tensor] | None

    def refresh(self) -> None:
        """Bring the gates to where the experts lie.

        Raises:
            SiteError: the vector holds no gates of experts.
        """
        if self._experts is not None and (self._reader is None or self._place != self._experts.place):
            with torch.inference_mode(mode=False), torch.no_grad():
                reader = self._experts.reader(*self._gates())
            self._place, self._reader = self._experts.place, reader

    def __call__(self, read: Tensor) -> Tensor:
        """What `Steer2Edit.edit` multiplies the gate with.

        Args:
            read: [..., i] what the module was called with.

        Returns:
            [..., i]; of experts [..., 1], their gates times what they read, summed up.
        """
        return read if self._reader is None else self._reader(read)


def expert_gates(params: Params) -> tuple[Tensor, Tensor | None]:
    """The gates of routed experts and of a shared one.

    Args:
        params: the tensors of one site.

    Returns:
        [e, i] and [j], or None where no expert is shared.

    Raises:
        SiteError: the vector was fitted on a model without experts.
    """
    if params["gate"].dim() != 2:
        raise SiteError("steer2edit: the vector holds no gates of experts; fit one on this model")
    return params["gate"], params.get("shared_gate")


class RoundedMeans(Means):
    """Means of rows that are rounded to bfloat16, and are themselves."""

    def update(self, positive: Tensor, negative: Tensor) -> None:
        """As `Means.update`.

        Args:
            positive: [k, d] float32.
            negative: [l, d] float32.
        """
        super().update(positive.bfloat16().float(), negative.bfloat16().float())

    def result(self) -> tuple[Tensor, Tensor]:
        """As `Means.result`.

        Raises:
            FitError: one side has no rows.
        """
        positive, negative = super().result()
        return positive.bfloat16().float(), negative.bfloat16().float()


def edited_matrix(
    direction: Tensor, part: MatrixPart, strength: float, transposed: bool, *, precision: str
) -> Callable[[Tensor | None], Tensor]:
    """From an old weight to the edited one, as it is stored: one matrix, or a stack of them.

    Args:
        direction: [o] of length 1.
        part: gate and magnitudes of the matrix.
        strength: by which the edit is multiplied.
        transposed: the weight is stored [i, o].
        precision: ``"float32"``, or ``"bfloat16"`` for the roundings of the released code.
    """
    gate, magnitude = part.gate, part.magnitude

    def update(old: Tensor | None) -> Tensor:
        assert old is not None
        weight = old.mT if transposed else old
        if precision == "float32":
            rows = gate.to(old.device)[..., None, :]
            edited = weight + (strength * direction).to(old.device)[:, None] * rows
        else:
            parts = gate.reshape(*magnitude.shape, -1)
            inputs = torch.where(magnitude[..., None] != 0, parts / magnitude[..., None], torch.zeros_like(parts))
            edited = weight.bfloat16()
            for expert in range(len(gate)) if gate.dim() == 2 else (...,):
                one = edited[expert], direction, inputs[expert], strength * magnitude[expert]
                edited[expert] = add_in_order(*one)
            edited = edited.float()
        return edited.mT if transposed else edited

    return update


def read_and_written(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """Each written site behind the one that its linear layer reads; experts have none of those.

    Args:
        sites: of both kinds.

    Raises:
        FitError: no site is written, or one is of another kind.
    """
    pairs = []
    for site in sites:
        if site.kind in WRITTEN:
            pairs.append((Site(site.layer, "mlp_post" if site.kind.startswith("mlp") else "z"), site))
        elif site.kind not in ("z", "mlp_post"):
            raise FitError(f"steer2edit: {site} is not what a linear layer reads or writes; choose layers instead")
    if not pairs:
        raise FitError("steer2edit: no site is written, only read; choose layers instead")
    return pairs


def matrix_edits(model: nn.Module, vector: SteeringVector, strength: float, *, precision: str) -> list[WeightUpdate]:
    """The rank-1 change of every edited matrix, each expert's by itself.

    Args:
        model: the transformers model.
        vector: a vector of Steer2Edit.
        strength: by which the edit is multiplied.
        precision: as for `edited_matrix`.

    Raises:
        SiteError: neither one linear layer nor routed experts write at a site, or an adapter does more than add.
    """
    updates = []
    for site, writer in writers_at(model, vector.sites).items() if strength else ():
        params = vector.params(site)
        if isinstance(writer, Experts):
            expert_gates(params)
            layouts = [down.transposed for down in (writer.stack, writer.shared) if down is not None]
        elif not writer.additive:
            raise SiteError(f"{site}: an adapter around {writer.parameter} rescales what it gives; merge it first")
        else:
            layouts = [writer.transposed]
        parts = parts_of(params)
        if len(parts) != len(layouts):
            raise SiteError(f"{site}: {len(layouts)} matrices write there and the vector edits {len(parts)}")
        for name, transposed, part in zip(writer.parameters, layouts, parts, strict=True):
            updates.append(
                WeightUpdate(name, edited_matrix(params["direction"], part, strength, transposed, precision=precision))
            )
    return updates


def random_edit(vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
    """Random directions, and in every edited component a random input direction of the same length.

    Args:
        vector: a vector of Steer2Edit.
        generator: what draws.
    """
    tensors = dict(vector.tensors)
    for site in vector.sites:
        params = vector.params(site)
        tensors[f"{site}/direction"] = random_direction(params["direction"], generator)
        for part in parts_of(params):
            gates = part.gate.reshape(part.magnitude.numel(), -1).clone()
            for row in part.magnitude.flatten().nonzero().flatten().tolist():
                gates[row] = random_direction(gates[row], generator)
            tensors[f"{site}/{part.prefix}gate"] = gates.reshape(part.gate.shape)
    return replace(vector, tensors=tensors)


def nothing_edited(thresholds: Mapping[str, float], largest: Mapping[str, float]) -> str:
    """Why nothing is edited.

    Args:
        thresholds: by kind of block what a |score| has to pass, rho * alpha.
        largest: by kind of block the largest |score|.
    """
    if not largest:
        return "steer2edit: at no site do the two sides differ, so there is no direction to edit along"
    said = ", ".join(
        f"the largest |score| is {score:.3g} where {block} * alpha = {thresholds[block]:.3g}"
        for block, score in largest.items()
    )
    return f"steer2edit: no component passes its threshold ({said}); lower rho or alpha"
