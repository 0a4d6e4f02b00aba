"""EleutherAI's sparsify: a folder named as the module it reads, with `cfg.json` and `sae.safetensors`; TopK.

    f = max(a, 0)  where a = E (h - b_dec) + b_enc is among the K largest of the token

`b_dec` is subtracted unless the configuration says `transcode`; `W_dec` is [k, d] as it stands. Transcoders read a
module's input and write its output, and are refused, with or without `skip_connection`. So is the activation
`groupmax`.
"""

from __future__ import annotations

from pathlib import Path

from steerkit.dictionary._files import config_of, known_site, tensors_of, wanted
from steerkit.dictionary.dictionary import Dictionary
from steerkit.dictionary.hook_names import site_of_module
from steerkit.errors import VectorFileError
from steerkit.network.sites import Site

__all__ = ["WEIGHTS", "read"]

WEIGHTS = "sae.safetensors"
_CONFIG = "cfg.json"


def read(path: Path, site: Site | None = None) -> Dictionary:
    """Read the folder of one hook point.

    Args:
        path: the folder, such as ``"layers.12"``.
        site: where it belongs; None takes the folder's name.

    Raises:
        VectorFileError: a file or an entry is missing, or it is a transcoder or has another activation.
    """
    config, weights = config_of(path / _CONFIG), path / WEIGHTS
    found = tensors_of(weights)
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in found:
        raise VectorFileError(
            f"{path}: a transcoder, which reads a module's input and writes its output; give a dictionary of one "
            "place, or its decoder's rows to SteeringVector.from_directions"
        )
    kind = config.get("activation", "topk")
    if kind != "topk":
        raise VectorFileError(f"{path / _CONFIG}: activation {kind!r} is not read; allowed is topk")
    if not isinstance(config.get("k"), int):
        raise VectorFileError(f"{path / _CONFIG}: has no k, how many latents fire; get it anew")
    name = path.resolve().name
    return Dictionary(
        encoder=wanted(weights, found, "encoder.weight"),
        decoder=wanted(weights, found, "W_dec"),
        encoder_bias=wanted(weights, found, "encoder.bias"),
        decoder_bias=wanted(weights, found, "b_dec"),
        activation="topk",
        top_k=config["k"],
        subtract=True,
        site=known_site(path, site_of_module(name), site, f"the folder's name {name!r}"),
        provenance={"format": "sparsify", "hookpoint": name},
    )
