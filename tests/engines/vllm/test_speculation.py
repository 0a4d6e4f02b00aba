"""Speculated tokens are steered as the tokens that they turn out to be."""

from __future__ import annotations

from typing import Any

from tests.engines.vllm.asked import every_edit

ENGINE = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
}


def test_n_grams(pair: Any) -> None:
    repeated = [5, 17, 44, 9] * 4
    asked = [([*repeated, *one[:3]], said) for one, said in every_edit((9, 17))[::2]]
    pair.check(asked, pair.answers(asked, 12), 12)
    found = {one.name: getattr(one, "value", 0) for one in pair.llm.get_metrics()}
    assert found["vllm:spec_decode_num_accepted_tokens"] > 0
