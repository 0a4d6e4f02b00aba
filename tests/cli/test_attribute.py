"""`steerkit attribute`, and the commands that rank layers by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit.evaluate.attribution import attribute
from steerkit.evaluate.setup import Setup
from steerkit.network.sites import layers_text
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector
from tests.program import WIDTH, Cli, plain, strict_json

LOOSE = ("--max-kl", "1e9", "--max-ppl-ratio", "1e9")
FEW = ("--texts", 2, "--neutral", 4, "--controls", 1)


def test_a_recipe_at_all_blocks(cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    found = answer("attribute", "joy-caa.toml", "--controls", 3, "--out", "slopes.json")
    assert [row["site"] for row in found["sites"]] == [f"resid_post.{layer}" for layer in range(4)]
    assert found["parts"] == []
    assert strict_json(Path("slopes.json").read_text()) == {name: found[name] for name in found if name != "file"}
    model, tokenizer = steerkit.load_model(str(tiny), device="cpu")
    train, _ = find_recipe("joy-caa.toml").split("caa")
    rest, kept = train.split(held_out=0.25, seed=0)
    vector = steerkit.fit(model, tokenizer, rest, layers="0-3", readout="response_mean")
    slow = attribute(Setup(model, tokenizer, kept), vector, controls=0)
    for row, slope in zip(found["sites"], slow.sites.values(), strict=True):
        assert row["slope"] == pytest.approx(slope.estimate.mean, rel=1e-4)
    shown = cli("attribute", "joy-caa.toml", "--controls", 3).out
    assert max(map(len, shown.split("\n"))) <= WIDTH
    assert "all sites together" in shown


def test_heads_and_neurons_and_what_is_seen_of_them(cli: Cli, answer: Callable[..., Any], here: Path) -> None:
    words = ("attribute", "joy-caa.toml", "--kinds", "z,mlp_post", "--layers", "1-2", "--controls", 0, "--parts", 3)
    found = answer(*words)
    assert [row["site"] for row in found["sites"]] == ["z.1", "mlp_post.1", "z.2", "mlp_post.2"]
    assert all(0 < row["seen_share"] <= 1 for row in found["sites"])
    assert len(found["parts"]) == 3
    shown = plain(cli(*words).out)
    assert "the 3 largest heads and neurons" in shown
    assert f"{found['parts'][0]['site']}[{found['parts'][0]['number']}]" in shown
    assert "seen" in shown


def test_a_fitted_vector_on_pairs_of_ones_own(cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    own = ("--data", "joy.jsonl", "--model", tiny)
    found = answer("attribute", "--vector", "v.safetensors", *own, "--controls", 2)
    (row,) = found["sites"]
    assert row["site"] == "resid_post.1"
    assert found["total"]["slope"] == row["slope"]
    for words in (
        ("--vector", "v.safetensors"),
        ("--vector", "v.safetensors", "--data", "joy.jsonl", "--layers", "1"),
        ("joy-caa.toml", "--vector", "v.safetensors"),
        (),
    ):
        assert cli("attribute", *words).code == 2, words


@pytest.mark.filterwarnings("ignore:format alone predicts")
def test_calibrate_ranks_by_slopes(cli: Cli, here: Path) -> None:
    words = ("calibrate", "joy-caa.toml", "--layers", "0-3", "--strengths", "0.5,1", *LOOSE, *FEW)
    found = strict_json(cli(*words, "--screen", "attribution", "--json", "--out", "a.safetensors").out)
    assert found["search"]["screen"] == "attribution"
    promised = found["promised"]
    assert {"0", "1", "2", "3"} <= set(promised)
    assert [one["effect"] for one in promised.values()] == sorted(
        (one["effect"] for one in promised.values()), reverse=True
    )
    tried = {tuple(row["layers"]) for row in found["validation"]}
    most = max(one["effect"] for one in promised.values())
    near = [name for name, one in promised.items() if one["effect"] >= 0.8 * most][:4]
    assert {layers_text(layers) for layers in tried} == set(near)
    assert "promised" not in strict_json(cli(*words, "--json", "--out", "b.safetensors").out)


def test_sweep_begins_where_slopes_promise_most(answer: Callable[..., Any], here: Path) -> None:
    words = ("--layers", "0-3", "--strengths", "1", "--controls", 0, "--scorer", "preference_margin")
    found = answer("sweep", "joy-caa.toml", *words, "--screen", "attribution", "--out", "swept")
    order = [tuple(point["layers"]) for point in found["points"][1:]]
    assert sorted(order) == [(0,), (1,), (2,), (3,)]
    assert order != sorted(order)


def test_inspect_shows_what_is_seen(cli: Cli, answer: Callable[..., Any], here: Path) -> None:
    cli("extract", "joy-caa.toml", "--method", "iti", "--out", "heads.safetensors")
    shown = plain(cli("inspect", "heads.safetensors").out)
    assert "seen by the projection" in shown
    assert "1 heads" in shown
    assert answer("inspect", "heads.safetensors")["sites"][0]["seen_share"] == pytest.approx(1.0, abs=1e-3)
    assert SteeringVector.load("heads.safetensors").method == "iti"
