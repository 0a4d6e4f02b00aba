"""The package from outside: exported names, import order, what importing loads, README, recipes and vectors."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import steerkit
from tests.readme import EVIDENCE, block, methods

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "steerkit"

# The order of the road: a file imports only from files before it.
ORDER = (
    "errors",
    "_support",
    "prompts",
    "model",
    "tokens",
    "network",
    "activations",
    "maths",
    "vector",
    "methods",
    "steering",
    "generation",
    "fitting",
    "evaluate",
    "monitor",
    "export",
    "report",
    "persona",
    "recipe",
    "checks",
    "cli",
    "__main__",
)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Modules of steerkit that a file imports, those only for type checking left out."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    skipped = {id(child) for node in typing_only for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("steerkit"):
            parts = (node.module or "").split(".")
            found += [parts[1]] if len(parts) > 1 else [name.name for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name.split(".")[1] for name in node.names if name.name.startswith("steerkit.")]
    return [name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()]


def test_every_file_has_its_place_in_the_order() -> None:
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts == set(ORDER) & parts, sorted(parts - set(ORDER))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    own = part_of(path)
    if own == "__init__":
        return
    for name in imports_of(path):
        assert name == own or ORDER.index(name) < ORDER.index(own), f"{own} imports {name}, which comes later"


def test_exported_names() -> None:
    assert steerkit.__all__ == sorted(steerkit.__all__)
    for name in steerkit.__all__:
        assert getattr(steerkit, name) is not None
    assert set(dir(steerkit)) == {*steerkit.__all__, "__version__"}
    with pytest.raises(AttributeError, match="nonsense"):
        steerkit.nonsense  # noqa: B018


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
    assert block("methods") == methods()


@pytest.mark.embedded
def test_the_readme_s_five_lines_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("five lines").strip().removeprefix("```python\n").removesuffix("```")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) == 4, "an import and four lines"
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    printed = ast.literal_eval(capsys.readouterr().out.strip())
    assert len(printed) == 1
    assert len(printed[0].split()) > 5


def test_the_readme_s_comparison_is_the_committed_one_and_has_every_method() -> None:
    from steerkit.methods import _registry as registry
    from steerkit.methods._base import sorts_prompts

    table = EVIDENCE.read_text(encoding="utf-8")
    assert block("evidence") == table
    content = json.loads(EVIDENCE.with_suffix(".json").read_text(encoding="utf-8"))
    names = [name for name in registry.method_names() if not sorts_prompts(registry.resolve(name))]
    assert [row["method"] for row in content["rows"]] == names
    assert all(f"| `{name}` |" in table for name in names)
    assert EVIDENCE.with_suffix(".html").is_file()


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
