"""The dictionary that ships: small, whole, of the embedded model, and worth what its card says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks import dictionary as benchmark
from steerkit._support.shipped import dictionaries, dictionary_path
from steerkit.dictionary import load_dictionary
from steerkit.dictionary.fitness import check_dictionary
from tests.program import ROOT

NAME = "smollm2-135m/resid_post.14"


def test_it_is_found_by_its_name_and_small() -> None:
    assert list(dictionaries()) == [NAME]
    path = dictionary_path(NAME)
    assert path.stat().st_size < 4e6
    found = load_dictionary(NAME)
    assert found.digest == load_dictionary(path).digest
    assert (str(found.site), found.num_latents, found.width) == ("resid_post.14", 1536, 576)
    assert not found.needs_all
    assert found.provenance["trained"]["dead"] == 0
    assert dictionary_path("mine/own.safetensors").as_posix() == "mine/own.safetensors"  # a path stays one


def test_its_card_is_what_its_figures_say() -> None:
    path = ROOT / benchmark.FILE
    assert path.with_suffix(".md").read_text("utf-8") == benchmark.card(load_dictionary(path))


@pytest.mark.slow
@pytest.mark.embedded
def test_it_explains_what_its_card_says(embedded: tuple[Any, Any]) -> None:
    card = (ROOT / benchmark.FILE).with_suffix(".md").read_text("utf-8")
    tokens, left, fire = re.findall(r"neutral texts \| (\d+) \| ([\d.]+) \| ([\d.]+)", card)[0]
    found = check_dictionary(*embedded, load_dictionary(dictionary_path(NAME)))
    assert found.tokens == int(tokens)
    assert found.fvu == pytest.approx(float(left), abs=2e-3)
    assert found.l0 == pytest.approx(float(fire), abs=0.2)
