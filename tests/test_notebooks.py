"""The notebooks of examples/ run from top to bottom, and are committed with what they printed and drew."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def shown(cell: nbformat.NotebookNode) -> list[str]:
    """What kinds of output a cell left."""
    return sorted({output["output_type"] for output in cell.get("outputs", [])})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_with_their_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom, once"
    assert all(cell.outputs for cell in cells)
    text = path.read_text(encoding="utf-8")
    assert not any(word in text for word in ("Traceback", "/home/", "/tmp/", "/work/", '"name": "stderr"'))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.embedded
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    for now, before in zip(notebook.cells, committed.cells, strict=True):
        if now.cell_type == "code":
            assert shown(now) == shown(before), now.source
