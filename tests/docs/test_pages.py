"""README, AGENTS and docs: all commands and snippets run, all links lead somewhere, what is shown is printed."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit.methods._registry import method_names
from tests.docs.pages import ROOT, Block, anchors, blocks, commands, links, name_of, pages, runnable, same
from tests.program import Cli
from tests.readme import block as block_of_readme
from tests.readme import results

PAGES = [pytest.param(page, id=name_of(page)) for page in pages()]
WITH_CODE = [page for page in runnable() if any(one.language != "" for one in blocks(page.read_text("utf-8")))]
RUN = [
    page
    for page in WITH_CODE
    if any(one.language in ("python", "console", "bash") for one in blocks(page.read_text("utf-8")))
]
SLOW = [page for page in RUN if any(one.is_slow for one in blocks(page.read_text("utf-8")))]
LONG = {  # more than ten seconds each; README and the page on own data are run every time
    "AGENTS.md",
    "docs/how-to/choose-a-strength.md",
    "docs/how-to/measure.md",
    "docs/how-to/prevent-drift.md",
    "docs/tutorials/first-vector.md",
    "docs/tutorials/persona.md",
    "docs/tutorials/refusal-gate.md",
}
# peft asks the model in the way that transformers is about to drop.
BY_TRANSFORMERS_ITSELF = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
# Formal answers are as many tokens as casual ones, of longer words; the pages say so.
LONGER_WORDS = pytest.mark.filterwarnings("ignore:length alone predicts the label.*more characters:UserWarning")
KNOWN = {"python", "console", "bash", "text", "toml", "json", "jsonl", "markdown", "{eval-rst}", "{toctree}"}


def ids(listed: list[Path], slow: Collection[str] = ()) -> list[Any]:
    return [
        pytest.param(page, id=name_of(page), marks=pytest.mark.slow if name_of(page) in slow else ()) for page in listed
    ]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: tuple[Any, Any]) -> Iterator[Path]:
    """A folder to run a page in, with the recipes beside it, and a copy of the embedded model for whoever loads it."""
    import steerkit

    load = steerkit.load_model

    def loaded(name: str = "smollm2-135m", **options: Any) -> tuple[Any, Any]:
        if name != "smollm2-135m" or any(value is not None for value in options.values()):
            return load(name, **options)
        return copy.deepcopy(embedded[0]), embedded[1]

    monkeypatch.setattr(steerkit, "load_model", loaded)
    for folder in ("dictionaries", "recipes", "vectors"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    yield tmp_path


def run_python(block: Block, names: dict[str, Any], page: str) -> None:
    """Run a block. One whose output names an error is to raise that error."""
    out = io.StringIO()
    expected = re.match(r"(\w+Error): ", block.shown or "")
    with contextlib.redirect_stdout(out):
        try:
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
        except Exception as error:
            if not expected or type(error).__name__ != expected[1]:
                raise
            out.write(f"{type(error).__name__}: {error}\n")
        else:
            assert not expected, f"{page}:{block.line}: no {expected and expected[1]} was raised"
    if block.shown is not None:
        assert same(block.shown, out.getvalue()), f"{page}:{block.line} printed:\n{out.getvalue()}"


def run_commands(block: Block, cli: Cli, page: str) -> None:
    for words, shown in commands(block):
        if words[0] != "steerkit":
            continue
        ended = cli(*words[1:])
        printed = ended.err if (shown or "").startswith("error: ") else ended.out
        assert ended.code == (1 if (shown or "").startswith("error: ") else 0), f"{page}:{block.line}: {ended.err}"
        assert shown is None or same(shown, printed), f"{page}:{block.line} {words[1:]} printed:\n{printed}"


def run_page(page: Path, folder: Path, cli: Cli, *, slow: bool) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text("utf-8")):
        if block.file:
            target = folder / block.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif not block.is_run or (block.is_slow and not slow):
            continue
        elif block.language == "python":
            run_python(block, names, name_of(page))
        elif block.language in ("console", "bash"):
            run_commands(block, cli, name_of(page))


@BY_TRANSFORMERS_ITSELF
@pytest.mark.embedded
@pytest.mark.parametrize("page", ids(RUN, LONG))
def test_a_page_runs(page: Path, site: Path, cli: Cli) -> None:
    run_page(page, site, cli, slow=False)


@BY_TRANSFORMERS_ITSELF
@LONGER_WORDS
@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.parametrize("page", ids(SLOW))
def test_a_page_runs_whole(page: Path, site: Path, cli: Cli) -> None:
    run_page(page, site, cli, slow=True)


def check_command(words: list[str], where: str) -> None:
    """Parse a command without running it; of a variable that is set by a pipe, the first one in it."""
    if "=$(" in words[0]:
        end = words.index("|") if "|" in words else len(words)
        words = [words[0].partition("=$(")[2], *words[1:end]]
    program, *rest = words
    if program == "steerkit":
        from typer.main import get_command

        from steerkit.cli import app

        program_of_its_own: Any = get_command(app)
        leaf = program_of_its_own
        for word in rest:
            if not hasattr(leaf, "commands"):
                break
            assert word in leaf.commands, f"{where}: no command {word!r}"
            leaf = leaf.commands[word]
        leaf.callback = lambda **_: None  # parsed by the real parser, and that is all
        program_of_its_own.main(rest, prog_name="steerkit", standalone_mode=False)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
        assert set(rest) <= set(targets), f"{where}: no target {rest}"
    elif words[:2] == ["python", "-m"] and words[2:3] != ["pip"]:
        module = ROOT / words[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), f"{where}: no {words[2]}"
    elif "pip" in words:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        for named in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            assert set(named.split(",")) <= set(extras), f"{where}: no extra {named}"
    else:
        assert program in ("git", "cd", "curl", "llama-cli", "vllm"), f"{where}: what is {program!r}?"


@pytest.mark.parametrize("page", ids(WITH_CODE))
def test_every_block_is_understood(page: Path) -> None:
    for block in blocks(page.read_text("utf-8")):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in KNOWN, f"{where}: {block.language!r} is none of {sorted(KNOWN)}"
        if block.language == "python":
            compile(block.text, where, "exec")
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language in ("console", "bash"):
            found = commands(block)
            assert found, f"{where}: no command"
            for words, _ in found:
                with contextlib.chdir(ROOT):
                    check_command(words, where)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{name_of(page)}: {target} leads nowhere"
        assert other.is_relative_to(ROOT), f"{name_of(page)}: {target} leaves the project"
        if anchor:
            assert anchor in anchors(other.read_text("utf-8")), f"{name_of(page)}: {target} has no such heading"


@pytest.mark.parametrize("page", PAGES)
def test_pages_speak_of_the_project_only(page: Path) -> None:
    assert not re.search(r"/(home|tmp|work|root)/", page.read_text("utf-8"))


def test_readme_s_results_are_those_that_are_kept() -> None:
    assert block_of_readme("results") == results()


@pytest.mark.parametrize("name", ["command-line.md", "sites.md"])
def test_generated_pages_are_as_the_program_is_now(name: str) -> None:
    from docs.generate import PAGES as GENERATED

    page = ROOT / "docs" / "reference" / name
    assert page.read_text("utf-8") == GENERATED[name](), "run `python -m docs.generate`"


def test_every_error_is_explained() -> None:
    from steerkit import errors

    names = {name for name in errors.__all__ if name.endswith("Error")} - {"SteerError"}
    for page in ("docs/how-to/errors-explained.md", "AGENTS.md"):
        text = (ROOT / page).read_text("utf-8")
        assert not [name for name in sorted(names) if name not in text], page


def test_the_format_s_keys_are_described() -> None:
    from steerkit.vector.fields import CODECS

    text = (ROOT / "docs" / "reference" / "file-format.md").read_text("utf-8")
    assert not [key for key in CODECS if f"`{key}`" not in text]


def test_a_recipe_s_keys_are_described() -> None:
    from steerkit.recipe import ApplyPart, DataPart, EvaluatePart, MethodPart, ModelPart

    text = (ROOT / "docs" / "reference" / "recipe-format.md").read_text("utf-8")
    keys = [field.name for part in (ModelPart, DataPart, MethodPart, ApplyPart, EvaluatePart) for field in fields(part)]
    assert not [key for key in keys if not re.search(rf"\b{key}\b", text)]


def test_every_scorer_is_described() -> None:
    from steerkit.evaluate.scoring import scorer_names

    text = (ROOT / "docs" / "how-to" / "measure.md").read_text("utf-8")
    assert not [name for name in scorer_names() if f"`{name}`" not in text]


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "api" / "index.md").read_text("utf-8")
    assert not [name for name in steerkit.__all__ if f"`{name}`" not in text]


def test_the_reference_of_methods_is_that_of_the_code() -> None:
    """Every part is; a method that has none yet is no mistake."""
    from docs.generate import _METHODS, method_section

    head, *parts = (ROOT / "docs" / "reference" / "api" / "methods.md").read_text("utf-8").split("\n## ")
    assert head == _METHODS, "run `python -m docs.generate`"
    names = [part.split("\n")[0] for part in parts]
    assert names == sorted(set(names))
    for name, part in zip(names, parts, strict=True):
        assert method_section(name).removeprefix("## ").rstrip("\n") == part.rstrip("\n"), (
            "run `python -m docs.generate`"
        )
        assert name in method_names(), f"{name} is no method (any more)"


def test_short_pages_are_short() -> None:
    methods = len(block_of_readme("methods").splitlines())  # grows with every method, and no other way
    for name, most in (("README.md", 135 + methods), ("AGENTS.md", 200)):
        assert len((ROOT / name).read_text("utf-8").splitlines()) <= most, f"{name} has more than {most} lines"


@pytest.mark.parametrize(
    ("shown", "printed", "is_same"),
    [
        ("a b\nc", "a  b c\n", True),
        ("a ... c", "a b b c", True),
        ("a ... c", "a b b", False),
        ("AUC 0.98", "AUC 0.99", True),
        ("AUC 0.98", "AUC 0.91", False),
        ("30 blocks", "31 blocks", False),
        ("some wor...", "some words", True),
        ("", "a", False),
    ],
)
def test_what_counts_as_the_same_output(shown: str, printed: str, is_same: bool) -> None:
    assert same(shown, printed) is is_same
