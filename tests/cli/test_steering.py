"""Compositions that read, on the command line: generated under, explained, measured, and what is said of a mistake."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit.vector.steering_vector import SteeringVector
from tests.program import Cli

FEW = ("--texts", 2, "--neutral", 4, "--max-new-tokens", 4, "--scorer", "preference_margin", "--scorer", "repetition")


@pytest.fixture
def readable(here: Path, vector: SteeringVector) -> Path:
    """The current folder, with a vector in it that says what its readings count in."""
    scale = {"joint": 1.0, "sites": {str(site): {"mean": 0.0, "deviation": 1.0} for site in vector.sites}}
    replace(vector, neutral={"prompt_last": scale, "response_mean": scale}).save("r.safetensors")
    return here


def test_generate_under_readings(answer: Callable[..., Any], readable: Path, tiny: Path) -> None:
    def ask(*words: object) -> dict[str, Any]:
        (found,) = answer("generate", "Hello", *words, "--model", tiny, "--max-new-tokens", 6)
        return found

    bare, steered = ask(), ask("--steering", "v.safetensors*2")
    for rule, text in (("> -1e9", steered), ("> 1e9", bare), ("> -1e9 per token", steered), ("> 1e9 per token", bare)):
        line = f"v.safetensors*2 when(r.safetensors {rule.replace('1e9', '1e+09')})"
        found = ask("--steering", line)
        assert found["text"] == text["text"], rule
        assert found["steering"] == line
    held = ask("--steering", "v.safetensors hold(r.safetensors at 1e9 within 0 to 2)")
    assert (held["text"], held["strength"]) == (steered["text"], None)
    assert held["steering"] == "v.safetensors hold(r.safetensors at 1e+09 within 0 to 2)"
    planned = answer("plan", "--steering", held["steering"], "--model", tiny, "--no-measure")
    assert [edit["paper"] for edit in planned["edits"]] == [2.0] * len(planned["edits"])


def test_explain_shows_what_a_prompt_decides(answer: Callable[..., Any], cli: Cli, readable: Path, tiny: Path) -> None:
    line = "v.safetensors*2 when(r.safetensors > -1e9 & ~(r.safetensors > 1e9)) + v.safetensors"
    words = ("explain", "one", "two", "--model", tiny, "--steering")
    rows = answer(*words, line)
    assert [(row["prompt"], row["open"], row["gain"]) for row in rows] == [("one", True, 2.0), ("two", True, 2.0)]
    model, tokenizer = steerkit.load_model(str(tiny))
    read = SteeringVector.load("r.safetensors")
    monitor = steerkit.Monitor(model, tokenizer, read, calibrated=False)
    expected = monitor.score(["one", "two"]).tolist()
    assert [row["readings"]["r.safetensors"] for row in rows] == pytest.approx(expected, rel=1e-4)
    shown = cli(*words, line)
    assert shown.code == 0
    assert "r.safetensors > -1e+09" in " ".join(shown.out.split())
    refused = cli(*words, "v.safetensors when(r.safetensors > 0 per token)")
    assert refused.code == 1
    assert "has no gate" in refused.err
    assert cli(*words, line, "--vector", "v.safetensors").code == 2
    assert cli(*words[:-1]).code == 2


def test_evaluate_measures_a_composition_as_it_stands(
    answer: Callable[..., Any], cli: Cli, readable: Path, tiny: Path
) -> None:
    words = ("evaluate", "--model", tiny, *FEW)
    items = ("--data", "joy.jsonl")
    found = answer(*words, *items, "--steering", "v.safetensors*2 when(r.safetensors > -1e9)")
    plain = answer(*words, *items, "--vector", "v.safetensors", "--strength", "2", "--controls", 0)
    assert found["steering"] == "v.safetensors*2 when(r.safetensors > -1e+09)"
    assert found["scores"].keys() == plain["strengths"][0]["scores"].keys()
    for name, one in found["scores"].items():
        assert one["mean"] == pytest.approx(plain["strengths"][0]["scores"][name]["mean"], abs=1e-4)
    shown = cli(*words, *items, "--steering", "v.safetensors*2")
    assert shown.code == 0
    assert "preference_margin" in shown.out
    for wrong, says in (
        (("--steering", "v.safetensors"), "give --data or --prompts"),
        ((*items, "--steering", "v.safetensors", "--strength", "2"), "--steering says all of --strength"),
        ((*items, "--steering", "v.safetensors", "--prompting"), "--steering says all of --prompting"),
        (items, "give a --vector, or several in one line with --steering"),
    ):
        ended = cli(*words, *wrong)
        assert ended.code == 2, wrong
        assert says in " ".join(ended.err.replace("│", " ").split()), wrong
