"""Small random dictionaries, and the files that other libraries would write of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerkit.dictionary import Dictionary
from steerkit.network.sites import Site

LATENTS, WIDTH = 40, 16


def random_parts(latents: int = LATENTS, width: int = WIDTH, seed: int = 0) -> dict[str, Tensor]:
    """Encoder and decoder [k, d] and their biases, none of them zero."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "encoder": torch.randn(latents, width, generator=draw) / width**0.5,
        "decoder": torch.randn(latents, width, generator=draw) / width**0.5,
        "encoder_bias": torch.randn(latents, generator=draw) * 0.3,
        "decoder_bias": torch.randn(width, generator=draw) * 0.3,
    }


def made(activation: str = "jumprelu", *, site: Site | None = None, seed: int = 0, **changes: Any) -> Dictionary:
    """A random dictionary of one activation, with whatever that one needs."""
    width = changes.pop("width", WIDTH)
    latents = changes.pop("latents", LATENTS)
    draw = torch.Generator().manual_seed(seed + 100)
    needs: dict[str, dict[str, Any]] = {
        "relu": {},
        "jumprelu": {"threshold": torch.rand(latents, generator=draw) * 0.5},
        "gated": {
            "gate_bias": torch.randn(latents, generator=draw) * 0.3,
            "gate_scale": torch.rand(latents, generator=draw) + 0.5,
        },
        "topk": {"top_k": 5},
        "batchtopk": {"top_k": 5, "threshold": torch.tensor(0.4)},
    }
    parts = {**random_parts(latents, width, seed), **needs[activation], **changes}
    return Dictionary(activation=activation, site=site or Site(1), **parts)  # type: ignore[arg-type]


def long_form(one: Dictionary, h: Tensor) -> Tensor:
    """Latents [n, k] of rows [n, d], latent by latent, as the formulas say it."""
    found = torch.zeros(len(h), one.num_latents, dtype=torch.float64)
    tensors = {
        name: None if getattr(one, name) is None else getattr(one, name).double()
        for name in ("encoder", "encoder_bias", "decoder_bias", "threshold", "gate_bias", "gate_scale")
    }
    for row, given in enumerate(h.double()):
        x = given * one.input_scale
        if one.subtract:
            x = x - tensors["decoder_bias"]
        product = torch.stack([torch.dot(line, x) for line in tensors["encoder"]])
        pre = product + tensors["encoder_bias"]
        kept = set(pre.argsort(descending=True)[: one.top_k].tolist()) if one.needs_all else set()
        for latent in range(one.num_latents):
            value = pre[latent]
            if one.activation == "gated":
                is_on = product[latent] + tensors["gate_bias"][latent] > 0
                value = product[latent] * tensors["gate_scale"][latent] + tensors["encoder_bias"][latent]
            elif one.needs_all:
                is_on = latent in kept
            else:
                is_on = one.threshold is None or value > tensors["threshold"][latent]
            if is_on and value > 0:
                found[row, latent] = value
    return found
