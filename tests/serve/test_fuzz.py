"""Random arrivals, lengths, cancellations and errors: no answer is lost or mixed, and memory is flat behind them."""

from __future__ import annotations

import functools
import gc
import random
import time
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from steerkit.errors import SteerError
from steerkit.serve import Done, Engine, QueueFullError, Request
from steerkit.serve.events import Event, gathered
from tests.serve.asked import STEERINGS, TEXTS, alone, chat, drawn_alone, engine_of, ids_of

KINDS = ("greedy",) * 6 + ("drawn",) * 2 + ("cancelled",) * 2 + ("wrong", "apart", "several", "beside")


def drawn_request(draw: random.Random, kind: str) -> Request:
    given: dict[str, Any] = {"steering": draw.choice(STEERINGS), "max_tokens": draw.randint(1, 10)}
    if kind == "drawn":
        given |= {"temperature": draw.choice((0.7, 1.0)), "seed": draw.randrange(3)}
    if kind == "wrong":
        given["steering"] = draw.choice(("nobody", "a@front", "a*1e38 + b*1e38 + c*3e38"))
    if kind == "apart":
        given["steering"] = "gated*2"
    if kind == "several":
        given["n"] = 3
    if kind == "beside":
        given["kl"] = True
    return Request(chat(draw.choice(TEXTS)), **given)


@functools.cache
def expected(steering: str | None, text: str, length: int, seed: int | None, temperature: float) -> Any:
    asked = Request(chat(text), steering=steering, max_tokens=length, seed=seed, temperature=temperature)
    return tuple(alone("llama", asked)) if seed is None else drawn_alone("llama", asked)


def check(asked: Request, kind: str, events: list[Event]) -> None:
    dones = [event for event in events if isinstance(event, Done)]
    assert sorted(one.choice for one in dones) == list(range(asked.n)), (kind, asked)
    if kind == "cancelled":
        assert dones[0].finish in ("cancelled", "length", "stop")
        return
    if kind == "wrong":
        assert dones[0].finish == "error"
        return
    text = asked.prompt[0]["content"]  # type: ignore[index, call-overload]
    wanted = expected(asked.steering, text, asked.max_tokens, asked.seed, asked.temperature)  # type: ignore[arg-type]
    for answer in gathered(events):
        assert (tuple(ids_of(answer)) if asked.seed is None else answer.text) == wanted, (kind, asked)


def run(engine: Engine, seed: int, arrivals: int) -> list[tuple[Request, str, list[Event]]]:
    """What came of so many requests; it is looked at when the engine is closed, which alone may run its model."""
    draw = random.Random(seed)
    running: list[tuple[Any, Request, str, SimpleQueue[Event]]] = []
    refused, ended = 0, []
    for _ in range(arrivals):
        kind = draw.choice(KINDS)
        asked, found = drawn_request(draw, kind), SimpleQueue[Event]()
        try:
            (ticket,) = engine.submit((asked, found.put))
        except QueueFullError:
            time.sleep(0.05)
            refused += 1
            continue
        except SteerError:
            assert kind == "wrong"
            continue
        running.append((ticket, asked, kind, found))
        if draw.random() < 0.7:
            time.sleep(draw.random() * 0.02)
        for ticket, _, waiting, _ in running[-5:]:
            if waiting == "cancelled" and draw.random() < 0.5:
                engine.cancel(ticket)
    for ticket, asked, kind, found in running:
        if ticket.planned.exception(timeout=60) is not None:
            assert kind == "wrong"
            continue
        events: list[Event] = []
        while sum(isinstance(event, Done) for event in events) < asked.n:
            events.append(found.get(timeout=60))
        ended.append((asked, kind, events))
        assert found.empty()
    assert refused < arrivals / 2
    return ended


def live_tensors(engine: Engine) -> int:
    while engine.running:
        time.sleep(0.01)
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("arrivals", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_arrivals(arrivals: int) -> None:
    with engine_of(max_batch=6, max_queue=40, prefix_bytes=0) as engine:
        ended = run(engine, 0, 40)
        before = live_tensors(engine)
        ended += run(engine, 1, arrivals)
        assert live_tensors(engine) <= before + 20
        assert engine.waiting == 0
    with engine_of(max_batch=6, max_queue=40) as engine:
        ended += run(engine, 2, arrivals)
    for one in ended:
        check(*one)
