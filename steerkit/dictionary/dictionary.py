"""`Dictionary`: an encoder from activations to sparse latents and a decoder back, frozen, with where it belongs.

    x = s h                             s the input scale
    x = x - b_dec                       where `subtract`
    f = activation(E x + b_enc)         [k], see `steerkit.dictionary.activation`
    h ~ (f D + b_dec) / s

Latents count as whoever trained the dictionary counts them. What one unit of latent k moves the model's activations by
is `rows(k)`, D[k] / s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from steerkit._support.precision import full_precision
from steerkit.dictionary.activation import ACTIVATIONS, Activation, fired
from steerkit.errors import VectorFileError, VectorMismatchError, near_miss
from steerkit.network.sites import Site

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TENSORS", "Dictionary", "LatentRows"]

TENSORS = ("encoder", "decoder", "encoder_bias", "decoder_bias", "threshold", "gate_bias", "gate_scale")


@dataclass(frozen=True)
class LatentRows:
    """What reads and writes some latents in the model's own activations, the whole dictionary left out.

        a = encoder h + bias;  f = max(scale (encoder h) + bias, 0) where a + gate > threshold, else 0

    Attributes:
        encoder: [k, d], the input scale in it.
        bias: [k], the subtracted decoder bias in it.
        decoder: [k, d], what one unit of each latent adds to the activations.
        threshold: [k], what the pre-activation has to exceed.
        gate_bias: [k], for gated dictionaries what stands in place of `bias` where the gate is decided; else None.
        gate_scale: [k], for gated dictionaries what `encoder h` is multiplied by to give the size; else None.
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    threshold: Tensor
    gate_bias: Tensor | None = None
    gate_scale: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A sparse autoencoder as its users need it. Tensors are kept as float32 copies on the CPU.

    Attributes:
        encoder: [k, d], one row for each latent.
        decoder: [k, d].
        encoder_bias: [k].
        decoder_bias: [d].
        activation: one of `ACTIVATIONS`.
        site: where in the model the activations are read that it was trained on.
        threshold: [k] of ``"jumprelu"``, and of ``"batchtopk"`` where training estimated it; else None.
        top_k: how many latents of a token fire, of ``"topk"`` and of ``"batchtopk"``, there on average; else None.
        gate_bias: [k] of ``"gated"``: decides with the encoder which latents fire; `encoder_bias` then gives the size.
        gate_scale: [k] of ``"gated"``: what the encoder's product is multiplied by to give the size.
        subtract: whether `decoder_bias` is taken off before encoding.
        input_scale: what activations are multiplied by before anything else.
        model_type: family of the model it was trained on, None where the file does not say.
        model_id: that model's public name, None where the file does not say.
        provenance: what else is known, as JSON can hold it: the format it was read from, training facts.

    Raises:
        VectorFileError: a tensor is missing, of another shape, or not finite; an unknown activation.

    Example:
        >>> import torch
        >>> eye = torch.eye(2)
        >>> one = Dictionary(eye, eye, torch.zeros(2), torch.zeros(2), "relu", Site(0))
        >>> one.encode(torch.tensor([[1.0, -2.0]]))
        tensor([[1., 0.]])
    """

    encoder: Tensor
    decoder: Tensor
    encoder_bias: Tensor
    decoder_bias: Tensor
    activation: Activation
    site: Site
    threshold: Tensor | None = None
    top_k: int | None = None
    gate_bias: Tensor | None = None
    gate_scale: Tensor | None = None
    subtract: bool = False
    input_scale: float = 1.0
    model_type: str | None = None
    model_id: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise VectorFileError(
                f"activation {self.activation!r} is unknown; {near_miss(str(self.activation), ACTIVATIONS)}"
            )
        for name in TENSORS:
            given = getattr(self, name)
            if given is not None:
                kept = torch.as_tensor(given, dtype=torch.float32).detach().to("cpu", copy=True).contiguous()
                object.__setattr__(self, name, kept)
        if self.encoder.dim() != 2:
            raise VectorFileError(f"encoder has shape {list(self.encoder.shape)}; it must be [latents, width]")
        self._check_shapes()
        self._check_parts()

    def _check_shapes(self) -> None:
        latents, width = self.encoder.shape
        wanted = {"decoder": (latents, width), "decoder_bias": (width,)}
        if self.threshold is not None and self.threshold.dim() == 0:  # one for all, as BatchTopK estimates it
            object.__setattr__(self, "threshold", self.threshold.expand(latents).contiguous())
        for name in TENSORS:
            given = getattr(self, name)
            if given is None:
                continue
            shape = wanted.get(name, (latents, width) if name == "encoder" else (latents,))
            if tuple(given.shape) != shape:
                raise VectorFileError(f"{name} has shape {list(given.shape)}; beside this encoder it is {list(shape)}")
            if not bool(torch.isfinite(given).all()):
                raise VectorFileError(f"{name} is not finite; get the dictionary anew")

    def _check_parts(self) -> None:
        needs = {"jumprelu": ("threshold",), "gated": ("gate_bias", "gate_scale"), "topk": ("top_k",)}
        for name in needs.get(self.activation, ()):
            if getattr(self, name) is None:
                raise VectorFileError(f"activation {self.activation} needs {name}, which is missing; give it")
        if self.activation == "batchtopk" and self.threshold is None and self.top_k is None:
            raise VectorFileError("activation batchtopk needs threshold or top_k, and both are missing; give one")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_latents:
            raise VectorFileError(
                f"top_k = {self.top_k}; it must be 1 to {self.num_latents}, the latents that there are"
            )
        if not (self.input_scale > 0 and self.input_scale < float("inf")):
            raise VectorFileError(f"input_scale = {self.input_scale}; it must be over 0 and finite")

    @property
    def num_latents(self) -> int:
        """How many latents there are, k."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """How wide the activations are that it reads, d."""
        return self.encoder.shape[1]

    @property
    def needs_all(self) -> bool:
        """Whether one latent cannot be known without all others: K of them fire, and no threshold stands for that."""
        return self.activation in ("topk", "batchtopk") and self.threshold is None

    def __repr__(self) -> str:
        return f"Dictionary({self.num_latents} latents of width {self.width} at {self.site}, {self.activation})"

    @full_precision()
    def encode(self, h: Tensor) -> Tensor:
        """The latents of activations, computed in float32 at least.

        Args:
            h: [..., d] activations of the site, on any device; there the work is done.

        Returns:
            [..., k], zero where a latent does not fire.

        Raises:
            VectorMismatchError: the activations have another width.
        """
        self._check_width(h.shape[-1])
        wide = torch.promote_types(h.dtype, torch.float32)
        own = {name: getattr(self, name) for name in TENSORS}
        mine: dict[str, Tensor] = {name: one.to(h.device, wide) for name, one in own.items() if one is not None}
        x = h.to(wide) * self.input_scale
        if self.subtract:
            x = x - mine["decoder_bias"]
        return fired(
            x @ mine["encoder"].T,
            mine["encoder_bias"],
            threshold=mine.get("threshold"),
            gate_bias=mine.get("gate_bias"),
            gate_scale=mine.get("gate_scale"),
            top_k=self.top_k if self.needs_all else None,
        )

    @full_precision()
    def decode(self, latents: Tensor) -> Tensor:
        """The activations that latents stand for.

        Args:
            latents: [..., k].

        Returns:
            [..., d], in the model's own scale, float32 at least.

        Raises:
            VectorMismatchError: there are more latents or fewer than the dictionary has.
        """
        if latents.shape[-1] != self.num_latents:
            raise VectorMismatchError(f"{latents.shape[-1]} latents were given, this dictionary has {self.num_latents}")
        wide = torch.promote_types(latents.dtype, torch.float32)
        decoder, bias = (one.to(latents.device, wide) for one in (self.decoder, self.decoder_bias))
        return (latents.to(wide) @ decoder + bias) / self.input_scale

    def rows(self, latents: Sequence[int]) -> LatentRows:
        """What reads and writes some latents in the model's own activations.

        Args:
            latents: their numbers, from 0.

        Raises:
            VectorMismatchError: there is no such latent.
        """
        for latent in latents:
            if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < self.num_latents:
                raise VectorMismatchError(f"latent {latent!r}: this dictionary has latents 0 to {self.num_latents - 1}")
        chosen = list(latents)
        encoder = self.encoder[chosen]
        shift = encoder @ self.decoder_bias if self.subtract else torch.zeros(len(chosen), dtype=torch.float32)
        is_gated = self.activation == "gated"
        assert not is_gated or (self.gate_bias is not None and self.gate_scale is not None)
        scale = self.gate_scale[chosen] if is_gated and self.gate_scale is not None else None
        gate = self.gate_bias[chosen] - shift if is_gated and self.gate_bias is not None else None
        return LatentRows(
            encoder=encoder * self.input_scale,
            bias=self.encoder_bias[chosen] - (shift if scale is None else shift * scale),
            decoder=self.decoder[chosen] / self.input_scale,
            threshold=torch.zeros(len(chosen), dtype=torch.float32)
            if self.threshold is None
            else self.threshold[chosen],
            gate_bias=gate,
            gate_scale=scale,
        )

    def at_site(self, site: Site) -> Dictionary:
        """The same dictionary, read and written somewhere else in the model.

        Args:
            site: where.
        """
        return replace(self, site=site)

    def check(self, model: nn.Module) -> None:
        """Refuse a model whose activations at the dictionary's site it cannot read.

        Args:
            model: a transformers model, wrapped or not.

        Raises:
            VectorMismatchError: the site is of another width than the dictionary.
            SiteError: the model has no such site.
        """
        from steerkit.network.tap import locate

        (tap,) = locate(model, [self.site]).values()
        self._check_width(tap.width)

    def _check_width(self, width: int) -> None:
        if width != self.width:
            raise VectorMismatchError(
                f"{self.site}: this dictionary reads width {self.width}, the activations there are {width} wide; "
                "take one that was trained on this model at this site"
            )

    @cached_property
    def digest(self) -> str:
        """What identifies its numbers and how they are used, in hex: the sha256 of both, provenance left out."""
        known = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode())
        for name in TENSORS:
            tensor = getattr(self, name)
            if tensor is not None:
                known.update(f"{name}{list(tensor.shape)}".encode())
                known.update(tensor.numpy().data)
        return known.hexdigest()

    def facts(self) -> dict[str, Any]:
        """How its tensors are used, as JSON can hold it."""
        return {
            "activation": self.activation,
            "site": str(self.site),
            "top_k": self.top_k,
            "subtract": self.subtract,
            "input_scale": self.input_scale,
        }

    def compact(self) -> Self:
        """The same with both matrices rounded to what bfloat16 holds, which takes half the room in a file."""
        return replace(self, encoder=self.encoder.bfloat16().float(), decoder=self.decoder.bfloat16().float())

    def save(self, path: str | Path) -> Path:
        """Write it as safetensors, whole or not at all; the same dictionary gives the same bytes.

        A tensor whose numbers bfloat16 holds exactly is stored in it.

        Args:
            path: where; missing folders are made.

        Returns:
            The path.

        Raises:
            VectorFileError: it cannot be written there.
        """
        from steerkit.dictionary.stored import write

        return write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `steerkit.dictionary.load_dictionary` reads the formats of others too.

        Args:
            path: the file.

        Raises:
            VectorFileError: there is no such file, or it is not what `save` wrote.
        """
        from steerkit.dictionary.stored import read

        return cls(**read(Path(path)))
