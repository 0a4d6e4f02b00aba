"""The command line: what each command prints and writes, every mistake one can make, and how the program ends."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit._support.shipped import vectors
from steerkit.cli import app, demo
from steerkit.methods import _listing
from steerkit.methods._listing import LISTING, MethodFacts, listed_method
from steerkit.methods._registry import resolve
from steerkit.network.sites import Site
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN
from tests.program import PAIRS, ROOT, WIDTH, Cli, apart_from_loaded, jsonl, last_line, plain, start, width
from tests.tiny_tokenizers import byte_tokenizer

COMMANDS = sorted(str(found.name) for found in app.registered_commands)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only cost time on models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- tables and help -------------------------------------------------------------------------------------------------


def without(libraries: set[str], *lines: str) -> None:
    """Run some command lines in a program of their own, which must end well and load none of some libraries."""
    code = f"""
import contextlib, io, sys
from steerkit.cli import app
for words in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            app(words.split())
        except SystemExit as left:
            assert not left.code, (words, left.code)
    assert shown.getvalue(), words
    assert not {libraries!r} & set(sys.modules), words
"""
    subprocess.run([sys.executable, "-c", code, *lines], check=True, cwd=ROOT)


def test_help_and_tables_load_no_model_library() -> None:
    assert {"calibrate", "compare", "demo", "doctor", "evaluate", "export", "extract", "lm-eval"} <= set(COMMANDS)
    tables = [f"{name}{form}" for name in ("recipes", "methods") for form in ("", " --json")]
    helps = [f"{name} --help" for name in COMMANDS]
    without({"torch", "transformers", "numpy", "datasets"}, "--help", "--version", *tables, *helps)


def test_inspect_loads_no_model_library() -> None:
    """But where only the method knows what a vector consists of, and for the intervals of a gate."""
    paths = [path for path in vectors().values() if not asks_the_method(SteeringVector.load(path))]
    assert len(paths) >= 20
    shown = [f"inspect {path}" for path in paths]
    without({"torch", "transformers", "datasets"}, *shown, f"inspect {paths[0]} --json")


def asks_the_method(vector: SteeringVector) -> bool:
    facts = listed_method(vector.method)
    return facts.lists_parts or facts.is_gated


def test_the_listing_of_methods_is_that_of_the_code() -> None:
    """Every entry is; a method that has none yet is asked itself."""
    listed = json.loads(LISTING.read_text(encoding="utf-8"))
    assert {"caa", "controller", "austeer"} <= {one["name"] for one in listed}
    for one in listed:
        assert one == MethodFacts.of(resolve(one["name"])).as_json(), "run `python -m docs.generate`"


def test_a_method_that_is_not_listed_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = json.loads(LISTING.read_text(encoding="utf-8"))
    shorter = tmp_path / "listing.json"
    shorter.write_text(json.dumps([one for one in listed if one["name"] != "caa"]), encoding="utf-8")
    monkeypatch.setattr(_listing, "LISTING", shorter)
    usable, broken = _listing.listed_methods()
    assert ([facts.as_json() for facts in usable.values()], broken) == (listed, {})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(cli: Cli, command: str) -> None:
    ended = cli(command, "--help")
    assert ended.code == 0
    assert "--json" in plain(ended.out)
    assert width(ended.out.split("\n")) <= WIDTH


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"steerkit {steerkit.__version__}\n", "")


def test_methods(cli: Cli, answer: Callable[..., Any]) -> None:
    rows = {row["name"]: row for row in answer("methods")}
    assert {"actadd", "caa", "repe"} <= set(rows)
    assert all(row.keys() >= {"name", "title", "paper", "scope", "data"} for row in rows.values())
    assert (rows["caa"]["scope"], rows["actadd"]["scope"]) == ("response", "front")
    shown = cli("methods").out
    assert all(name in shown for name in rows)


def test_recipes(cli: Cli, answer: Callable[..., Any]) -> None:
    from steerkit._support.shipped import recipe_path
    from steerkit.recipe import Recipe

    rows = answer("recipes")
    assert rows
    for row in rows:
        recipe = Recipe.load(recipe_path(row["name"]))
        train, held_out = recipe.split()
        if recipe.data.positive is not None:  # prompts of two kinds
            assert row["items"] == sum(len(part.positive) + len(part.negative) for part in (train, held_out))
        elif recipe.data.pair is None:
            assert row["items"] == len(train) + len(held_out)
        assert (row["behaviour"], row["method"], row["default"], row["strength"]) == (
            recipe.behaviour,
            recipe.method.name,
            recipe.default,
            recipe.apply.strength,
        )
    assert all(row["name"] in cli("recipes").out for row in rows[:1])


# --- extract and inspect ---------------------------------------------------------------------------------------------


def test_extract_a_recipe(cli: Cli, here: Path, tiny: Path) -> None:
    ended = cli("extract", "joy-caa.toml")
    assert (ended.code, ended.err) == (0, "")
    made = SteeringVector.load("joy-caa.safetensors")
    assert [str(site) for site in made.sites] == ["resid_post.1", "resid_post.2"]
    assert (made.method, made.suggested_strength, made.held_out["items"]) == ("caa", 1.5, 3)
    for words in ("joy-caa.safetensors", "resid_post.1", "AUC", '"Is it good?" --vector joy-caa.safetensors'):
        assert words in ended.out
    assert f"--strength 1.5 --model {tiny}" in ended.out


def test_extract_changes_what_the_recipe_says(answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    found = answer(
        "extract", "joy-caa.toml", "--model", tiny, "--method", "repe", "--layers", "0-2", "--readout", "-1",
        "--held-out", 0.5, "--batch-size", 3, "--out", "new/folder/x.safetensors",
    )  # fmt: skip
    assert found["file"] == str(Path("new/folder/x.safetensors"))
    assert [site["site"] for site in found["sites"]] == ["resid_post.0", "resid_post.1", "resid_post.2"]
    assert (found["method"], found["readout"], found["held_out"]["items"]) == ("repe", "index(-1)", 6)
    assert SteeringVector.load(found["file"]).digest == found["digest"]


def test_extract_from_two_files_is_fit(answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    found = answer(
        "extract", "--positive", "plus.txt", "--negative", "minus.txt", "--raw", "--layers", "2", "--model", tiny,
        "--out", "x.safetensors",
    )  # fmt: skip
    data = steerkit.ContrastSet.from_prompts(["I love this", "I love that"], ["I hate this", "I hate that"], raw=True)
    expected = steerkit.fit(*steerkit.load_model(str(tiny)), data, layers=[2])
    made = SteeringVector.load("x.safetensors")
    assert torch.equal(made.tensors["resid_post.2/direction"], expected.tensors["resid_post.2/direction"])
    assert found["data_digest"] == data.digest
    assert found["data_source"] == "plus.txt, minus.txt"
    assert found["held_out"] == {}


def test_extract_from_pairs(answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    alike = [{**pair, "positive": f"{n} is a joy.", "negative": f"{n} is a woe."} for n, pair in enumerate(PAIRS)]
    Path("joy.jsonl").write_text(jsonl(alike))
    common = ("extract", "--data", "joy.jsonl", "--readout", "response_mean", "--out", "x.safetensors", "--model", tiny)
    assert answer(*common)["held_out"] == {}
    assert answer(*common, "--held-out", "0.25")["held_out"]["items"] == 3
    marked = [{**pair, "held_out": number < 2} for number, pair in enumerate(alike)]
    Path("joy.jsonl").write_text(jsonl(marked))
    assert answer(*common)["held_out"]["items"] == 2


def test_actadd_takes_one_raw_pair(answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    Path("plus.txt").write_text("Love\n")
    Path("minus.txt").write_text("Hate\n")
    found = answer(
        "extract", "--positive", "plus.txt", "--negative", "minus.txt", "--method", "actadd", "--out", "x.safetensors",
        "--model", tiny,
    )  # fmt: skip
    tokens = len(byte_tokenizer()("Love")["input_ids"])
    (site,) = found["sites"]
    assert site["params"]["direction"][1] == [tokens, HIDDEN]


@pytest.mark.filterwarnings("ignore:format alone predicts")
def test_extract_measures_a_strength_and_can_find_the_block(
    cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path
) -> None:
    mean = ("--readout", "response_mean")
    common = ("extract", "--data", "joy.jsonl", "--out", "x.safetensors", "--model", tiny, *mean)
    found = answer(*common, "--layers", "2")
    assert found["calibration"]["by"] == "suggest_strength"
    assert found["suggested_strength"] > 0
    ended = cli(*common, "--layers", "auto")
    (site,) = SteeringVector.load("x.safetensors").sites
    assert site.layer in (1, 2), "between a fifth and four fifths of four blocks"
    assert f"block {site.layer} of 4: separates best" in ended.err
    assert f"--strength {SteeringVector.load('x.safetensors').suggested_strength:g}" in ended.out


def test_layers(cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    common = ("layers", "--data", "joy.jsonl", "--model", tiny)
    found = answer(*common, "--layers", "0-3", "--plot", "blocks.svg")
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, 3]
    assert {"auc", "cohens_d", "strength", "kl", "effect"} <= set(found["layers"][0])
    assert Path("blocks.svg").read_text().startswith("<?xml")
    shown = cli(*common, "--no-effect").out
    assert f"best at block {answer(*common, '--no-effect')['best_separation']}" in shown
    assert "strength" not in shown
    assert width(shown.split("\n")) <= WIDTH
    assert [row["layer"] for row in answer("layers", "joy-caa.toml", "--no-effect")["layers"]] == [1, 2]


def test_inspect(cli: Cli, answer: Callable[..., Any], here: Path, vector: SteeringVector) -> None:
    found = answer("inspect", "v.safetensors")
    assert found == {"file": "v.safetensors", **json.loads(json.dumps(vector.describe())), "parts": None}
    shown = cli("inspect", "v.safetensors").out
    assert width(shown.split("\n")) <= WIDTH
    length = float(vector.tensors["resid_post.1/direction"].norm())
    for words in ("resid_post.1", "response", "tiny", vector.digest[:16], f"{length:.3g}", f"{1.5 * length / 6:.3g}"):
        assert words in shown


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(answer: Callable[..., Any], here: Path, tiny: Path) -> Callable[..., Any]:
    def run(*words: object) -> Any:
        return answer("generate", *words, "--model", tiny, "--max-new-tokens", 6)

    return run


def test_generate_is_the_library_s_generate(ask: Callable[..., Any], tiny: Path, vector: SteeringVector) -> None:
    model, tokenizer = steerkit.load_model(str(tiny))
    prompts = ["How was your day?", "Hello"]
    baseline = steerkit.generate(model, tokenizer, prompts, max_new_tokens=6)
    steered = steerkit.generate(model, tokenizer, prompts, vector=vector, strength=-2.0, max_new_tokens=6)
    assert baseline != steered
    assert ask(*prompts) == [
        {"prompt": prompt, "text": text, "vector": None, "strength": None, "scope": None, "steering": None}
        for prompt, text in zip(prompts, baseline, strict=True)
    ]
    assert ask(*prompts, "--vector", "v.safetensors", "--strength", "-2", "--baseline") == [
        {
            "prompt": prompt,
            "text": text,
            "baseline": base,
            "vector": "v.safetensors",
            "strength": -2,
            "scope": "response",
            "steering": "- v.safetensors*2",
        }
        for prompt, text, base in zip(prompts, steered, baseline, strict=True)
    ]


def test_strength_unit_and_scope(ask: Callable[..., Any], vector: SteeringVector) -> None:
    steering = ("Hello", "--vector", "v.safetensors")
    (suggested,) = ask(*steering)
    assert suggested["strength"] == 1.5
    assert ask(*steering, "--strength", "1.5") == [suggested]
    (neutral,) = ask(*steering, "--strength=0", "--baseline")
    assert neutral["text"] == neutral["baseline"]
    length = float(vector.tensors["resid_post.1/direction"].norm())
    (in_norms,) = ask(*steering, "--strength", repr(1.5 * length / 6), "--unit", "norm")
    assert in_norms["text"] == suggested["text"]
    (everywhere,) = ask(*steering, "--scope", "all")
    assert everywhere["scope"] == "all"
    assert everywhere["text"] != suggested["text"]


def test_several_vectors(ask: Callable[..., Any]) -> None:
    two = ("Hello", "--vector", "v.safetensors", "--vector", "v.safetensors")
    (found,) = ask(*two)
    assert (found["vector"], found["strength"]) == (["v.safetensors"] * 2, [1.5, 1.5])
    assert found["scope"] == ["response"] * 2
    (cancelled,) = ask(*two, "--strength", "2", "--strength", "-2")
    assert cancelled["strength"] == [2, -2]
    assert cancelled["text"] == ask("Hello")[0]["text"]


def test_an_expression_is_what_its_options_are(ask: Callable[..., Any], here: Path) -> None:
    options = ("--vector", "v.safetensors", "--strength", "2", "--vector", "v.safetensors", "--strength", "-0.5")
    (by_options,) = ask("Hello", *options, "--scope", "all")
    line = "v.safetensors@all*2 - v.safetensors@all*0.5"
    assert by_options["steering"] == line
    steerkit.Composition.parse(line).save("mix.json")
    steerkit.Composition.parse(line).save("mix.txt")
    recipe = Path("joy-caa.toml").read_text("utf-8")
    assert "[apply]" in recipe
    Path("mix.toml").write_text(recipe.replace("[apply]", f'[apply]\nsteering = "{line}"'))
    for steering in (line, "mix.json", "mix.txt", "mix.toml"):
        assert ask("Hello", "--steering", steering) == [by_options]
    (suggested,) = ask("Hello", "--steering", "v.safetensors - v.safetensors[2:4]")
    assert suggested["steering"] == "v.safetensors*1.5 - v.safetensors[2:4]*1.5"
    assert ask("Hello", "--steering", suggested["steering"]) == [suggested]


@pytest.mark.parametrize(
    ("steering", "says"),
    [
        ("v.safetensors*x", "steering 'v.safetensors*x', column 15: got 'x' where a strength stands"),
        ("v.safetensors + gone.safetensors", "steering, column 17: gone.safetensors: no such file"),
        ("gone.json", "gone.json: cannot be read (No such file or directory)"),
        ("joy-caa.toml", "joy-caa.toml: [apply] steering is missing"),
    ],
)
def test_a_wrong_expression_ends_in_one_line(cli: Cli, here: Path, steering: str, says: str) -> None:
    ended = cli("generate", "Hello", "--steering", steering)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(f"error: {says}")
    assert ended.err.count("\n") == 1


def test_sampling_has_a_seed(ask: Callable[..., Any]) -> None:
    sampled = [ask("Hello", "--sample", "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_temperature_and_top_p_sample(ask: Callable[..., Any], tiny: Path) -> None:
    model, tokenizer = steerkit.load_model(str(tiny))
    settings = {"do_sample": True, "temperature": 0.4, "top_p": 0.7, "seed": 3, "max_new_tokens": 6}
    expected = steerkit.generate(model, tokenizer, ["Hello"], **settings)
    (row,) = ask("Hello", "--temperature", 0.4, "--top-p", 0.7, "--seed", 3)
    assert row["text"] == expected[0]


def test_a_system_prompt_comes_before_every_prompt(ask: Callable[..., Any]) -> None:
    chats = [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}] for prompt in ("Hello", "Bye")
    ]
    Path("chats.jsonl").write_text(jsonl(chats))
    asked = ask("Hello", "Bye", "--system", "Be kind.")
    assert asked == ask("--prompts", "chats.jsonl")
    assert [row["prompt"] for row in asked] == chats


@pytest.mark.filterwarnings("default")
def test_generate_says_which_strength_it_takes(cli: Cli, here: Path, tiny: Path, vector: SteeringVector) -> None:
    common = ("generate", "Hello", "--vector", "v.safetensors", "--model", tiny, "--max-new-tokens", 2)
    assert "v.safetensors: strength 1.5, suggested by the file" in cli(*common).err
    assert "strength 1.5" not in cli(*common, "--strength", 1.5).err
    facts = {"by": "suggest_strength", "confirmed": False, "kl": 0.1432, "limit": 2.0, "max_kl": 0.15}
    replace(vector, calibration=facts).save("v.safetensors")
    assert "strength 1.5, by its cost alone (KL 0.14 on neutral texts), not confirmed" in cli(*common).err
    assert "strength 7 is beyond 2" in cli(*common, "--strength", 7).err
    assert "by='suggest_strength'" in " ".join(cli("inspect", "v.safetensors").out.split())


def test_a_shipped_vector_by_its_name() -> None:
    assert "smollm2-135m/optimism-caa" in steerkit.shipped_vectors("smollm2-135m")
    assert SteeringVector.load("optimism-caa") == SteeringVector.load("smollm2-135m/optimism-caa")
    with pytest.raises(steerkit.UnknownNameError, match="unknown vector 'optimism-caaa'"):
        SteeringVector.load("optimism-caaa")


def test_prompts_from_files(ask: Callable[..., Any]) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    Path("p.txt").write_bytes("\ufeffHello\r\n\r\n  [not a chat] é\n".encode())
    assert [row["prompt"] for row in ask("--prompts", "p.txt")] == ["Hello", "  [not a chat] é"]
    Path("p.jsonl").write_text(
        jsonl(
            [
                "Hello",
                chat,
                {"prompt": "Hello", "topic": "x"},
                {"messages": chat},
                {"prompt": "Hello", "system": "Be kind."},
            ]
        )
        + "\n\n"
    )
    rows = ask("--prompts", "p.jsonl")
    assert [row["prompt"] for row in rows] == ["Hello", chat, "Hello", chat, chat]
    assert rows[0]["text"] == rows[2]["text"]
    assert rows[1]["text"] == rows[3]["text"] == rows[4]["text"]
    Path("chats").write_text(jsonl([chat]))
    assert ask("--prompts", "chats")[0]["prompt"] == chat


def test_raw_prompts(ask: Callable[..., Any], tiny: Path) -> None:
    model, tokenizer = steerkit.load_model(str(tiny))
    expected = steerkit.generate(model, tokenizer, ["Hello"], raw=True, max_new_tokens=6)
    assert [row["text"] for row in ask("Hello", "--raw")] == expected


def test_what_generate_prints(cli: Cli, ask: Callable[..., Any], tiny: Path) -> None:
    common = ("--model", tiny, "--max-new-tokens", 6)
    (row,) = ask("Hello", "--vector", "v.safetensors")
    assert cli("generate", "Hello", "--vector", "v.safetensors", *common).out == row["text"] + "\n"
    two = cli("generate", "Hello [/INST]", "Bye", *common).out
    assert "> Hello [/INST]\n" in two
    assert "\n> Bye\n" in two
    both = cli("generate", "Hello", "--vector", "v.safetensors", "--baseline", *common).out
    assert "without" in both
    assert "steered" in both
    assert width(both.split("\n")) <= WIDTH


# --- demo ------------------------------------------------------------------------------------------------------------


def test_demo(answer: Callable[..., Any], here: Path) -> None:
    found = answer("demo", "--recipe", "joy-caa.toml", "--out", "made/here", "--batch-size", 8)
    folder = Path("made/here")
    assert SteeringVector.load(folder / "joy-caa.safetensors").digest == found["vector"]["digest"]
    assert [row["strength"] for row in found["curve"]] == [-2, -1, 0, 1, 2]
    assert [len(row["random"]) for row in found["curve"]] == [5, 0, 0, 0, 5]
    assert all(row["low"] <= row["effect"] <= row["high"] for row in found["curve"])
    assert {type(found["rises"]), type(found["clear_of_controls"])} == {bool}
    assert found["items"] == 3
    assert found["vector"]["shipped"] is False
    assert [(row["prompt"], row["strength"]) for row in found["answers"]] == [
        (prompt, strength) for prompt in ("Is it good?", "How are you?") for strength in (-1.5, 0, 1.5)
    ]
    if importlib.util.find_spec("matplotlib") is not None:
        assert (folder / "joy-caa.png").read_bytes().startswith(b"\x89PNG")
        assert found["picture"] == str(folder / "joy-caa.png")


def test_what_demo_prints(cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    ended = cli("demo", "--recipe", "joy-caa.toml")
    assert (ended.code, ended.err) == (0, "")
    answers = ("steered with a vector fitted just now", "Is it good?", "strength -1.5", "unsteered", "strength +1.5")
    measured = ("Preference margin, 3 held-out items", "95 % interval", "5 random directions")
    places = [ended.out.index(words) for words in (*answers, *measured, "try next:")]
    assert places == sorted(places)  # sentences first
    assert re.search(
        r"rises over the whole range: (yes|no); outer intervals clear of random directions: (yes|no)", ended.out
    )
    assert "no picture: matplotlib is missing" in ended.out
    assert "steerkit inspect out/joy-caa.safetensors" in ended.out
    assert not Path("out/joy-caa.png").exists()
    assert width(line for line in ended.out.split("\n") if str(tiny) not in line) <= WIDTH


def test_a_full_demo_has_random_directions_at_every_strength(
    answer: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "BRIEF", demo.BRIEF._replace(pairs=2))
    brief, full = (answer("demo", "--recipe", "joy-caa.toml", *more) for more in ((), ("--full",)))
    assert (brief["items"], full["items"]) == (2, 3)
    assert [len(row["random"]) for row in full["curve"]] == [5] * 5
    assert brief["vector"]["digest"] == full["vector"]["digest"]
    assert brief["answers"] == full["answers"]


def test_a_demo_takes_the_shipped_vector_where_it_fits(
    cli: Cli, here: Path, tiny: Path, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CONTROLS", 1)  # what is measured is looked at elsewhere
    monkeypatch.setattr(demo, "_draw", lambda *_: None)
    train, _ = find_recipe("joy-caa.toml").split()
    monkeypatch.setattr(demo, "recipes", lambda: {"joy-caa": Path("joy-caa.toml")})
    monkeypatch.setattr(demo, "vectors", lambda: {f"{tiny}/joy-caa": Path("shipped.safetensors")})
    replace(vector, data_digest=train.digest).save("shipped.safetensors")
    ended = cli("demo", "--recipe", "joy-caa.toml")
    assert "steered with the vector that is shipped" in ended.out
    assert SteeringVector.load("out/joy-caa.safetensors").digest == SteeringVector.load("shipped.safetensors").digest
    assert "fitted just now" in cli("demo", "--recipe", "joy-caa.toml", "--full").out
    null = replace(
        vector, data_digest=train.digest, suggested_strength=None, calibration={"by": "calibrate", "confirmed": False}
    )
    null.save("shipped.safetensors")
    assert "calibration confirmed no effect on held-out items" in cli("demo", "--recipe", "joy-caa.toml").err
    assert "strength +0.5" in cli("demo", "--recipe", "joy-caa.toml", "--strength", 0.5).out
    replace(vector, data_digest="0" * 64).save("shipped.safetensors")  # of other items than the recipe's
    assert "fitted just now" in cli("demo", "--recipe", "joy-caa.toml").out


ASKED = """
format = 1
behaviour = "caution"
[model]
name = "{model}"
[data]
file = "asked.jsonl"
positive = "bad"
held_out_sources = ["b"]
[method]
name = "{method}"
layers = [1]
[method.settings]
writes = [1]
[apply]
strength = {strength}
[evaluate]
questions = ["Is it good?"]
"""


@pytest.mark.parametrize(("method", "strength"), [("controller", 0.0), ("conditional", 3.0)])
def test_demo_of_two_kinds_of_prompts(
    answer: Callable[..., Any], cli: Cli, here: Path, tiny: Path, method: str, strength: float
) -> None:
    items = [
        {"prompt": f"{word} {source}{n}", "label": label, "source": source}
        for label, word in (("bad", "Break"), ("good", "Mend"))
        for source in "ab"
        for n in range(6)
    ]
    Path("asked.jsonl").write_text(jsonl(items))
    Path(f"asked-{method}.toml").write_text(ASKED.format(model=tiny, method=method, strength=strength))
    found = answer("demo", "--recipe", f"asked-{method}.toml")
    assert [(kind["side"], kind["items"]) for kind in found["kinds"]] == [("positive", 6), ("negative", 6)]
    assert found["picture"] is None
    if not strength:
        assert all(kind["unchanged"][0] == 1 and kind["refused"] == kind["before"] for kind in found["kinds"])
    card = Path(f"out/asked-{method}.md").read_text()
    assert "| positive side | 6 | 0 (0 to 39) |" in card
    assert "## The gate" in card
    ended = cli("demo", "--recipe", f"asked-{method}.toml")
    assert "not bad" in ended.out
    assert "picture" not in ended.out
    assert width(line for line in ended.out.split("\n") if str(tiny) not in line) <= WIDTH


@pytest.mark.slow
@pytest.mark.embedded
def test_demo_on_the_embedded_model(answer: Callable[..., Any], tmp_path: Path) -> None:
    found = answer("demo", "--out", tmp_path)
    assert found["model"] == "smollm2-135m"
    assert found["vector"]["shipped"]
    assert found["rises"]
    texts = {row["strength"]: row["text"] for row in found["answers"]}
    assert len(set(texts.values())) == 3


# --- errors ----------------------------------------------------------------------------------------------------------

OWN = ("--positive", "plus.txt", "--negative", "minus.txt", "--out", "x.safetensors")
STEERED = ("generate", "Hello", "--vector", "v.safetensors")


def broken_files() -> None:
    whole = Path("v.safetensors").read_bytes()
    Path("short.safetensors").write_bytes(whole[:-16])
    Path("stub.safetensors").write_bytes(whole[:40])
    altered = bytearray(whole)
    altered[-1] ^= 1
    Path("altered.safetensors").write_bytes(altered)
    Path("blank").write_text("\n \n")
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text(jsonl(PAIRS[:2]) + '{"prompt": "x", \n')
    Path("one-sided.jsonl").write_text(jsonl([*PAIRS[:1], {"prompt": "x", "positive": "y"}]))
    Path("typo.jsonl").write_text(jsonl([{"prompt": "x", "positve": "y", "negative": "z"}]))
    Path("chats.jsonl").write_text(jsonl([[{"role": "user", "content": "Hi"}], [{"role": "user"}]]))
    Path("nothing.jsonl").write_text(jsonl(["Hi", {"body": "Hi"}]))
    Path("latin.txt").write_bytes(b"Hello\nd\xe9j\xe0 vu\n")
    recipe = Path("joy-caa.toml").read_text()
    Path("key.toml").write_text(recipe.replace("readout", "raedout"))
    Path("data.toml").write_text(recipe.replace("joy.jsonl", "gone.jsonl"))
    Path("not.toml").write_text("format = = 1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("extract", "optimsim"), "unknown recipe 'optimsim'; did you mean 'optimism-"),
        (("demo", "--recipe", "optimsim"), "unknown recipe 'optimsim'"),
        (("extract", "gone.toml"), "gone.toml"),
        (("extract", "key.toml"), "key.toml: [method] unknown key 'raedout'; did you mean 'readout'?"),
        (("extract", "data.toml"), "gone.jsonl: cannot read the file"),
        (("extract", "not.toml"), "not.toml: not a TOML file"),
        (("extract", "joy-caa.toml", "--method", "cca"), "unknown method 'cca'; did you mean 'caa'?"),
        (("extract", *OWN, "--method", "cca"), "unknown method 'cca'; did you mean 'caa'?"),
        (("extract", "joy-caa.toml", "--method", "actadd", "--readout", "last"), "actadd"),
        (("extract", *OWN, "--method", "actadd"), "one pair of prompts, got 2 positive and 2 negative"),
        (("extract", "joy-caa.toml", "--layers", "2-9"), "layer 9 is outside the model; layers go from 0 to 3"),
        (("extract", "joy-caa.toml", "--layers", "two"), "two"),
        (("extract", "joy-caa.toml", "--readout", "lats"), "unknown readout 'lats'"),
        (("extract", "joy-caa.toml", "--held-out", "1.5"), "held_out=1.5: give a share between 0 and 1"),
        (("extract", "joy-caa.toml", "--out", "plus.txt/x.safetensors"), "cannot be written (Not a directory)"),
        (("extract", "joy-caa.toml", "--out", "."), "is a folder; give the name of a file"),
        (("demo", "--recipe", "joy-caa.toml", "--out", "plus.txt"), "cannot be written (Not a directory)"),
        (("extract", "--data", "gone.jsonl", "--out", "x"), "gone.jsonl: cannot read the file (No such file"),
        (("extract", "--data", "empty.jsonl", "--out", "x"), "empty.jsonl: the file holds no item"),
        (("extract", "--data", "bad.jsonl", "--out", "x"), "bad.jsonl, line 3: malformed JSON at column"),
        (("extract", "--data", "one-sided.jsonl", "--out", "x"), "one-sided.jsonl, line 2: no 'negative'"),
        (("extract", "--data", "typo.jsonl", "--out", "x"), "line 1: unknown key 'positve'; did you mean 'positive'?"),
        (("extract", "--positive", "gone", "--negative", "minus.txt", "--out", "x"), "gone: cannot read the file"),
        (("extract", "--positive", "plus.txt", "--negative", "blank", "--out", "x"), "blank: the file holds no prompt"),
        (("extract", "--positive", "plus.txt", "--negative", "plus.txt", "--out", "x"), "are the same text"),
        (("extract", "--data", "chats.jsonl", "--raw", "--out", "x"), "line 1: expected a JSON object"),
        (("generate", "--prompts", "gone"), "gone: cannot read the file"),
        (("generate", "--prompts", "."), "cannot read the file"),
        (("generate", "--prompts", "blank"), "blank: the file holds no prompt; write one a line"),
        (("generate", "--prompts", "empty.jsonl"), "empty.jsonl: the file holds no prompt"),
        (("generate", "--prompts", "bad.jsonl"), "bad.jsonl, line 3: malformed JSON at column"),
        (("generate", "--prompts", "chats.jsonl"), "chats.jsonl, line 2: message 0: no 'content'"),
        (("generate", "--prompts", "nothing.jsonl"), "nothing.jsonl, line 2: give 'prompt' or 'messages'"),
        (("generate", "--prompts", "latin.txt"), "latin.txt, line 2: byte 2 is not UTF-8"),
        (("generate", "Hello", "--vector", "no-such-vector"), "unknown vector 'no-such-vector'"),
        (("generate", "Hello", "--vector", "gone.safetensors"), "gone.safetensors: no such file"),
        (("generate", "Hello", "--vector", "short.safetensors"), "short.safetensors: truncated"),
        (("inspect", "stub.safetensors"), "stub.safetensors: truncated"),
        (("inspect", "altered.safetensors"), "altered.safetensors: altered file"),
        (("inspect", "joy.jsonl"), "joy.jsonl: "),
        (("inspect", "."), "is a folder"),
        (("inspect", "no-such-vector"), "unknown vector 'no-such-vector'"),
        ((*STEERED, "--scope", "reponse"), "unknown scope 'reponse'; did you mean 'response'"),
        ((*STEERED, "--scope", "front"), "front"),
        ((*STEERED, "--unit", "norm"), "give a strength too"),
        ((*STEERED, "--model", "smollm2-135n"), "unknown model 'smollm2-135n'; did you mean 'smollm2-135m'?"),
        ((*STEERED, "--model", "./gone"), "./gone: no such folder"),
        ((*STEERED, "--model", "plus.txt"), "plus.txt: is no model"),
        (("generate", "Hello", "--vector", "narrow.safetensors"), "cannot steer LlamaForCausalLM (4 layers, width 32)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_error_is_one_line(
    cli: Cli, here: Path, tiny: Path, vector: SteeringVector, words: tuple[str, ...], said: str
) -> None:
    broken_files()
    narrow = SteeringVector(
        suggested_strength=1.0,
        method="caa", tensors={"resid_post.1/direction": torch.ones(8)}, sites=(Site(1),), edit="add", scope="all",
        unit="paper", model_type="llama", hidden_size=8, num_layers=BLOCKS,
    )  # fmt: skip
    narrow.save("narrow.safetensors")
    before = sorted(here.rglob("*"))
    model = () if "--model" in words or words[0] == "inspect" else ("--model", tiny)
    ended = cli(*words, *model)
    assert ended.code == 1
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert said in ended.err
    assert sorted(here.rglob("*")) == before


def test_no_model_is_loaded_for_what_cannot_be_written(
    cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(steerkit, "load_model", loaded)
    assert cli("extract", "joy-caa.toml", "--out", "plus.txt/x").code == 1
    assert cli("extract", *OWN[:-1], "plus.txt/x").code == 1
    assert cli("demo", "--recipe", "joy-caa.toml", "--out", "plus.txt").code == 1
    assert cli("generate", "Hello", "--vector", "v.safetensors", "--strength", "nan").code == 2


@pytest.mark.parametrize("command", ["extract", "calibrate", "sweep", "layers", "attribute"])
def test_no_model_is_loaded_for_a_block_that_the_recipe_s_own_lacks(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(steerkit, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    ended = cli(command, "optimism-caa", "--layers", "12-120")
    assert (ended.code, ended.err) == (1, "error: layer 120 is outside the model; layers go from 0 to 29\n")


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("extract",),
        ("extract", "joy", "--data", "joy.jsonl", "--out", "x"),
        ("extract", "joy", *OWN),
        ("extract", "--data", "joy.jsonl", *OWN),
        ("extract", "--positive", "plus.txt", "--out", "x"),
        ("extract", "--negative", "plus.txt", "--out", "x"),
        ("extract", "--data", "joy.jsonl"),
        ("extract", "--data", "joy.jsonl", "--out", "joy.jsonl"),
        ("extract", "joy-caa.toml", "--raw"),
        ("extract", "joy-caa.toml", "--batch-size", "0"),
        ("extract", "joy-caa.toml", "--held-out", "half"),
        ("extract", "joy-caa.toml", "--held-out", "nan"),
        ("generate",),
        ("generate", "Hello", "--prompts", "plus.txt"),
        ("generate", "Hello", "--strength", "1"),
        ("generate", "Hello", "--scope", "all"),
        ("generate", "Hello", "--unit", "norm"),
        ("generate", "Hello", "--baseline"),
        ("generate", "Hello", "--temperature", "0"),
        ("generate", "Hello", "--top-p", "1.5"),
        ("generate", "Hello", "--raw", "--system", "Be kind."),
        ("layers",),
        ("layers", "joy", "--data", "joy.jsonl"),
        ("generate", "Hello", "--seed", "1"),
        ("generate", "Hello", "--sample", "--seed", "9" * 20),
        ("generate", "Hello", "--max-new-tokens", "0"),
        ("generate", "Hello", "--batch-size", "-1"),
        (*STEERED, "--strength", "strong"),
        (*STEERED, "--strength", "nan"),
        (*STEERED, "--strength", "-inf"),
        (*STEERED, "--strength", "1", "--strength", "2"),
        (*STEERED, "--vector", "v.safetensors", "--strength", "2"),
        (*STEERED, "--unit", "metre"),
        (*STEERED, "--steering", "v.safetensors"),
        ("generate", "Hello", "--steering", "v.safetensors", "--scope", "all"),
        ("plan",),
        ("bake", "--out", "x"),
        ("export", "--to", "gguf", "--steering", "v.safetensors"),
        ("inspect",),
        ("inspect", "v.safetensors", "another"),
        ("recipes", "more"),
        ("demo", "--debug"),
    ],
    ids=" ".join,
)
def test_wrong_usage(cli: Cli, here: Path, words: tuple[str, ...]) -> None:
    ended = cli(*words)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage: steerkit" in plain(ended.err)


def test_debug_shows_the_traceback(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("inspect", "gone.safetensors")
    assert "Traceback" not in cli(*words).err
    debugged = cli("--debug", *words)
    assert debugged.code == 1
    assert "Traceback" in debugged.err
    assert debugged.err.splitlines()[-1].startswith("error: gone.safetensors: ")
    monkeypatch.setenv("STEERKIT_DEBUG", "1")
    assert "Traceback" in cli(*words).err


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(cli: Cli, here: Path, tiny: Path) -> None:
    shutil.copytree(tiny, "other")
    words = ("generate", "Hello", "--vector", "v.safetensors", "--strength", 1, "--model", "./other")
    ended = cli(*words, "--max-new-tokens", 2)
    assert ended.code == 0
    assert re.fullmatch(r"warning: the vector was fitted on model 'tiny', this is [^\n]+\n", ended.err), ended.err


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_process_says_one_line_too(here: Path, tiny: Path) -> None:
    words = ("generate", "Hello", "--model", tiny, "--vector", "v.safetensors", "--scope", "reponse")
    process = start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert err.count("error") == 1
    assert re.fullmatch(r"error: unknown scope 'reponse'; [^\n]+", last_line(err)), err


@pytest.mark.slow  # processes of their own; that work is shared is tried every time in `test_sharding`
def test_processes_share_a_command_and_end_together(here: Path, tiny: Path) -> None:
    words = ("extract", "joy-caa.toml", "--model", tiny)

    def ended(*more: object) -> tuple[int, str, str]:
        process = start(*words, *more, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, apart_from_loaded(err)

    alone, shared = ended("--out", "v.safetensors"), ended("--out", "w.safetensors", "--processes", 2)
    assert alone[0] == shared[0] == 0
    assert shared[1].replace("w.safetensors", "v.safetensors") == alone[1]
    assert Path("w.safetensors").read_bytes() == Path("v.safetensors").read_bytes()
    wrong = ended("--layers", "99", "--out", "x.safetensors", "--processes", 2)
    assert (wrong[0], wrong[1]) == (1, "")
    assert last_line(wrong[2]).startswith("error: ")
    assert wrong[2].count("error: ") == 1
    assert not Path("x.safetensors").exists()


def test_a_reader_that_has_gone_is_no_error(here: Path) -> None:
    with start("recipes", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_ctrl_c_leaves_nothing_behind(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it hurts most: while the file is written."""
    during: list[Path] = []

    def interrupted(_handle: int) -> None:
        during.extend(Path("made").iterdir())
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("steerkit._support.files.os.fsync", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = cli("extract", "joy-caa.toml", "--out", "made/x.safetensors")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.code, ended.out, last_line(ended.err)) == (130, "", "interrupted")
    assert len(during) == 1
    assert list(Path("made").iterdir()) == []


@pytest.mark.slow  # a process of its own
def test_ctrl_c_ends_a_process(here: Path, tiny: Path) -> None:
    pty = pytest.importorskip("pty")
    pairs = [{"prompt": f"Is {n} good?", "positive": f"Yes, {n}.", "negative": f"No, {n}."} for n in range(1500)]
    Path("many.jsonl").write_text(jsonl(pairs))
    Path("made").mkdir()
    ours, theirs = pty.openpty()  # the bar, which shows on terminals only, tells when reading has begun
    words = ("extract", "--data", "many.jsonl", "--model", tiny, "--batch-size", 1, "--out", "made/x.safetensors")
    process = start(*words, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    try:
        while b"reading" not in seen:
            seen += os.read(ours, 1024)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # a terminal whose other side has gone
            while more := os.read(ours, 1024):
                seen += more
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    assert seen.decode().rstrip().endswith("interrupted")
    assert b"Traceback" not in seen
    assert list(Path("made").iterdir()) == []
