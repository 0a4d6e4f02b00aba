"""A method in a package of its own, installed for one test: its file, and the entry point that a wheel would bring."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import pytest

from steerkit._support import plugins


@dataclass(frozen=True)
class _Entry:
    name: str
    value: str
    kind: type

    def load(self) -> type:
        return self.kind


def register(monkeypatch: pytest.MonkeyPatch, *kinds: type, name: str = "") -> None:
    """Make classes known as installed methods are, each by its own `name` where none is given.

    Args:
        monkeypatch: forgets them afterwards.
        kinds: the classes.
        name: the entry point's, of one class.
    """
    real = importlib.metadata.entry_points
    entries = [_Entry(name or vars(kind)["name"], f"{kind.__module__}:{kind.__name__}", kind) for kind in kinds]
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: [*real(group=group), *(entries if group == "steerkit.methods" else [])],
    )


def plug_in(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, target: str, source: str) -> type:
    """Write one method file, make it known, and give its class.

    Args:
        monkeypatch: takes the folder off the path afterwards.
        folder: an empty one.
        name: the method's.
        target: such as ``module:Class``.
        source: of the file.
    """
    module, _, kind = target.partition(":")
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    facts = folder / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(f"[steerkit.methods]\n{name} = {target}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    found: type = getattr(importlib.import_module(module), kind)
    return found
