"""Several vectors at once: cosines, effects alone and together, orthogonal versions, and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import steerkit
from steerkit.cli import interference as command
from steerkit.errors import DataError, FitError, VectorFileError, VectorMismatchError
from steerkit.evaluate.intervals import interval
from steerkit.evaluate.overlap import orthogonalise, overlaps
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.together import interference, named
from steerkit.evaluate.trial import Trial
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ITEMS = [
    ("How was it?", "It was a fine day.", "It was a bad day."),
    ("And the food?", "Good.", "Not good at all."),
    ("Well?", "Yes, very well.", "No."),
    ("The music?", "Loud and lovely.", "Loud."),
]
HERE, THERE = Site(1), Site(2)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def setup(tokenizer: Any) -> Setup:
    return Setup(build("llama"), tokenizer, ContrastSet.from_answers(ITEMS), batch_size=3)


def with_sites(sites: dict[Site, Tensor], **fields: Any) -> SteeringVector:
    decoder = find_decoder(build("llama"))
    fields.setdefault("suggested_strength", 1.0)
    return SteeringVector(
        method="caa",
        tensors={f"{site}/direction": direction for site, direction in sites.items()},
        sites=tuple(sites),
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        **fields,
    )


def directions(count: int, *, seed: int = 0) -> list[Tensor]:
    width = find_decoder(build("llama")).hidden_size
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator)
    return [(n + 1) * (torch.randn(width, generator=generator) + common) for n in range(count)]


def three() -> list[SteeringVector]:
    """A and B share one site, B and C another; A and C share none."""
    a, b, c, d = directions(4)
    return [
        with_sites({HERE: a}, recipe="a", suggested_strength=0.5, held_out={"items": 2}),
        with_sites({HERE: b, THERE: c}, recipe="b", held_out={"items": 2}),
        with_sites({THERE: d}, recipe="c", held_out={"items": 2}),
    ]


def test_cosines_at_shared_sites() -> None:
    vectors = named(three())
    found = {(one.first, one.second): one for one in overlaps(vectors)}
    a, b, c, d = directions(4)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair, site, one, other in ((("a", "b"), HERE, a, b), (("b", "c"), THERE, c, d)):
        expected = float(one @ other / one.norm() / other.norm())
        assert found[pair].cosines == {site: pytest.approx(expected, abs=1e-5)} and found[pair].note is None
    assert not found["a", "c"].cosines and found["a", "c"].note == "a and c have no direction at a site they share"


def slow_change(setup: Setup, vectors: list[tuple[SteeringVector, float]]) -> Tensor:
    """The margin under nested contexts, one text at a time, minus the unsteered one."""

    def margins(used: Sequence[tuple[SteeringVector, float]]) -> Tensor:
        found = []
        for pair in setup.pairs:
            means = []
            for text in pair:
                logits = _under(setup.model, used, text)
                rows = torch.log_softmax(logits[text.prompt_length - 1 : -1].double(), dim=-1)
                targets = torch.tensor(text.ids[text.prompt_length :])
                means.append(rows.gather(-1, targets[:, None]).mean())
            found.append(means[0] - means[1])
        return torch.stack(found)

    return margins(vectors) - margins([])


def _under(model: Any, used: Sequence[tuple[SteeringVector, float]], text: Any) -> Tensor:
    if not used:
        return modes.plain_logits(model, text.ids)
    (vector, strength), *others = used
    with steerkit.steer(model, vector, strength, prompt_lengths=[text.prompt_length]):
        return _under(model, others, text)


def test_effects_are_their_definition(setup: Setup) -> None:
    # With a handful of items the bootstrap divides by tiny spreads and makes much of the last digit.
    many = [*ITEMS, *((f"Number {n}?", f"Yes, {n * n} it is.", f"{n} is bad") for n in range(8))]
    setup, vectors = replace(setup, data=ContrastSet.from_answers(many)), three()
    found = interference(setup, vectors, [0.5, -0.4, 0.3], measure_orthogonal=True)
    (effect,) = found.effects
    used = list(zip(vectors, [0.5, -0.4, 0.3], strict=True))
    alone = [slow_change(setup, [one]) for one in used]
    joint = slow_change(setup, used)
    assert joint.abs().max() > 1e-2
    for name, values in zip("abc", alone, strict=True):
        assert tuple(effect.alone[name]) == pytest.approx(tuple(interval(values)), abs=1e-4)
    added = torch.stack(alone).sum(dim=0)
    bent = list(zip(orthogonalise(vectors), [0.5, -0.4, 0.3], strict=True))
    for got, expected in (
        (effect.joint, joint),
        (effect.added, added),
        (effect.interaction, joint - added),
        (effect.orthogonal, slow_change(setup, bent)),
    ):
        assert got is not None and tuple(got) == pytest.approx(tuple(interval(expected)), abs=1e-4)
    assert effect.interaction.mean == pytest.approx(effect.joint.mean - sum(e.mean for e in effect.alone.values()))
    assert (effect.items, effect.failures) == (12, 0)
    json.dumps(found.as_json(), allow_nan=False)
    assert [one.strength for one in found.vectors.values()] == [0.5, -0.4, 0.3]


def test_strengths_default_to_the_vectors_own(setup: Setup) -> None:
    vectors = three()
    own = interference(setup, [vectors[0], vectors[1].at(strength=0.25)])
    assert [one.strength for one in own.vectors.values()] == [0.5, 0.25]
    assert own.effects == interference(setup, vectors[:2], [0.5, 0.25]).effects


def test_each_set_of_items_is_measured(setup: Setup) -> None:
    sets = {"first": ContrastSet.from_answers(ITEMS[:2]), "all": ContrastSet.from_answers(ITEMS)}
    found = interference(setup, three()[:2], data=sets)
    assert [(one.data, one.items) for one in found.effects] == [("first", 2), ("all", 4)]
    assert found.effects[1] == replace(interference(setup, three()[:2]).effects[0], data="all")
    baseline = interference(replace(setup, data=None), three()[:2])
    assert baseline.effects == () and baseline.overlaps, "without items only the directions are compared"


VALUES = torch.tensor([1.0, 2.0, 4.0, 2.0, 3.0, 1.0])
WEIGHTS = torch.tensor([1.0, 1.0, 2.0, 1.0, 3.0, 1.0])
MEAN = 13 / 6


@dataclass(frozen=True)
class Counted(Scorer):
    """Scores that are worked out from the strengths alone: 2 per unit, and 5 more for two vectors at once."""

    name: ClassVar[str] = "counted"
    title: ClassVar[str] = "counted"
    columns: ClassVar[dict[str, Column]] = {"counted": Column("counted", "points")}
    synergy: float = 5.0
    lost: int | None = None

    def score(self, trial: Trial) -> dict[str, Tensor | Weighted]:
        total = sum(2 * float(one.strength) for one in trial.vectors)  # type: ignore[arg-type]
        values = VALUES * (total + self.synergy * (len(trial.vectors) > 1)) + 7
        if self.lost is not None and len(trial.vectors) == 1:
            values[self.lost] = math.nan
        return {"counted": values}


@dataclass(frozen=True)
class Ratios(Counted):
    """The same as logarithms, against the baseline model, with weights."""

    columns: ClassVar[dict[str, Column]] = {"counted": Column("counted", "factor", scale="log")}
    against_baseline: ClassVar[bool] = True

    def score(self, trial: Trial) -> dict[str, Tensor | Weighted]:
        assert trial.vectors, "the baseline model is not scored beside it"
        found = super().score(trial)["counted"]
        assert isinstance(found, Tensor)
        return {"counted": Weighted((found - 7) / 100, WEIGHTS)}


def test_an_interaction_is_seen_where_there_is_one(setup: Setup) -> None:
    for synergy in (5.0, 0.0, -5.0):
        (effect,) = interference(setup, three()[:2], [1, 2], scorers=[Counted(synergy)]).effects
        assert effect.alone["a"].mean == pytest.approx(2 * MEAN) and effect.alone["b"].mean == pytest.approx(4 * MEAN)
        assert effect.added.mean == pytest.approx(6 * MEAN)
        assert effect.joint.mean == pytest.approx((6 + synergy) * MEAN)
        assert effect.interaction.mean == pytest.approx(synergy * MEAN) and effect.interferes is (synergy != 0)


def test_items_that_fail_once_count_nowhere(setup: Setup) -> None:
    (effect,) = interference(setup, three()[:2], [1, 2], scorers=[Counted(lost=2)]).effects
    assert (effect.items, effect.failures) == (5, 1)
    assert effect.joint.mean == pytest.approx(9 / 5 * 11) and effect.added.mean == pytest.approx(9 / 5 * 6)


def test_log_scores_are_ratios_and_weights_count(setup: Setup) -> None:
    (effect,) = interference(setup, three()[:2], [1, 2], scorers=[Ratios(5.0)]).effects
    mean = (1 + 2 + 2 * 4 + 2 + 3 * 3 + 1) / 9 / 100
    assert effect.added.mean == pytest.approx(math.exp(6 * mean))
    assert effect.joint.mean == pytest.approx(effect.added.mean * effect.interaction.mean)
    assert effect.interaction.mean == pytest.approx(math.exp(5 * mean))
    (none,) = interference(setup, three()[:2], [1, 2], scorers=[Ratios(0.0)]).effects
    assert none.interaction == pytest.approx((1, 1, 1)) and not none.interferes


def test_gram_and_schmidt_in_the_order_given() -> None:
    vectors = three()
    first, second, third = orthogonalise(vectors)
    a, b, c, d = (one.double() for one in directions(4))
    assert first is vectors[0]
    expected = b - (b @ a) / (a @ a) * a
    expected = expected / expected.norm() * b.norm()
    assert torch.allclose(second.params(HERE)["direction"].double(), expected, atol=1e-5)
    assert torch.equal(second.params(THERE)["direction"].double(), c), "the first at its other site"
    turned = third.params(THERE)["direction"].double()
    assert abs(float(turned @ c)) < 1e-4 and float(turned.norm()) == pytest.approx(float(d.norm()), rel=1e-6)
    assert not second.held_out and first.held_out, "figures of the old direction are not handed on"
    assert SteeringVector.from_bytes(second.to_bytes()) == second


def test_loewdin_bends_all_alike() -> None:
    rows = directions(3, seed=2)
    turned = orthogonalise([with_sites({HERE: row}) for row in rows], symmetric=True)
    units = torch.stack([row.double() / row.double().norm() for row in rows])
    values, vectors = torch.linalg.eigh(units @ units.T)
    expected = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ units
    got = torch.stack([one.params(HERE)["direction"].double() for one in turned])
    assert torch.allclose(got, expected * torch.stack([row.double().norm() for row in rows])[:, None], atol=1e-5)
    again = orthogonalise([with_sites({HERE: rows[n]}) for n in (2, 0, 1)], symmetric=True)
    assert torch.allclose(again[0].params(HERE)["direction"], turned[2].params(HERE)["direction"], atol=1e-5)
    closeness = [float(one @ other) for one, other in zip(got / got.norm(dim=1, keepdim=True), units, strict=True)]
    assert min(closeness) > 0.8, "nearer to each than Gram and Schmidt's last"


@pytest.mark.parametrize("symmetric", [True, False])
def test_dependent_directions_are_refused(symmetric: bool) -> None:
    a, b, *_ = directions(4)
    for rows in ([a, -0.3 * a], [a, b, a / 3 + 0.7 * b]):
        with pytest.raises(FitError, match=r"resid_post\.1: the directions are linearly dependent; drop one"):
            orthogonalise([with_sites({HERE: row}) for row in rows], symmetric=symmetric)


def test_what_has_no_direction_cannot_be_turned(setup: Setup) -> None:
    window = modes.vector_for(setup.model, scope="front")
    with pytest.raises(FitError, match="actadd has no single direction there"):
        orthogonalise([three()[0], window])
    found = interference(replace(setup, data=None), [three()[0], window])
    assert found.overlaps[0].note is not None


def test_wrong_input_is_told(setup: Setup) -> None:
    vectors = three()
    with pytest.raises(DataError, match="got 1 vectors; give two or more"):
        interference(setup, vectors[:1])
    with pytest.raises(DataError, match="2 strengths for 3 vectors"):
        interference(setup, vectors, [1.0, 2.0])
    with pytest.raises(VectorFileError, match="for a vector"):
        interference(setup, [vectors[0], "b"])  # type: ignore[list-item]
    with pytest.raises(VectorMismatchError):
        interference(setup, [vectors[0], replace(vectors[1], num_layers=9)])
    assert list(named([vectors[0], vectors[0], replace(vectors[0], recipe=None)])) == ["a", "a 2", "caa"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build("llama").save_pretrained(tmp_path / "tiny")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "tiny")
    for name, vector in zip("abc", three(), strict=True):
        vector.save(tmp_path / f"{name}.safetensors")
    lines = [json.dumps({"prompt": q, "positive": yes, "negative": no}) for q, yes, no in ITEMS]
    for name, part in (("few", lines[:3]), ("all", lines)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    (tmp_path / "joy.toml").write_text(
        'format = 1\nbehaviour = "joy"\n[data]\nfile = "all.jsonl"\nheld_out = 0.5\n[method]\nlayers = [1]\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def call(*words: str) -> Any:
    app = typer.Typer()
    app.command()(command.run)
    return CliRunner().invoke(app, [*words, "--model", "tiny"])


TWO = ("--vector", "a.safetensors", "--vector", "b.safetensors")
DATA = ("--data", "few.jsonl", "--data", "all.jsonl")


def test_command_prints_tables(folder: Path, setup: Setup) -> None:
    ended = call(*TWO, *DATA, "--strength", "0.5", "--strength", "0.3", "--orthogonalise", "out")
    assert ended.exit_code == 0, ended.output
    assert max(map(len, ended.stdout.splitlines())) <= 80
    sets = {"a": ContrastSet.from_jsonl("few.jsonl"), "b": ContrastSet.from_jsonl("all.jsonl")}
    found = interference(setup, dict(zip("ab", three(), strict=False)), [0.5, 0.3], data=sets, measure_orthogonal=True)
    assert f"{found.overlaps[0].cosines[HERE]:.3f}" in ended.stdout
    for effect in found.effects:
        assert f"items of {effect.data} ({effect.items}): preference margin, nats per token" in ended.stdout
        for estimate in (*effect.alone.values(), effect.joint, effect.added, effect.interaction, effect.orthogonal):
            assert f"{estimate.mean:.3f}" in ended.stdout
    written = [SteeringVector.load(folder / "out" / f"{name}.safetensors") for name in "ab"]
    expected = list(found.orthogonalised().values())
    assert [one.digest for one in written] == [one.digest for one in expected]


def test_command_prints_json_of_the_recipes_items(folder: Path) -> None:
    for name in "ab":
        vector = SteeringVector.load(f"{name}.safetensors")
        replace(vector, recipe="joy.toml").save(f"{name}.safetensors")
    ended = call(*TWO, "--json")
    assert ended.exit_code == 0, ended.output
    shown = json.loads(ended.stdout)
    assert [one["items"] for one in shown["effects"]] == [2, 2] and shown["files"] == []
    assert shown["vectors"]["a"]["strength"] == 0.5 and shown["vectors"]["b"]["strength"] == 1.0
    assert set(shown["effects"][0]["alone"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (TWO[:2], "got 1 --vector"),
        ((*TWO, *DATA[:2]), "1 --data for 2 --vector"),
        ((*TWO, *DATA, "--strength", "1"), "1 --strength for 2 --vector"),
        ((*TWO, *DATA, "--symmetric"), "--symmetric says how"),
        ((*TWO, *DATA, "--orthogonalise", "."), "would overwrite"),
    ],
)
def test_wrong_use_of_the_command(folder: Path, words: Sequence[str], told: str) -> None:
    ended = call(*words)
    assert ended.exit_code == 2 and told in " ".join(ended.output.replace("│", " ").split())


def test_a_vector_without_a_recipe_needs_data(folder: Path) -> None:
    for name in "ab":
        replace(SteeringVector.load(f"{name}.safetensors"), recipe=None).save(f"{name}.safetensors")
    ended = call(*TWO)
    assert ended.exit_code == 2 and "names no recipe" in ended.output
