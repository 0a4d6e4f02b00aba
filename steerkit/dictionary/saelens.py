"""SAELens v6: `cfg.json` and `sae_weights.safetensors`; the architectures standard, jumprelu, gated, topk, batchtopk.

What `cfg.json` says is followed. `apply_b_dec_to_input` is whether `b_dec` is subtracted. TopK's
`rescale_acts_by_decoder_norm` multiplies latents by the length of their decoder rows before the choice and divides by
it when decoding, which is put into the weights here. `normalize_activations` is `none`, or `expected_average_only_in`,
whose factor SAELens folds into the weights when it saves and which stands in no file: where it is still named, the
weights are read as SAELens reads them, without a factor, and the provenance says so. `layer_norm`,
`constant_norm_rescale` and whitening make what a latent writes depend on the token, so that a row is no direction; they
are refused.

Files of transcoders are refused: they read one place and write another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerkit.dictionary._files import config_of, known_site, tensors_of, wanted
from steerkit.dictionary.dictionary import Dictionary
from steerkit.dictionary.hook_names import site_of_hook
from steerkit.errors import VectorFileError
from steerkit.network.sites import Site

__all__ = ["WEIGHTS", "read"]

WEIGHTS = "sae_weights.safetensors"
_CONFIG = "cfg.json"
_ARCHITECTURES = ("standard", "jumprelu", "gated", "topk", "batchtopk")


def read(path: Path, site: Site | None = None) -> Dictionary:
    """Read the folder of one dictionary.

    Args:
        path: the folder.
        site: where it belongs; None takes `hook_name`.

    Raises:
        VectorFileError: a file or an entry is missing, or it computes something that is not read.
    """
    config, weights = config_of(path / _CONFIG), path / WEIGHTS
    architecture = str(config.get("architecture", "standard"))
    _check(path / _CONFIG, config, architecture)
    found = tensors_of(weights)
    about = {**config, **(config.get("metadata") or {})}
    hook = str(about.get("hook_name"))
    encoder, decoder = wanted(weights, found, "W_enc").T.float(), wanted(weights, found, "W_dec").float()
    bias = found.get("b_enc" if architecture != "gated" else "b_mag")
    parts: dict[str, Any] = {
        "encoder_bias": torch.zeros(len(encoder), dtype=torch.float32) if bias is None else bias.float()
    }
    parts |= _firing(weights, architecture, config, found)
    if config.get("rescale_acts_by_decoder_norm"):
        norm = decoder.norm(dim=-1)
        if bool((norm == 0).any()):
            raise VectorFileError(f"{weights}: rescales by the length of decoder rows, and one has none; get it anew")
        encoder, decoder = encoder * norm[:, None], decoder / norm[:, None]
        parts["encoder_bias"] = parts["encoder_bias"] * norm
    return Dictionary(
        encoder=encoder,
        decoder=decoder,
        decoder_bias=wanted(weights, found, "b_dec"),
        subtract=bool(config.get("apply_b_dec_to_input", True)),
        site=known_site(path, site_of_hook(hook), site, f"hook_name {hook!r}"),
        model_id=about.get("model_name"),
        provenance={
            "format": "saelens",
            "architecture": architecture,
            "hook_name": hook,
            "normalize_activations": str(config.get("normalize_activations", "none")),
        },
        **parts,
    )


def _check(path: Path, config: dict[str, Any], architecture: str) -> None:
    """Refuse what is computed in another way than read here.

    Raises:
        VectorFileError: it is.
    """
    if "transcoder" in architecture:
        raise VectorFileError(
            f"{path}: a transcoder, which reads one place and writes another; give a dictionary of one place, or its "
            "decoder's rows to SteeringVector.from_directions"
        )
    if architecture not in _ARCHITECTURES:
        raise VectorFileError(
            f"{path}: architecture {architecture!r} is not read; allowed are {', '.join(_ARCHITECTURES)}"
        )
    normalisation = config.get("normalize_activations", "none")
    if normalisation not in ("none", "expected_average_only_in"):
        raise VectorFileError(
            f"{path}: normalize_activations {normalisation!r} scales each token by itself, so that a latent has no "
            "fixed direction; allowed are none and expected_average_only_in"
        )
    if config.get("finetuning_scaling_factor"):
        raise VectorFileError(f"{path}: finetuning_scaling_factor is not read; save the dictionary without one")


def _firing(path: Path, architecture: str, config: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Any]:
    """What says which latents fire: fields of `Dictionary`.

    Raises:
        VectorFileError: an entry is missing.
    """
    if architecture == "standard":
        return {"activation": "relu"}
    if architecture == "jumprelu":
        logs = found.get("log_threshold")
        return {
            "activation": "jumprelu",
            "threshold": wanted(path, found, "threshold") if logs is None else logs.float().exp(),
        }
    if architecture == "gated":
        return {
            "activation": "gated",
            "gate_bias": wanted(path, found, "b_gate"),
            "gate_scale": wanted(path, found, "r_mag").float().exp(),
        }
    if "k" not in config:
        raise VectorFileError(f"{path.parent / _CONFIG}: has no k, how many latents fire; get it anew")
    threshold = found.get("topk_threshold") if architecture == "batchtopk" else None
    return {"activation": architecture, "top_k": round(config["k"]), "threshold": threshold}
