"""Progress where nobody sits at a terminal: plain lines, few of them, and none for what is done at once."""

from __future__ import annotations

import logging
import re
import time

import pytest

from steerkit._support import progress
from tests.program import Cli


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines every twentieth of a second."""
    monkeypatch.setattr(progress, "EVERY", 0.05)


def test_steps_are_told_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("measuring", 40) as step:
        for _ in range(40):
            time.sleep(0.01)
            step()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 8
    counts = [int(re.fullmatch(r"measuring: (\d+) of 40 \(\d+ s\)", line)[1]) for line in lines]  # type: ignore[index]
    assert counts == sorted(set(counts))


def test_a_state_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.status("reading") as say:
        time.sleep(0.2)
        say("fitting")
        time.sleep(0.2)
    assert [line.split(" (")[0] for line in capsys.readouterr().err.splitlines()] == ["reading", "fitting"]


def test_what_is_done_at_once_tells_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 5.0)
    start = time.monotonic()
    with progress.bar("reading", 1) as step:
        step()
    with pytest.raises(KeyError), progress.status("fitting"):
        raise KeyError
    assert time.monotonic() - start < 2  # nothing is waited for
    assert capsys.readouterr().err == ""


def test_a_command_tells_its_progress(cli: Cli, here: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    ended = cli("demo", "--recipe", "joy-caa.toml")
    assert ended.code == 0
    assert re.search(r"^measuring: \d+ of 15 \(\d+ s\)$", ended.err, re.MULTILINE)
    assert "of 15" not in ended.out


def test_what_the_library_announces_is_a_note(cli: Cli, here: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import steerkit

    load = steerkit.load_model

    def announced(*args: object, **options: object) -> object:
        logging.getLogger("steerkit.model").info("converting %s once, into a form that loads fast", "x.gguf")
        return load(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(steerkit, "load_model", announced)
    ended = cli("generate", "Hello", "--max-new-tokens", 1, "--model", "tiny")
    assert ended.err.startswith("note: converting x.gguf once, into a form that loads fast\n")
