"""The fields of a vector and their text form in the file's metadata, one codec for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from steerkit.errors import SiteError, StrengthError, VectorFileError
from steerkit.network.sites import Site
from steerkit.vector.frozen import finite_number, frozen, json_like, whole_number

__all__ = ["BY_SITE", "CODECS", "MAPPING", "checked_strength", "decoded"]


class _Codec(NamedTuple):
    clean: Callable[[Any], Any]
    """Check and normalise a Python value; TypeError or ValueError says what is wrong."""
    encode: Callable[[Any], str]
    decode: Callable[[str], Any]


def _clean_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text that is not empty, got {value!r}")
    return value


def _clean_verbatim(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be a text, got {value!r}")
    return value


def _clean_count(value: Any) -> int:
    if whole_number(value) < 1:
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


def _clean_shares(value: Any) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"must map dimensions to shares, got {value!r}")
    return MappingProxyType({whole_number(place): finite_number(share) for place, share in sorted(value.items())})


def _clean_mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"must be a mapping, got {value!r}")
    kept: Mapping[str, Any] = frozen(value)
    return kept


def _to_json(value: Any) -> str:
    return json.dumps(json_like(value), ensure_ascii=False, sort_keys=True, allow_nan=False)


def _site_keys(text: str) -> dict[Site, Any]:
    return {Site.parse(name): value for name, value in json.loads(text).items()}


_TEXT = _Codec(_clean_text, str, str)
_VERBATIM = _Codec(_clean_verbatim, json.dumps, lambda text: _clean_verbatim(json.loads(text)))
_WHOLE = _Codec(whole_number, str, int)
_COUNT = _Codec(_clean_count, str, int)
_STRENGTH = _Codec(lambda value: checked_strength("suggested_strength", value), repr, float)
MAPPING = _Codec(_clean_mapping, _to_json, json.loads)
_SITES = _Codec(
    _clean_sites,
    lambda sites: json.dumps([str(site) for site in sites]),
    lambda text: tuple(Site.parse(name) for name in json.loads(text)),
)
NORMS = _Codec(_by_site(finite_number), _to_json, _site_keys)
WIDTHS = _Codec(_by_site(_clean_count), _to_json, _site_keys)
SHARES = _Codec(
    _by_site(_clean_shares),
    _to_json,
    lambda text: {site: {int(place): one for place, one in own.items()} for site, own in _site_keys(text).items()},
)
BY_SITE = (NORMS, WIDTHS, SHARES)
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
        "spreads": NORMS,
        "massive": SHARES,
        "widths": WIDTHS,
        "suggested_strength": _STRENGTH,
        "calibration": MAPPING,
        "model_id": _TEXT,
        "model_revision": _TEXT,
        "chat_template_sha256": _TEXT,
        "tokenizer_sha256": _TEXT,
        "answer_separator": _VERBATIM,
        "readout": _TEXT,
        "data_digest": _TEXT,
        "data_source": _TEXT,
        "seed": _WHOLE,
        "paper": _TEXT,
        "held_out": MAPPING,
        "neutral": MAPPING,
        "steerkit_version": _TEXT,
        "recipe": _TEXT,
        "extra": MAPPING,
        "fitted_at": _SITES,
    }
)


def decoded(name: str, text: str) -> Any:
    """Read one field's text.

    Args:
        name: of the field.
        text: from the file's metadata.

    Raises:
        VectorFileError: it is not the text of such a field.
    """
    try:
        return CODECS[name].decode(text)
    except (TypeError, ValueError, AttributeError, RecursionError, SiteError) as error:
        raise VectorFileError(f"metadata {name!r} cannot be read ({error})") from None


def checked_strength(name: str, value: Any) -> float | tuple[float, ...] | None:
    """Refuse what is no strength.

    Args:
        name: ``strength``, which may differ from row to row, or what else to call it.
        value: a finite number, or one per row as a sequence or a tensor [b]; None stays None.

    Raises:
        StrengthError: anything else.
    """
    if value is None:
        return None
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        if isinstance(value, Sequence) and not isinstance(value, str) and name == "strength" and len(value):
            return tuple(finite_number(row) for row in value)
        return finite_number(value)
    except ValueError as error:
        raise StrengthError(f"{name} {error}") from None
