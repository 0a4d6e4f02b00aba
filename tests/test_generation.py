"""`steerkit.generate`: prompts to texts, in order, seeded, steered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import DataError, StrengthError
from steerkit.generation import told
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from tests import modes
from tests.families import FAMILIES, FURTHER, build
from tests.modes import vector_for
from tests.tiny_tokenizers import CHATML, byte_tokenizer

PROMPTS = ["Hi", "Tell me about the long and winding road to the sea.", "Why?"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def test_order_and_batches_do_not_matter(model: Any, tokenizer: Any) -> None:
    vector = modes.vector_for(model, scope="response")
    alone = [
        steerkit.generate(model, tokenizer, [prompt], vector=vector, strength=0.8, max_new_tokens=6)[0]
        for prompt in PROMPTS
    ]
    for batch_size in (1, 2, 8):
        together = steerkit.generate(
            model, tokenizer, PROMPTS, vector=vector, strength=0.8, max_new_tokens=6, batch_size=batch_size
        )
        assert together == alone
    assert alone != steerkit.generate(model, tokenizer, PROMPTS, max_new_tokens=6)


def test_one_strength_per_prompt_follows_its_prompt(model: Any, tokenizer: Any) -> None:
    vector = modes.vector_for(model, scope="response")
    strengths = [0.0, 1.0, -1.0]
    expected = [
        steerkit.generate(model, tokenizer, [prompt], vector=vector, strength=strength, max_new_tokens=6)[0]
        for prompt, strength in zip(PROMPTS, strengths, strict=True)
    ]
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 2}
    assert steerkit.generate(model, tokenizer, PROMPTS, vector=vector, strength=strengths, **options) == expected
    with pytest.raises(StrengthError, match="2 numbers for 3 prompts"):
        steerkit.generate(model, tokenizer, PROMPTS, vector=vector, strength=[1.0, 2.0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": [1, 2, 3], "do_sample": True, "temperature": 1.7},
        {"seed": 5, "do_sample": True, "top_k": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.9},
        {"shares": True},
    ],
    ids=["greedy", "a-seed-each", "several", "penalty", "shares"],
)
def test_told_with_each_answer_is_how_likely_a_pass_over_it_finds_its_tokens(
    family: str, options: dict[str, Any], tokenizer: Any
) -> None:
    """Whatever changes the logits before a token is taken; up to the first token that ends an answer."""
    model = build(family)
    vector = vector_for(model, scope="response")
    steered: dict[str, Any] = {"vector": vector, "strength": 0.7, "max_new_tokens": 6}
    asks: dict[str, Any] = {"batch_size": 2, **steered, **options}
    end = told(model, tokenizer, PROMPTS, **asks)[0].ids[2]
    found = told(model, tokenizer, PROMPTS, eos_token_id=end, **asks)
    assert end in found[0].ids[:3], "one ends before others"
    asked = [prompt for prompt in PROMPTS for _ in range(options.get("num_return_sequences", 1))]
    for prompt, answer in zip(asked, found, strict=True):
        assert answer.log_probs is not None
        before = list(render(tokenizer, Conversation(prompt)).ids)
        with torch.no_grad(), steerkit.steer(model, vector, 0.7, scope="response", prompt_lengths=[len(before)]):
            logs = model(torch.tensor([before + answer.ids])).logits[0].log_softmax(-1)
        for place, token in enumerate(answer.ids):
            expected = float(logs[len(before) + place - 1, token])
            assert float(answer.log_probs[place]) == pytest.approx(expected, abs=1e-5)
            if token == end:
                break


def test_of_beams_nothing_is_told_but_their_texts(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 3}
    found = told(model, tokenizer, PROMPTS, **options)
    assert [one.log_probs for one in found] == [None] * 9
    assert [one.text for one in found] == steerkit.generate(model, tokenizer, PROMPTS, **options)


def test_sampling_is_seeded_and_leaves_the_random_state(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 2}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = steerkit.generate(model, tokenizer, PROMPTS, seed=1, **options)
    assert torch.equal(torch.rand(1), expected)
    assert one == steerkit.generate(model, tokenizer, PROMPTS, seed=1, **options)
    assert one != steerkit.generate(model, tokenizer, PROMPTS, seed=2, **options)
    assert len(one) == 2 * len(PROMPTS)


def test_chats_raw_text_and_bad_prompts(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    texts = steerkit.generate(model, tokenizer, [chat, "Hi"], max_new_tokens=4)
    assert len(texts) == 2
    assert texts[1] == steerkit.generate(model, tokenizer, ["Hi"], max_new_tokens=4)[0]
    raw = steerkit.generate(model, tokenizer, ["Hi"], max_new_tokens=4, raw=True)
    assert raw != [texts[1]]
    with pytest.raises(DataError, match="give a list of prompts"):
        steerkit.generate(model, tokenizer, "Hi")
    with pytest.raises(DataError, match="no prompts"):
        steerkit.generate(model, tokenizer, [])


def test_the_tokenizer_and_model_are_left_alone(model: Any, tokenizer: Any) -> None:
    before = (tokenizer.padding_side, tokenizer.pad_token, dict(vars(model.generation_config)))
    steerkit.generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert (tokenizer.padding_side, tokenizer.pad_token, dict(vars(model.generation_config))) == before


@pytest.mark.embedded
def test_the_embedded_model_is_steered_both_ways(embedded: tuple[Any, Any]) -> None:
    from steerkit._support.shipped import vector_path

    model, tokenizer = embedded
    vector = steerkit.SteeringVector.load(vector_path("optimism-caa"))
    question = ["How do you see the future of reading books?"]
    texts = {
        strength: steerkit.generate(model, tokenizer, question, vector=vector, strength=strength, max_new_tokens=24)[0]
        for strength in (-1.5, 0.0, 1.5)
    }
    assert len(set(texts.values())) == 3
    assert texts[0.0] == steerkit.generate(model, tokenizer, question, max_new_tokens=24)[0]


def test_a_seed_per_prompt_does_not_depend_on_batches(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8}
    prompts, seeds = [*PROMPTS, *PROMPTS], [1, 2, 3, 4, 5, 6]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    alone = [
        steerkit.generate(model, tokenizer, [prompt], seed=[seed], **options)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert torch.equal(torch.rand(1), expected)
    for batch_size in (2, 4, 8):
        assert steerkit.generate(model, tokenizer, prompts, seed=seeds, batch_size=batch_size, **options) == alone
    assert all(alone[place] != alone[place + 3] for place in range(3)), "another seed, another text"
    assert steerkit.generate(model, tokenizer, prompts, seed=seeds, max_new_tokens=8) == alone
    cold = steerkit.generate(model, tokenizer, prompts, seed=seeds, max_new_tokens=8, temperature=1e-4)
    assert cold == steerkit.generate(model, tokenizer, prompts, max_new_tokens=8)


def test_a_seed_per_prompt_draws_tokens_with_their_probability(model: Any, tokenizer: Any) -> None:
    from steerkit.generation import _RowNoise

    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf])
    draws = 20000
    noise = _RowNoise([7], temperature=2.0)
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[noise(torch.zeros(1, 1), logits[None]).argmax()] += 1
    shares = torch.softmax(logits / 2, dim=-1)
    spread = (shares * (1 - shares) / draws).sqrt()
    assert counts[3] == 0
    assert bool(((counts / draws - shares).abs() <= 4 * spread + 1e-9).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": [1, 2]}, "2 numbers for 3 prompts"),
        ({"do_sample": False}, "do_sample=False does not"),
        ({"top_p": 0.9}, "top_p cannot be given beside it"),
        ({"num_beams": 2}, "num_beams cannot"),
        ({"num_return_sequences": 2}, "num_return_sequences cannot"),
        ({"temperature": 0}, "a number above 0, got 0"),
    ],
)
def test_what_a_seed_per_prompt_cannot_do(model: Any, tokenizer: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        steerkit.generate(model, tokenizer, PROMPTS, **{"seed": [1, 2, 3], **options})


BEGUN = "You are kind and patient with all. "


@pytest.mark.parametrize("begun", [(BEGUN,) * 4, (BEGUN, "You are a gruff old sailor. ", BEGUN, BEGUN)])
@pytest.mark.parametrize("name", [*FAMILIES, *FURTHER])
def test_what_prompts_share_is_read_once(name: str, begun: tuple[str, ...]) -> None:
    tiny = build(name).eval()
    if find_decoder(tiny).model_type == "rwkv":
        return  # several rows with a state are refused
    questions = ("Hi", "And you?", "Hi", "Well, how was it?")
    prompts = [f"{system}{asked}" for system, asked in zip(begun, questions, strict=True)]
    steering = {"vector": vector_for(tiny, scope="response", site=Site(1)), "strength": [1.0, 2.0, -1.0, 0.0]}
    seen: list[int] = []
    handle = tiny.register_forward_pre_hook(
        lambda _module, _args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    options: dict[str, Any] = {"max_new_tokens": 3, "raw": True, **steering}
    whole = steerkit.generate(tiny, byte_tokenizer(), prompts, **options)
    columns, seen[:] = sum(seen), []
    assert steerkit.generate(tiny, byte_tokenizer(), prompts, shares=True, **options) == whole
    handle.remove()
    if name == "llama":
        assert sum(seen) < 0.7 * columns


@pytest.mark.parametrize("options", [{"num_return_sequences": 2, "do_sample": True, "seed": 1}, {"num_beams": 2}])
def test_several_answers_to_a_prompt_share_nothing(model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    prompts = [f"{BEGUN}{asked}" for asked in ("Hi", "And you?", "Hi")]
    one, other = (
        steerkit.generate(model, tokenizer, prompts, max_new_tokens=3, shares=shares, **options)
        for shares in (True, False)
    )
    assert one == other
