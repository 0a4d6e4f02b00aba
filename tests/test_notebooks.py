"""The notebooks of examples/ import what is public, are committed as they ran, and (slow) run from top to bottom."""

from __future__ import annotations

import ast
import importlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
named = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def shown(cell: nbformat.NotebookNode) -> list[str]:
    """What kinds of output a cell left; what libraries say on stderr is none."""
    return sorted({one["output_type"] for one in cell.get("outputs", []) if one.get("name") != "stderr"})


def tree_of(cell: nbformat.NotebookNode) -> ast.Module:
    """A cell as Python, without the lines that are IPython's."""
    if cell.source.startswith("%%"):
        return ast.parse("")
    kept = [line for line in cell.source.splitlines() if not re.match(r"\s*([%!]|\w+ = !)", line)]
    return ast.parse("\n".join(kept))


def names_used(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of steerkit that a notebook imports, with the names it takes from each, by import or by a dot."""
    rooms: dict[str, str] = {}
    trees = [tree_of(cell) for cell in code_of(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "steerkit":
                    rooms[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "steerkit":
            for alias in node.names:
                if node.module == "steerkit" and alias.name in ROOMS:
                    rooms[alias.asname or alias.name] = f"steerkit.{alias.name}"
                else:
                    yield node.module or "", alias.name
    for room in rooms.values():
        yield room, ""
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in rooms:
            yield rooms[node.value.id], node.attr


ROOMS = {path.parent.name for path in (ROOT / "steerkit").glob("[!_]*/__init__.py")}


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["persona", "quickstart", "refusal"]


@named
def test_notebooks_import_what_is_public(path: Path) -> None:
    used = set(names_used(path))
    assert ("steerkit", "load_model") in used
    for module, name in sorted(used):
        deep = module.split(".")[1:]
        assert len(deep) <= 1, f"{module} is inside a room"
        assert set(deep) <= ROOMS, f"{module} is no room"
        home = importlib.import_module(module)
        assert not name or name in home.__all__, f"{module}.{name} is not public"
        assert not name or hasattr(home, name)


@named
def test_no_line_is_the_shell_s(path: Path) -> None:
    """A name that only such a line uses looks unused to every checker, and its failure is no error of the cell."""
    assert not [
        line for cell in code_of(path) for line in cell.source.splitlines() if re.match(r"\s*(!|\w+ = !)", line)
    ]


@named
def test_notebooks_are_committed_as_they_ran(path: Path) -> None:
    cells = code_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom, once"
    assert "error" not in {kind for cell in cells for kind in shown(cell)}
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 1, "what is computed is shown"
    text = path.read_text(encoding="utf-8")
    places = {str(Path.home()), tempfile.gettempdir(), str(ROOT)}
    assert not any(word in text for word in ("Traceback", '"name": "stderr"', *places))
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) >= 2
    assert nbformat.read(path, as_version=4).metadata.kernelspec.name == "python3"


@pytest.mark.slow
@pytest.mark.embedded
@named
def test_notebooks_run(path: Path) -> None:
    """Every cell as it is, on the embedded model, leaves the kinds of output that it was committed with."""
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=where).execute()
    for now, then in zip(notebook.cells, committed.cells, strict=True):
        if now.cell_type == "code":
            assert shown(now) == shown(then), now.source
