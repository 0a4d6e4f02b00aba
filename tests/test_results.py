"""Pages of measured figures: their form, and that they belong together. Nothing here asks what has been measured."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import results
from steerkit.vector.steering_vector import SteeringVector

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(results.FOLDER.glob("*.json"))
BY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def content_of(page: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(page.read_text(encoding="utf-8"))
    return content


def is_known(command: str) -> bool:
    """Whether a command is one of the benchmarks', of steerkit's or of the Makefile's."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        return words[2].startswith("benchmarks") and importlib.util.find_spec(words[2]) is not None
    if words[0] == "steerkit":
        return (ROOT / "steerkit" / "cli" / f"{words[1].replace('-', '_')}.py").is_file()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return words[0] == "make" and re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE) is not None


@BY_PAGE
def test_the_page_is_what_its_json_renders_to(page: Path) -> None:
    assert page.with_suffix(".md").read_text(encoding="utf-8") == results.render(content_of(page))


def test_every_page_has_its_json() -> None:
    named = {page.stem for page in PAGES} | {"index", "README"}
    assert {page.stem for page in results.FOLDER.glob("*.md")} <= named


@BY_PAGE
def test_command_date_versions_and_model_are_recorded(page: Path) -> None:
    content = content_of(page)
    assert is_known(content["command"]), content["command"]
    assert datetime.date.fromisoformat(content["date"])
    assert content["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", content["commit"])
    assert list(content["versions"]) == ["steerkit", "torch", "transformers"]
    assert all(re.match(r"\d+\.\d+", version) for version in content["versions"].values())
    assert content["model"] is None or re.fullmatch(r"[0-9a-f]{64}", content["model"]["digest"])


@BY_PAGE
def test_the_vectors_named_are_the_committed_ones(page: Path) -> None:
    for name, digest in content_of(page)["vectors"].items():
        vector = SteeringVector.load(ROOT / "vectors" / results.MODEL / f"{name}.safetensors")
        assert vector.digest == digest, f"{name} has changed since it was measured"


@BY_PAGE
def test_tables_are_whole(page: Path) -> None:
    tables = [part for part in content_of(page)["parts"] if isinstance(part, dict) and "rows" in part]
    assert all(len(row) == len(table["columns"]) for table in tables for row in table["rows"])


@pytest.mark.embedded
def test_every_measured_model_is_the_embedded_one() -> None:
    import steerkit
    from steerkit.evaluate.store_identity import weights_digest

    model, _ = steerkit.load_model(results.MODEL)
    digests = {content["model"]["digest"] for content in map(content_of, PAGES) if content["model"]}
    assert digests <= {weights_digest(model)}


def test_what_is_printed_becomes_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["matched", "some vector", "--write"])
    with results.recorded("one", "One", "benchmarks.matched", wanted=True, folder=tmp_path) as facts:
        sys.stdout.write("Words\nof two lines.\n\n| a | b |\n| --- | --- |\n| 1 |  |\n\nAfter.")
        facts["model"] = nn.Linear(2, 2)
    content = content_of(tmp_path / "one.json")
    assert content["parts"] == ["Words\nof two lines.", {"columns": ["a", "b"], "rows": [["1", ""]]}, "After."]
    assert content["command"] == "python -m benchmarks.matched 'some vector' --write"
    assert is_known(content["command"])
    page = (tmp_path / "one.md").read_text(encoding="utf-8")
    assert page == results.render(content)
    assert page.startswith("# One\n\nWords\nof two lines.\n\n| a | b |\n| --- | --- |\n| 1 |  |\n\nAfter.\n")


def test_nothing_is_written_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with results.recorded("one", "One", "benchmarks", wanted=False, folder=tmp_path):
        sys.stdout.write("figures\n")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == "figures\n"
