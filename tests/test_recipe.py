"""Recipes and names: what is read, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from steerkit._support import shipped
from steerkit.errors import RecipeError, StrengthError, UnknownNameError, VectorFileError
from steerkit.methods import MeanDifference
from steerkit.methods import _registry as registry
from steerkit.prompts import SystemPrompts
from steerkit.recipe import Recipe, find_recipe
from tests.families import build
from tests.modes import vector_for
from tests.plugged import register
from tests.tiny_tokenizers import CHATML, byte_tokenizer

GOOD = """
format = 1
behaviour = "joy"
[data]
file = "joy.jsonl"
held_out = 0.5
[method]
name = "caa"
layers = [1, 2]
readout = "response_mean"
[apply]
strength = 1.5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    items = [
        {
            "prompt": f"How was day {number}?",
            "positive": f"Bright and fine, {number}.",
            "negative": f"Dull and sad, {number}.",
        }
        for number in range(8)
    ]
    (tmp_path / "joy.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "joy-caa.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_recipe_is_read_and_run(folder: Path) -> None:
    recipe = Recipe.load(write(folder, GOOD))
    assert recipe.name == "joy-caa"
    assert recipe.apply.unit == "paper"
    vector = recipe.extract(build("llama"), byte_tokenizer(CHATML))
    assert [str(site) for site in vector.sites] == ["resid_post.1", "resid_post.2"]
    assert vector.suggested_strength == 1.5
    assert vector.held_out["items"] == 4
    assert vector.extra["recipe"] == recipe.resolved()
    assert recipe.resolved()["apply"]["unit"] == "paper", "defaults are filled in"
    other = recipe.extract(build("llama"), byte_tokenizer(CHATML), method="repe", layers="0-1")
    assert other.method == "repe"
    assert [site.layer for site in other.sites] == [0, 1]
    assert other.extra["recipe"]["method"]["name"] == "repe", "the stored recipe is the one that was run"
    assert other.extra["recipe"]["method"]["layers"] == (0, 1)
    assert other.readout == "last", "the readout of another method is not its own"
    assert other.suggested_strength != 1.5, "the strength was found for the recipe's own method"
    assert other.calibration["by"] == "suggest_strength"


@pytest.mark.parametrize(("old", "new", "message"), [
    ("format = 1", "format = 2", "format 2 is not 1"),
    ("format = 1", "", "format None"),
    ('behaviour = "joy"', "", "behaviour is missing"),
    ("[apply]", "[aply]", "unknown key 'aply'; did you mean 'apply'"),
    ("strength = 1.5", "strenght = 1.5", "[apply] unknown key 'strenght'; did you mean 'strength'"),
    ("strength = 1.5", 'strength = "big"', "a number is wanted"),
    ("strength = 1.5", "strength = true", "a number is wanted"),
    ("strength = 1.5", 'unit = "meters"', "neither 'paper' nor 'norm'"),
    ("layers = [1, 2]", 'layers = "1-2"', "a list is wanted"),
    ("layers = [1, 2]", "layers = [1.5]", "whole numbers"),
    ('file = "joy.jsonl"', "", "[data] lacks file"),
    ('file = "joy.jsonl"', "file = 3", "a text is wanted"),
    ("[apply]", "[evaluate]\nstrengths = []\n[apply]", "strengths is an empty list"),
    ("strength = 1.5", "strength = nan", "not a finite number"),
    ("strength = 1.5", "range = [1.0]", "not a lower and a higher"),
    ("strength = 1.5", 'scope = "foo"', "unknown scope 'foo'"),
    ("strength = 1.5", 'scope = "front"', "is none of caa's"),
    ("layers = [1, 2]", 'layers = [1]\nsites = ["resid_post.1"]', "both layers and sites"),
    ("layers = [1, 2]", "layers = [-1]", "whole number from 0"),
    ("[method]", "[model]\nnum_layers = 2\n[method]", "[method] block 2 is outside of [model] num_layers = 2"),
    ("layers = [1, 2]", "settings = 3", "a table is wanted"),
    ("layers = [1, 2]", "settings = {x = 1}", "unknown setting 'x'"),
    ('name = "caa"', 'name = "cca"', "did you mean 'caa'"),
    ('name = "caa"', 'name = "repe"\nsettings = {restore_norm = "no"}', "true or false is wanted"),
    ('name = "caa"', 'name = "repe"\nsettings = {reading = "pcaa"}', "allowed are pca, difference, mean"),
    ('readout = "response_mean"', 'readout = "middle"', "unknown readout 'middle'"),
    ('behaviour = "joy"', 'behaviour = "joy"\ntitle = 3', "a text is wanted"),
    ('behaviour = "joy"', 'behaviour = "joy"\ndefault = "no"', "true or false is wanted"),
    ("[data]", "data = 3\n[dat]", "unknown key 'dat'"),
    ("[data]", "[data", "not a TOML file"),
    ("[apply]", '[prompting]\npositive = ["Be glad."]\n[apply]', "[prompting] negative has no system prompt"),
    ("[apply]", "[prompting]\npositive = 3\n[apply]", "[prompting] positive = 3: a list is wanted"),
    ("[apply]", "[prompting]\npositve = []\n[apply]", "unknown key 'positve'; did you mean 'positive'"),
    ("[apply]", '[prompting]\npositive = ["Be glad."]\nnegative = [" "]\n[apply]', "negative 1 is ' '"),
    ("[apply]", '[prompting]\npositive = ["a", "a"]\nnegative = ["b", "c"]\n[apply]', "positive 2 stands there twice"),
    ("[apply]", '[prompting]\npositive = ["a", "d"]\nnegative = ["b"]\n[apply]', "2 positive and 1 negative"),
    ("[apply]", '[prompting]\npositive = ["a"]\nfile = "joy-system.toml"\n[apply]', "wordings beside file"),
])  # fmt: skip
def test_mistakes_are_named(folder: Path, old: str, new: str, message: str) -> None:
    path = write(folder, GOOD.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_without_an_effect_suggests_no_strength(folder: Path) -> None:
    """A null stays one: nothing is measured in its place, and who steers with it is asked for a strength."""
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    recipe = Recipe.load(write(folder, GOOD.replace("strength = 1.5", "no_effect = true")))
    vector = recipe.extract(model, tokenizer)
    assert vector.suggested_strength is None
    assert Recipe.load(write(folder, GOOD.replace("strength = 1.5", ""))).extract(model, tokenizer).suggested_strength
    with pytest.raises(StrengthError, match="calibration confirmed no effect on held-out items"):
        registry.default_strength(vector)
    always = replace(vector, method="ablation", edit="project_out", calibration={})
    assert registry.default_strength(always) == 1.0
    with pytest.raises(StrengthError, match="calibration confirmed no effect"):
        registry.default_strength(replace(always, calibration=vector.calibration))
    with pytest.raises(RecipeError, match=r"strength = 1\.5 beside no_effect"):
        Recipe.load(write(folder, f"{GOOD}no_effect = true\n"))


def test_system_prompts_stand_in_the_recipe_or_in_a_file_that_recipes_share(folder: Path) -> None:
    texts = 'positive = ["Be glad.", "Sound happy."]\nnegative = ["Be sad.", "Sound gloomy."]\n'
    inside = Recipe.load(write(folder, f"{GOOD}[prompting]\n{texts}"))
    (folder / "joy-system.toml").write_text(texts, encoding="utf-8")
    beside = Recipe.load(write(folder, f'{GOOD}[prompting]\nfile = "joy-system.toml"\n'))
    assert (
        inside.prompting
        == beside.prompting
        == SystemPrompts(("Be glad.", "Sound happy."), ("Be sad.", "Sound gloomy."))
    )
    plain = Recipe.load(write(folder, GOOD))
    assert plain.prompting is None
    assert plain.resolved() == inside.resolved(), "vectors stay as they are"
    with pytest.raises(RecipeError, match=r"none\.toml: cannot be read"):
        Recipe.load(write(folder, f'{GOOD}[prompting]\nfile = "none.toml"\n'))
    for text, message in (("positive = [", "not a TOML file"), (texts + 'file = "x.toml"', "no further file")):
        (folder / "joy-system.toml").write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=message):
            Recipe.load(write(folder, f'{GOOD}[prompting]\nfile = "joy-system.toml"\n'))


@pytest.mark.parametrize("name", shipped.recipes())
def test_every_shipped_recipe_has_three_system_prompts_on_each_side(name: str) -> None:
    prompting = find_recipe(name).prompting
    assert prompting is not None
    assert len(prompting.positive) == len(prompting.negative) == 3
    for one, other in zip(prompting.positive, prompting.negative, strict=True):
        assert one != other
        assert len(one.split()) == len(other.split()), "alike in length"


def test_a_missing_recipe_or_prompt_file(folder: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(folder / "none.toml")
    recipe = Recipe.load(write(folder, GOOD.replace("joy.jsonl", "none.jsonl")))
    with pytest.raises(RecipeError, match=r"none\.jsonl"):
        recipe.split()


def test_recipes_by_name_and_by_behaviour() -> None:
    assert find_recipe("optimism-caa").name == "optimism-caa"
    assert find_recipe("optimism").name == "optimism-caa"
    with pytest.raises(UnknownNameError, match="did you mean 'optimism-caa'"):
        find_recipe("optimsm-caa")
    with pytest.raises(UnknownNameError, match="unknown recipe"):
        find_recipe("nothing-at-all")


def test_each_behaviour_has_one_default() -> None:
    recipes = [Recipe.load(path) for path in shipped.recipes().values()]
    for behaviour in {recipe.behaviour for recipe in recipes}:
        defaults = [recipe for recipe in recipes if recipe.behaviour == behaviour and recipe.default]
        works = any(not recipe.apply.no_effect for recipe in recipes if recipe.behaviour == behaviour)
        assert len(defaults) == int(works), behaviour
        assert not any(recipe.apply.no_effect for recipe in defaults), "a null is no default"


def test_vectors_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("one", "two"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "joy-caa.safetensors").write_bytes(b"")
    monkeypatch.setattr(shipped, "_folder", lambda _name: tmp_path)
    assert shipped.vector_path("joy-caa", "two") == tmp_path / "two" / "joy-caa.safetensors"
    assert shipped.vector_path("one/joy-caa", "two") == tmp_path / "one" / "joy-caa.safetensors"
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "joy-caa.safetensors").touch()  # of the embedded model, where no model is said
    assert shipped.vector_path("joy-caa") == tmp_path / "smollm2-135m" / "joy-caa.safetensors"
    assert shipped.vector_path("joy-caa", "two") == tmp_path / "two" / "joy-caa.safetensors"
    assert shipped.vector_path("./some/where.safetensors") == Path("some/where.safetensors")
    with pytest.raises(UnknownNameError, match="did you mean 'joy-caa'"):
        shipped.vector_path("joi-caa")


def test_methods_by_name() -> None:
    assert {"actadd", "caa", "repe"} <= set(registry.method_names())
    with pytest.raises(UnknownNameError, match="did you mean 'caa'"):
        registry.resolve("cca")
    with pytest.raises(UnknownNameError, match=r"repe: unknown setting 'redaing'; did you mean .*'reading'"):
        registry.resolve("repe").from_settings({"redaing": "pca"})


def test_a_method_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Theirs(MeanDifference):
        """Means, of another package."""

        name, title, paper = "theirs", "Theirs", "nobody"

    register(monkeypatch, Theirs)
    assert "theirs" in registry.method_names()
    assert registry.resolve("theirs") is Theirs


def test_a_vector_whose_method_does_another_edit_is_refused(folder: Path) -> None:
    import dataclasses

    vector = Recipe.load(write(folder, GOOD)).extract(build("llama"), byte_tokenizer(CHATML))
    with pytest.raises(VectorFileError, match="wants edit 'rotate'"):
        registry.method_of(dataclasses.replace(vector, edit="rotate"))


def test_the_shipped_files_travel_inside_the_wheel(tmp_path: Path) -> None:
    """Built as pip builds it, from a copy, without the network."""
    import subprocess
    import sys
    import zipfile

    root = Path(__file__).resolve().parent.parent
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("steerkit", "recipes", "vectors", "dictionaries"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*pip, str(tmp_path), str(copy)], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "steerkit/recipes/optimism-caa.toml" in names
    assert "steerkit/recipes/prompts/optimism.jsonl" in names
    assert "steerkit/recipes/prompts/optimism-system.toml" in names
    assert "steerkit/recipes/traits/optimistic.toml" in names
    assert "steerkit/recipes/finetune/finetune-pirate.jsonl" in names
    assert "steerkit/vectors/smollm2-135m/optimism-caa.safetensors" in names
    assert "steerkit/dictionaries/smollm2-135m/resid_post.14.safetensors" in names
    assert "steerkit/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "recipes", "vectors", "dictionaries"))]


def test_a_pair_is_what_is_fitted_and_the_file_what_is_measured_on(folder: Path) -> None:
    text = GOOD.replace('name = "caa"', 'name = "actadd"').replace('readout = "response_mean"\n', "")
    recipe = Recipe.load(write(folder, text.replace("held_out = 0.5", 'held_out = 0.5\npair = ["So glad", "So sad"]')))
    train, held_out = recipe.split()
    assert [(train.positive[0].prompt, train.negative[0].prompt)] == [("So glad", "So sad")]
    assert len(held_out) == 4
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    vector = recipe.extract(model, tokenizer)
    assert vector.method == "actadd"
    assert vector.extra["recipe"]["data"]["pair"] == ("So glad", "So sad")
    assert "pair" not in Recipe.load(write(folder, GOOD)).resolved()["data"]
    with pytest.raises(RecipeError, match=r"pair has 3 prompts"):
        Recipe.load(write(folder, text.replace("held_out = 0.5", 'held_out = 0.5\npair = ["a", "b", "c"]')))


def test_labelled_prompts_are_held_out_by_source(folder: Path) -> None:
    lines = [
        {"source": source, "label": label, "prompt": f"{label} {source} {n}"}
        for source in ("one", "two", "three")
        for label in ("bad", "good")
        for n in range(3)
    ]
    (folder / "joy.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    part = 'positive = "bad"\nheld_out_sources = ["two"]'
    text = GOOD.replace("held_out = 0.5", part).replace('readout = "response_mean"\n', "")
    recipe = Recipe.load(write(folder, text))
    train, held_out = recipe.split()
    assert (len(train.positive), len(train.negative)) == (6, 6)
    assert [item.prompt for item in held_out.positive] == ["bad two 0", "bad two 1", "bad two 2"]
    vector = recipe.extract(build("llama"), byte_tokenizer(CHATML))
    assert vector.held_out["items"] == 3
    assert vector.extra["recipe"]["data"]["held_out_sources"] == ("two",)
    unsaid = Recipe.load(write(folder, GOOD)).resolved()["data"]
    assert not {"positive", "negative", "held_out_sources"} & set(unsaid), "as in files of earlier versions"
    by_share = Recipe.load(write(folder, text.replace('held_out_sources = ["two"]', "held_out = 0.34")))
    assert len(by_share.split()[1].positive) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('negative = "good"', "negative = 'good' without positive; name both labels"),
        ('positive = "bad"\nheld_out_sources = []', "held_out_sources is an empty list"),
        ('positive = "bad"\nheld_out_sources = [1]', "a list of texts is wanted"),
        ("positive = 1", "a text is wanted"),
    ],
)
def test_labels_and_sources_that_cannot_be_are_refused(folder: Path, change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe.load(write(folder, GOOD.replace("held_out = 0.5", change)))


def test_candidates_hold_the_recipe_s_own_layers(folder: Path) -> None:
    recipe = Recipe.load(write(folder, GOOD))
    assert recipe.candidates(30)[0] == (1, 2)
    assert recipe.candidates(2)[0] == (1,)


def test_blocks_count_for_the_model_the_recipe_was_made_on(caplog: pytest.LogCaptureFixture) -> None:
    from steerkit.recipe import find_recipe

    caplog.set_level("INFO", logger="steerkit")
    recipe = find_recipe("optimism-caa")
    assert recipe.model.num_layers == 30
    part = replace(recipe.method, layers=(11, 12, 29), sites=None)
    assert recipe.at_depth(part, 30) == part
    assert not caplog.records
    moved = recipe.at_depth(part, 18)
    assert moved.layers == (round(11 * 17 / 29), round(12 * 17 / 29), 17)
    assert "counts 30 blocks and this model has 18" in caplog.text
    sites = replace(recipe.method, layers=None, sites=("mlp_out.10", "resid_post.20"))
    assert recipe.at_depth(sites, 60).sites == ("mlp_out.20", "resid_post.41")
    unknown = replace(recipe, model=replace(recipe.model, num_layers=None))
    assert unknown.at_depth(part, 18) == part


def test_a_strength_of_the_recipe_s_own_model_is_no_strength_of_another() -> None:
    recipe = Recipe.load(shipped.recipes()["optimism-steer2edit"])  # names no blocks, so depth moves nothing in it
    vector = vector_for(build("llama"), scope="all")
    assert vector.num_layers != recipe.model.num_layers
    assert recipe.signed(vector, recipe.method).suggested_strength is None
    own = replace(vector, num_layers=recipe.model.num_layers)
    assert recipe.signed(own, recipe.method).suggested_strength == recipe.apply.strength
