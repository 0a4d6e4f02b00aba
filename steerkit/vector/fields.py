"""SteeringVector: what a fit leaves behind, frozen, with everything needed to use it right; and its file.

The file is safetensors: 8 bytes header length, a JSON header, raw tensors named ``<site>/<param>`` or
``shared/<param>``. Steerkit writes the container itself because the same vector must give the same bytes (the
safetensors writer orders metadata at random), and because the digest covers every byte: it is the sha256 of the whole
file with 64 zeros in the digest's place. Reading checks the container first and then goes through safetensors.
Pickles are neither written nor read.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import SiteError, StrengthError, VectorFileError
from steerkit.network.sites import Site
from steerkit.vector.container import DTYPE_NAMES, MAX_DIMENSIONS

__all__ = [
    "CODECS",
    "MAPPING",
    "NORMS",
    "WIDTHS",
    "check_direction",
    "checked_strength",
    "decoded",
    "direction_length",
    "json_like",
    "own_copy",
    "thawed",
]

MAX_NESTING = 32


class _Codec(NamedTuple):
    clean: Callable[[Any], Any]
    """Check and normalise a Python value; TypeError or ValueError says what is wrong."""
    encode: Callable[[Any], str]
    decode: Callable[[str], Any]


def _clean_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text that is not empty, got {value!r}")
    return value


def _clean_number(value: Any) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, got {value!r}")
    return number


def _clean_whole(value: Any) -> int:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or abs(value) >= 2**64:
        raise ValueError(f"must be a whole number of at most 64 bits, got {value!r}")
    return int(value)


def _clean_count(value: Any) -> int:
    if _clean_whole(value) < 1:
        raise ValueError(f"must be at least 1, got {value!r}")
    return int(value)


def _clean_sites(value: Any) -> tuple[Site, ...]:
    sites = tuple(value)
    if not sites or len(set(sites)) < len(sites) or not all(isinstance(site, Site) for site in sites):
        raise ValueError(f"must be one or more different sites, got {value!r}")
    return sites


def _by_site(clean: Callable[[Any], Any]) -> Callable[[Any], Mapping[Site, Any]]:
    def cleaned(value: Any) -> Mapping[Site, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(site, Site) for site in value):
            raise ValueError(f"must map sites to numbers, got {value!r}")
        return MappingProxyType({site: clean(number) for site, number in sorted(value.items())})

    return cleaned


def _clean_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"must be a mapping, got {value!r}")
    frozen: Mapping[str, Any] = _frozen(value)
    return frozen


def _frozen(value: Any, depth: int = 0) -> Any:
    """A JSON-like value that nobody can change."""
    if depth > MAX_NESTING:
        raise ValueError(f"is nested more than {MAX_NESTING} deep")
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"keys must be text, got {wrong[0]!r}")
        return MappingProxyType({key: _frozen(value[key], depth + 1) for key in sorted(value)})
    if isinstance(value, list | tuple):
        return tuple(_frozen(entry, depth + 1) for entry in value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Real):
        return _clean_whole(value) if isinstance(value, numbers.Integral) else _clean_number(value)
    raise ValueError(f"must hold text, finite numbers, lists and mappings only, got {value!r}")


def thawed(value: Any) -> Any:
    """The value with plain dicts in place of read-only ones."""
    if isinstance(value, Mapping):
        return {key: thawed(entry) for key, entry in value.items()}
    return tuple(map(thawed, value)) if isinstance(value, tuple) else value


def json_like(value: Any) -> Any:
    """The value with dicts and lists, as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): json_like(entry) for key, entry in value.items()}
    return [json_like(entry) for entry in value] if isinstance(value, tuple) else value


def _to_json(value: Any) -> str:
    return json.dumps(json_like(value), ensure_ascii=False, sort_keys=True, allow_nan=False)


def _site_keys(text: str) -> dict[Site, Any]:
    return {Site.parse(name): value for name, value in json.loads(text).items()}


_TEXT = _Codec(_clean_text, str, str)
_WHOLE = _Codec(_clean_whole, str, int)
_COUNT = _Codec(_clean_count, str, int)
_STRENGTH = _Codec(lambda value: checked_strength("suggested_strength", value), repr, float)
MAPPING = _Codec(_clean_mapping, _to_json, json.loads)
_SITES = _Codec(
    _clean_sites,
    lambda sites: json.dumps([str(site) for site in sites]),
    lambda text: tuple(Site.parse(name) for name in json.loads(text)),
)
NORMS = _Codec(_by_site(_clean_number), _to_json, _site_keys)
WIDTHS = _Codec(_by_site(_clean_count), _to_json, _site_keys)
CODECS: Mapping[str, _Codec] = MappingProxyType(
    {
        "method": _TEXT,
        "edit": _TEXT,
        "scope": _TEXT,
        "unit": _TEXT,
        "sites": _SITES,
        "model_type": _TEXT,
        "hidden_size": _COUNT,
        "num_layers": _COUNT,
        "settings": MAPPING,
        "norms": NORMS,
        "widths": WIDTHS,
        "suggested_strength": _STRENGTH,
        "model_id": _TEXT,
        "model_revision": _TEXT,
        "chat_template_sha256": _TEXT,
        "tokenizer_sha256": _TEXT,
        "readout": _TEXT,
        "data_digest": _TEXT,
        "data_source": _TEXT,
        "seed": _WHOLE,
        "paper": _TEXT,
        "held_out": MAPPING,
        "steerkit_version": _TEXT,
        "recipe": _TEXT,
        "extra": MAPPING,
        "fitted_at": _SITES,
    }
)


def decoded(name: str, text: str) -> Any:
    """Read one field's text.

    Raises:
        VectorFileError: it is not the text of such a field.
    """
    try:
        return CODECS[name].decode(text)
    except (TypeError, ValueError, AttributeError, RecursionError, SiteError) as error:
        raise VectorFileError(f"metadata {name!r} cannot be read ({error})") from None


def checked_strength(name: str, value: Any) -> float | tuple[float, ...] | None:
    """One finite number, or one per row; None stays None.

    Raises:
        StrengthError: anything else.
    """
    if value is None:
        return None
    value = value.tolist() if isinstance(value, Tensor) else value
    try:
        if isinstance(value, Sequence) and not isinstance(value, str) and name == "strength" and len(value):
            return tuple(_clean_number(row) for row in value)
        return _clean_number(value)
    except ValueError as error:
        raise StrengthError(f"{name} {error}") from None


def own_copy(name: str, tensor: Any) -> Tensor:
    """A copy of one tensor that nobody else holds.

    Raises:
        VectorFileError: no tensor, an unknown dtype, no numbers, too many dimensions, or one is not finite.
    """
    if not isinstance(tensor, Tensor):
        raise VectorFileError(f"{name} is {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in DTYPE_NAMES:
        raise VectorFileError(f"{name} has dtype {tensor.dtype}; allowed are floats, integers and bool")
    if tensor.numel() == 0 or tensor.dim() > MAX_DIMENSIONS:
        raise VectorFileError(f"{name} has shape {list(tensor.shape)}; it must hold numbers in 0 to 8 dimensions")
    with torch.inference_mode(mode=False):  # a tensor made in inference mode could not be trained through later
        copy = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(copy).all()):
        raise VectorFileError(f"{name} is not finite; fit again in float32 or bfloat16")
    return copy


def check_direction(name: str, direction: Tensor, width: int) -> None:
    """Raise VectorFileError where a direction is not as wide as its site."""
    if direction.dim() not in (1, 2) or direction.shape[-1] != width:
        raise VectorFileError(f"{name} has shape {list(direction.shape)}; it must be [{width}] or [k, {width}]")


def direction_length(direction: Tensor | None) -> float | None:
    """Norm of a direction [d]; of several [k, d] the median of those that are not zero."""
    if direction is None:
        return None
    norms = torch.linalg.vector_norm(direction.float(), dim=-1).reshape(-1)
    norms = norms[norms > 0]
    return float(norms.median()) if len(norms) else 0.0
