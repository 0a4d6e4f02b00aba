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

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from steerkit.errors import SiteError
from steerkit.export.gguf_container import write_gguf
from steerkit.export.plain_addition import added_everywhere
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["control_vector", "warn_of_architecture", "write_control_vector"]

ARCHITECTURE = "controlvector"
# Of llama.cpp's graphs (src/models/*.cpp), those that do not call `build_cvec` after every block, as the compiled
# library of this build shows; families of encoders and drafters left out. Names are transformers'.
SEEN_IN = "b11549"
IGNORED = frozenset({"hy_v4", "plamo2", "qwen4_exp", "qwen4_exp_text"})
PARTLY: Mapping[str, str] = MappingProxyType({"nemotron_h": "behind MLP blocks only, not behind Mamba or attention"})


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

    Warns:
        UserWarning: llama.cpp adds control vectors nowhere in this family, or at some blocks only.
    """
    path = Path(path)
    directions = control_vector(vector, strength=strength)
    warn_of_architecture(vector.model_type)
    metadata: dict[str, str | int | float] = {
        f"{ARCHITECTURE}.model_hint": vector.model_type,
        f"{ARCHITECTURE}.layer_count": len(directions),
    }
    write_gguf(path, ARCHITECTURE, metadata, {f"direction.{layer}": one for layer, one in directions.items()})
    return path


def warn_of_architecture(model_type: str) -> None:
    """Warn of a family in which llama.cpp leaves control vectors out.

    Args:
        model_type: of the model, in transformers' words.
    """
    if model_type in IGNORED:
        warnings.warn(
            f"llama.cpp ({SEEN_IN}) loads control vectors for {model_type!r} and adds them nowhere; steer with hooks, "
            "or look whether a newer one does",
            stacklevel=3,
        )
    elif model_type in PARTLY:
        warnings.warn(
            f"llama.cpp ({SEEN_IN}) adds control vectors of {model_type!r} {PARTLY[model_type]}", stacklevel=3
        )


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
    added = added_everywhere(vector, "llama.cpp", strength=strength)
    if 0 in added:
        raise SiteError("resid_post.0: llama.cpp has no direction.0, it begins at block 1; fit at another layer")
    return added
