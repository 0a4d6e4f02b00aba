"""Data of one's own on the command line: one group of options, any format, the same items at every command."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit.checks.doctor.case import Case
from steerkit.cli._data import PANEL, DataChoice
from steerkit.errors import FitError, SteerError
from steerkit.network.decoder import find_decoder
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.rendering import render
from steerkit.recipe import Recipe
from steerkit.vector.steering_vector import SteeringVector
from tests.cli.test_model_options import COMMANDS
from tests.program import PAIRS, Cli, jsonl, plain

FITTED = {"extract", "layers", "attribute", "calibrate", "sweep", "compare"}
TAKE_DATA = FITTED | {"evaluate", "report", "doctor"}
WORDS: dict[str, tuple[object, ...]] = {
    "extract": ("--readout", "response_mean", "--out", "x.safetensors"),
    "calibrate": ("--controls", 1),
    "layers": (),
    "attribute": ("--controls", 2),
    "sweep": (),
    "compare": ("--method", "caa"),
    "evaluate": ("--vector", "v.safetensors"),
    "report": ("--vector", "v.safetensors"),
    "doctor": (),
}
ROWS = [{"question": row["prompt"], "good": row["positive"], "bad": row["negative"], "note": "a, b"} for row in PAIRS]


@pytest.fixture
def mine(here: Path) -> str:
    """The pairs of the recipe as a table with columns of other names."""
    made = io.StringIO()
    table = csv.DictWriter(made, ["question", "good", "bad", "note"])
    table.writeheader()
    table.writerows(ROWS)
    Path("mine.csv").write_text(made.getvalue(), newline="")
    return "mine.csv"


# --- the group ---


def test_every_command_that_takes_data_has_the_whole_group() -> None:
    group = {f"--{field.name.replace('_', '-')}" for field in fields(DataChoice)}
    for name, command in COMMANDS.items():
        panel = {flag for one in command.params if getattr(one, "rich_help_panel", None) == PANEL for flag in one.opts}
        assert panel == (group if name in TAKE_DATA | {"recipe new", "gates", "latents"} else set()), name


class Stopped(SteerError):
    """Instead of a model."""


@pytest.mark.parametrize("name", sorted(TAKE_DATA))
def test_data_is_read_before_a_model_is_loaded(name: str, cli: Cli, mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DataChoice] = []
    items = DataChoice.items

    def load(*_: Any, **__: Any) -> None:
        raise Stopped("no model today")

    def read(choice: DataChoice) -> ContrastSet:
        seen.append(choice)
        return items(choice)

    monkeypatch.setattr(steerkit, "load_model", load)
    monkeypatch.setattr(DataChoice, "items", read)
    ended = cli(name, *WORDS[name], "--data", mine, "--held-out", 0.25)
    assert (ended.code, plain(ended.err)) == (1, "error: no model today")
    assert {(choice.data, choice.held_out) for choice in seen} <= {(mine, 0.25)}
    Path("wrong.csv").write_text("prompt,god,bed\na,b,c\n")
    ended = cli(name, *WORDS[name], "--data", "wrong.csv")
    assert ended.code == 1
    assert "wrong.csv, line 2: no columns of two sides; there are 'prompt', 'god', 'bed'" in plain(ended.err)
    assert ended.err.count("\n") == 1
    if name not in FITTED:  # which want more than one pair
        named = "positive=god,negative=bed"
        assert "no model today" in cli(name, *WORDS[name], "--data", "wrong.csv", "--columns", named).err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("calibrate",), "give one of: RECIPE, --data, --positive with --negative"),
        (("calibrate", "joy-caa.toml", "--data", "mine.csv"), "give one of: RECIPE, --data"),
        (("sweep", "joy-caa.toml", "--positive", "plus.txt", "--negative", "minus.txt"), "give one of: RECIPE"),
        (("compare", "joy-caa.toml", "--data", "mine.csv"), "give one of: RECIPE, --data"),
        (
            ("evaluate", "--vector", "v.safetensors", "--data", "mine.csv", "--positive", "plus.txt"),
            "give one of: --data",
        ),
        (("report", "--vector", "v.safetensors", "--positive", "plus.txt"), "--positive and --negative go together"),
        (("doctor", "--negative", "minus.txt"), "--positive and --negative go together"),
        (("doctor", "--raw"), "--raw is for your own prompts"),
        (("calibrate", "joy-caa.toml", "--columns", "prompt=x"), "--columns is for your own prompts"),
        (("extract", "--data", "mine.csv", "--out", "x", "--escapes"), "--escapes goes with --raw"),
        (
            ("extract", "--data", "mine.csv", "--out", "x", "--columns", "promt=x"),
            "--columns: nothing is called 'promt'",
        ),
        (("extract", "--data", "mine.csv", "--out", "./mine.csv"), "would overwrite what is read"),
        (("evaluate", "--vector", "v.safetensors", "--held-out", "0.5"), "--held-out is a share of --data"),
        (("generate", "Hello", "--columns", "prompt=x"), "--columns says how a file is read"),
        (("generate", "--prompts", "plus.txt", "--escapes"), "--escapes goes with --raw"),
        (
            ("monitor", "Hello", "--vector", "v.safetensors", "--columns", "prompt=x"),
            "--columns says how a file is read",
        ),
        (("recipe", "new"), "give one of: --data, --positive with --negative"),
        (("recipe", "new", "--data", "-"), "a recipe names files; stdin is none"),
        (("recipe", "new", "--data", "mine.csv", "--out", "mine"), "a recipe is a .toml file"),
    ],
)
def test_options_that_do_not_go_together(cli: Cli, mine: str, words: tuple[str, ...], said: str) -> None:
    ended = cli(*words)
    assert (ended.code, ended.out) == (2, "")
    assert said in plain(ended.err)


# --- the same items everywhere ---


def made(answer: Callable[..., Any], tiny: Path, *words: object) -> SteeringVector:
    answer("extract", *words, "--out", "x.safetensors", "--model", tiny, "--layers", 1)
    return SteeringVector.load("x.safetensors")


@pytest.mark.filterwarnings("ignore:format alone predicts", "ignore:only the last token")
def test_extract_reads_any_format(answer: Callable[..., Any], mine: str, tiny: Path) -> None:
    Path("mine.json").write_text(json.dumps({"data": ROWS}, indent=2))
    found = [made(answer, tiny, "--data", name, "--held-out", 0.25) for name in ("joy.jsonl", mine, "mine.json")]
    assert len({vector.data_digest for vector in found}) == 1
    assert [vector.data_source for vector in found] == ["joy.jsonl", "mine.csv", "mine.json"]
    assert {vector.held_out["items"] for vector in found} == {3}


def test_extract_from_prompts_of_any_format(
    answer: Callable[..., Any], here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = made(answer, tiny, "--positive", "plus.txt", "--negative", "minus.txt")
    alpaca = [{"instruction": text, "input": "", "output": "x"} for text in ("I love this", "I love that")]
    Path("plus.json").write_text(json.dumps(alpaca, indent=2))
    monkeypatch.setattr(sys, "stdin", io.StringIO("I hate this\nI hate that\n"))
    found = made(answer, tiny, "--positive", "plus.json", "--negative", "-")
    assert (found.data_digest, found.data_source) == (expected.data_digest, "plus.json, stdin")
    Path("labels.csv").write_text("text,label\nI love this,1\nI hate this,0\nI love that,1\nI hate that,0\n")
    data = ContrastSet.from_file("labels.csv")
    assert made(answer, tiny, "--data", "labels.csv").data_digest == data.digest
    assert made(answer, tiny, "--data", "labels.csv", "--label", "0").data_digest != data.digest


@pytest.mark.filterwarnings("ignore:format alone predicts", "ignore:only the last token")
def test_evaluate_knows_the_items_again(answer: Callable[..., Any], mine: str, tiny: Path) -> None:
    own = ("--data", mine, "--held-out", 0.25, "--model", tiny)
    answer("extract", *own, "--layers", 1, "--readout", "response_mean", "--out", "x.safetensors")
    few = ("--controls", 1, "--texts", 2, "--neutral", 2, "--max-new-tokens", 2, "--scorer", "preference_margin")
    found = answer("evaluate", "--vector", "x.safetensors", *own, *few)
    assert found["direction"] is not None, "what it was fitted on is known, and fitted again"
    assert found["strengths"][0]["scores"]["preference_margin"]["items"] == 3
    found = answer("evaluate", "--vector", "x.safetensors", "--data", mine, "--model", tiny, *few)
    assert found["direction"] is None
    assert found["strengths"][0]["scores"]["preference_margin"]["items"] == 12


def test_a_sweep_of_data_is_that_of_its_recipe(answer: Callable[..., Any], cli: Cli, mine: str, tiny: Path) -> None:
    few = ("--layers", 1, "--strengths", 1, "--texts", 1, "--neutral", 1, "--controls", 0, "--model", tiny)
    said = cli("recipe", "new", "--data", mine, "--out", "made/mine.toml")
    assert (said.code, said.err) == (0, "")
    text = Path("made/mine.toml").read_text()
    Path("made/mine.toml").write_text(text.replace("readout =", "# readout ="))
    found = answer("sweep", "made/mine.toml", *few, "--out", "a")
    assert answer("sweep", "--data", mine, *few, "--out", "b")["points"] == found["points"]


@pytest.mark.slow
def test_calibration_of_data_is_that_of_its_recipe(cli: Cli, mine: str, tiny: Path) -> None:
    cli("recipe", "new", "--data", mine, "--out", "mine.toml")
    text = Path("mine.toml").read_text()
    Path("mine.toml").write_text(text.replace("readout =", "# readout ="))
    few = ("--layers", 1, "--strengths", 1, "--texts", 2, "--neutral", 4, "--controls", 1, "--model", tiny, "--json")
    first, second = (cli("calibrate", *source, *few) for source in (("mine.toml",), ("--data", mine)))
    assert first == second
    assert json.loads(first.out)["validation"]


def test_the_doctor_reads_a_short_and_a_longer_text_of_the_data(mine: str, tiny: Path) -> None:
    model, tokenizer = steerkit.load_model(str(tiny))
    data = ContrastSet.from_file(mine)
    texts = Case(model, tokenizer, False, find_decoder(model), data).texts
    lengths = sorted({len(render(tokenizer, item).ids) for item in (*data.positive, *data.negative)})
    assert [len(text.ids) for text in texts] == lengths[:2]


@pytest.mark.slow
def test_doctor_on_data(answer: Callable[..., Any], mine: str, tiny: Path) -> None:
    assert all(finding["passed"] for finding in answer("doctor", "--data", mine, "--model", tiny))


def test_marked_items_are_held_out_of_a_calibration(here: Path, cli: Cli) -> None:
    rows = [{**row, "held_out": place < 2} for place, row in enumerate(PAIRS)]
    Path("marked.jsonl").write_text(jsonl(rows))
    recipe = DataChoice(data="marked.jsonl").recipe()
    train, held_out = recipe.split()
    assert (len(train), len(held_out)) == (10, 2)
    assert len(DataChoice(data="marked.jsonl", held_out=0.5).recipe().split()[1]) == 6
    assert cli("recipe", "new", "--data", "marked.jsonl").code == 0
    again = Recipe.load("marked.toml")
    assert (again.data.marked, len(again.split()[1])) == (True, 2)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (DataChoice(data="a/my pairs.v2.csv"), "my-pairs.v2"),
        (DataChoice(data="-"), "stdin"),
        (DataChoice(data="hf:org/set:train"), "set"),
        (DataChoice(positive="plus.txt", negative="minus.txt"), "plus"),
        (DataChoice(data=".jsonl"), "jsonl"),
    ],
)
def test_data_has_a_name_that_files_can_have(choice: DataChoice, name: str) -> None:
    assert choice.name == name


# --- a recipe of it ---


def test_a_new_recipe_is_commented_valid_and_not_replaced(answer: Callable[..., Any], cli: Cli, mine: str) -> None:
    words = ("recipe", "new", "--data", mine, "--columns", "prompt=question", "--behaviour", 'joy "of" it',
             "--out", "deep/er/joy.toml", "--model", "org/name", "--dtype", "bfloat16")  # fmt: skip
    found = answer(*words)
    assert found["items"] == [9, 3]
    recipe = Recipe.load("deep/er/joy.toml")
    assert recipe.behaviour == 'joy "of" it'
    assert (recipe.data.file, recipe.data.columns) == ("../../mine.csv", {"prompt": "question"})
    assert (recipe.model.name, recipe.model.dtype) == ("org/name", "bfloat16")
    assert (recipe.method.name, recipe.method.readout) == ("caa", "response_mean")
    assert recipe.evaluate.questions == tuple(row["prompt"] for row in PAIRS[:3])
    assert recipe.items().digest == ContrastSet.from_jsonl("joy.jsonl").digest
    text = Path("deep/er/joy.toml").read_text()
    assert text.count("#") > 6
    ended = cli(*words)
    assert (ended.code, ended.out) == (1, "")
    assert "deep/er/joy.toml: is there already; choose another name with --out" in ended.err
    assert Path("deep/er/joy.toml").read_text() == text


def test_a_new_recipe_of_two_files(cli: Cli, here: Path, tiny: Path) -> None:
    Path("plus.txt").write_text("\n".join(rf"I love\nnumber {n}" for n in range(8)))
    Path("minus.txt").write_text("\n".join(rf"I hate\nnumber {n}" for n in range(8)))
    ended = cli("recipe", "new", "--positive", "plus.txt", "--negative", "minus.txt", "--raw", "--escapes",
                "--held-out", 0.25, "--model", tiny)  # fmt: skip
    assert (ended.code, ended.err) == (0, "")
    assert "wrote plus.toml: 6 items to fit on, 2 held out" in ended.out
    recipe = Recipe.load("plus.toml")
    assert recipe.items().positive[3].prompt == "I love\nnumber 3"
    assert recipe.items().positive[3].raw
    assert recipe.method.readout is None
    assert cli("extract", "plus.toml", "--layers", 1).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--data", "gone.csv"), "error: gone.csv: cannot read the file"),
        (("--data", "mine.csv", "--method", "cca"), "unknown method 'cca'; did you mean 'caa'"),
        (("--data", "mine.csv", "--method", "actadd"), "actadd is fitted on one pair of prompts"),
        (("--data", "one.csv"), "leave a part empty"),
        (("--data", "mine.csv", "--held-out", "1.5"), "held_out=1.5: give a share between 0 and 1"),
    ],
)
def test_a_recipe_that_would_not_work_is_not_written(cli: Cli, mine: str, words: tuple[str, ...], said: str) -> None:
    Path("one.csv").write_text("positive,negative\na,b\n")
    ended = cli("recipe", "new", *words)
    assert ended.code == 1
    assert said in ended.err
    assert sorted(path.name for path in Path().glob("*.toml")) == ["joy-caa.toml"]


# --- prompts ---


def test_generate_reads_prompts_of_any_format(
    answer: Callable[..., Any], cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("generate", "--model", tiny, "--max-new-tokens", 2)
    alpaca = [
        {"instruction": "Hello", "input": "", "output": "x"},
        {"instruction": "Say", "input": "it", "output": "x"},
    ]
    for content in (json.dumps(alpaca), json.dumps(alpaca, indent=2)):
        Path("alpaca.json").write_text(content)
        rows = answer(*common, "--prompts", "alpaca.json")
        assert [row["prompt"] for row in rows] == ["Hello", "Say\n\nit"]
    Path("goals.csv").write_text('aim,id\n"Hello, you",1\n')
    rows = answer(*common, "--prompts", "goals.csv", "--columns", "prompt=aim")
    assert [row["prompt"] for row in rows] == ["Hello, you"]
    for text in ("Hello\nSay\n", '["Hello", "Say"]', '"Hello"\n"Say"\n'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert [row["prompt"] for row in answer(*common, "--prompts", "-")] == ["Hello", "Say"]
    Path("raw.txt").write_text("one\\ntwo\n")
    (row,) = answer(*common, "--prompts", "raw.txt", "--raw", "--escapes")
    assert row["prompt"] == "one\ntwo"


@pytest.mark.filterwarnings("always::UserWarning")
def test_generate_tells_of_marks_and_of_chats_with_an_answer(cli: Cli, here: Path, tiny: Path) -> None:
    common = ("generate", "--model", tiny, "--max-new-tokens", 2)
    Path("marked.txt").write_text("<|im_start|>user\\nHello<|im_end|>\n<|im_start|>user\\nYou<|im_end|>\n")
    (told,) = cli(*common, "--prompts", "marked.txt").err.splitlines()
    assert told.startswith("warning: marked.txt, line 1 and 1 more: '<|im_start|>' is a mark of a chat template")
    turns = [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "No."}]
    Path("turns.jsonl").write_text(jsonl([{"conversations": turns}]))
    told = cli(*common, "--prompts", "turns.jsonl").err
    assert "turns.jsonl: 1 of 1 chats end with the assistant's turn, which is continued" in told


@pytest.mark.filterwarnings("ignore:format alone predicts")
def test_the_readout_of_extract_is_that_of_the_commands_that_choose(
    answer: Callable[..., Any], cli: Cli, mine: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("--data", mine, "--held-out", 0.25, "--model", tiny)
    last, mean = (
        answer("layers", *own, *more, "--layers", "1-2", "--no-effect")["layers"]
        for more in ((), ("--readout", "response_mean"))
    )
    assert last != mean
    seen: list[Any] = []

    def refuse(*_: Any, **options: Any) -> None:
        seen.append(options["readout"])
        raise FitError("seen")

    monkeypatch.setattr("steerkit.evaluate.calibration.search.calibrate", refuse)
    assert cli("calibrate", *own, "--readout", "response_mean", "--out", "c.safetensors").code == 1
    assert seen == ["response_mean"]


def test_blocks_are_compared_on_the_tokens_that_the_recipe_reads(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def refuse(*_: Any, **options: Any) -> None:
        seen.append(options["readout"])
        raise FitError("seen")

    monkeypatch.setattr("steerkit.evaluate.blocks.find_layer", refuse)
    assert cli("extract", "joy-caa.toml", "--layers", "auto").code == 1
    assert cli("extract", "joy-caa.toml", "--layers", "auto", "--readout", "-1").code == 1
    assert seen == ["response_mean", -1]
