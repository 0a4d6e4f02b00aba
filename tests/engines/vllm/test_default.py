"""Steering that a server has for all requests which name none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerkit.engines.vllm.plan import Served
from steerkit.engines.vllm.requests import Admission
from steerkit.engines.vllm.settings import Settings
from tests.engines.vllm import models
from tests.engines.vllm.asked import prompt

DEFAULT = "add-post@response*1"
ENGINE = {"steerkit": {"default": DEFAULT}}


@pytest.fixture(scope="module")
def place(place: Path) -> Path:
    """With the vectors that the engine needs as it starts."""
    folder = place / "llama-vectors"
    folder.mkdir(exist_ok=True)
    for name, vector in models.vectors(models.loaded(models.saved("llama", place))).items():
        vector.save(folder / f"{name}.safetensors")
    return place


def test_who_names_none_gets_it(pair: Any) -> None:
    one, other = prompt(3, 9), prompt(4, 17)
    asked = [(one, None), (other, ""), (one, "off-post*1"), (other, None)]
    answers = pair.answers(asked)
    pair.check([(one, DEFAULT), (other, None), (one, "off-post*1"), (other, DEFAULT)], answers)


def test_no_beam_search_where_it_would_be_steered_otherwise(pair: Any) -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(VLLMValidationError, match="counts from the prompt's end"):
        pair.llm.beam_search([{"prompt_token_ids": prompt(3, 9)}], BeamSearchParams(beam_width=2, max_tokens=4))


@pytest.mark.parametrize(
    ("default", "refused"), [(None, False), ("add-post@all*1", False), (DEFAULT, True), ("add-post@all*0", False)]
)
def test_which_defaults_go_with_beams(pair: Any, default: str | None, refused: bool) -> None:
    served = Served(models.WIDTH, models.BLOCKS, ("resid_post",), 2, 8)
    admission = Admission(Settings(folder=str(pair.vectors), default=default), served)
    assert (admission.no_beams() is not None) == refused
