"""`steerkit discover`: the pack it writes, what it shows of each direction, and every mistake one can make."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.evaluate import discoveries
from steerkit.evaluate.discoveries import nearest
from steerkit.evaluate.scoring import measure
from steerkit.methods.melbo import MELBO
from steerkit.vector.pack import check_pack, save_pack
from steerkit.vector.steering_vector import SteeringVector
from tests.families import HIDDEN
from tests.program import WIDTH, Cli, last_line, strict_json

SMALL = ("--count", 2, "--steps", 3, "--controls", 1, "--neutral", 2, "--norm", 2.0, "--max-new-tokens", 3)
ON = ("--prompts", "plus.txt", "--model")


def test_a_pack_and_what_each_direction_does(answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    found = answer("discover", *ON, tiny, "--out", "pack", "--known", "v.safetensors", *SMALL)
    assert (found["source"], found["target"], found["prompts"]) == ("resid_post.1", "resid_post.2", 2)
    assert found["norm"] == pytest.approx(2.0, rel=1e-5)
    names = [f"pack/melbo-{place}.safetensors" for place in (1, 2)]
    assert [row["file"] for row in found["vectors"]] == names
    assert {path.name for path in Path("pack").iterdir()} == {
        "melbo-1.safetensors",
        "melbo-2.safetensors",
        "steerkit.json",
        "discovered.json",
    }
    assert strict_json(Path("pack/discovered.json").read_text()) == found
    assert list(json.loads(Path("pack/steerkit.json").read_text())["vectors"]) == ["melbo-1", "melbo-2"]

    model, tokenizer = steerkit.load_model(str(tiny), device="cpu")
    method = MELBO(count=2, steps=3, norm=2.0)
    expected = steerkit.discover(model, tokenizer, ["I love this", "I love that"], method=method)
    known = SteeringVector.load("v.safetensors")
    prompts = [steerkit.Conversation("How was your day?")]
    setup = steerkit.Setup(model, tokenizer, prompts=prompts, max_new_tokens=3).first_neutral(2)
    for row, vector in zip(found["vectors"], expected, strict=True):
        loaded = SteeringVector.load(row["file"])
        assert loaded == vector
        kl = measure(setup.trial(vector, 1.0), ["divergence"])["kl"].effect
        assert [row["kl"][end] for end in ("mean", "low", "high")] == pytest.approx(list(kl), rel=1e-4)
        own, other = (one.params(loaded.sites[0])["direction"].double() for one in (loaded, known))
        cosine = float(own @ other / own.norm() / other.norm())
        assert row["nearest"]["vector"] == "v.safetensors"
        assert row["nearest"]["cosine"] == pytest.approx(cosine, abs=1e-5)
        (text,) = steerkit.generate(
            model, tokenizer, ["How was your day?"], vector=vector, strength=1.0, max_new_tokens=3
        )
        assert row["text"] == text
    (random,) = found["random"]
    assert random["name"] == "random-1"
    assert random["change"] < found["vectors"][0]["change"]


def test_the_table_fits_and_says_what_to_do_next(cli: Cli, here: Path) -> None:
    ended = cli("discover", "--recipe", "joy-caa.toml", "--source-block", 0, "--last", 2, "--out", "pack", *SMALL)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= WIDTH or max(map(len, lines[:-1])) <= WIDTH  # the command to copy is one line
    assert lines[0].startswith("wrote pack: length 2 at resid_post.0, to change resid_post.2")
    for name in ("melbo-1", "melbo-2", "random-1", "unsteered"):
        assert name in ended.out
    assert "pack/melbo-1.safetensors" in lines[-1]
    assert json.loads(Path("pack/discovered.json").read_text())["prompts"] == 4
    assert SteeringVector.load("pack/melbo-1.safetensors").settings["last"] == 2


def test_known_vectors_are_told_apart_by_site_and_sign() -> None:
    along = torch.zeros(HIDDEN).index_fill(0, torch.tensor(0), 1.0)
    across = torch.zeros(HIDDEN).index_fill(0, torch.tensor([0, 1]), 1.0)

    def at(layer: int, direction: torch.Tensor) -> SteeringVector:
        name = f"resid_post.{layer}"
        facts = {"model_type": "llama", "hidden_size": HIDDEN, "num_layers": 4, "scope": "all", "unit": "paper"}
        site = steerkit.Site(layer)
        return SteeringVector("caa", {f"{name}/direction": direction}, (site,), "add", **facts)  # type: ignore[arg-type]

    known = {"same": at(1, across), "opposite": at(1, -along), "elsewhere": at(2, along)}
    found = nearest(at(1, along), known)
    assert [(one.vector, round(one.cosine, 4)) for one in found] == [("opposite", -1.0), ("same", 0.7071)]


def test_an_interruption_keeps_the_vectors(cli: Cli, here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(discoveries, "looked_at", interrupted)
    ended = cli("discover", *ON, tiny, "--out", "pack", *SMALL)
    assert (ended.code, ended.out, last_line(ended.err)) == (130, "", "interrupted")
    assert SteeringVector.load("pack/melbo-2.safetensors").method == "melbo"
    assert Path("pack/steerkit.json").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "give one of: --prompts, --recipe"),
        (("--prompts", "plus.txt", "--recipe", "joy-caa.toml"), 2, "give one of: --prompts, --recipe"),
        (("--recipe", "joy-caa.toml", "--columns", "prompt=x"), 2, "--columns says how a file is read"),
        (("--prompts", "plus.txt", "--norm", 0), 2, "a length is above 0"),
        (("--prompts", "plus.txt", "--norm", "0"), 2, "a length is above 0"),
        (("--prompts", "plus.txt", "--count", 0), 2, "--count"),
        (("--prompts", "none.txt"), 1, "none.txt"),
        (("--recipe", "joi-caa"), 1, "unknown recipe 'joi-caa'"),
        (("--prompts", "plus.txt", "--known", "none"), 1, "unknown vector 'none'"),
        (("--prompts", "plus.txt", "--out", "v.safetensors"), 1, "v.safetensors: is a file"),
        (("--prompts", "plus.txt", "--out", "."), 1, "holds files already"),
        (("--prompts", "plus.txt", "--source-block", 9), 1, "9"),
        (("--prompts", "plus.txt", "--target-block", 1), 1, "target = 1 with the source resid_post.1"),
        (("--prompts", "plus.txt", "--count", HIDDEN + 1), 1, f"holds at most {HIDDEN} directions"),
    ],
)
def test_mistakes(cli: Cli, here: Path, tiny: Path, words: tuple[object, ...], code: int, message: str) -> None:
    before = sorted(path.name for path in here.iterdir())
    out = () if "--out" in words else ("--out", "pack")
    model = () if "--recipe" in words else ("--model", tiny)
    ended = cli("discover", *words, *out, *model)
    assert (ended.code, ended.out) == (code, "")
    assert message in ended.err
    assert code == 2 or ended.err.count("\n") == 1
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_method_that_finds_one_vector_is_refused(tiny: Path) -> None:
    model, tokenizer = steerkit.load_model(str(tiny), device="cpu")
    with pytest.raises(steerkit.FitError, match="caa finds one vector; use `fit`"):
        steerkit.discover(model, tokenizer, ["Why?"], method="caa")


def test_a_pack_is_written_beside_nothing(vector: SteeringVector, tmp_path: Path) -> None:
    files = save_pack({"one": vector, "two": vector}, tmp_path / "pack")
    assert [SteeringVector.load(file) for file in files] == [vector, vector]
    with pytest.raises(steerkit.VectorFileError, match="holds files already"):
        check_pack(tmp_path / "pack")
    (tmp_path / "empty").mkdir()
    check_pack(tmp_path / "empty")
    assert not any((tmp_path / "empty").iterdir())
