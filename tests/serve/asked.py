"""Tiny models that are served, the vectors that requests name, and what each request is answered with alone."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch

import steerkit
from steerkit.serve import Answer, Catalogue, Engine, Request
from steerkit.serve.prompt import PromptReader
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.gated import gated_vector
from tests.modes import vector_for
from tests.tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
NEW = 8
# What requests are steered by: every kind of scope, windows, fades, several vectors, and none.
STEERINGS = (
    "a*1.5",
    None,
    "b@all*0.7",
    "a@generated*2 + c*0.5",
    "c@first(3)*2",
    "b@prompt*1.5",
    "a[1:4]*2",
    "b[:2]*-2",
    "c*2 fade(linear over 5)",
    "a@assistant*1.5",
    "b@answer*1.2",
    "c@after(0)*1.1",
    "a*1.5 - b",
    "c@generated[2:]*3",
    "b*0.5 + a*0.5 + c*0.5",
    "a@all*1.5 fade(exponential over 2)",
    "a*2 when(b > 0)",
    "c*3 when(b > 0 | ~(a > 0.5) per token)",
    "a hold(a at 3 within 0 to 4)",
)
TEXTS = ("Hi", "How was your day?", "Tell me of the sea.", "One, two, three, four", "Why?")


@functools.cache
def _built(family: str, copy: int) -> Any:
    model = build(family).eval()
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    return model


def model_of(family: str = "llama") -> Any:
    return _built(family, 0)


def vectors_of(family: str = "llama") -> dict[str, SteeringVector]:
    model = model_of(family)
    return {name: vector_for(model, scope="response", seed=seed) for seed, name in enumerate("abc")}


@functools.cache
def gated() -> SteeringVector:
    return gated_vector(model_of())


def catalogue(family: str = "llama") -> Catalogue:
    more = {"gated": gated()} if family == "llama" else {}
    return Catalogue({**vectors_of(family), **more})


def engine_of(family: str = "llama", **options: Any) -> Engine:
    return Engine(model_of(family), TOKENIZER, catalogue(family), **{"max_tokens": 64, **options})


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def request(number: int, **more: Any) -> Request:
    """One of many different requests."""
    given: dict[str, Any] = {"max_tokens": 3 + number % NEW, "steering": STEERINGS[number % len(STEERINGS)], **more}
    return Request(chat(TEXTS[number % len(TEXTS)]), **given)


def alone(family: str, asked: Request) -> list[int]:
    """The tokens that transformers' own `generate` gives under `steerkit.steer`, the one that ends it left out.

    They come from a model of the same weights: the one that is served is run by its engine alone.
    """
    model, known = _built(family, 1), catalogue(family)
    given: Any = asked.steering
    vectors = given if isinstance(given, list) else [] if given is None else known.vectors(given)
    ids = torch.tensor([PromptReader(TOKENIZER, 320).ids(asked, vectors)])
    steering = steerkit.steer(model, vectors, tokenizer=TOKENIZER) if vectors else contextlib.nullcontext()
    with torch.no_grad(), steering:
        out = model.generate(ids, max_new_tokens=asked.max_tokens, do_sample=False, pad_token_id=0)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens[:-1] if tokens and tokens[-1] == TOKENIZER.eos_token_id else tokens


def drawn_alone(family: str, asked: Request) -> str:
    """The text that `steerkit.generate` gives with the request's seed."""
    assert asked.seed is not None
    vectors = None if asked.steering is None else catalogue(family).vectors(str(asked.steering))
    options: dict[str, Any] = {"do_sample": True, "temperature": asked.temperature, "seed": [asked.seed]}
    (text,) = steerkit.generate(
        _built(family, 1), TOKENIZER, [asked.prompt], vector=vectors, max_new_tokens=asked.max_tokens or 0, **options
    )
    return text


def ids_of(answer: Answer) -> list[int]:
    return [token.id for token in answer.tokens]


def together(engine: Engine, asked: Sequence[Request]) -> list[list[Answer]]:
    """The answers to requests that come from as many threads at once."""
    found: list[Any] = [None] * len(asked)

    def run(place: int) -> None:
        found[place] = engine.answers(asked[place])

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(asked))]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    return found
