"""The method that docs/how-to/write-a-method.md writes, taken from that very text: it conforms, and it is typed."""

from __future__ import annotations

import ast
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
from steerkit.steering import steer
from tests import test_house
from tests.families import build
from tests.plugged import plug_in
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "write-a-method.md"


FILES = {"head_shift": "HeadShift", "prompt_end": "PromptEnd"}


def source(name: str = "head_shift") -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return str(next(block for block in blocks if f"class {FILES[name]}" in block))


def plugged(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> type[Method]:
    monkeypatch.delitem(sys.modules, name, raising=False)
    return plug_in(monkeypatch, folder, name, f"{name}:{FILES[name]}", source(name))


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Method]:
    return plugged(monkeypatch, tmp_path, "head_shift")


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


def test_the_second_passes_them_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = ContrastSet.from_prompts(["joy"], ["woe is"], raw=True)
    kind = plugged(monkeypatch, tmp_path, "prompt_end")
    findings = conformance(kind, build("llama"), byte_tokenizer(CHATML), pair, strength=3.0)
    assert not [finding for finding in findings if not finding.passed]


def test_the_second_is_actadd_s_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's text and the shipped method, on a padded batch of two prompts that the rows' strengths tell apart."""
    pair = ContrastSet.from_prompts(["joy"], ["woe is"], raw=True)
    plugged(monkeypatch, tmp_path, "prompt_end")
    model, found = build("llama"), []
    ids, mask = torch.arange(1, 25).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :2] = 0
    for name, scope in (("prompt_end", None), ("actadd", "back")):
        vector = fit(model, byte_tokenizer(CHATML), pair, method=name, sites=["resid_pre.1"])
        with torch.no_grad(), steer(model, vector, [2.0, -3.0], scope=scope, prompt_lengths=[9, 8]):
            found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    assert torch.equal(*found)


def test_so_many_heads_are_shifted_and_no_other(kind: type[Method]) -> None:
    model = build("llama")
    vector = fit(model, byte_tokenizer(CHATML), contrast(), method=kind.from_settings({"heads": 3}))
    moved = [tensor.unflatten(0, (4, -1)).any(dim=1).sum() for tensor in vector.tensors.values()]
    assert int(torch.stack(moved).sum()) == 3
    with pytest.raises(FitError, match="heads = 0; give 1 to 16"):
        fit(model, byte_tokenizer(CHATML), contrast(), method=kind.from_settings({"heads": 0}))


@pytest.mark.parametrize("name", FILES)
def test_the_texts_keep_the_rules_of_the_house(name: str, tmp_path: Path) -> None:
    """Put into a checkout, as the page says, they need no other line."""
    path = tmp_path / "steerkit" / "methods" / f"{name}.py"
    path.parent.mkdir(parents=True)
    path.write_text(source(name), encoding="utf-8")
    tree = ast.parse(source(name))
    exported = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert ast.unparse(exported[0].value) == f"['{FILES[name]}']"
    for function, node in test_house.public_functions(path):
        text = ast.get_docstring(node) or ""
        assert text, function
        assert all(f"{error}:" in text.partition("Raises:")[2] for error in test_house.raised(node)), function
        inherited = function.split(".")[-1] in test_house.declared_with_shapes()
        assert inherited or not test_house.takes_tensors(node) or test_house.SHAPE.search(text), function


def test_the_page_is_short() -> None:
    """About 80 lines of code in the first file, docstrings and blank lines included."""
    assert len(source("head_shift").splitlines()) <= 92
    assert len(source("prompt_end").splitlines()) <= 75


def test_the_texts_are_typed(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / f"{name}.py").write_text(source(name), encoding="utf-8")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *map(str, tmp_path.glob("*.py"))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
