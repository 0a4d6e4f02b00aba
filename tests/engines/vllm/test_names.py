"""Which vectors a request may name: those of the folder and the shipped ones, and no name is ever a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerkit.engines.vllm.plan import Served
from steerkit.engines.vllm.requests import ASKED, CARRIED, Admission
from steerkit.engines.vllm.settings import Settings
from steerkit.errors import UnknownNameError
from tests.engines.vllm import models

SERVED = Served(models.WIDTH, models.BLOCKS, ("resid_post",), 2, 8)
LINES = (
    "{}*1",
    "joy - {}*2",
    "joy~{}",
    "joy when({} > 1)",
    "joy when(joy > 0 & ~({} < 1) per token)",
    "joy hold({} at 2 within 0 to 3)",
    '{{"format": 1, "terms": [{{"vector": "{}", "strength": 1}}]}}',
    '{{"format": 1, "terms": [{{"vector": "joy", "when": {{"rule": {{"reading": "{}", "above": 1}}}}}}]}}',
)
PATHS = ("HERE/plain", "HERE/joy.safetensors", "joy.safetensors", "./plain", "../run/plain", "plain", "folder/joy")


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which vectors lie under all the names that a request might try."""
    joy = models.vectors(models.loaded(models.saved("llama", place)))["add-post"]
    run = tmp_path / "run"
    (run / "folder").mkdir(parents=True)
    for name in ("joy.safetensors", "folder/joy.safetensors"):
        joy.save(run / name)
    for name in ("plain", "folder/joy"):
        (run / name).write_bytes((run / "joy.safetensors").read_bytes())
    monkeypatch.chdir(run)
    return run


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("folder", [None, "folder"])
def test_no_name_is_a_path(here: Path, line: str, folder: str | None) -> None:
    line = line if folder else line.replace("joy", "optimism-caa")
    admission = Admission(Settings(folder=folder), SERVED)
    for path in PATHS:
        with pytest.raises(UnknownNameError, match="unknown vector") as refused:
            admission.admitted({ASKED: line.format(path.replace("HERE", str(here)))}, 5)
        text = str(refused.value)
        assert "\n" not in text
        assert ("no files" in text) == (path not in ("plain", "folder/joy")), text


def test_names_of_the_folder_come_first(here: Path) -> None:
    (here / "folder" / "joy.safetensors").rename(here / "folder" / "optimism-caa.safetensors")
    admission = Admission(Settings(folder="folder"), SERVED)
    found = admission.admitted({ASKED: "optimism-caa*1"}, 5)
    assert found is not None
    assert found[CARRIED]["vectors"] == {"optimism-caa": (here / "joy.safetensors").read_bytes()}
