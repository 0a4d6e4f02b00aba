"""How long a text may be: told by what a model is made of, and checked before anything runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import steerkit
from steerkit.activations.recording import record_ids
from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup
from steerkit.monitor.difference import projection_difference
from steerkit.network.context import Context, context_of
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from tests.families import BLOCKS, HIDDEN, MAX_POSITIONS, VOCAB, build
from tests.tiny_tokenizers import byte_tokenizer

LIMIT = MAX_POSITIONS
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT: dict[str, Any] = {**COMMON, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
NAMED: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
# Tables of all kinds: learned, learned behind rows that stand for no position, computed.
TABLES: dict[str, Callable[[], Any]] = {
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(
            **{**NAMED, "num_layers": 2, "num_heads": 4, "num_hidden_layers": 2},
            attention_types=[[["global", "local"], 1]],
        )
    ),
    "biogpt": lambda: tf.BioGptForCausalLM(tf.BioGptConfig(**{**NAMED, "pad_token_id": 1}, intermediate_size=48)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=4)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**GPT, rotary_dim=4)),
    "ctrl": lambda: tf.CTRLLMHeadModel(tf.CTRLConfig(**GPT, dff=48)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(**COMMON, d_model=32, n_heads=4, n_layers=2, max_seq_len=24)),
    "roberta": lambda: tf.RobertaForCausalLM(
        tf.RobertaConfig(
            **{**NAMED, "pad_token_id": 1, "max_position_embeddings": 26}, is_decoder=True, intermediate_size=48
        )
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_ends_where_it_is_said_to(name: str) -> None:
    model = TABLES[name]().eval()
    decoder = find_decoder(model)
    assert context_of(decoder) == Context(24, True)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids[:, :24]).logits).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=ids[:, :25])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", Context(LIMIT, True)),
        ("opt", Context(LIMIT, True)),
        ("opt_post", Context(LIMIT, True)),
        ("llama", Context(LIMIT, False)),
        ("gemma3_vlm", Context(LIMIT, False)),
        ("falcon", Context(LIMIT, False)),
        ("bloom", None),
        ("mamba", None),
    ],
)
def test_the_kinds_of_limits(family: str, expected: Context | None) -> None:
    assert context_of(find_decoder(build(family))) == expected


def test_positions_that_are_stretched_count_and_linear_biases_do_not() -> None:
    model = build("llama")
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT}
    try:
        assert context_of(find_decoder(model)) == Context(4 * LIMIT, False)
    finally:
        del model.config.rope_parameters
    falcon = build("falcon")
    falcon.config.alibi = True
    assert context_of(find_decoder(falcon)) is None


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return build("gpt2")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(None, merges=False)


def text(tokens: int, letter: str = "a") -> str:
    found = letter * tokens
    assert len(byte_tokenizer(None, merges=False)(found)["input_ids"]) == tokens + 1  # and BOS
    return found


def test_what_just_fits_runs_and_one_token_more_is_refused_by_name(gpt2: Any, tokenizer: Any) -> None:
    fits, long = text(LIMIT - 1), text(LIMIT, "b")
    short = ["c", "dd", "eee"]
    assert len(steerkit.record(gpt2, tokenizer, [fits], ["resid_post.1"]).positive[Site(1)]) == 1
    with pytest.raises(DataError, match=rf"item 3 of 5 \('b+...'\): {LIMIT + 1} tokens, .* positions for {LIMIT}"):
        steerkit.record(gpt2, tokenizer, [*short[:2], long, long, short[2]], ["resid_post.1"])
    # New tokens count, but for the last, which is never read.
    assert steerkit.generate(gpt2, tokenizer, [text(LIMIT - 5)], max_new_tokens=5)
    message = rf"prompt 2 of 2 .* {LIMIT - 4} tokens and 6 new ones, .* give max_new_tokens=5 or less"
    with pytest.raises(DataError, match=message):
        steerkit.generate(gpt2, tokenizer, ["c", text(LIMIT - 5)], max_new_tokens=6)
    with pytest.raises(DataError, match=r"shorten the text$"):
        steerkit.generate(gpt2, tokenizer, [text(LIMIT + 3)], max_new_tokens=1)


@pytest.mark.filterwarnings("ignore:.* has no chat template")
def test_every_road_to_the_model_checks_first(gpt2: Any, tokenizer: Any) -> None:
    long = text(LIMIT + 2)
    data = ContrastSet.from_answers([("q", "yes", "no"), ("q2", "y", long), ("q3", "oh", "ah")])
    vector = steerkit.fit(gpt2, tokenizer, ContrastSet.from_prompts(["aa", "b"], ["cc", "d"]), layers=[1])
    answered = [Conversation("q", answer="a"), Conversation("q", answer=long)]
    ran: list[str] = []
    handle = gpt2.register_forward_pre_hook(lambda *_: ran.append("a pass"))
    body = find_decoder(gpt2).body.register_forward_pre_hook(lambda *_: ran.append("a pass"))
    try:
        for method in ("caa", "repe"):  # streamed, and kept
            with pytest.raises(DataError, match=r"negative item 2 of 3 \('q2 a"):
                steerkit.fit(gpt2, tokenizer, data, method=method, layers=[1])
        with pytest.raises(DataError, match=f"text 1 of 2: {LIMIT + 3} tokens"):
            steerkit.fit(
                gpt2, tokenizer, ContrastSet.from_prompts(["a"], [long], raw=True), method="actadd", layers=[1]
            )
        setup = Setup(gpt2, tokenizer, data, neutral=answered)
        with pytest.raises(DataError, match="negative item 2 of 3"):
            steerkit.measure(setup.trial(vector, 1.0), ["preference_margin"])
        with pytest.raises(DataError, match="text 2 of 2"):
            steerkit.measure(Setup(gpt2, tokenizer, neutral=answered).trial(vector, 1.0), ["divergence"])
        monitor = steerkit.Monitor(gpt2, tokenizer, vector, calibrated=False)
        with pytest.raises(DataError, match="item 2 of 2"):
            monitor.score(["short", long])
        with pytest.raises(DataError, match="text 2 of 2: "):
            record_ids(gpt2, [[1, 2], [1] * (LIMIT + 1)], [Site(1)])
    finally:
        handle.remove()
        body.remove()
    assert ran == []
    with pytest.raises(DataError, match="prompt 2 of 2"):
        items = [{"prompt": prompt, "response": "a"} for prompt in ("q", text(LIMIT - 3))]
        projection_difference(gpt2, tokenizer, items, vector, calibrated=False, max_new_tokens=8)


def test_rotary_positions_beyond_what_was_trained_warn_once(tokenizer: Any) -> None:
    model = build("llama")
    long = [text(LIMIT + 4), text(LIMIT + 9)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor = steerkit.Monitor(model, tokenizer, _vector(model), calibrated=False, batch_size=1)
        monitor.score(["short", *long])
    (told,) = [str(one.message) for one in caught]
    assert (
        told.startswith("item 2 of 3 ('aaa") and f"more than the {LIMIT} positions" in told and "so are 1 more" in told
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steerkit.record(build("bloom"), tokenizer, [long[0]], ["resid_post.1"])


def _vector(model: Any) -> Any:
    from steerkit.vector.steering_vector import SteeringVector

    return SteeringVector(
        method="caa",
        tensors={"resid_post.1/direction": torch.ones(HIDDEN)},
        sites=(Site(1),),
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=HIDDEN,
        num_layers=BLOCKS,
    )
