"""A mixture trained on two topics: dropping one topic's experts costs that topic, and not the other as much."""

from __future__ import annotations

import pytest
import torch

from benchmarks import experts
from steerkit.evaluate.intervals import interval


def test_the_topics_are_texts_of_their_own() -> None:
    kitchen, harbour = (experts.texts(topic, 40, 0) for topic in experts.PAIRS[0])
    assert not set(kitchen) & set(harbour)
    assert experts.texts("kitchen", 40, 0) == kitchen
    assert experts.texts("kitchen", 40, 1) != kitchen
    assert not set(experts.texts("kitchen", 40, -1)) & set(experts.texts("kitchen", 40, -2))
    tokenizer = experts.byte_tokenizer()
    ids, mask = experts.batch_of(tokenizer, ["é fry", "stir"])
    assert mask.sum(dim=1).tolist() == [len("é fry".encode()) + 1, 5]
    assert tokenizer.decode(ids[0, 1:]) == "é fry"


@pytest.mark.slow
def test_a_topic_s_experts_cost_the_topic() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenizer = experts.byte_tokenizer()
        pair = experts.PAIRS[1]
        model, _ = experts.trained(tokenizer, pair, 0)
        found = [experts.measured(model, tokenizer, *both, draws=8) for both in (pair, pair[::-1])]
    finally:
        torch.set_num_threads(before)
    for one in found:
        assert interval(one.own - one.other).low > 0, "the topic becomes dearer than the other"
        assert interval(one.own).low > 0
        assert one.beaten <= 1, "random experts that are used as often do not tell the topics apart like that"
