"""Vectors fitted on vLLM are those that steerkit fits on transformers, in chunks, batches and whatever lies cached."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.engines.vllm import fit
from steerkit.errors import DataError, FitError, SiteError
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests.engines.vllm.engine import Pair
from tests.engines.vllm.models import FAMILIES, loaded, saved
from tests.tiny_tokenizers import CHATML, byte_tokenizer

# Chunks of 16 tokens at most, one of which is left of some texts; blocks of 32 are shared by texts that begin alike.
OPTIONS = {"max_num_batched_tokens": 16, "enable_prefix_caching": True}
BEGUN = "The letter came on a grey morning in the second week of March and"
DATA = ContrastSet.from_answers(
    [
        (f"{BEGUN} she read it.", "How lovely, at last!", "How dreadful, at last."),
        (f"{BEGUN} it lay there.", "A joy to open.", "A grief to open."),
        (f"{BEGUN} nobody knew.", "Good news!", "Bad news."),
        (f"{BEGUN} we waited for the rest.", "It was worth it.", "It was for nothing."),
        (f"{BEGUN} he laughed.", "Splendid", "Wretched"),
    ]
)
HELD_OUT = ContrastSet.from_answers(
    [("Was it a good day?", "It was wonderful.", "It was terrible."), ("And the food?", "Delicious!", "Disgusting.")]
)
ONE_PAIR = ContrastSet.from_prompts(["Love"], ["Hate"], raw=True)
READOUTS = ("last", "mean", "response_mean", "predicting_mean", -3, "span(0,4)", "answer_mean")
METHODS = ("caa", "repe", "persona", "refusal", "ablation", "set_projection", "selective", "angular")
SEVERAL = ["resid_post.1", "resid_post.2", "resid_post.3"]


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, place: Path) -> Iterator[Pair]:
    made = Pair.of(request.param, place, **OPTIONS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def alike(one: SteeringVector, other: SteeringVector) -> None:
    """Hold a vector to another one: tensors and scales to 1e-4, all else exactly."""
    assert set(one.tensors) == set(other.tensors)
    for name, wanted in other.tensors.items():
        torch.testing.assert_close(one.tensors[name], wanted, rtol=1e-4, atol=1e-4)
    for of_one, of_other in ((one.norms, other.norms), (one.spreads, other.spreads)):
        assert set(of_one) == set(of_other)
        # A norm may fall into the histogram's next bin, 0.4 % away.
        assert all(math.isclose(of_one[site], of_other[site], rel_tol=5e-3) for site in of_other)
    same = (
        "method",
        "sites",
        "fitted_at",
        "edit",
        "scope",
        "readout",
        "settings",
        "model_type",
        "model_id",
        "num_layers",
    )
    same += ("data_digest", "tokenizer_sha256", "chat_template_sha256", "answer_separator", "massive", "extra")
    for name in same:
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("kind", ["resid_post", "attn_out", "mlp_out"])
def test_every_readout(engine: Pair, tokenizer: Any, kind: str) -> None:
    sites = [f"{kind}.1", f"{kind}.3"]
    for readout in READOUTS if kind == "resid_post" else ("last", "response_mean"):
        how: dict[str, Any] = {"sites": sites, "readout": readout, "method": "caa"}
        alike(fit(engine.llm, DATA, tokenizer=tokenizer, **how), steerkit.fit(engine.model, tokenizer, DATA, **how))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_is_fitted_on_activations(engine: Pair, tokenizer: Any, method: str) -> None:
    how: dict[str, Any] = {"sites": SEVERAL[: 1 if method == "ablation" else 3], "method": method}
    how |= {"settings": {"source": "responses", "apply": "add"}} if method == "refusal" else {"held_out": HELD_OUT}
    one = fit(engine.llm, DATA, tokenizer=tokenizer, batch_size=4, **how)
    other = steerkit.fit(engine.model, tokenizer, DATA, **how)
    alike(one, other)
    assert one.held_out == other.held_out


def test_massive_tokens_leave_a_mean(engine: Pair, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import steerkit.activations.token_scale as scale

    monkeypatch.setattr(scale, "MASSIVE_TOKEN", 1.15)  # some tokens of these models, and not all
    how: dict[str, Any] = {"layers": [1, 2], "readout": "mean,no_massive_tokens"}
    one, other = fit(engine.llm, DATA, tokenizer=tokenizer, **how), steerkit.fit(engine.model, tokenizer, DATA, **how)
    assert min(other.extra["massive_tokens_left_out"].values()) > 0
    alike(one, other)


def test_the_same_beside_other_requests_and_cached_blocks(engine: Pair, tokenizer: Any) -> None:
    how: dict[str, Any] = {"layers": [1, 2], "readout": "mean"}
    first = fit(engine.llm, DATA, tokenizer=tokenizer, **how)
    again = fit(engine.llm, DATA, tokenizer=tokenizer, batch_size=1, **how)
    alike(again, first)
    texts = [list(text) for text in ((5, 17, 44, 9, 101, 63), (9, 8, 7) * 20)]
    engine.check([(text, "add-post*1") for text in texts], engine.answers([(text, "add-post*1") for text in texts]))


def test_what_is_fitted_steers_the_engine_that_fitted_it(engine: Pair, tokenizer: Any) -> None:
    engine.add("fitted", fit(engine.llm, DATA, layers=[2], readout="response_mean", tokenizer=tokenizer))
    asked = [([5, 17, 44, 9, 101, 63], "fitted@all*4"), ([9, 8, 7], None)]
    answers = engine.answers(asked)
    engine.check(asked, answers)
    assert answers[0] != engine.answers([(asked[0][0], None)])[0]


@pytest.mark.parametrize("method", ["controller", "conditional", "actadd", "refusal"])
def test_methods_that_ask_more_are_refused_by_name(engine: Pair, tokenizer: Any, method: str) -> None:
    data = ONE_PAIR if method == "actadd" else DATA
    settings = {"source": "unembedding"} if method == "refusal" else {}
    with pytest.raises(FitError, match=f"^{method}: asks more of the model"):
        fit(engine.llm, data, method=method, tokenizer=tokenizer, settings=settings)


def test_places_and_texts_that_the_engine_does_not_have(engine: Pair, tokenizer: Any) -> None:
    with pytest.raises(SiteError, match="kinds"):
        fit(engine.llm, DATA, sites=["resid_pre.1"], tokenizer=tokenizer)
    with pytest.raises(SiteError, match="outside the model"):
        fit(engine.llm, DATA, layers=[9], tokenizer=tokenizer)
    with pytest.raises(DataError, match="fewer than 512"):
        fit(engine.llm, ContrastSet.from_prompts(["ab " * 400], ["cd"]), layers=[1], tokenizer=tokenizer)


def test_an_engine_in_a_process_of_its_own(place: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = loaded(saved("llama", place))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    program = f"""
from transformers import AutoTokenizer
from vllm import LLM
from steerkit.engines.vllm import fit
from tests.engines.vllm.test_fitting import DATA

if __name__ == "__main__":
    options = {{"dtype": "float32", "max_model_len": 512, "enforce_eager": True}}
    llm = LLM({str(place / "llama")!r}, tokenizer={str(tmp_path / "tokenizer")!r}, **options)
    fit(llm, DATA, layers=[1, 2], readout="mean").save("made.safetensors")
"""
    (tmp_path / "program.py").write_text(program)
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(Path.cwd())}
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=env, check=True, capture_output=True)
    alike(
        SteeringVector.load(tmp_path / "made.safetensors"),
        steerkit.fit(model, tokenizer, DATA, layers=[1, 2], readout="mean"),
    )
