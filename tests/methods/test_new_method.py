"""Adding a method touches its own file and nothing else: one is written into a package outside, and all works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import steerkit
from steerkit.checks import conformance
from steerkit.cli import app
from steerkit.errors import FitError, VectorMismatchError
from steerkit.methods import Method
from steerkit.methods import _registry as registry
from steerkit.prompts import ContrastSet
from tests.families import build
from tests.plugged import plug_in
from tests.tiny_tokenizers import CHATML, byte_tokenizer

SOURCE = '''
"""Medians instead of means, which a few odd texts cannot move. arXiv 0000.00000."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from steerkit.methods import AddDirection


@dataclass(frozen=True)
class MedianDifference(AddDirection):
    """Add the median of the positive side minus the median of the negative side."""

    name: ClassVar[str] = "median_difference"
    title: ClassVar[str] = "Median difference"
    paper: ClassVar[str] = "nobody, arXiv 0000.00000"
    scope: ClassVar[str] = "response"

    sign: Literal["up", "down"] = "up"

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        difference = positive.median(dim=0).values - negative.median(dim=0).values
        return {"direction": difference if self.sign == "up" else -difference}
'''


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Method]:
    monkeypatch.delitem(sys.modules, "median_difference", raising=False)
    return plug_in(monkeypatch, tmp_path, "median_difference", "median_difference:MedianDifference", SOURCE)


def contrast() -> ContrastSet:
    return ContrastSet.from_prompts(
        ["a bright and cheerful morning", "what a happy little town", "they danced with joy all day"],
        ["a dull and gloomy morning", "what a weary little town", "they wept in grief all day"],
        raw=True,
    )


@pytest.mark.filterwarnings("ignore:.*is fitted on as well")
def test_it_is_found_fitted_saved_loaded_and_steers(kind: type[Method], tmp_path: Path) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    assert registry.resolve("median_difference") is kind
    vector = steerkit.fit(model, tokenizer, contrast(), method="median_difference", held_out=contrast())
    vector.save(tmp_path / "median.safetensors")
    loaded = steerkit.SteeringVector.load(tmp_path / "median.safetensors")
    assert loaded == vector
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(ids).logits
        with steerkit.steer(model, loaded, 4.0, prompt_lengths=8, scope="all"):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)


def test_the_command_line_lists_it(kind: type[Method]) -> None:
    shown = CliRunner().invoke(app, ["methods", "--json"])
    assert shown.exit_code == 0, shown.output
    assert "median_difference" in shown.output


def test_it_passes_the_checks_of_every_method(kind: type[Method]) -> None:
    findings = conformance(kind(), build("llama"), byte_tokenizer(CHATML), contrast(), strength=3.0)
    assert not [finding for finding in findings if not finding.passed]


def test_settings_and_tensors_are_checked_without_a_line_in_the_method(kind: type[Method]) -> None:
    with pytest.raises(FitError, match="setting sign = 'sideways': allowed are up, down"):
        kind(sign="sideways")  # type: ignore[call-arg]
    site = steerkit.Site(1)
    kind().check(site, {"direction": torch.ones(4)})
    with pytest.raises(VectorMismatchError, match=r"needs 'direction' \[d\], the vector has none"):
        kind().check(site, {})
    with pytest.raises(VectorMismatchError, match=r"the vector's is \[2, 4\]"):
        kind().check(site, {"direction": torch.ones(2, 4)})
