"""llama.cpp's control vector file, for `--control-vector FILE`; repeng reads it too.

    block il:  h' = h + direction.il          (il from 1 to the last block, at every token)

The file is GGUF with `general.architecture = "controlvector"` and one-dimensional float32 tensors `direction.N`. N is
the block counted from 0, so `direction.N` is added where steerkit's `resid_post.N` is: llama.cpp's loader
(`common_control_vector_load`, common/common.cpp) puts `direction.N` at row N - 1 of its buffer and refuses N < 1,
`llama_adapter_cvec::apply` (src/llama-adapter.cpp) gives block il the row il - 1, so il = N, and the model graphs call
`build_cvec` on a block's output, after the last residual addition. Block 0 cannot be steered: no file can name it.

llama.cpp reads neither key below; repeng's importer needs the first. `controlvector.model_hint` is the family in
transformers' words, `controlvector.layer_count` the number of directions in the file, as llama.cpp's own
cvector-generator and repeng write it. The strength is part of the tensors, so that the file as it is means the
calibrated strength (`--control-vector-scaled FILE:X` multiplies it by X).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from steerkit._support.files import write_whole
from steerkit.errors import ScopeError, SiteError, StrengthError, VectorFileError
from steerkit.methods._registry import can_write_all, default_strength
from steerkit.network.sites import Site
from steerkit.vector.applying import varying
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["control_vector", "write_control_vector"]

ARCHITECTURE = "controlvector"


def write_control_vector(vector: SteeringVector, path: str | Path, *, strength: float | None = None) -> Path:
    """Write llama.cpp's control vector file, whole or not at all; the same vector gives the same bytes.

    Args:
        vector: a plain addition at block outputs, with scope `all` (`vector.at(scope="all")`).
        path: where; missing folders are made.
        strength: in the vector's unit; None takes the vector's own, else its suggested one, else 1.

    Returns:
        The path.

    Raises:
        VectorFileError: llama.cpp cannot express the vector, or the file cannot be written there.
        SiteError: a site that llama.cpp does not add at.
        ScopeError: the scope is not `all`.
        StrengthError: the strength is not one finite number, or of a unit that the file cannot convert.
    """
    path = Path(path)
    directions = control_vector(vector, strength=strength)
    try:
        if path.is_dir():
            raise VectorFileError(f"{path}: is a folder; give the name of a file, such as {path / 'x.gguf'}")
        write_whole(path, _container(vector.model_type, directions))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VectorFileError(f"{path}: cannot be written ({reason}); choose another folder") from None
    return path


def control_vector(vector: SteeringVector, *, strength: float | None = None) -> dict[int, Tensor]:
    """What llama.cpp adds at each block, the strength included.

    Args:
        vector: a plain addition at block outputs, with scope `all`.
        strength: in the vector's unit; None takes the vector's own, else its suggested one, else 1.

    Returns:
        block from 1 to [d] float32, in the order of the blocks.

    Raises:
        VectorFileError: the vector is no plain addition of one direction per site.
        SiteError: a site that llama.cpp does not add at.
        ScopeError: the scope is not `all`.
        StrengthError: the strength is not one finite number, or of a unit that the file cannot convert.
    """
    if vector.edit != "add":
        raise VectorFileError(
            f"llama.cpp only adds a direction, this vector's edit is {vector.edit!r}; steer with hooks instead"
        )
    if vector.scope != "all":
        advice = (
            "accept that with vector.at(scope='all') or --scope all" if can_write_all(vector) else "steer with hooks"
        )
        raise ScopeError(f"llama.cpp adds at every token, the vector only at '{vector.scope}'; {advice}")
    if changing := varying(vector):
        raise StrengthError(f"llama.cpp adds the same at every token, which this is not ({changing})")
    for site in vector.sites:
        _check(site, vector)
    strengths = _strengths(vector, strength)
    return {site.layer: _shift(vector, site, strengths[site]) for site in sorted(vector.sites)}


def _check(site: Site, vector: SteeringVector) -> None:
    """Refuse what has no place in the file.

    Raises:
        SiteError: not the output of a block that llama.cpp adds at.
        VectorFileError: not one direction [hidden_size].
    """
    if site.kind != "resid_post":
        raise SiteError(f"{site}: llama.cpp adds at block outputs only; fit at resid_post, or steer with hooks")
    if site.layer == 0:
        raise SiteError(f"{site}: llama.cpp has no direction.0, it begins at block 1; fit at another layer")
    direction = vector.params(site).get("direction")
    shape = None if direction is None else list(direction.shape)
    if shape != [vector.hidden_size]:
        raise VectorFileError(
            f"{site}: llama.cpp adds one direction of shape [{vector.hidden_size}], the vector has {shape or 'none'}"
        )


def _strengths(vector: SteeringVector, strength: float | None) -> dict[Site, float]:
    """The strength at each site in the paper unit.

    Raises:
        StrengthError: several strengths, one not finite, none at all, or no activation norm to convert with.
    """
    used = vector.at(strength=strength)
    if used.strength is None:
        used = used.at(strength=default_strength(vector))
    if isinstance(used.strength, tuple):
        raise StrengthError(f"got {len(used.strength)} strengths, one per row; a control vector file holds one")
    strengths: dict[Site, float] = {}
    for entry in used.describe()["sites"]:
        if entry["strength"]["paper"] is None:
            raise StrengthError(
                f"{entry['site']}: the vector file holds no norm to convert unit 'norm' with; "
                "give a strength in unit 'paper' (vector.at(strength=..., unit='paper'))"
            )
        strengths[Site.parse(entry["site"])] = entry["strength"]["paper"]
    return strengths


def _shift(vector: SteeringVector, site: Site, strength: float) -> Tensor:
    """`strength * direction` [d] in float32, whatever the dtype of either.

    Raises:
        StrengthError: it is too large for float32.
    """
    shift = torch.tensor(strength, dtype=torch.float32) * vector.params(site)["direction"].float()
    if not bool(torch.isfinite(shift).all()):
        raise StrengthError(f"{site}: strength {strength:g} is too large for float32; give a smaller one")
    return shift


def _container(model_type: str, directions: dict[int, Tensor]) -> bytes:
    """The file's content."""
    import gguf

    # The writer knows paths only, and makes its file bit by bit.
    with tempfile.TemporaryDirectory(prefix="steerkit-") as folder:
        path = Path(folder, "vector.gguf")
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        try:
            writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
            writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
            for layer, direction in directions.items():
                writer.add_tensor(f"direction.{layer}", direction.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return path.read_bytes()
