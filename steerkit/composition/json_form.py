"""The JSON of a composition, and its files. `schema.json` beside this file says the same to other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerkit._support.files import write_whole
from steerkit.composition.terms import Term
from steerkit.errors import CompositionError, SteerError, near_miss
from steerkit.tokens.fade import Fade
from steerkit.vector.hold import Hold
from steerkit.vector.when import When

if TYPE_CHECKING:
    from steerkit.composition.terms import Composition

__all__ = ["plain", "read_file", "terms_of", "write_file"]

FORMAT = 1
_KEYS = tuple(entry.name for entry in fields(Term) if entry.name != "column")
_FADE = tuple(entry.name for entry in fields(Fade))
_LARGEST_FILE = 2**20


def plain(terms: Sequence[Term]) -> dict[str, Any]:
    """Terms as JSON holds them.

    Args:
        terms: of a composition.
    """
    return {"format": FORMAT, "terms": [_plain_term(term) for term in terms]}


def _plain_term(term: Term) -> dict[str, Any]:
    said = {name: getattr(term, name) for name in _KEYS}
    return {name: _plain_value(value) for name, value in said.items() if value is not None and value is not False}


def _plain_value(value: Any) -> Any:
    if isinstance(value, When | Hold):
        return value.data
    return list(value) if isinstance(value, tuple) else asdict(value) if isinstance(value, Fade) else value


def terms_of(data: Any) -> tuple[Term, ...]:
    """Terms of plain data.

    Args:
        data: of the form that `plain` gives.

    Raises:
        CompositionError: it is of another form; the message names the term.
    """
    _check_keys("steering", data, ("format", "terms"))
    if data.get("format") != FORMAT or isinstance(data["format"], bool):
        raise CompositionError(
            f"steering: format {repr(data.get('format'))[:40]} is not {FORMAT}, the one this version reads"
        )
    listed = data.get("terms")
    if not isinstance(listed, list | tuple):
        raise CompositionError(f"steering: terms is {repr(listed)[:40]}; give a list of vectors")
    return tuple(_term(number, entry) for number, entry in enumerate(listed, start=1))


def _term(number: int, entry: Any) -> Term:
    where = f"steering, term {number}"
    _check_keys(where, entry, _KEYS)
    if "vector" not in entry:
        raise CompositionError(f"{where}: no vector; name a file or a shipped vector")
    fade = entry.get("fade")
    if fade is not None:
        _check_keys(f"{where}, fade", fade, _FADE)
        if not {"shape", "over"} <= set(fade):
            raise CompositionError(f"{where}: a fade has a shape, and the tokens that it goes over")
    try:
        made: dict[str, Any] = {"fade": None if fade is None else Fade(**fade)}
        for name, kind in (("when", When), ("hold", Hold)):
            made[name] = None if entry.get(name) is None else kind.from_data(entry[name])
        return Term(**{**entry, **made})
    except SteerError as error:
        raise CompositionError(f"{where}: {error}") from None


def _check_keys(where: str, data: Any, allowed: Sequence[str]) -> None:
    if not isinstance(data, Mapping):
        raise CompositionError(f"{where}: got {repr(data)[:40]}; give an object with {' and '.join(allowed[:2])}")
    unknown = next((key for key in data if key not in allowed), None)
    if unknown is not None:
        raise CompositionError(f"{where}: unknown key {str(unknown)[:40]!r}; {near_miss(str(unknown)[:40], allowed)}")


def read_file(path: Path) -> tuple[Term, ...]:
    """The terms of a composition file.

    Args:
        path: one that ends in .json holds the plain data, any other the text.

    Raises:
        CompositionError: there is no such file, or it holds no composition.
    """
    from steerkit.composition.expression import parsed

    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise CompositionError(f"{path}: more than {_LARGEST_FILE} bytes are no composition")
        text = path.read_text("utf-8")
        return terms_of(json.loads(text)) if path.suffix == ".json" else parsed(text.strip())
    except CompositionError as error:
        raise CompositionError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CompositionError(f"{path}: cannot be read ({reason}); give a composition's .json or .txt file") from None


def write_file(path: Path, composition: Composition) -> None:
    """Write a composition file, whole or not at all.

    Args:
        path: with the ending .json the plain data is written, else the text.
        composition: what is written.

    Raises:
        CompositionError: it cannot be written there.
    """
    is_json = path.suffix == ".json"
    text = json.dumps(composition.as_json(), indent=2, ensure_ascii=False) if is_json else str(composition)
    try:
        write_whole(path, f"{text}\n".encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CompositionError(f"{path}: cannot be written ({reason}); choose another folder") from None
