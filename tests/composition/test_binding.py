"""A composition steers like the vectors it names, and a direction without another has nothing left of it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import steerkit
import steerkit.recipe
from steerkit.composition import Composition
from steerkit.composition.binding import bound
from steerkit.errors import FitError, RecipeError, ScopeError, StrengthError
from steerkit.network.sites import Site
from tests.families import build
from tests.modes import LONG, vector_for

IDS = torch.tensor([LONG])


@functools.cache
def model_of() -> Any:
    return build("llama")


def known() -> dict[str, Any]:
    return {name: vector_for(model_of(), scope="response", seed=seed) for seed, name in enumerate("abc")}


def logits(vectors: Any) -> torch.Tensor:
    with torch.no_grad(), steerkit.steer(model_of(), vectors, prompt_lengths=4):
        return model_of()(IDS).logits


def test_a_composition_is_the_list_of_its_vectors() -> None:
    a, b, c = known().values()
    counted = replace(b, norms={Site(1): 10.0})
    text = "a*1.5 + b@all*0.2 norm - c[1:3]"
    by_hand = [a.at(strength=1.5), counted.at(0.2, "all", "norm"), c.at(-1.0, "response(1:3)")]
    made = Composition.parse(text).vectors({**known(), "b": counted})
    assert made == by_hand
    assert torch.equal(logits(made), logits(by_hand))


def test_files_by_name_in_python(tmp_path: Any) -> None:
    a, b, _ = known().values()
    paths = [one.save(tmp_path / f"{name} x.safetensors") for name, one in (("a", a), ("b", b))]
    text = f'"{paths[0]}"*2 - "{paths[1]}"*0.5'
    expected = logits([a.at(2.0), b.at(-0.5)])
    assert torch.equal(logits(text), expected)
    assert torch.equal(logits(Composition.parse(text)), expected)


@pytest.mark.parametrize(
    ("own", "term", "scope"),
    [
        ("response", "a[2:4]", "response(2:4)"),
        ("generated", "a[2:4]", "generated(2:4)"),
        ("generated", "a@response[2:]", "response(2:)"),
        ("all", "a[:4]", "response(4)"),
        ("prompt", "a", "prompt"),
    ],
)
def test_where_a_window_falls(own: str, term: str, scope: str) -> None:
    (made,) = Composition.parse(term).vectors({"a": vector_for(model_of(), scope=own)})
    assert made.scope == scope


def test_a_direction_without_another() -> None:
    a, b = vector_for(model_of(), scope="all"), vector_for(model_of(), scope="all", seed=1, size=7.0)
    (made,) = Composition.parse("a~b*2").vectors({"a": a, "b": b})
    v, w = (one.tensors["resid_post.1/direction"] for one in (a, b))
    torch.testing.assert_close(made.tensors["resid_post.1/direction"], v - w * (v @ w) / (w @ w))
    assert abs(float(made.tensors["resid_post.1/direction"] @ w)) < 1e-4
    assert made.strength == 2.0
    elsewhere = vector_for(model_of(), scope="all", site=Site(2))
    for other, says in ((a, "nothing is left"), (elsewhere, "act at the same sites")):
        with pytest.raises(FitError, match=says):
            bound(Composition.parse("a~b").terms, {"a": a, "b": other})


def test_what_a_vector_cannot_do_is_said_with_its_place() -> None:
    weak = replace(vector_for(model_of(), scope="all"), suggested_strength=None)
    with pytest.raises(StrengthError, match=r"^steering, column 7: caa: the file suggests no strength"):
        Composition.parse("b*1 - b").vectors({"b": weak})
    window = vector_for(model_of(), scope="front")
    with pytest.raises(ScopeError, match=r"actadd: scope 'response\(1:2\)' is not one of its own"):
        steerkit.steer(model_of(), Composition.parse("w[1:2]*1").vectors({"w": window}))


def test_a_recipe_with_a_wrong_composition_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "x-caa.toml"
    path.write_text('format = 1\nbehaviour = "x"\n[data]\nfile = "x.jsonl"\n[apply]\nsteering = "a*"\n', "utf-8")
    with pytest.raises(RecipeError, match=r"x-caa.toml: \[apply\] steering 'a\*', column 3: "):
        steerkit.recipe.Recipe.load(path)
