"""The notebooks of examples/ run from top to bottom, and are committed with what they printed and drew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
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


@pytest.fixture(scope="module")
def small(embedded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many blocks as the embedded model, its tokenizer and template, but narrow and random, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model, tokenizer = embedded
    wide = model.config.to_dict()
    narrow = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3, "num_key_value_heads": 1}
    # Large weights and a head of its own: a random model whose head is its embedding says one token for ever.
    own = {"head_dim": 16, "initializer_range": 0.3, "tie_word_embeddings": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        type(model)(type(model.config)(**{**wide, **narrow, **own})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(path: Path, before: str = "") -> None:
    """Run a notebook, with a line of code before it, and compare what kinds of output its cells leave."""
    committed = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(before))
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    for now, then in zip(notebook.cells[1:], committed.cells, strict=True):
        if now.cell_type == "code":
            assert shown(now) == shown(then), now.source


# The persona notebook takes half a minute; what it calls is called by its tutorial's page too.
OFTEN = [pytest.param(path, id=path.stem, marks=pytest.mark.slow) for path in NOTEBOOKS]


@pytest.mark.embedded
@pytest.mark.parametrize("path", OFTEN)
def test_notebooks_run_on_a_small_model(path: Path, small: Path) -> None:
    """Every cell as it is; only the model that they load is narrower."""
    loader = f"steerkit.load_model = functools.partial(steerkit.load_model, {str(small)!r})"
    run(path, f"import functools, torch, steerkit; torch.set_num_threads(1); {loader}")


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path) -> None:
    run(path)
