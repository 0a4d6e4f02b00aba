"""`steerkit merge`: what it writes, says and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.families import build
from tests.program import WIDTH, Cli, width
from tests.tuning.pairs import finetuned


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = build("llama")
    base.save_pretrained("base")
    for seed, name in enumerate("abc"):
        finetuned(base, seed=seed).save_pretrained(name)


def weights(folder: str) -> dict[str, torch.Tensor]:
    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.usefixtures("folders")
def test_an_analogy(answer: Callable[..., Any], cli: Cli) -> None:
    words = ["--tuned", "c", "--tuned", "b", "--tuned", "a", "--scale", 1, "--scale", 1, "--scale", -1]
    found = answer("merge", "base", *words, "--out", "out", "--shard-gb", 0.001)
    assert (found["changed"], found["kept"], found["resumed"], found["left_out"]) == (39, 0, 0, {})
    base, a, b, c, out = (weights(name) for name in ("base", "a", "b", "c", "out"))
    for name, value in out.items():
        torch.testing.assert_close(value, c[name] + b[name] - a[name], rtol=0, atol=1e-5)
    ended = cli("merge", "base", "--tuned", "a", "--scale", 0, "--out", "still")
    assert ended.code == 0
    assert "0 tensors changed, 39 as they were, 1 files" in ended.out
    assert width(ended.out.split("\n")) <= WIDTH
    assert all(torch.equal(value, base[name]) for name, value in weights("still").items())


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("base", "--tuned", "a", "--scale", 1, "--scale", 2, "--out", "out"), 2, "got 2 of --scale for 1 of --tuned"),
        (("base", "--tuned", "a", "--out", "b"), 1, "error: b: is there already"),
        (("base", "--tuned", "a", "--scale", "nan", "--out", "out"), 2, "nan is no finite number; give one"),
        (("base", "--tuned", "./none", "--out", "out"), 1, "error: ./none: no folder"),
    ],
)
def test_mistakes(cli: Cli, words: Any, code: int, message: str) -> None:
    ended = cli("merge", *words)
    assert (ended.code, ended.out) == (code, "")
    assert message in " ".join(ended.err.split())
    assert not Path("out").exists()
