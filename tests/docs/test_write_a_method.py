"""The method that docs/how-to/write-a-method.md writes, taken from that very text: it conforms, and it is typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steerkit.checks import conformance
from steerkit.errors import FitError
from steerkit.fitting import fit
from steerkit.methods import Method
from steerkit.prompts import ContrastSet
from tests.families import build
from tests.plugged import plug_in
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "write-a-method.md"


def source() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return str(next(block for block in blocks if "class HeadShift" in block))


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Method]:
    monkeypatch.delitem(sys.modules, "head_shift", raising=False)
    return plug_in(monkeypatch, tmp_path, "head_shift", "head_shift:HeadShift", source())


def contrast() -> ContrastSet:
    return ContrastSet.from_prompts(
        ["a bright and cheerful morning", "what a happy little town", "they danced with joy", "sunny by the sea"],
        ["a dull and gloomy morning", "what a weary little town", "they wept in grief", "bitter by the sea"],
        raw=True,
    )


@pytest.mark.parametrize("along", ["mean", "probe"])
def test_it_passes_the_checks_of_every_method(kind: type[Method], along: str) -> None:
    method = kind.from_settings({"along": along})
    findings = conformance(method, build("llama"), byte_tokenizer(CHATML), contrast(), strength=3.0)
    assert not [finding for finding in findings if not finding.passed]


def test_so_many_heads_are_shifted_and_no_other(kind: type[Method]) -> None:
    model = build("llama")
    vector = fit(model, byte_tokenizer(CHATML), contrast(), method=kind.from_settings({"heads": 3}))
    moved = [tensor.unflatten(0, (4, -1)).any(dim=1).sum() for tensor in vector.tensors.values()]
    assert int(torch.stack(moved).sum()) == 3
    with pytest.raises(FitError, match="heads = 0; give 1 to 16"):
        fit(model, byte_tokenizer(CHATML), contrast(), method=kind.from_settings({"heads": 0}))


def test_the_text_is_typed(tmp_path: Path) -> None:
    (tmp_path / "head_shift.py").write_text(source(), encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / "head_shift.py")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
