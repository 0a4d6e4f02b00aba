"""The package from outside: exported names, import order, what importing loads, README, recipes and vectors."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import steerkit
from tests.readme import block

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "steerkit"


def test_exported_names() -> None:
    assert steerkit.__all__ == sorted(steerkit.__all__)
    for name in steerkit.__all__:
        assert getattr(steerkit, name) is not None
    assert set(dir(steerkit)) == {*steerkit.__all__, "__version__"}
    with pytest.raises(AttributeError, match="nonsense"):
        steerkit.nonsense  # noqa: B018


def test_every_room_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    rooms = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == rooms | {"steerkit.dictionaries", "steerkit.recipes", "steerkit.vectors"}


def test_no_submodule_bears_the_name_of_an_exported_function() -> None:
    modules = {entry.name for entry in pkgutil.iter_modules([str(PACKAGE)])}
    functions = {name for name in steerkit.__all__ if not isinstance(getattr(steerkit, name), type(steerkit))}
    assert not modules & functions


def test_importing_loads_no_model_library() -> None:
    code = "import sys, steerkit; print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_module_exports_what_it_says() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("__init__.py", "__main__.py") or "cli" in path.parts:
            continue
        name = ".".join(("steerkit", *path.relative_to(PACKAGE).with_suffix("").parts))
        module = importlib.import_module(name)
        assert module.__doc__, name
        assert all(hasattr(module, entry) for entry in module.__all__), name


def test_the_readme_s_table_of_methods_is_that_of_the_code() -> None:
    """Every row is; a method that has none yet is no mistake."""
    from docs.generate import METHODS_HEAD, method_row

    head, ruler, *rows = block("methods").splitlines()
    assert (head, ruler) == METHODS_HEAD
    names = [row.split("`")[1] for row in rows]
    assert names == sorted(set(names))
    assert rows == [method_row(name) for name in names], "run `python -m docs.generate`"


def test_the_readme_s_five_lines_are_five() -> None:
    code = block("five lines").strip().removeprefix("```python\n").removesuffix("```")
    assert len([line for line in code.splitlines() if line.strip()]) == 5, "an import and four lines; a test runs them"


def items_of(name: str) -> list[dict[str, str]]:
    path = ROOT / "recipes" / "prompts" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


PROMPT_FILES = sorted((ROOT / "recipes" / "prompts").glob("*.jsonl"))
LABELLED = [path for path in PROMPT_FILES if "label" in items_of(path.stem)[0]]


@pytest.mark.parametrize("path", LABELLED, ids=lambda path: path.stem)
def test_labelled_prompts_are_matched_and_come_from_several_sources(path: Path) -> None:
    items = items_of(path.stem)
    assert len({item["prompt"].lower() for item in items}) == len({item["id"] for item in items}) == len(items)
    labels = sorted({item["label"] for item in items})
    sides = [[item for item in items if item["label"] == label] for label in labels]
    assert len(sides) == 2
    assert min(map(len, sides)) >= 200
    counts = [Counter(item["source"] for item in side) for side in sides]
    assert counts[0] == counts[1]
    assert len(counts[0]) >= 4
    words = [sum(len(item["prompt"].split()) for item in side) / len(side) for side in sides]
    assert abs(words[0] - words[1]) < 0.05 * words[1]
    openings = [Counter(item["prompt"].split()[0] for item in side) for side in sides]
    shared = sum((openings[0] & openings[1]).values())
    assert shared >= 0.8 * min(map(len, sides)), "what is asked tells the sides apart, not how it begins"


LABELS = ("harmful", "harmless")
FIRST = 15
"""Sources whose harmless requests are partly alarming; those of later ones are ordinary, and twins of harmful ones."""


def test_harmful_and_ordinary_requests_of_later_sources_are_twins_in_form() -> None:
    items = items_of("requests")
    sources = list(dict.fromkeys(item["source"] for item in items))[FIRST:]
    assert len(sources) >= 8
    for source in sources:
        sides = [[one for one in items if (one["source"], one["label"]) == (source, side)] for side in LABELS]
        assert min(map(len, sides)) >= 20
        assert {one["topic"] for one in sides[1]} == {"ordinary"}
        for harmful, ordinary in zip(*sides, strict=True):
            texts = [one["prompt"] for one in (harmful, ordinary)]
            counts = [len(text.split()) for text in texts]
            assert abs(counts[0] - counts[1]) <= 2, texts
            assert texts[0].split()[0] == texts[1].split()[0], texts
            assert texts[0][-1] == texts[1][-1], texts
            assert not any(text.startswith(("Help me", "Can you", "Could you")) for text in texts), texts


@pytest.mark.parametrize("path", [path for path in PROMPT_FILES if path not in LABELLED], ids=lambda path: path.stem)
def test_prompt_files_are_matched_and_varied(path: Path) -> None:
    items = items_of(path.stem)
    assert len(items) >= 96
    assert len({item["prompt"].lower() for item in items}) == len(items)
    words = {side: [len(item[side].split()) for item in items] for side in ("positive", "negative")}
    means = {side: sum(counts) / len(counts) for side, counts in words.items()}
    assert abs(means["positive"] - means["negative"]) < 0.03 * means["negative"]
    for item, more, less in zip(items, words["positive"], words["negative"], strict=True):
        assert abs(more - less) <= max(1, 0.2 * max(more, less)), item["prompt"]
        assert item["positive"][-1] == item["negative"][-1], item["prompt"]
    for side in ("positive", "negative"):
        openings = [" ".join(item[side].split()[:2]).lower() for item in items]
        # Real refusals have few openings; everything else should not be told by its first words.
        allowed = (0.18 if path.stem == "refusal" else 0.054) * len(items)
        assert max(openings.count(opening) for opening in openings) <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_has_its_vector_and_card(path: Path) -> None:
    from steerkit.recipe import Recipe
    from steerkit.vector.steering_vector import SteeringVector

    recipe = Recipe.load(path)
    train, held_out = recipe.split()
    assert len(held_out) >= 0.24 * (len(train) + len(held_out))
    folder = ROOT / "vectors" / recipe.model.name
    vector = SteeringVector.load(folder / f"{recipe.name}.safetensors")
    assert vector.data_digest == train.digest, "the prompts have changed since the vector was made"
    assert vector.extra["recipe"] == recipe.resolved(), "the recipe has changed since the vector was made"
    card = (folder / f"{recipe.name}.md").read_text(encoding="utf-8")
    assert vector.digest[:16] in card
