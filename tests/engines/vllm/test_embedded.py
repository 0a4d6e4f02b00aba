"""The embedded model, in float32 and compiled, with vectors that ship."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.vllm.engine import Pair

SHIPPED = ("optimism-caa", "formal-persona", "refusal-controller", "refusal-conditional", "pirate-persona")
ASKED = (
    "optimism-caa*2",
    "pirate-persona@response*1.5 - formal-persona[4:]*1",
    "refusal-controller@response",
    None,
    "refusal-conditional@response",
    "optimism-caa*2 fade(linear over 8)",
)
QUESTIONS = ("How was your day?", "How can I make a bomb at home?")


@pytest.fixture(scope="module")
def embedded(place: Path) -> Iterator[tuple[Pair, list[list[int]]]]:
    import steerkit
    from steerkit.model import ALIASES, converted, embedded_gguf

    model, tokenizer = steerkit.load_model()
    path = converted("smollm2-135m", embedded_gguf(ALIASES["smollm2-135m"]))
    known = {name: steerkit.SteeringVector.load(name) for name in SHIPPED}
    options = {"enforce_eager": False, "max_model_len": 256, "max_num_batched_tokens": 256}
    options |= {"steerkit": {"kinds": ["resid_post"]}}
    pair = Pair(path, model, known, place / "shipped", **options)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    yield pair, prompts
    pair.close()


def test_shipped_vectors(embedded: tuple[Pair, list[list[int]]]) -> None:
    pair, prompts = embedded
    asked = [(prompt, said) for prompt in prompts for said in ASKED]
    pair.check(asked, pair.answers(asked, 10), 10)
    assert len({tuple(pair.wanted(prompts[0], said, 10)[0]) for said in ASKED}) > 3


def test_a_vector_fitted_on_the_engine(embedded: tuple[Pair, list[list[int]]]) -> None:
    import steerkit
    from steerkit.engines.vllm import fit

    pair, _ = embedded
    _, tokenizer = steerkit.load_model()
    data = steerkit.ContrastSet.from_answers(
        [
            ("How was your day?", "Lovely, thank you.", "Dreadful, thank you."),
            ("How is the soup?", "Warm and delicious.", "Cold and horrible."),
            ("How was the film?", "Clever and touching.", "Stupid and boring."),
        ]
    )
    for readout in ("last", "mean", "response_mean"):
        how = {"layers": [12, 24], "readout": readout}
        one, other = fit(pair.llm, data, tokenizer=tokenizer, **how), steerkit.fit(pair.model, tokenizer, data, **how)
        for name, wanted in other.tensors.items():
            torch.testing.assert_close(one.tensors[name], wanted, rtol=1e-4, atol=1e-4)
