"""Gemma Scope: `params.npz` with W_enc [d, k], W_dec [k, d], b_enc, b_dec and threshold; JumpReLU.

    f = max(a, 0)  where a = h W_enc + b_enc > threshold

`b_dec` is not subtracted before encoding. What the dictionary reads stands in its repository's name alone:
`gemma-scope-2b-pt-res` the output of a block, `-mlp` what the MLP adds behind its post-norm, `-att` the heads side by
side before attention's output projection. Dictionaries of the embeddings (`embedding/...`) were trained on embeddings
times sqrt(d); they read no site of a block and are refused. Transcoders read one place and write another, and are
refused too: their encoder says nothing of the place where their decoder writes.

Lieberum et al. (2024), "Gemma Scope", arXiv 2408.05147.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steerkit.dictionary._files import known_site, wanted
from steerkit.dictionary.dictionary import Dictionary
from steerkit.errors import VectorFileError
from steerkit.network.sites import Site

__all__ = ["WEIGHTS", "read"]

WEIGHTS = "params.npz"
_KINDS = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}


def read(path: Path, site: Site | None = None) -> Dictionary:
    """Read a `params.npz`.

    Args:
        path: of the file.
        site: where it belongs; None takes it from the folders' names.

    Raises:
        VectorFileError: it is none, holds pickled objects, or is an embedding's dictionary or a transcoder.
    """
    whole = path.resolve().as_posix()
    if "transcoder" in whole:
        raise VectorFileError(
            f"{path}: a transcoder, which reads one place and writes another; give a dictionary of one place (-res, "
            "-mlp, -att), or its decoder's rows to SteeringVector.from_directions"
        )
    if "/embedding/" in whole:
        raise VectorFileError(
            f"{path}: a dictionary of the embeddings, which no block's site gives; take one of a layer"
        )
    found = _arrays(path)
    given = {name: wanted(path, found, name) for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}
    return Dictionary(
        encoder=given["w_enc"].T,
        decoder=given["w_dec"],
        encoder_bias=given["b_enc"],
        decoder_bias=given["b_dec"],
        threshold=given["threshold"],
        activation="jumprelu",
        site=known_site(path, _site_of_path(whole), site, "its folder"),
        provenance={"format": "gemma_scope"},
    )


def _arrays(path: Path) -> dict[str, Tensor]:
    """Its arrays by name in small letters: both W_enc and w_enc are about.

    Raises:
        VectorFileError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name.lower(): torch.from_numpy(np.asarray(data[name], dtype=np.float32)) for name in data.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise VectorFileError(f"{path}: cannot be read as an .npz of plain arrays ({error}); get it anew") from None


def _site_of_path(path: str) -> Site | None:
    """The site by the repository's name and the layer's folder."""
    kind = re.search(r"gemma-scope-[^/]*-(res|mlp|att)(?=[/_-]|$)", path)
    layer = re.search(r"/layer_([0-9]+)/", path)
    return None if kind is None or layer is None else Site(int(layer[1]), _KINDS[kind[1]])
