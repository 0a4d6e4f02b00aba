"""The options of the model: the whole group at every command that loads one, and the only way to load one."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer

import steerkit.cli
from steerkit.cli._model import DEFAULT, PANEL, ModelChoice, loads_model
from steerkit.cli._shared import usage_line
from steerkit.errors import RecipeError, SteerError
from steerkit.recipe import ModelPart
from tests.cli.words import WORDS, commands
from tests.program import LOADED, Cli, plain

GROUP = {f"--{field.name.replace('_', '-')}" for field in fields(ModelChoice)}
GIVEN = ModelChoice(
    model="org/name",
    revision="v1",
    device="cuda:1",
    dtype="bfloat16",  # type: ignore[arg-type]
    quantize="4bit",  # type: ignore[arg-type]
    attn="eager",
    trust_remote_code=True,
)
LOADS_NONE = {"audit", "dictionary decompose", "fetch", "merge", "methods", "recipes"}
NAMES_ONE = {"recipe new"}  # writes down what a later command loads
NAMES_IT_FOR_VLLM = {"vllm-verify"}


COMMANDS = dict(commands())


def in_panel(command: Any) -> set[str]:
    return {flag for one in command.params if getattr(one, "rich_help_panel", None) == PANEL for flag in one.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_whole_group_or_loads_no_model(name: str) -> None:
    assert in_panel(COMMANDS[name]) == (set() if name in LOADS_NONE | NAMES_IT_FOR_VLLM else GROUP)
    beside = {flag for one in COMMANDS[name].params for flag in one.opts} & GROUP - in_panel(COMMANDS[name])
    assert beside == ({"--model"} if name in NAMES_IT_FOR_VLLM else set())


def test_nothing_else_on_the_command_line_loads_a_model() -> None:
    ways = {"load_model", "from_pretrained", "AutoModelForCausalLM"}
    found = {}
    for file in sorted(Path(steerkit.cli.__file__).parent.rglob("*.py")):
        names = {
            getattr(node, "attr", getattr(node, "id", getattr(node, "name", None)))
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        }
        if names & ways:
            found[file.name] = names & ways
    assert found == {"_model.py": {"load_model"}}


def test_help_shows_the_group_in_one_panel(cli: Cli) -> None:
    shown = cli("generate", "--help").out
    panel = plain(shown[shown.index(f"─ {PANEL} ─") :])
    assert all(flag in panel for flag in GROUP)


def asked(choice: ModelChoice, *words: str) -> ModelChoice:
    """What a command gets that is called with the options of a choice."""
    seen = []

    @loads_model
    def run(model: ModelChoice = DEFAULT) -> None:
        seen.append(model)

    app = typer.Typer()
    app.command()(run)
    with pytest.raises(SystemExit):
        app([*choice.words(), *words])
    return seen[0]


@pytest.mark.parametrize(
    "choice",
    [DEFAULT, GIVEN, ModelChoice(model="gpt2"), ModelChoice(device_map="auto", dtype="float16")],  # type: ignore[arg-type]
    ids=["nothing", "most", "name", "map"],
)
def test_what_was_asked_for_can_be_asked_for_again(choice: ModelChoice) -> None:
    assert asked(choice) == choice
    assert asked(DEFAULT, *choice.words(every=True)) == replace(choice, model=choice.name)


def test_a_usage_line_repeats_the_options() -> None:
    assert usage_line("Hi", "v", model=DEFAULT) == 'steerkit generate "Hi" --vector v'
    assert usage_line("Hi", "v", strength=2, model=GIVEN).endswith(
        "--strength 2 --model org/name --revision v1 --device cuda:1 --dtype bfloat16 --quantize 4bit --attn eager "
        "--trust-remote-code"
    )


def test_a_recipe_says_what_the_command_line_does_not() -> None:
    part = ModelPart(name="org/name", revision="v1", device="cuda:1", dtype="bfloat16", quantize="4bit", attn="eager")
    assert DEFAULT.of(part) == replace(GIVEN, trust_remote_code=False)
    assert replace(DEFAULT, device="cpu").of(part) == replace(GIVEN, device="cpu", trust_remote_code=False)
    spread = replace(DEFAULT, device_map="auto").of(part)
    assert (spread.device, spread.device_map, spread.attn) == (None, "auto", "eager")
    assert replace(DEFAULT, model="another").of(part) == ModelChoice(model="another")


def test_a_recipe_does_not_allow_code_by_itself() -> None:
    part = ModelPart(name="org/name", trust_remote_code=True)
    with pytest.raises(RecipeError, match=r"org/name, brings Python files of its own; allow them with --trust"):
        DEFAULT.of(part)
    allowed = ModelChoice(model="org/name", trust_remote_code=True)
    assert replace(DEFAULT, trust_remote_code=True).of(part) == allowed


class Stopped(SteerError):
    """Instead of a model."""


def test_there_are_words_for_every_command() -> None:
    assert {name for name in COMMANDS if name not in LOADS_NONE | NAMES_ONE | NAMES_IT_FOR_VLLM} == set(WORDS)


@pytest.mark.parametrize("name", WORDS)
def test_every_command_loads_what_it_was_asked_for(
    name: str, cli: Cli, furnished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def load(asked_for: str, **options: Any) -> None:
        seen.append((asked_for, options))
        raise Stopped("no model today")

    monkeypatch.setattr(steerkit, "load_model", load)
    ended = cli(*name.split(), *WORDS[name], *GIVEN.words())
    assert (ended.code, ended.err.splitlines()[-1]) == (1, "error: no model today"), ended.err
    wanted = {field.name: getattr(GIVEN, field.name) for field in fields(ModelChoice)[1:] if field.name != "device_map"}
    assert seen[0] == ("org/name", wanted)


def test_what_was_loaded_is_said_on_stderr(
    cli: Cli, here: Path, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "generate",
        "Hello",
        "--max-new-tokens",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
        "--model",
        str(tiny),
    ]
    with pytest.raises(SystemExit) as left:
        steerkit.cli.app([*words, "--json"])
    shown = capsys.readouterr()
    assert left.value.code == 0
    assert shown.err == f"{LOADED}{tiny} on cpu, bfloat16\n"
    assert LOADED not in shown.out
