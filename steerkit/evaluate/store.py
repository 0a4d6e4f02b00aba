"""Figures kept on the disk row by row, so that a killed measurement goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerkit._support.files import append
from steerkit._support.processes import from_first
from steerkit.errors import SteerError

__all__ = ["Store"]


class Store:
    """Measured figures in a file that grows line by line, found again by a digest of all they depend on.

    A line that a killed run left torn is not read. A row is found again only if nothing it depends on has changed:
    weights, precision, revision, template, vocabulary, library versions, every text, the vector, the strength, the
    scorers and their settings.

    Args:
        path: a JSONL file, made when the first row is kept; None keeps rows in memory only.

    Raises:
        SteerError: the file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        try:
            # Read in one process: another one may have found more in the file by now.
            content = from_first(lambda: path.read_bytes() if path.exists() else None)
        except OSError as error:
            raise SteerError(f"{path}: cannot be read ({error.strerror}); choose another folder") from None
        if content is None:
            return
        lines = content.split(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
                self._rows[entry["key"]] = entry["scores"]
            except (ValueError, KeyError, TypeError):
                continue
        if lines[-1]:  # a torn line: what follows must not be glued to it
            self._append(b"\n")

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row kept under a key, if there is one.

        Args:
            key: a digest.
        """
        return self._rows.get(key)

    def put(self, key: str, scores: Mapping[str, Any], **notes: Any) -> None:
        """Keep a row, on the disk before this returns.

        Args:
            key: a digest.
            scores: plain data.
            notes: what people who look into the file want to see.

        Raises:
            SteerError: the file cannot be written.
        """
        self._rows[key] = dict(scores)
        self._append(json.dumps({"key": key, **notes, "scores": scores}).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._path is None:
            return
        try:
            append(self._path, line)
        except OSError as error:
            raise SteerError(f"{self._path}: cannot be written ({error.strerror}); choose another folder") from None
