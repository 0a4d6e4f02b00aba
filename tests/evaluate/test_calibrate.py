"""Calibration on a model whose every number is known, and sweeps that are killed."""

from __future__ import annotations

import gc
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steerkit.errors import DataError, SiteError, SteerError
from steerkit.evaluate import store_identity as identity
from steerkit.evaluate.attribution.promises import Promise, Promises
from steerkit.evaluate.calibration import problem as module
from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.search import calibrate
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.layer_sets import default_candidates, parse_candidates
from steerkit.evaluate.scorers._base import Column
from steerkit.evaluate.scoring import Measured, measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import digest_of, setup_identity
from steerkit.evaluate.sweep_table import save_table
from steerkit.evaluate.sweeps import sweep
from steerkit.methods._registry import resolve
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.vector.steering_vector import SteeringVector
from tests.choices import mostly_slow
from tests.families import build
from tests.looping import LOOPS_ABOVE, NEUTRAL, answer, looping_model, swapped, trait_data

# The items of these tests differ in their answers alone.
pytestmark = pytest.mark.filterwarnings("ignore:.*is fitted on as well")

LADDER = (0.5, 1.0, 1.5, 1.9, 2.5, 3.0)
FREE = Budget(max_kl=1e9, max_ppl_ratio=1e30, max_repetition=0.1)
SEARCH = Search(candidates=[(1,), (2,)], strengths=LADDER, controls=3, neutral_texts=2)


@pytest.fixture(scope="module")
def looping() -> tuple[Any, Any]:
    return looping_model()


def setup_of(looping: tuple[Any, Any], data: Any = None, **options: Any) -> Setup:
    held_out = trait_data(24, seed=9) if data is None else data
    return Setup(*looping, held_out, neutral=NEUTRAL, texts=4, max_new_tokens=24, **options)


def test_the_model_loops_above_the_known_strength_and_not_below(looping: tuple[Any, Any]) -> None:
    setup = setup_of(looping)
    vector = Fits(setup, trait_data(40), "caa", [1], readout="response_mean").at([1])
    found = {
        strength: measure(setup.trial(vector, strength), ["repetition"])["repetition"].estimate.mean
        for strength in (0.95 * LOOPS_ABOVE, 1.1 * LOOPS_ABOVE)
    }
    assert found[0.95 * LOOPS_ABOVE] == 0.0
    assert found[1.1 * LOOPS_ABOVE] > 0.8


@pytest.fixture(scope="module")
def found(looping: tuple[Any, Any]) -> Calibration:
    return calibrate(setup_of(looping), trait_data(40), readout="response_mean", budget=FREE, search=SEARCH)


def test_bug_26_a_model_that_loops_is_calibrated_below_the_loop(found: Calibration) -> None:
    """More strength is more effect throughout; only the texts say that it is too much."""
    assert found.works, found.verdict
    assert found.strength == 1.9
    effects = [point.scores["preference_margin"].effect.mean for point in found.points if point.layers == found.layers]
    assert effects == sorted(effects), "a stronger one would have had more effect"
    assert found.vector is not None
    assert found.vector.suggested_strength == 1.9
    kept = found.vector.held_out["calibration"]
    assert kept["curve"][-1]["strength"] == 1.9
    assert {row["strength"] for row in kept["validation"]} == set(LADDER)
    assert SteeringVector.from_bytes(found.vector.to_bytes()) == found.vector
    assert found.confirmed["repetition"].effect.mean <= FREE.max_repetition
    assert found.confirmed["preference_margin"].items == 24


@pytest.mark.slow
def test_what_a_calibration_kept_goes_when_the_next_one_begins(looping: tuple[Any, Any]) -> None:
    """Setups hold activations and themselves in circles; Python's collector comes by too seldom for such sizes."""
    search, left = replace(SEARCH, candidates=[(1,)], strengths=(0.5, 1.0)), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            calibrate(setup_of(looping), trait_data(40), readout="response_mean", budget=FREE, search=search)
            left.append(sum(isinstance(one, Setup) for one in gc.get_objects()))
    finally:
        gc.enable()
    assert left[0] == left[1]


def figure(mean: float) -> Measured:
    return Measured(Column("", ""), Estimate(mean, mean - 0.01, mean + 0.01), None, 5)


@pytest.mark.parametrize("screen", ["steering", "attribution"])
def test_bug_26_a_strength_counts_only_if_all_below_it_are_healthy(
    looping: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, screen: str
) -> None:
    """Texts loop at 1.5 and, by some chance, not at 1.9: the choice stays below 1.5."""

    def table(_setup: Any, _vector: Any, strength: float, scorers: Any, **_: Any) -> dict[str, Measured]:
        if scorers[0].name == "repetition":
            return {"repetition": figure(0.9 if strength == 1.5 else 0.0)}
        return {"preference_margin": figure(strength), "kl": figure(0.1), "perplexity_ratio": figure(1.0)}

    monkeypatch.setattr(module, "measure_point", table)
    search = replace(SEARCH, screen=screen)
    found = calibrate(setup_of(looping), trait_data(40), readout="response_mean", budget=Budget(), search=search)
    assert found.strength == 1.0


@pytest.mark.parametrize("promised", [None, 0.1, 1.2, 9.0])
@pytest.mark.parametrize("cost", mostly_slow(["kl", "perplexity_ratio"], ["kl"]))
def test_a_strength_counts_only_if_all_below_it_are_inside_the_budget(
    looping: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, cost: str, promised: float | None
) -> None:
    """From the bottom of the ladder, or from the strength that slopes promise, wherever that lies."""

    def table(_setup: Any, _vector: Any, strength: float, scorers: Any, **_: Any) -> dict[str, Measured]:
        costs = {"repetition": 0.0, "kl": 0.1, "perplexity_ratio": 1.0}
        costs[cost] = 9.0 if strength == 1.0 else costs[cost]
        figures = {name: figure(value) for name, value in costs.items()}
        return {"preference_margin": figure(strength), **figures}

    monkeypatch.setattr(module, "measure_point", table)
    search = Search(candidates=[(1,)], strengths=(0.5, 1.0, 1.5), controls=1)
    if promised is not None:
        promise = {(1,): Promise(slope=1.0, curvature=1.0, strength=promised, effect=promised)}
        monkeypatch.setattr(Promises, "of", lambda _self, _candidates: promise)
        search = replace(search, screen="attribution")
    assert calibrate(setup_of(looping), trait_data(40), readout="response_mean", search=search).strength == 0.5


STEPS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
WORTH = {0: 0.2, 1: 0.7, 2: 1.0, 3: 0.9}
"""By block, what one unit of strength does there."""
EFFECTS = {
    "as strong as it is": lambda strength: strength,
    "bends": lambda strength: strength / (1 + strength),
    "falls from the screened strength on": lambda strength: strength * (3.2 - strength),
    "falls behind the screened strength": lambda strength: strength * (5.2 - strength),
}
DIVERGENCES = {
    "squared": lambda strength: 0.05 * strength**2,
    "slower": lambda strength: 0.11 * strength,
    "faster": lambda strength: 0.02 * strength**4,
    "hardly": lambda strength: 1e-3 * strength**2,
    "too much everywhere": lambda strength: 2.0 + strength,
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("divergence", mostly_slow(list(DIVERGENCES), ["squared", "hardly"]))
@pytest.mark.parametrize("effect", EFFECTS)
def test_climbs_begin_where_screening_expects_the_budget_to_end_and_choose_what_a_full_search_does(
    looping: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, effect: str, divergence: str, together: bool
) -> None:
    asked: set[tuple[tuple[int, ...], float]] = set()

    def of(layers: tuple[int, ...], strength: float) -> tuple[float, float]:
        return (
            sum(WORTH[layer] for layer in layers) * EFFECTS[effect](strength),
            DIVERGENCES[divergence](strength) * len(layers) ** 2,
        )

    def table(_setup: Any, vector: Any, strength: float, scorers: Any, **_: Any) -> dict[str, Measured]:
        layers = tuple(sorted(site.layer for site in vector.sites))
        if scorers[0].name == "repetition":
            return {"repetition": figure(0.0)}
        asked.add((layers, strength))
        gain, kl = of(layers, strength)
        return {"preference_margin": figure(gain), "kl": figure(kl), "perplexity_ratio": figure(1.0)}

    monkeypatch.setattr(module, "measure_point", table)
    blocks = [(layer,) for layer in WORTH]
    search = Search(candidates=blocks, strengths=STEPS, controls=1, together=together)
    found = calibrate(setup_of(looping), trait_data(40), readout="response_mean", search=search)
    finalists = [(2,), (3,), *([(1, 2, 3)] if together else [])]
    inside = []
    for layers in finalists:
        for strength in STEPS:
            if of(layers, strength)[1] > 0.3:
                break
            inside.append((layers, strength))
    best = max(inside, key=lambda place: of(*place)[0], default=((), None))
    assert (found.layers, found.strength) == best
    if divergence == "hardly" and not effect.startswith("falls"):
        climbed = {place for place in asked if place[0] != best[0] and place[1] != 2.0}
        assert climbed == {(layers, 3.0) for layers in finalists if layers != best[0]}


def test_pure_noise_works_nowhere(looping: tuple[Any, Any]) -> None:
    noise = swapped(trait_data(64), seed=1)
    train, held_out = noise.split(held_out=0.4, seed=0)
    found = calibrate(setup_of(looping, held_out), train, readout="response_mean", budget=FREE, search=SEARCH)
    assert not found.works
    assert found.verdict.startswith("nothing works")
    if found.vector is not None:
        assert found.vector.suggested_strength is None


def test_a_budget_nothing_keeps(looping: tuple[Any, Any]) -> None:
    found = calibrate(
        setup_of(looping), trait_data(40), readout="response_mean", budget=Budget(max_kl=1e-9), search=SEARCH
    )
    assert not found.works
    assert found.vector is None
    assert "no layer and strength" in found.verdict


def test_the_optimiser_stays_below_the_loop_too(looping: tuple[Any, Any]) -> None:
    search = Search(candidates=[(1,), (2,)], strengths=LADDER, controls=2, neutral_texts=2, trials=12)
    found = calibrate(setup_of(looping), trait_data(40), readout="response_mean", budget=FREE, search=search)
    assert found.works, found.verdict
    assert found.strength is not None
    assert 1.0 < found.strength < 1.05 * LOOPS_ABOVE


def test_length_that_predicts_the_label_draws_the_warning(looping: tuple[Any, Any]) -> None:
    from steerkit.prompts.contrast_set import ContrastSet

    rows = [(f"Item {n}?", answer("ABCDEFGH"[: 6 + n % 3]), answer("NOP"[: 2 + n % 2])) for n in range(40)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        calibrate(
            setup_of(looping), ContrastSet.from_answers(rows), readout="response_mean", budget=FREE, search=SEARCH
        )
    assert any(str(one.message).startswith("length alone predicts the label") for one in caught)


def test_the_held_out_items_are_not_used_to_choose(looping: tuple[Any, Any], found: Calibration) -> None:
    """Other held-out items, of pure noise: the same choice, which they do not confirm."""
    noise = swapped(trait_data(24, seed=5), seed=3)
    other = calibrate(setup_of(looping, noise), trait_data(40), readout="response_mean", budget=FREE, search=SEARCH)
    assert other.points == found.points
    assert other.strength == found.strength
    assert not other.works


def test_mistakes() -> None:
    with pytest.raises(DataError, match="max_kl is -1"):
        Budget(max_kl=-1)
    with pytest.raises(DataError, match="max_ppl_ratio is nan"):
        Budget(max_ppl_ratio=math.nan)
    with pytest.raises(SiteError, match="outside the model"):
        parse_candidates("3,9", 4)
    assert parse_candidates("0-2,1+3, 2", 4) == [(0,), (1,), (2,), (1, 3)]
    assert default_candidates(resolve("caa"), 30, [(12, 14)])[0] == (12, 14)
    assert 5 <= len(default_candidates(resolve("caa"), 30)) <= 8
    assert default_candidates(resolve("caa"), 2)


def points_of(setup: Setup, store: Store | None = None) -> list[Any]:
    fits = Fits(setup, trait_data(16), "caa", [1, 2], readout="response_mean")
    return list(sweep(setup, fits, [(1,), (1, 2)], [-1.0, 0.0, 1.0], store=store))


def test_a_fit_on_a_part_reads_nothing_that_the_whole_reads(looping: tuple[Any, Any]) -> None:
    setup, train = setup_of(looping), trait_data(40)
    rest, _ = train.split(held_out=0.25, seed=3)
    assert 0 < len(rest) < len(train)
    passes: list[int] = []
    locate(looping[0], [Site(1)])  # what form the residual stream has is seen in a pass of its own, once
    handle = looping[0].model.register_forward_pre_hook(lambda *_: passes.append(1))
    whole = Fits(setup, train, "caa", [1, 2], readout="response_mean", rows=True)
    part = whole.part(rest)
    vectors = part.at([1]), part.at([2]), whole.at([1, 2])
    read, passes[:] = len(passes), []
    again = Fits(setup, train, "caa", [1, 2], readout="response_mean", rows=True).at([1, 2])
    handle.remove()
    assert read == len(passes)
    assert again.digest == vectors[2].digest, "what is confirmed is not touched"
    for vector, layer in zip(vectors, (1, 2), strict=False):
        alone = Fits(setup, rest, "caa", [layer], readout="response_mean").at([layer])
        assert vector.data_digest == alone.data_digest
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(vector.tensors[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_method_that_arranges_its_data_reads_a_part_by_itself(looping: tuple[Any, Any]) -> None:
    train = trait_data(40)
    rest, _ = train.split(held_out=0.25, seed=3)
    assert Fits(setup_of(looping), train, "austeer", [1], rows=True).part(rest).whole is None


def test_a_sweep_is_what_single_measurements_give(looping: tuple[Any, Any]) -> None:
    from steerkit.fitting.fitting import fit

    setup = setup_of(looping)
    points = points_of(setup)
    assert [point.layers for point in points] == [(), *[(1,)] * 3, *[(1, 2)] * 3]
    assert points[2].scores == points[0].scores, "strength 0 is the unsteered model"
    vector = fit(*looping, trait_data(16), layers=[1, 2], readout="response_mean")
    fresh = setup_of(looping)
    assert points[-1].scores == measure(fresh.trial(vector, 1.0), ["preference_margin", "divergence", "repetition"])


def test_stored_figures_come_back_and_are_not_measured_again(
    looping: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = points_of(setup_of(looping), Store(tmp_path / "rows.jsonl"))
    lines = (tmp_path / "rows.jsonl").read_bytes()
    torn = lines + b'{"key": "half a li'
    (tmp_path / "rows.jsonl").write_bytes(torn)
    monkeypatch.setattr(Setup, "trial", lambda *_, **__: pytest.fail("measured again"))
    again = points_of(setup_of(looping), Store(tmp_path / "rows.jsonl"))
    assert again == first
    monkeypatch.undo()
    store = Store(tmp_path / "rows.jsonl")
    store.put("new", {})
    assert len(Store(tmp_path / "rows.jsonl")) == len(lines.splitlines()) + 1, "a torn line swallows nothing"


def changed(name: str, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """The setup with one thing changed that a score depends on."""
    from dataclasses import replace

    model, tokenizer = setup.model, setup.tokenizer
    if name == "dtype":
        return replace(setup, model=build("llama").to(torch.bfloat16))
    if name == "weights":
        other = build("llama")
        with torch.no_grad():
            other.model.layers[2].mlp.up_proj.weight.mul_(1.001)
        return replace(setup, model=other)
    if name == "revision":
        monkeypatch.setattr(model.config, "_commit_hash", "abcdef", raising=False)
    elif name == "template":
        monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
    elif name in ("torch", "transformers", "steerkit"):
        monkeypatch.setattr(identity, name, SimpleNamespace(__version__="0.0.0"))
    elif name == "data":
        return replace(setup, data=trait_data(24, seed=10))
    elif name == "neutral":
        return replace(setup, neutral=NEUTRAL[:2])
    elif name == "texts":
        return replace(setup, max_new_tokens=setup.max_new_tokens + 1)
    return setup


@pytest.mark.parametrize(
    "name",
    ["dtype", "weights", "revision", "template", "torch", "transformers", "steerkit", "data", "neutral", "texts"],
)
def test_bug_37_what_has_changed_is_not_found_in_the_store(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.tiny_tokenizers import CHATML, byte_tokenizer

    setup = Setup(build("llama"), byte_tokenizer(CHATML), trait_data(24, seed=9), neutral=NEUTRAL)
    before = digest_of(setup_identity(setup))
    assert digest_of(setup_identity(setup)) == before
    assert digest_of(setup_identity(changed(name, setup, monkeypatch))) != before


def test_tables(looping: tuple[Any, Any], tmp_path: Path) -> None:
    from pyarrow import parquet

    points = points_of(setup_of(looping))
    lines = save_table(points, tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    read = parquet.read_table(save_table(points, tmp_path / "t.parquet")).to_pylist()
    assert [row["mean"] for row in read] == [row["mean"] for row in rows]
    assert rows[0]["layers"] == ""
    assert {row["layers"] for row in rows} == {"", "1", "1+2"}
    with pytest.raises(SteerError, match="a table is"):
        save_table(points, tmp_path / "t.csv")
