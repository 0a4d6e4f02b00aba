"""`steerkit latents`, `steerkit dictionary check`, and the output score of `steerkit inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests.dictionary.made import made
from tests.program import WIDTH, Cli, plain

pytestmark = pytest.mark.filterwarnings("ignore:format alone predicts")


@pytest.fixture
def dictionary(here: Path) -> str:
    one = made("relu", site=Site(1), width=32, encoder_bias=torch.zeros(40))
    return str(one.save(here / "d.safetensors"))


def test_latents_are_ranked_and_made_a_vector(
    cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path, dictionary: str
) -> None:
    words = ("latents", "--data", "joy.jsonl", "--dictionary", dictionary, "--model", tiny)
    found = answer(*words, "--top", 5, "--readout", "response_mean", "--correction", "holm")
    assert len(found["latents"]) == 5
    assert found["file"] is None
    shown = cli(*words, "--top", 5, "--choose", "3,17", "--op", "clamp", "--out", "c.safetensors").out
    told, _, usage = shown.partition("wrote ")
    assert max(map(len, told.split("\n"))) <= WIDTH
    assert "--vector c.safetensors --strength 1" in usage
    assert "wrote c.safetensors" in plain(shown)
    vector = SteeringVector.load("c.safetensors")
    assert (vector.edit, vector.params(Site(1))["latents"].tolist()) == ("latent_clamp", [3, 17])
    saif = answer(*words, "--by", "saif", "--beta", "0.5", "--choose", "4", "--out", "s.safetensors")
    assert saif["ranking"] == "saif"
    told = answer("inspect", "c.safetensors", "--output-score", "--model", tiny)
    assert 0 <= told["sites"][0]["output_score"]["score"] <= 1
    assert [row["latent"] for row in told["parts"]["rows"]] == [3, 17]
    assert "output score" in plain(cli("inspect", "c.safetensors", "--output-score", "--model", tiny).out)
    for wrong in (("--choose", "a,b"), ("--top", 0)):
        assert cli(*words, *wrong).code == 2, wrong
    assert cli("latents", "--data", "joy.jsonl", "--dictionary", "nowhere", "--model", tiny).code == 1
    assert cli("latents", "--dictionary", dictionary, "--model", tiny).code == 2


def test_the_choices_are_those_of_the_method() -> None:
    from steerkit.cli import latents as command
    from steerkit.dictionary.selecting import Correction
    from steerkit.evaluate.latents import Ranking
    from steerkit.methods.latent import Latent

    op = get_type_hints(Latent)["op"]
    for offered, taken in ((command.By, Ranking), (command.Op, op), (command.Correction, Correction)):
        assert tuple(offered) == get_args(taken)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dictionary", "check", "resid_post.14"), "or a shipped name: smollm2-135m/resid_post.14"),
        (("dictionary", "check", "v.safetensors"), "give a dictionary"),
        (("dictionary", "train", "--out", "t.safetensors", "--work", "joy.jsonl"), "--work: joy.jsonl is a file"),
        (("vllm-verify", "--options", "banana"), "--options: 'banana'; give a JSON object"),
        (("export", "--vector", "v.safetensors", "--to", "hub", "--repo", "banana"), "--repo: banana; give USER/NAME"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_mistakes(cli: Cli, words: tuple[object, ...], said: str) -> None:
    ended = cli(*words, "--model", "./none") if words[0] != "export" else cli(*words)
    assert (ended.code > 0, ended.out) == (True, "")
    assert said in " ".join(plain(ended.err).replace("│", " ").split())
    assert not Path("t.safetensors").exists()


def test_a_dictionary_is_checked(cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path, dictionary: str) -> None:
    left = cli("dictionary", "check", dictionary, "--model", tiny)
    assert left.code == 1  # a random one explains nothing
    assert "variance unexplained" in plain(left.out)
    eye = torch.eye(32)
    whole = {"encoder": torch.cat([eye, -eye]), "decoder": torch.cat([eye, -eye])}
    zeros = {"encoder_bias": torch.zeros(64), "decoder_bias": torch.zeros(32)}
    made("relu", site=Site(1), width=32, latents=64, **whole, **zeros).save("eye.safetensors")
    found = answer("dictionary", "check", "eye.safetensors", "--model", tiny)
    assert found["fvu"] < 1e-6
    assert found["l0"] == pytest.approx(32, abs=1)
    made("relu", width=16).save("narrow.safetensors")
    assert cli("dictionary", "check", "narrow.safetensors", "--model", tiny).code == 1
