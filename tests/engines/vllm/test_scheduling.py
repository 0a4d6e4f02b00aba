"""However the scheduler cuts the requests' tokens into steps, they are steered alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.vllm.asked import every_edit, gated, prompt
from tests.engines.vllm.engine import TOLERANCE, Pair, answer_of

STEERED = "add-post@all*1"


@pytest.fixture(scope="module")
def chunked(place: Path) -> Iterator[Pair]:
    """Steps of 16 tokens at most: a prompt of 17 leaves one token for its last chunk. Room for 16 blocks of 32."""
    made = Pair.of("llama", place, max_num_batched_tokens=16, num_gpu_blocks_override=17)
    yield made
    made.close()


def test_last_chunks_of_one_token(chunked: Pair) -> None:
    for one in every_edit((17, 33))[::4]:
        chunked.check([one], chunked.answers([one]))


def test_chunks_in_mixed_batches(chunked: Pair) -> None:
    asked = every_edit((17, 5, 33, 40, 2))
    chunked.check(asked, chunked.answers(asked))


def test_gates_over_chunks(chunked: Pair) -> None:
    asked = [(prompt(length, length), said) for length in (17, 40) for _, said in gated()[:7]]
    chunked.check(asked, chunked.answers(asked))
    for one in asked:
        chunked.check([one], chunked.answers([one]))


def test_preempted_and_resumed(chunked: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "add-post@response*1",
        "off-attn*1",
        "turn-mlp[3:]*70",
        None,
        "late",
        "mean@response",
        "add-mlp*2 fade(linear over 30)",
    )
    asked = [(prompt(100 + number, 40), one) for number, one in enumerate((*said, "controller"))]
    asked[4] = ([5, 17, 44, 9, 101, 63], "late")
    count, preempt = [], type(chunked.scheduler)._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        return preempt(*args, **kwargs)

    monkeypatch.setattr(type(chunked.scheduler), "_preempt_request", counted)
    chunked.check(asked, chunked.answers(asked, 60), 60)
    assert count


def test_prefixes_are_shared_by_those_steered_alike_only(chunked: Pair) -> None:
    long = prompt(77, 135)
    for said in (None, STEERED, None, STEERED, "add-post@response*1", "add-post@all*2", None, "mean@response"):
        (output,) = chunked.llm.generate([{"prompt_token_ids": long}], chunked.params(said, 6), use_tqdm=False)
        chunked.check([(long, said)], [answer_of(output)])
        seen = output.num_cached_tokens
        first = said in (None, STEERED) and seen == 0
        assert first or seen == {"add-post@all*2": 0, "mean@response": 0}.get(str(said), 128), (said, seen)


def test_a_longer_prompt_does_not_take_over_what_was_steered_as_an_answer(chunked: Pair) -> None:
    begun = prompt(78, 60)
    tokens, _ = chunked.answers([(begun, "add-post@response*1")], 40)[0]
    for cut in (1, 20, 40):
        one = ([*begun, *tokens[:cut]], "add-post@response*1")
        chunked.check([one], chunked.answers([one]))


def test_300_requests_at_random(chunked: Pair) -> None:
    draw = random.Random(0)
    known = [said for _, said in every_edit((5,))] + [said for _, said in gated()]
    asked = [(prompt(1000 + number, draw.randint(1, 60)), draw.choice(known)) for number in range(300)]
    counts = [draw.randint(1, 12) for _ in asked]
    engine, found = chunked.llm.llm_engine, {}
    waiting = list(range(len(asked)))
    while waiting or engine.has_unfinished_requests():
        for _ in range(draw.randint(0, 3)):
            if waiting:
                number = waiting.pop(0)
                ids, said = asked[number]
                engine.add_request(str(number), {"prompt_token_ids": ids}, chunked.params(said, counts[number]))
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = answer_of(output)
    for number, one in enumerate(asked):
        chunked.check([one], [found[number]], counts[number])
        # And what the engine answers to it alone, nothing cached before it.
        chunked.llm.reset_prefix_cache()
        ((tokens, logs),) = chunked.answers([one], counts[number])
        assert tokens == found[number][0], f"{one[1]} on {len(one[0])} tokens"
        assert max(abs(alone - mixed) for alone, mixed in zip(logs, found[number][1], strict=True)) < TOLERANCE
