"""The bytes of a file or of stdin, and the text in them: UTF-8, or UTF-16 where a byte order mark says so."""

from __future__ import annotations

import codecs
import functools
import sys
from pathlib import Path
from typing import TextIO

from steerkit._support.processes import from_first
from steerkit.errors import DataError

__all__ = ["STDIN", "content_of", "located", "name_of", "text_of"]

STDIN = "-"
HUB = "hf:"

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive (.zip, .xlsx, .npz)"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "a database"),
    (b"%PDF", "a PDF"),
)


def name_of(source: str | Path) -> str:
    """What to call a source in messages.

    Args:
        source: a file, - for stdin, or a data set's name behind ``hf:``.
    """
    return "stdin" if str(source) == STDIN else str(source)


def located(folder: Path, file: str) -> str | Path:
    """A file that is named relative to a folder; stdin and data sets of the hub have no folder.

    Args:
        folder: the folder.
        file: a file, - for stdin, or a data set's name behind ``hf:``.
    """
    return file if file == STDIN or file.startswith(HUB) else folder / file


def content_of(source: str | Path, what: str) -> bytes:
    """All bytes of a file, or of stdin, which is read once and kept.

    Args:
        source: the file; - is stdin.
        what: what it should hold, for messages.

    Raises:
        DataError: it cannot be read, or is a binary file of a known kind that holds no rows.
    """
    name = name_of(source)
    try:
        content = from_first(lambda: _stdin(sys.stdin)) if str(source) == STDIN else Path(source).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot read the file ({error.strerror}); give a file of {what}") from None
    except ValueError as error:  # a name that no system allows
        raise DataError(f"{name!r}: cannot read the file ({error}); give a file of {what}") from None
    for start, kind in _BINARY:
        if content.startswith(start):
            raise DataError(f"{name}: is {kind}; give {what} as JSON, JSONL, CSV, TSV, parquet or plain text")
    return content


@functools.lru_cache(maxsize=1)
def _stdin(stream: TextIO) -> bytes:
    """What stands on stdin; it is read once, whoever asks again."""
    binary = getattr(stream, "buffer", None)
    return stream.read().encode() if binary is None else bytes(binary.read())


def text_of(name: str, content: bytes) -> str:
    """The text of a file.

    Args:
        name: of the file, for messages.
        content: its bytes.

    Raises:
        DataError: with line and byte: it is not UTF-8, nor UTF-16 with a byte order mark, or holds a NUL.
    """
    mark, encoding = next((pair for pair in _MARKS if content.startswith(pair[0])), (b"", "utf-8"))
    content = content.removeprefix(mark)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise DataError(f"{name}: byte {len(mark) + error.start + 1} is not {encoding}; save it as UTF-8") from None
        raise DataError(f"{_place(name, content, error.start)} is not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        at = _place(name, text.encode(), text.encode().index(b"\0"))
        raise DataError(f"{at} is a NUL, which is no text; save the file as UTF-8 (UTF-16 needs its byte order mark)")
    return text


def _place(name: str, content: bytes, at: int) -> str:
    line = content.count(b"\n", 0, at) + 1
    return f"{name}, line {line}: byte {at - content.rfind(chr(10).encode(), 0, at)}"
