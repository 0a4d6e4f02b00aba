"""Which vectors a request may name: no name is ever a path, wherever in a composition it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerkit.errors import UnknownNameError
from steerkit.serve import Catalogue
from tests.families import build
from tests.modes import vector_for


@pytest.mark.parametrize(
    "line",
    ["{}", "joy~{}", "joy when({} > 1)", "joy when(joy > 0 & ~({} < 1) per token)", "joy hold({} at 2 within 0 to 3)"],
)
@pytest.mark.parametrize("name", ["/made/v.safetensors", "v.safetensors", "hub:somebody/vectors"])
def test_no_name_is_a_path(line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vector = vector_for(build("llama"), scope="response")
    vector.save("v.safetensors")  # it is there, and not asked for
    with pytest.raises(UnknownNameError):
        Catalogue({"joy": vector}).vectors(line.format(name.replace("/made", str(tmp_path))))
