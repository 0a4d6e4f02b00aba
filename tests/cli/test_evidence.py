"""The commands that measure, as somebody meets them: what they print and write, mistakes, kills and Ctrl-C."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import typer

import steerkit
from steerkit.cli._compare_files import together
from steerkit.cli._prompting import systems_for
from steerkit.errors import FitError
from steerkit.evaluate.compare import Row
from steerkit.evaluate.compare_prompting import best_method
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.network.sites import Site
from steerkit.persona import TraitSpec
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS
from tests.looping import looping_model, trait_data
from tests.program import PAIRS, RECIPE, WIDTH, Cli, Ended, jsonl, last_line, plain, start, strict_json, width

FEW = ("--texts", 2, "--neutral", 2)
FREE = ("--max-kl", "1e9", "--max-ppl-ratio", "1e9")
SHORT = (*FEW, "--max-new-tokens", 4)


@pytest.fixture(scope="session")
def looping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model whose every number is known, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "looping"
    model, tokenizer = looping_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trait(here: Path, looping: Path) -> Path:
    """The current folder with a recipe for it that works."""
    data = trait_data(28)
    rows = [
        {"prompt": plus.prompt, "positive": plus.answer, "negative": minus.answer}
        for plus, minus in zip(data.positive, data.negative, strict=True)
    ]
    Path("trait.jsonl").write_text(jsonl(rows))
    text = RECIPE.format(model=looping.as_posix()).replace("joy", "trait")
    Path("trait-caa.toml").write_text(text)
    return here


@pytest.fixture
def measured(cli: Cli, here: Path, tiny: Path) -> Callable[..., Any]:
    """Run evaluate on the tiny model and read its JSON."""

    def run(*words: object) -> Any:
        ended = cli("evaluate", "--vector", "v.safetensors", "--model", tiny, *SHORT, *words, "--json")
        assert (ended.code, ended.err) == (0, "")
        return strict_json(ended.out)

    return run


def fits(text: str) -> bool:
    """Whether every line fits on the terminal and no cell of a table had to be cut or broken into bits."""
    return width(text.split("\n")) <= WIDTH and "…" not in text


def rows_of(text: str) -> list[list[str]]:
    """Cells of a printed table, by its lines."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.split("\n")]


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluate_is_the_library_s_measure(measured: Any, tiny: Path, vector: SteeringVector) -> None:
    found = measured("--data", "joy.jsonl", "--strength", "0.5,-1", "--strength", "2", "--controls", 2)
    assert [one["strength"] for one in found["strengths"]] == [0.5, -1, 2]
    data = ContrastSet.from_jsonl("joy.jsonl")
    setup = Setup(*steerkit.load_model(str(tiny)), data, texts=2, max_new_tokens=4).first_neutral(2)
    for one in found["strengths"]:
        expected = measure(setup.trial(vector, one["strength"]), ["preference_margin", "divergence", "repetition"])
        for name, figure in expected.items():
            assert one["scores"][name]["mean"] == pytest.approx(figure.estimate.mean, abs=1e-6)
    means = [one["scores"]["preference_margin"]["mean"] for one in found["strengths"]]
    assert len(set(means)) == 3, "every strength has its own figures"
    control = found["control"]
    assert (control["column"], control["strength"], control["effect"]) == ("preference_margin", 2, means[2])
    assert len(control["random"]) == 2
    assert control["shuffled"] == []
    assert any("first word" in warning for warning in found["warnings"])


def test_evaluate_takes_the_suggested_strength(measured: Any) -> None:
    few = ("--data", "joy.jsonl", "--scorer", "preference_margin", "--controls", 0)
    assert measured(*few) == measured(*few, "--strength", "1.5")


def test_a_unit_holds_at_every_strength(measured: Any, vector: SteeringVector) -> None:
    """Two strengths in one unit are the same two in the other."""
    few = ("--data", "joy.jsonl", "--scorer", "preference_margin", "--controls", 1)
    factor = vector.norms[Site(1)] / float(vector.tensors["resid_post.1/direction"].norm())
    norm = measured(*few, "--strength", "0.2,0.4", "--unit", "norm")
    paper = measured(*few, "--strength", f"{0.2 * factor!r},{0.4 * factor!r}")
    assert (norm["unit"], paper["unit"]) == ("norm", "paper")
    margins = [
        [one["scores"]["preference_margin"]["mean"] for one in found["strengths"]] + found["control"]["random"]
        for found in (norm, paper)
    ]
    assert margins[0] == pytest.approx(margins[1], abs=1e-6)
    assert margins[0][0] != margins[0][1]


def test_a_scope_holds_for_vector_and_controls(measured: Any) -> None:
    few = ("--data", "joy.jsonl", "--scorer", "preference_margin", "--controls", 1, "--strength", 3)
    everywhere, response = measured(*few, "--scope", "all")["control"], measured(*few)["control"]
    assert everywhere["effect"] != response["effect"]
    assert everywhere["random"] != response["random"]


def test_evaluate_sets_system_prompts_beside_the_vector(cli: Cli, measured: Any, tiny: Path, vector: Any) -> None:
    words = ("--data", "joy.jsonl", "--controls", 0, "--system", "Be glad.", "--system", "Be sad, please.")
    found = measured(*words, "--strength", "0.5,-1")["prompting"]
    data = ContrastSet.from_jsonl("joy.jsonl")
    setup = Setup(*steerkit.load_model(str(tiny)), data, texts=2, max_new_tokens=4).first_neutral(2)
    for place, system in enumerate(("Be glad.", "Be sad, please.")):
        for key, one, strength in (("alone", None, None), ("with_vector", vector, -1)):
            row = found[key]["wordings"][place]
            assert row["system"] == system
            expected = measure(setup.prompted(system).trial(one, strength), ["preference_margin", "divergence"])
            change = expected["preference_margin"].change
            assert row["scores"]["preference_margin"]["change"] == pytest.approx(change.mean, abs=1e-6)  # type: ignore[union-attr]
            assert row["scores"]["kl"]["mean"] == pytest.approx(expected["kl"].estimate.mean, abs=1e-6)
    kls = [row["scores"]["kl"]["mean"] for row in found["alone"]["wordings"]]
    assert found["alone"]["over_wordings"]["kl"] == pytest.approx(
        {"mean": sum(kls) / 2, "lowest": min(kls), "highest": max(kls)}
    )
    ended = cli("evaluate", "--vector", "v.safetensors", "--model", tiny, *SHORT, *words)
    assert fits(ended.out), ended.out
    assert "system prompts: change against the unsteered model" in ended.out
    assert "the same under v.safetensors at strength 1.5" in ended.out
    assert "2: Be sad, please." in ended.out


def test_system_prompts_of_a_shipped_vector(vector: SteeringVector) -> None:
    prompting = find_recipe("warmth-caa").prompting
    known = replace(vector, recipe="warmth-caa")
    assert prompting is not None
    assert systems_for(known, None, 1.0) == prompting.positive
    assert systems_for(known, None, -1.0) == prompting.negative
    assert systems_for(known, ["Be.", "Be."], 1.0) == ("Be.",)
    persona = SteeringVector.load("smollm2-135m/pirate-persona")
    assert systems_for(persona, None, 1.0) == TraitSpec.load("pirate").prompting.positive
    with pytest.raises(typer.BadParameter, match="names no system prompts; give --system TEXT"):
        systems_for(replace(vector, recipe=None), None, 1.0)


def test_evaluate_on_prompts_alone(measured: Any, cli: Cli, tiny: Path) -> None:
    found = measured("--prompts", "plus.txt", "--controls", 1)
    assert {"kl", "repetition"} <= set(found["strengths"][0]["scores"])
    assert "preference_margin" not in found["strengths"][0]["scores"]
    assert found["control"]["column"] == "kl"
    assert found["warnings"] is None
    words = ("evaluate", "--vector", "v.safetensors", "--model", tiny, "--prompts", "plus.txt", *SHORT)
    shown = cli(*words, "--controls", 0, "--scorer", "length").out
    assert "predicts the label" not in shown, "there are no labels"


def test_markers(measured: Any) -> None:
    """Every text of a random model holds some letter or sign; none holds what nobody writes."""
    words = ("--prompts", "plus.txt", "--controls", 0, "--scorer", "markers")
    (absent,) = measured(*words, "--markers", "unwritten", "--markers", "never")["strengths"]
    assert absent["scores"]["marker_rate"]["mean"] == 0
    (beside,) = measured("--prompts", "plus.txt", "--controls", 0, "--markers", "never")["strengths"]
    assert {"marker_rate", "kl"} <= set(beside["scores"]), "beside the scorers that are there without asking"


def test_choice(measured: Any, tiny: Path, vector: SteeringVector) -> None:
    found = measured("--data", "joy.jsonl", "--controls", 0, "--scorer", "choice", "--strength", 2)
    setup = Setup(*steerkit.load_model(str(tiny)), ContrastSet.from_jsonl("joy.jsonl"))
    expected = measure(setup.trial(vector, 2.0), ["choice"])["p_match"]
    assert found["strengths"][0]["scores"]["p_match"]["mean"] == pytest.approx(expected.estimate.mean, abs=1e-6)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """A judge's address, and what it was asked; it rates everything with 1."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            choice = {"index": 0, "message": {"role": "assistant", "content": "1"}, "finish_reason": "stop"}
            data = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1#tiny-judge", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_rates_texts(measured: Any, endpoint: tuple[str, list[str]]) -> None:
    url, asked = endpoint
    words = ("--prompts", "plus.txt", "--controls", 0, "--judge", url, "--behaviour", "the answer is joyful")
    (found,) = measured(*words, "--scorer", "judge")["strengths"]
    assert found["scores"]["judged"]["mean"] == 1
    assert found["scores"]["judged"]["items"] == 2
    assert all("the answer is joyful" in one for one in asked)
    (found,) = measured(*words)["strengths"]
    assert {"kl", "overall", "concept", "instruction", "fluency"} <= set(found["scores"])
    assert found["scores"]["overall"]["mean"] == pytest.approx(1)


def test_what_evaluate_prints(cli: Cli, here: Path, tiny: Path) -> None:
    words = ("evaluate", "--vector", "v.safetensors", "--model", tiny, "--data", "joy.jsonl", *SHORT)
    ended = cli(*words, "--strength", "1,2", "--controls", 2, "--scorer", "preference_margin", "--scorer", "perplexity")
    assert (ended.code, ended.err) == (0, "")
    assert fits(ended.out), ended.out
    assert "v.safetensors at strength 1\n" in ended.out
    assert "v.safetensors at strength 2\n" in ended.out
    assert re.search(r"preference_margin at strength 2 is [+-]\d\.\d{3}; controls reach\n", ended.out)
    assert "random directions, same norm" in ended.out
    assert "warning: format alone predicts the label" in plain(ended.out)
    (row,) = [cells for cells in rows_of(ended.out) if cells[0] == "preference_margin"][:1]
    assert len(row) == 5, "figure, mean, change, items, share that moved the wrong way"
    assert re.fullmatch(r"\d+%", row[4])
    assert [cells[4] for cells in rows_of(ended.out) if cells[0] == "perplexity"] == ["-", "-"]


def test_evaluate_doubts_the_fit_and_what_was_taken_out(cli: Cli, here: Path, tiny: Path) -> None:
    fitted = ("extract", "--data", "joy.jsonl", "--held-out", 0.4, "--model", tiny, "--layers", 1)
    assert cli(*fitted, "--method", "ablation", "--readout", "response_mean", "--out", "a.safetensors").code == 0
    data = ("--data", "joy.jsonl", "--held-out", 0.4)
    words = ("evaluate", "--vector", "a.safetensors", *data, "--model", tiny, *SHORT, "--controls", 0)
    ended = cli(*words, "--scorer", "preference_margin", "--refit-intervals", 3)
    assert ended.code == 0, ended.err
    assert fits(ended.out), ended.out
    (row,) = (cells for cells in rows_of(ended.out) if cells[0] == "held-out items and fit")
    assert row[-1] == "3"
    (site,) = (cells for cells in rows_of(ended.out) if cells[0] == "resid_post.1")
    assert site[2].startswith("0.50 ("), "along the direction that was taken out nothing is left"
    assert any(cells[0] == "resid_post.3" for cells in rows_of(ended.out))
    # Of items the vector was not fitted on nothing can be fitted again.
    refused = cli(
        "evaluate", "--vector", "v.safetensors", "--data", "joy.jsonl", "--model", tiny, "--refit-intervals", 3
    )
    assert refused.code == 1
    assert "so --refit-intervals cannot be had" in refused.err


def test_the_doctor_looks_at_a_vector_and_at_pairs(
    answer: Callable[..., Any], cli: Cli, here: Path, tiny: Path
) -> None:
    pairs = [*PAIRS[:2], {"prompt": "Same?", "positive": "Quite so.", "negative": "Quite so."}]
    Path("same.jsonl").write_text(jsonl(pairs))
    words = ("doctor", "--model", tiny, "--vector", "v.safetensors", "--strength", 2, "--data", "same.jsonl")
    found = {one["check"]: one for one in answer(*words)}
    assert re.fullmatch(r"\d+ of 16 heads have a sink, steered \d+; \d+ lose it", found["sink"]["reason"])
    assert found["pairs"]["reason"].startswith("pairs 3")
    assert "give --vector" in cli("doctor", "--model", tiny, "--strength", 2).err


def test_massive_tokens_left_out_are_told(cli: Cli, here: Path, tiny: Path) -> None:
    words = ("extract", "--data", "joy.jsonl", "--held-out", 0.4, "--model", tiny, "--layers", 1)
    assert cli(*words, "--readout", "response_mean,no_massive_tokens", "--out", "m.safetensors").code == 0
    shown = plain(cli("inspect", "m.safetensors").out)
    assert "massive tokens left out resid_post.1=0" in shown
    assert "response_mean,no_massive_tokens" in shown


def test_a_shipped_vector_brings_its_data_and_controls(
    cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector of a shipped recipe is measured on its held-out items, with fits on shuffled labels beside it."""
    from steerkit.recipe import finding as module

    own = here / "joy-caa.toml"
    monkeypatch.setattr("steerkit._support.shipped.recipes", lambda: {"joy-caa": own})
    monkeypatch.setattr(module, "recipes", lambda: {"joy-caa": own})
    monkeypatch.setattr(module, "recipe_path", lambda _: own)
    assert cli("extract", "joy-caa.toml", "--out", "x.safetensors").code == 0
    words = ("evaluate", "--vector", "x.safetensors", "--model", tiny, *SHORT, "--controls", 2)
    ended = cli(*words, "--scorer", "preference_margin")
    assert ended.code == 0
    assert fits(ended.out), ended.out
    assert "fits on shuffled labels, same norm" in ended.out
    assert "split-half cosine" in plain(ended.out)
    found = strict_json(cli(*words, "--scorer", "preference_margin", "--json").out)
    assert found["strengths"][0]["scores"]["preference_margin"]["items"] == 3
    assert len(found["control"]["shuffled"]) == 2
    assert found["direction"]["sites"]["resid_post.1"]["reproduced"] == pytest.approx(1, abs=1e-4)


# --- sweep -----------------------------------------------------------------------------------------------------------

SWEEP = ("sweep", "joy-caa.toml", *FEW, "--layers", "1,0+2", "--strengths", "-1,1")


def table_of(folder: str) -> list[dict[str, Any]]:
    return [strict_json(line) for line in (Path(folder) / "table.jsonl").read_text().splitlines()]


def test_sweep(cli: Cli, here: Path) -> None:
    ended = cli(*SWEEP, "--out", "made/here")
    assert (ended.code, ended.err) == (0, "")
    assert fits(ended.out), ended.out
    assert [cells[:2] for cells in rows_of(ended.out) if cells[0] in ("unsteered", "1", "0+2")] == [
        ["unsteered", "-"], ["1", "-1"], ["1", "1"], ["0+2", "-1"], ["0+2", "1"]
    ]  # fmt: skip
    table = table_of("made/here")
    assert [(row["layers"], row["strength"]) for row in table if row["column"] == "kl"] == [
        ("", None), ("1", -1), ("1", 1), ("0+2", -1), ("0+2", 1)
    ]  # fmt: skip
    assert {row["column"] for row in table} >= {"preference_margin", "kl", "perplexity_ratio", "repetition"}
    names = {"rows.jsonl", "table.jsonl"} | ({"sweep.png"} if importlib.util.find_spec("matplotlib") else set())
    assert {path.name for path in Path("made/here").iterdir()} == names
    found = strict_json(cli(*SWEEP, "--out", "made/here", "--json").out)
    assert found["table"] == str(Path("made/here/table.jsonl"))
    assert found["effect"] == "preference_margin"
    by_place = {(tuple(point["layers"]), point["strength"]): point["scores"] for point in found["points"]}
    for row in table:
        place = (tuple(int(layer) for layer in row["layers"].split("+") if layer), row["strength"])
        assert by_place[place][row["column"]]["mean"] == row["mean"]


def test_a_sweep_as_parquet_and_without_pictures(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    words = ("sweep", "joy-caa.toml", *FEW, "--layers", "1", "--strengths", "1", "--scorer", "preference_margin")
    ended = cli(*words, "--format", "parquet")
    assert ended.code == 0
    assert "no picture: matplotlib is missing" in ended.out
    table = parquet.read_table("out/sweep-joy-caa/table.parquet").to_pylist()
    assert [row["layers"] for row in table] == ["", "1"]
    assert strict_json(cli(*words, "--json").out)["picture"] is None


def test_layers_in_little_room() -> None:
    from steerkit.cli._evidence import layers_text

    assert layers_text([8]) == "8"
    assert layers_text([8, 9]) == "8+9"
    assert layers_text([3, 8, 9, 10, 14, 15]) == "3+8-10+14+15"
    assert layers_text([]) == ""


def keys_of(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_bytes().split(b"\n") if line]


def wait_for(path: Path, lines: int, process: subprocess.Popen[str]) -> None:
    """Until a file has so many whole lines."""
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    pytest.fail("no such line in a minute")


@pytest.mark.slow  # a process of its own; that rows are kept is seen in every sweep
def test_a_killed_sweep_goes_on(cli: Cli, here: Path) -> None:
    words = ("sweep", "joy-caa.toml", *FEW, "--layers", "0-2", "--strengths", "-1,-0.5,0.5,1")
    assert cli(*words, "--out", "whole").code == 0
    process = start(*words, "--out", "killed", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(Path("killed/rows.jsonl"), 3, process)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = keys_of(Path("killed/rows.jsonl"))
    every = set(keys_of(Path("whole/rows.jsonl")))
    assert 3 <= len(kept) < len(every)
    assert not Path("killed/table.jsonl").exists()
    with Path("killed/rows.jsonl").open("ab") as file:
        file.write(b'{"key": "torn')  # as a kill in the middle of a line leaves it
    assert cli(*words, "--out", "killed").code == 0
    assert Path("killed/table.jsonl").read_bytes() == Path("whole/table.jsonl").read_bytes()
    lines = Path("killed/rows.jsonl").read_bytes().replace(b'{"key": "torn\n', b"")
    keys = [json.loads(line)["key"] for line in lines.split(b"\n") if line]
    assert len(keys) == len(every), "nothing was measured twice"
    assert set(keys) == every
    assert keys[: len(kept)] == kept


# --- calibrate -------------------------------------------------------------------------------------------------------

CALIBRATE = ("calibrate", "trait-caa.toml", *FEW, *FREE, "--controls", 1, "--layers", "1", "--strengths", "0.5,1")


def test_calibrate(cli: Cli, trait: Path, looping: Path) -> None:
    ended = cli(*CALIBRATE)
    assert (ended.code, ended.err) == (0, "")
    usage = f'use it:\n  steerkit generate "Is it good?" --vector trait-caa.safetensors --strength 1 --model {looping}'
    assert usage in ended.out
    assert fits(ended.out.replace(usage, "")), ended.out
    assert "chosen" in ended.out
    assert "wrote trait-caa.safetensors\n" in ended.out
    assert not list(trait.glob("*.rows.jsonl")), "kept until the vector is there, no longer"
    made = SteeringVector.load("trait-caa.safetensors")
    assert (made.suggested_strength, made.unit, made.recipe) == (1.0, "paper", "trait-caa")
    kept = made.held_out["calibration"]
    assert kept["works"]
    assert kept["curve"]
    assert {row["strength"] for row in kept["validation"]} == {0.5, 1.0}
    found = strict_json(cli(*CALIBRATE, "--json", "--out", "new/x.safetensors").out)
    assert found["file"] == str(Path("new/x.safetensors"))
    assert (found["works"], found["strength"], found["layers"]) == (True, 1.0, [1])
    assert Path("new/x.safetensors").read_bytes() == Path("trait-caa.safetensors").read_bytes()


def test_calibrate_says_that_nothing_works(cli: Cli, trait: Path) -> None:
    ended = cli(*CALIBRATE, "--max-kl", "0")
    assert (ended.code, ended.err) == (1, "")
    assert fits(ended.out), ended.out
    assert "nothing works: no layer and strength tried has a positive effect inside the budget" in plain(ended.out)
    assert "over" in ended.out
    assert not list(trait.glob("trait-caa.*safetensors"))
    assert not list(trait.glob("*.rows.jsonl"))
    ended = cli(*CALIBRATE, "--max-kl", "0", "--json")
    assert (ended.code, ended.err) == (1, "")
    found = strict_json(ended.out)
    assert (found["file"], found["works"], found["strength"]) == (None, False, None)


def test_calibrate_by_an_optimiser(cli: Cli, trait: Path) -> None:
    pytest.importorskip("optuna")
    words = ("calibrate", "trait-caa.toml", *FEW, *FREE, "--controls", 1, "--layers", "1,2", "--strengths", "0.5,1")
    found = strict_json(cli(*words, "--trials", 3, "--json").out)
    assert 0.5 <= found["strength"] <= 1
    assert len(found["validation"]) == 3


@pytest.mark.slow  # as a sweep does, below
def test_a_killed_calibration_goes_on(cli: Cli, trait: Path) -> None:
    words = (*CALIBRATE[:-1], "0.2,0.4,0.6,0.8,1")
    assert cli(*words, "--out", "whole.safetensors").code == 0
    Path("killed").mkdir()
    words = (*words, "--out", "killed/whole.safetensors")
    process = start(*words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = Path("killed/whole.rows.jsonl")
    try:
        wait_for(rows, 2, process)
    finally:
        process.kill()
        process.wait()
    kept = keys_of(rows)
    assert len(kept) >= 2
    assert [path.name for path in Path("killed").iterdir()] == [rows.name]
    copy = Path("seen.jsonl")
    unlink = Path.unlink

    def keep(path: Path, *rest: Any, **more: Any) -> None:
        if path == rows:
            shutil.copy(path, copy)
        unlink(path, *rest, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "unlink", keep)
        assert cli(*words).code == 0
    assert [path.name for path in Path("killed").iterdir()] == ["whole.safetensors"]
    assert Path("killed/whole.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    keys = keys_of(copy)
    assert len(keys) == len(set(keys)), "nothing was measured twice"
    assert keys[: len(kept)] == kept


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # two processes each; Ctrl-C in `extract` is tried every time
@pytest.mark.parametrize(
    ("words", "begun"),
    [
        ((*SWEEP[:-1], "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", "--out", "made"), "made/rows.jsonl"),
        ((*CALIBRATE[:-1], "0.2,0.4,0.6,0.8,1", "--out", "made/x.safetensors"), "made/x.rows.jsonl"),
    ],
    ids=["sweep", "calibrate"],
)
def test_ctrl_c_keeps_what_was_measured(cli: Cli, trait: Path, words: tuple[Any, ...], begun: str) -> None:
    process = start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(Path(begun), 2, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, last_line(err)) == (130, "", "interrupted")
    assert [path.as_posix() for path in Path("made").iterdir()] == [begun]
    kept = keys_of(Path(begun))
    assert cli(*words).code == 0
    if words[0] == "sweep":
        keys = keys_of(Path(begun))
        assert keys[: len(kept)] == kept
        assert len(keys) == len(set(keys))


@pytest.mark.slow  # a process of its own; Ctrl-C in `extract` is tried every time
def test_ctrl_c_in_evaluate(here: Path, tiny: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()  # what is done shows on terminals only
    words = ("evaluate", "--vector", "v.safetensors", "--model", tiny, "--data", "joy.jsonl", "--texts", 12)
    many = ",".join(map(str, range(1, 200)))
    process = start(*words, "--strength", many, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    before = sorted(here.rglob("*"))
    try:
        while b"strength 2" not in seen:
            seen += os.read(ours, 1024)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # a terminal whose other side has gone
            while more := os.read(ours, 1024):
                seen += more
        assert process.wait(timeout=60) == 130
        assert process.stdout is not None
        assert process.stdout.read() == ""
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
    assert re.search(r"(\r|\n|\x1b\[2K)interrupted\r\n$", seen.decode()), seen[-200:]
    assert b"Traceback" not in seen
    assert sorted(here.rglob("*")) == before


# --- compare ---------------------------------------------------------------------------------------------------------


COMPARE = ("compare", "trait-caa.toml", *FEW, *FREE, "--controls", 1, "--out", "made")


@pytest.fixture(scope="module")
def kept() -> list[tuple[Ended, dict[Path, bytes]]]:
    """How the comparison ended and what it wrote, once it has run."""
    return []


@pytest.fixture
def compared(cli: Cli, trait: Path, kept: list[tuple[Ended, dict[Path, bytes]]]) -> Ended:
    """Two methods compared, the files in the current folder."""
    pytest.importorskip("matplotlib")
    if not kept:
        ended = cli(*COMPARE, "--method", "caa", "--method", "repe", "--method", "actadd")
        kept.append((ended, {path: path.read_bytes() for path in Path("made").iterdir()}))
    ended, files = kept[0]
    Path("made").mkdir(exist_ok=True)
    for path, content in files.items():
        path.write_bytes(content)
    return ended


def test_compare(compared: Ended, looping: Path) -> None:
    ended = compared
    assert ended.code == 0
    assert ended.err == "note: actadd is left out: no recipe of trait says what it is fitted on\n"
    assert fits(ended.out), ended.out
    assert {path.name for path in Path("made").iterdir()} == {"trait.json", "trait.md", "trait.html"}
    found = strict_json(Path("made/trait.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["caa", "repe"]
    assert found["rows"][0]["works"]
    assert found["rows"][1]["strength"] is not None, "read where the recipe's data shows the trait"
    assert {row["recipe"] for row in found["rows"]} == {"trait-caa"}
    assert found["command"] == (
        "steerkit compare trait-caa.toml --method=caa --method=repe --method=actadd --max-kl=1e+09 "
        "--max-ppl-ratio=1e+09 --max-repetition=0.1 --controls=1 --texts=2 --neutral=2 --seed=0 --batch-size=16 "
        f"--model={looping}"
    )
    assert Path("made/trait.md").read_text().count("\n") == 4
    assert re.search(r"(src|href)=.?https?:", Path("made/trait.html").read_text()) is None


@pytest.mark.slow
def test_compare_sets_system_prompts_beside_the_methods(cli: Cli, trait: Path) -> None:
    """The looping model does not attend, so that asking does nothing, and steering on top of it what it does alone."""
    pytest.importorskip("matplotlib")
    asked = '[prompting]\npositive = ["Say A.", "Be A."]\nnegative = ["Say Z.", "Be Z."]\n'
    Path("trait-caa.toml").write_text(f"{Path('trait-caa.toml').read_text()}{asked}")
    ended = cli(*COMPARE, "--method", "caa")
    assert (ended.code, ended.err) == (0, "")
    assert fits(ended.out), ended.out
    assert "* at its own costs" in ended.out
    found = strict_json(Path("made/trait.json").read_text())
    caa, alone, on_top = found["rows"]  # at no KL the method cannot be set beside it
    assert [row["method"] for row in found["rows"]] == ["caa", "prompting", "caa + prompting"]
    assert [row["own_costs"] for row in found["rows"]] == [False, True, True]
    again = strict_json(cli(*COMPARE, "--method", "prompting", "--keep", "--json").out)
    assert [row["method"] for row in again["rows"]] == ["caa", "caa + prompting", "prompting"]
    kept, *asked_again = [{**row, "overhead": None} for row in again["rows"]]
    assert kept == {**caa, "overhead": None}, "the kept method is fitted again"
    for row, before in zip(asked_again, (on_top, alone), strict=True):
        assert row["effect"]["mean"] == pytest.approx(before["effect"]["mean"], abs=1e-5)
        assert row["kl"]["mean"] == pytest.approx(before["kl"]["mean"], abs=1e-5)
    assert [one["system"] for one in alone["wordings"]] == ["Say A.", "Be A."]
    assert alone["effect"]["mean"] == pytest.approx(0, abs=1e-6)
    assert not alone["works"]
    assert "which may be nothing" in alone["verdict"]
    assert "All 2 wordings: effect" in alone["verdict"]
    assert on_top["effect"]["mean"] == pytest.approx(caa["effect"]["mean"], abs=1e-5)
    assert on_top["kl"]["mean"] == pytest.approx(caa["kl"]["mean"], abs=1e-5)
    assert (on_top["strength"], on_top["sites"]) == (caa["strength"], caa["sites"])
    assert not on_top["works"], "no more than steering alone"
    table = Path("made/trait.md").read_text()
    assert "| `prompting` | best of 2 |" in table
    assert table.count("| no, own costs |") == 2
    page = Path("made/trait.html").read_text()
    assert "1 of 1 methods has an effect" in page
    assert "Say A." in page


def test_one_row_of_a_table_is_on_top_of_asking() -> None:
    """That of the best method, whenever it was measured."""

    def row(method: str, effect: float, *, works: bool = True, **more: Any) -> Row:
        return Row(method, "", "", (), 1.0, works, "", Estimate(effect, effect, effect), **more)

    def names(*rows: Row, before: tuple[Row, ...] = ()) -> list[str]:
        return [one.method for one in together(list(rows), list(before))]

    caa, alone = row("caa", 0.5), row("prompting", 0.9, own_costs=True)
    on_top = row("caa + prompting", 1.0, own_costs=True)
    before = (caa, alone, on_top)
    assert names(row("repe", 0.4), before=before) == ["caa", "repe", "caa + prompting", "prompting"]
    assert names(row("repe", 0.6, works=False), before=before)[2:] == ["caa + prompting", "prompting"]
    assert names(row("repe", 0.6), before=before) == ["caa", "repe", "prompting"]
    beside = row("caa, prompting's KL", 0.2, own_costs=True)
    assert names(*before, beside) == ["caa", "caa + prompting", "caa, prompting's KL", "prompting"]
    assert names(row("repe", 0.6), before=(*before, beside)) == ["caa", "repe", "prompting"]
    other = row("repe + prompting", 1.1, own_costs=True)
    assert names(row("repe", 0.6), other, before=before) == ["caa", "repe", "prompting", "repe + prompting"]
    assert best_method([alone, on_top]) is None
    assert best_method([row("a", 0.2), row("b", 0.9, works=False)]).method == "a"  # type: ignore[union-attr]
    told = replace(alone, wordings=({"system": "Be.", "training_effect": 0.1},))
    assert Row.from_json(json.loads(json.dumps(told.as_json()))) == told


@pytest.mark.usefixtures("compared")
def test_compare_goes_on_when_one_method_fails_and_keeps_the_others_rows(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = strict_json(Path("made/trait.json").read_text())

    def refuse(*_: Any, **__: Any) -> None:
        raise FitError("there is no direction between them")

    monkeypatch.setattr("steerkit.evaluate.calibration.search.calibrate", refuse)
    ended = cli(*COMPARE, "--method", "repe", "--keep", "--json")
    assert ended.code == 0
    found = strict_json(Path("made/trait.json").read_text())
    assert strict_json(ended.out) == found
    assert found["rows"][0] == before["rows"][0], "read and written again, a row is the same"
    assert found["rows"][1]["method"] == "repe"
    assert "no direction between them" in found["rows"][1]["verdict"]
    assert not found["rows"][1]["works"]
    ended = cli(*COMPARE, "--method", "repe", "--keep", "--max-kl", "0.5")
    assert ended.code == 1
    assert "its budget are not those of now" in plain(ended.err)
    assert strict_json(Path("made/trait.json").read_text()) == found


# --- the others, in a few words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--vector", "v.safetensors"),
        ("interference", "--vector", "v.safetensors", "--vector", "w.safetensors", *["--data", "joy.jsonl"] * 2),
        ("export", "v.safetensors", "--to", "gguf", "--scope", "all", "--out", "x.gguf"),
    ],
    ids=lambda words: words[0],
)
def test_what_the_others_print(
    cli: Cli, here: Path, tiny: Path, vector: SteeringVector, words: tuple[str, ...]
) -> None:
    if words[0] == "export":
        pytest.importorskip("gguf")
    generator = torch.Generator().manual_seed(5)
    other = {name: 3 * torch.randn(tensor.shape, generator=generator) for name, tensor in vector.tensors.items()}
    from dataclasses import replace

    replace(vector, tensors=other).save("w.safetensors")
    words = words if words[0] == "export" else (*words, "--model", str(tiny))
    ended = cli(*words)
    assert (ended.code, ended.err) == (0, "")
    assert fits(ended.out), ended.out
    ended = cli(*words, "--json", *(["--force"] if words[0] == "export" else []))
    assert (ended.code, ended.err) == (0, "")
    strict_json(ended.out)


# --- mistakes --------------------------------------------------------------------------------------------------------

EVALUATE = ("evaluate", "--vector", "v.safetensors", "--data", "joy.jsonl")


def broken(vector: SteeringVector) -> None:
    """Files with a mistake in them."""
    from dataclasses import replace

    Path("one-sided.jsonl").write_text(jsonl([*PAIRS[:3], {"prompt": "x", "positive": "y"}]))
    Path("prompts.jsonl").write_text(jsonl([{"positive": "I love it", "negative": "I hate it"}] * 3))
    recipe = Path("joy-caa.toml").read_text()
    for count in (1, 3):
        Path(f"few{count}.jsonl").write_text(jsonl(PAIRS[:count]))
        Path(f"few{count}.toml").write_text(recipe.replace("joy.jsonl", f"few{count}.jsonl"))
    Path("sided.toml").write_text(recipe.replace("joy.jsonl", "one-sided.jsonl"))
    Path("gone.toml").write_text(recipe.replace("joy.jsonl", "gone.jsonl"))
    Path("nomodel.toml").write_text(re.sub(r"name = .*", 'name = "./gone"', recipe))
    narrow = SteeringVector(
        suggested_strength=1.0,
        method="caa", tensors={"resid_post.1/direction": torch.ones(8)}, sites=(Site(1),), edit="add", scope="all",
        unit="paper", model_type="llama", hidden_size=8, num_layers=BLOCKS,
    )  # fmt: skip
    narrow.save("narrow.safetensors")
    replace(vector, norms={}, suggested_strength=None).save("normless.safetensors")


CHEAP = [
    (("evaluate", "--vector", "gone.safetensors"), "gone.safetensors: no such file"),
    (("evaluate", "--vector", "nonsense"), "unknown vector 'nonsense'"),
    (("evaluate", "--vector", "v.safetensors"), "give --data or --prompts"),
    (("evaluate", "--vector", "v.safetensors", "--data", "gone.jsonl"), "gone.jsonl: cannot read the file"),
    (("evaluate", "--vector", "v.safetensors", "--data", "one-sided.jsonl"), "line 4: no 'negative'"),
    (("evaluate", "--vector", "v.safetensors", "--prompts", "gone"), "gone: cannot read the file"),
    ((*EVALUATE, "--scorer", "choic"), "unknown scorer 'choic'; did you mean 'choice'"),
    ((*EVALUATE, "--scope", "reponse"), "unknown scope 'reponse'; did you mean 'response'"),
    ((*EVALUATE, "--scope", "front"), "caa: scope 'front' is not one of its own: all, prompt"),
    ((*EVALUATE, "--unit", "norm"), "give a strength too"),
    (
        ("evaluate", "--vector", "normless.safetensors", "--data", "joy.jsonl", "--unit", "norm", "--strength", 1),
        "use --unit paper",
    ),
    ((*EVALUATE, "--judge", "nonsense", "--behaviour", "joy"), "unknown model 'nonsense'"),
    ((*EVALUATE, "--judge", "http://x/v1", "--behaviour", "joy"), "no model is named"),
    ((*EVALUATE, "--judge", "ftp:/x#y", "--behaviour", "joy"), "ftp:/x#y"),
    (("sweep", "optimsim"), "unknown recipe 'optimsim'; did you mean 'optimism"),
    (("sweep", "gone.toml"), "gone.jsonl: cannot read the file"),
    (("sweep", "sided.toml"), "one-sided.jsonl, line 4: no 'negative'"),
    (("sweep", "few1.toml"), "few1"),
    (("sweep", "joy-caa.toml", "--method", "cca"), "unknown method 'cca'; did you mean 'caa'?"),
    (("sweep", "joy-caa.toml", "--scorer", "choic"), "unknown scorer 'choic'; did you mean 'choice'"),
    (("sweep", "joy-caa.toml", "--out", "plus.txt"), "cannot be written (Not a directory)"),
    (("calibrate", "optimsim"), "unknown recipe 'optimsim'; did you mean 'optimism"),
    (("calibrate", "joy-caa.toml", "--effect", "choic"), "unknown scorer 'choic'; did you mean 'choice'"),
    (("calibrate", "joy-caa.toml", "--method", "cca"), "unknown method 'cca'; did you mean 'caa'?"),
    (("calibrate", "joy-caa.toml", "--out", "."), "is a folder; give the name of a file"),
    (("calibrate", "joy-caa.toml", "--out", "plus.txt/x"), "cannot be written (Not a directory)"),
    (("calibrate", "few1.toml"), "few1"),
    (
        ("calibrate", "few3.toml"),
        "few3: 2 training and 1 held-out items are too few to calibrate caa on; give at least 8",
    ),
    (("compare", "few3.toml", "--method", "caa"), "2 training and 1 held-out items are too few to calibrate caa on"),
    (("compare", "optimsim"), "unknown recipe 'optimsim'; did you mean 'optimism"),
    (("compare", "joy-caa.toml", "--method", "caa", "--method", "cca"), "unknown method 'cca'; did you mean 'caa'?"),
    (("compare", "joy-caa.toml", "--method", "actadd"), "nothing to fit actadd on; choose another --method"),
    (("compare", "joy-caa.toml", "--out", "plus.txt"), "cannot be written (Not a directory)"),
    (("interference", "--vector", "v.safetensors", "--vector", "gone.safetensors"), "gone.safetensors: no such file"),
    (("plan", "--vector", "gone.safetensors"), "gone.safetensors: no such file"),
    (("export", "v.safetensors", "--to", "gguf", "--scope", "front"), "front"),
    (("export", "v.safetensors", "--to", "gguf", "--scope", "all", "--out", "plus.txt/x"), "Not a directory"),
    (("lm-eval", "--tasks", "x", "--vector", "v.safetensors"), "give scope='all'"),
]
DEAR = [
    ((*EVALUATE, "--model", "./gone"), "./gone: no such folder"),
    ((*EVALUATE, "--model", "plus.txt"), "plus.txt: is no model"),
    (("evaluate", "--vector", "narrow.safetensors", "--data", "joy.jsonl"), "cannot steer LlamaForCausalLM (4 layers"),
    (("evaluate", "--vector", "v.safetensors", "--prompts", "plus.txt", "--scorer", "choice"), "give data with both"),
    (("evaluate", "--vector", "v.safetensors", "--data", "prompts.jsonl"), "no two answers to one prompt"),
    ((*EVALUATE, "--strength", "1e39"), "strength"),
    (("sweep", "nomodel.toml"), "./gone: no such folder"),
    (("sweep", "joy-caa.toml", "--layers", "2-9"), "layer 9 is outside the model; layers go from 0 to 3"),
    (("sweep", "joy-caa.toml", "--layers", "two"), "'two' is no layer; layers are counted from 0"),
    (("calibrate", "joy-caa.toml", "--layers", "1+9"), "layer 9 is outside the model; layers go from 0 to 3"),
    (("doctor", "--model", "plus.txt"), "plus.txt: is no model"),
    (("lm-eval", "--tasks", "nonsense", "--include-path", "gone"), "gone: is no folder"),
]


def check_error(cli: Cli, here: Path, vector: SteeringVector, words: tuple[Any, ...], said: str) -> None:
    broken(vector)
    before = sorted(here.rglob("*"))
    ended = cli(*words)
    assert ended.code == 1
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert said in ended.err
    assert sorted(here.rglob("*")) == before


def named(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else ""


@pytest.mark.parametrize(("words", "said"), CHEAP, ids=named)
def test_a_cheap_mistake_is_one_line_before_a_model_is_loaded(
    cli: Cli,
    here: Path,
    vector: SteeringVector,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.setattr(steerkit, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    check_error(cli, here, vector, words, said)


@pytest.mark.parametrize(("words", "said"), DEAR, ids=named)
def test_a_mistake_is_one_line(
    cli: Cli, here: Path, tiny: Path, vector: SteeringVector, words: tuple[str, ...], said: str
) -> None:
    has_own = "--model" in words or words[0] in ("sweep", "calibrate", "compare")
    check_error(cli, here, vector, words if has_own else (*words, "--model", str(tiny)), said)


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate",),
        (*EVALUATE, "--strength", "strong"),
        (*EVALUATE, "--strength", "nan"),
        (*EVALUATE, "--strength", ","),
        (*EVALUATE, "--unit", "metre"),
        (*EVALUATE, "--controls", "-1"),
        (*EVALUATE, "--neutral", "0"),
        (*EVALUATE, "--texts", "0"),
        (*EVALUATE, "--scorer", "markers"),
        ("sweep", "joy-caa.toml", "--scorer", "markers"),
        ("sweep", "joy-caa.toml", "--scorer", "judge"),
        ("calibrate", "joy-caa.toml", "--effect", "markers"),
        (*EVALUATE, "--markers", " "),
        (*EVALUATE, "--scorer", "judge"),
        (*EVALUATE, "--behaviour", "joy"),
        (*EVALUATE, "--judge", "http://localhost/v1#x"),
        ("sweep",),
        ("sweep", "joy-caa.toml", "--strengths", "one"),
        ("sweep", "joy-caa.toml", "--format", "csv"),
        ("sweep", "joy-caa.toml", "--texts", "0"),
        ("sweep", "joy-caa.toml", "--neutral", "0"),
        ("calibrate",),
        ("calibrate", "joy-caa.toml", "--max-kl", "-1"),
        ("calibrate", "joy-caa.toml", "--max-ppl-ratio", "-0.1"),
        ("calibrate", "joy-caa.toml", "--max-repetition", "-0.1"),
        ("calibrate", "joy-caa.toml", "--max-kl", "much"),
        ("calibrate", "joy-caa.toml", "--max-kl", "nan"),
        ("calibrate", "joy-caa.toml", "--max-kl", "inf"),
        ("calibrate", "joy-caa.toml", "--strengths", "1,inf"),
        ("calibrate", "joy-caa.toml", "--strengths=-1,1"),
        ("calibrate", "joy-caa.toml", "--trials", "0"),
        ("calibrate", "joy-caa.toml", "--controls", "0"),
        ("calibrate", "joy-caa.toml", "--neutral", "1"),
        ("compare", "joy-caa.toml", "--max-kl", "-1"),
        ("compare", "joy-caa.toml", "--seed", "-1"),
        ("interference", "--vector", "v.safetensors"),
        ("plan",),
        ("plan", "--vector", "v.safetensors", "--strength", "1", "--strength", "2"),
        ("export", "v.safetensors"),
        ("export", "v.safetensors", "--to", "onnx"),
        ("doctor", "more"),
        ("lm-eval",),
        ("lm-eval", "--tasks", "x", "--baseline"),
    ],
    ids=" ".join,
)
def test_wrong_usage(cli: Cli, here: Path, words: tuple[str, ...]) -> None:
    before = sorted(here.rglob("*"))
    ended = cli(*words)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage: steerkit" in plain(ended.err)
    assert sorted(here.rglob("*")) == before


# What a reader sees.


def test_evidence_says_its_time_and_leaves(here: Path, tiny: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from steerkit.evidence import measuring, questions

    short = [questions.Question("How?"), questions.Question("Why?")]
    monkeypatch.setattr(measuring, "asked_of", lambda *_: short)
    ended = cli("evidence", "--model", tiny, "--only", "optimism-caa", "--estimate", "--out", "seen")
    assert ended.code == 0, ended.err
    assert re.search(r"1 vectors?, 3 parts to measure: at most about \d+ minutes? here", ended.err)
    assert not Path("seen/evidence").exists()


def test_evidence_refuses_a_vector_that_is_none(here: Path, cli: Cli) -> None:
    ended = cli("evidence", "--only", "optimism-ca", "--out", "seen")
    assert ended.code == 1
    assert "did you mean 'optimism-caa'" in ended.err
