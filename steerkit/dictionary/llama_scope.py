"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, trained on scaled activations.

    s = sqrt(d) / average norm of the activations it was trained on
    f = max(a, 0)  where a = E (s h) + b_enc > s threshold, with one threshold for all latents
    h ~ (f D + b_dec) / s

Weights are stored as linear layers have them, [out, in]. The threshold in the file counts in the model's own scale, so
that it is multiplied by s here, as SAELens does. Latents count as in the scaled form, as SAELens and the published
figures do. The output's average norm may be another one (transcoders); then the decoder is scaled by both.

He et al. (2024), "Llama Scope", arXiv 2410.20526.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from steerkit.dictionary._files import config_of, known_site, tensors_of, wanted
from steerkit.dictionary.activation import Activation
from steerkit.dictionary.dictionary import Dictionary
from steerkit.dictionary.hook_names import site_of_hook
from steerkit.errors import VectorFileError
from steerkit.network.sites import Site

__all__ = ["CONFIG", "read"]

CONFIG = "hyperparams.json"
_WEIGHTS = "checkpoints/final.safetensors"


def read(path: Path, site: Site | None = None) -> Dictionary:
    """Read the folder of one dictionary.

    Args:
        path: the folder.
        site: where it belongs; None takes `hook_point_in`.

    Raises:
        VectorFileError: a file or an entry is missing, it is a transcoder, or its activation is unknown.
    """
    config, weights = config_of(path / CONFIG), path / _WEIGHTS
    read_at, written_at = config.get("hook_point_in"), config.get("hook_point_out")
    if written_at not in (None, read_at):
        raise VectorFileError(
            f"{path}: a transcoder, which reads {read_at} and writes {written_at}; give a dictionary of one place, or "
            "its decoder's rows to SteeringVector.from_directions"
        )
    found = tensors_of(weights)
    encoder, decoder = (wanted(weights, found, f"{name}.weight") for name in ("encoder", "decoder"))
    scale, out = _scales(path, config, encoder.shape[1])
    activation, threshold, top_k = _activation(path, config, scale, encoder.shape[0])
    bias = found.get("decoder.bias")
    # The decoder gives activations times the output's scale; one scale is kept, so the other goes into the decoder.
    other = scale / out
    return Dictionary(
        encoder=encoder,
        decoder=decoder.T.float() * other,
        encoder_bias=wanted(weights, found, "encoder.bias"),
        decoder_bias=torch.zeros(encoder.shape[1], dtype=torch.float32) if bias is None else bias.float() * other,
        activation=activation,
        threshold=threshold,
        top_k=top_k,
        input_scale=scale,
        subtract=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        site=known_site(path, site_of_hook(str(read_at)), site, f"hook_point_in {read_at!r}"),
        provenance={"format": "llama_scope"},
    )


def _scales(path: Path, config: dict[str, Any], width: int) -> tuple[float, float]:
    """What activations are multiplied by on the way in, and what the decoder's output was.

    Raises:
        VectorFileError: the average norms are missing.
    """
    if config.get("norm_activation", "dataset-wise") == "inference":  # already in the model's own scale
        return 1.0, 1.0
    norms = config.get("dataset_average_activation_norm")
    if not isinstance(norms, dict) or not norms.get("in"):
        raise VectorFileError(
            f"{path / CONFIG}: has no dataset_average_activation_norm, without which its scale is unknown; get it anew"
        )
    return tuple(math.sqrt(width) / float(norms.get(side) or norms["in"]) for side in ("in", "out"))  # type: ignore[return-value]


def _activation(
    path: Path, config: dict[str, Any], scale: float, latents: int
) -> tuple[Activation, torch.Tensor | None, int | None]:
    """Which latents fire: the activation, its thresholds [k] in the scaled form, and how many.

    Raises:
        VectorFileError: another activation.
    """
    kind = str(config.get("act_fn", "jumprelu")).lower()
    if kind == "jumprelu":
        value = float(config.get("jump_relu_threshold", 0.0)) * scale
        return "jumprelu", torch.full((latents,), value, dtype=torch.float32), None
    if kind == "topk":
        return "topk", None, int(config.get("top_k", 0))
    if kind == "relu":
        return "relu", None, None
    raise VectorFileError(f"{path / CONFIG}: act_fn {kind!r} is not read; allowed are jumprelu, topk and relu")
