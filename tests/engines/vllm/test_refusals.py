"""A wrong request is refused alone, with a reason; its neighbours get their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steerkit.network.sites import Site
from tests.engines.vllm.asked import prompt
from tests.engines.vllm.models import _vector

ENGINE = {"steerkit": {"default": None, "vectors": 1, "terms": 3}}
WRONG = {
    "nothing-like-it*1": "unknown vector",
    "add-post**": "column",
    "add-post@assistant": "does not steer vLLM",
    "add-post@nowhere": "unknown scope",
    "add-post*1e60": "strength",
    "add-post when(add-post > 1)": "when",
    "add-post hold(add-post at 1 within 0 to 2)": "hold",
    "late@all": "before the gate",
    "late fade(linear over 3)": "fade",
    "off-post*1 norm": "unit",
    "add-post + off-post + set-post": "2 a site",
    "add-post + add-attn + off-mlp + set-mlp": "takes 3",
    "hub:some/where": "Hub",
    "wide*1": "width",
    "elsewhere*1": "writes",
    "window*1": "more than a plane",
    '{"format": 1': "JSON",
    '{"format": 1, "terms": []}': "vectors",
}


def test_each_wrong_request_alone(pair: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    _strange(pair)
    engine = pair.llm.llm_engine
    asked, found = [], {}
    for number, (said, why) in enumerate(WRONG.items()):
        good = (prompt(number, 7), (None, "add-post*1", "turn-attn*70")[number % 3])
        asked.append(good)
        engine.add_request(str(number), {"prompt_token_ids": good[0]}, pair.params(good[1], 6))
        with pytest.raises(VLLMValidationError, match=why.replace("(", r"\(")) as refused:
            engine.add_request(f"wrong{number}", {"prompt_token_ids": prompt(1, 5)}, pair.params(said, 6))
        assert "\n" not in str(refused.value)
        found |= {one.request_id: one for one in engine.step() if one.finished}
    while engine.has_unfinished_requests():
        found |= {one.request_id: one for one in engine.step() if one.finished}
    from tests.engines.vllm.engine import answer_of

    pair.check(asked, [answer_of(found[str(number)]) for number in range(len(asked))])


def _strange(pair: Any) -> None:
    from dataclasses import replace

    usual = pair.known["add-post"]
    pair.add(
        "wide", replace(usual, hidden_size=32, tensors={"resid_post.1/direction": torch.ones(32)}, sites=(Site(1),))
    )
    pair.add("elsewhere", _vector(pair.model, "caa", "add", (Site(1, "attn_in"),), 0, {}))
    rows = {"resid_post.1/direction": torch.ones(2, 64)}
    window = replace(usual, method="actadd", edit="add_window", scope="front", tensors=rows, sites=(Site(1),))
    pair.add("window", window)


def test_other_kinds_of_values(pair: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    for wrong in (3, 1.5, ["add-post", "off-post"], {"terms": 3}):
        with pytest.raises(VLLMValidationError, match="steering"):
            pair.llm.llm_engine.add_request("wrong", {"prompt_token_ids": [1]}, pair.params(wrong, 1))


def test_text_json_and_json_as_text_are_one(pair: Any) -> None:
    from steerkit.composition.terms import Composition

    data = Composition.parse("add-post@response*1").as_json()
    one = (prompt(3, 9), "add-post@response*1")
    for said in (data, json.dumps(data), one[1]):
        pair.check([one], pair.answers([(one[0], said)]))
    for plain in ("", " "):
        pair.check([(one[0], None)], pair.answers([(one[0], plain)]))


def test_a_file_that_goes_while_its_request_runs(pair: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    path: Path = pair.add("fleeting", pair.known["off-attn"])
    engine, one = pair.llm.llm_engine, (prompt(4, 9), "fleeting*1")
    engine.add_request("early", {"prompt_token_ids": one[0]}, pair.params(one[1], 6))
    path.unlink()
    with pytest.raises(VLLMValidationError, match="fleeting"):
        engine.add_request("late", {"prompt_token_ids": one[0]}, pair.params(one[1], 6))
    found = [output for _ in range(20) for output in engine.step() if output.finished]
    from tests.engines.vllm.engine import answer_of

    pair.check([one], [answer_of(found[0])])


def test_more_vectors_at_one_time_than_there_is_room_for(pair: Any) -> None:
    # Room for one vector at every block: five entries, the first of which is nothing.
    before = pair.runner._steerkit._board.entries
    names = ("add-post", "add-attn", "off-mlp", "turn-post", "set-attn", "aim-mlp", "off-post", None)
    asked = [
        (prompt(number, 9), name and f"{name}*{60 if 'turn' in name or 'aim' in name else 1}")
        for number, name in enumerate(names)
    ]
    pair.check(asked, pair.answers(asked))
    assert pair.runner._steerkit._board.entries > before


def test_whoever_writes_what_workers_get_is_not_believed(pair: Any) -> None:
    one = (prompt(5, 9), None)
    params = pair.params(None, 6)
    params.extra_args = {"steerkit": {"composition": {}, "vectors": {}, "key": "x", "first": 0}}
    (output,) = pair.llm.generate([{"prompt_token_ids": one[0]}], params, use_tqdm=False)
    from tests.engines.vllm.engine import answer_of

    pair.check([one], [answer_of(output)])
