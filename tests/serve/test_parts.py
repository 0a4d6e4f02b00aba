"""Parts of the engine on their own: text as it comes, what is kept of texts, names, and what a request may say."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from steerkit.errors import CompositionError, DataError
from steerkit.generation import AnswerText
from steerkit.serve import Catalogue, Request, caches
from steerkit.serve.prefixes import NOTHING, Prefixes
from steerkit.serve.running import bound, is_local
from steerkit.serve.text_stream import TextStream
from tests.modes import vector_for
from tests.serve.asked import TOKENIZER, model_of

WORDS = "the sea in the morning, ünd über naïve 海と空 🌊 <b>in</b>"


def pieces(ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(AnswerText(TOKENIZER), stops)
    found = []
    for token in ids:
        found.append(stream.add(token))
        if stream.is_stopped:
            return found
    return [*found, stream.close()]


def test_pieces_of_text_are_the_text() -> None:
    draw = random.Random(0)
    for _ in range(50):
        text = "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 30)))
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        found = pieces(ids)
        assert "".join(found) == text
        stop = text[len(text) // 2 :][:2]
        assert "".join(pieces(ids, (stop,))) == text[: text.index(stop)]
        assert "".join(pieces(ids, ("nowhere", text + "!"))) == text
    assert pieces(TOKENIZER("🌊!", add_special_tokens=False)["input_ids"]) == ["", "", "", "🌊", "!", ""]
    assert "".join(pieces([TOKENIZER.eos_token_id, *TOKENIZER("in", add_special_tokens=False)["input_ids"]])) == "in"


def test_bytes_that_never_become_a_character_are_not_waited_for() -> None:
    byte = TOKENIZER("é", add_special_tokens=False)["input_ids"][0]
    found = pieces([byte] * 40)
    assert "".join(found) == "\ufffd" * 40
    assert sum(map(bool, found)) > 3


def cache_of(family: str, ids: list[int]) -> Any:
    with torch.no_grad():
        return model_of(family)(torch.tensor([ids]), use_cache=True).past_key_values


def test_a_beginning_is_cut_off_a_longer_text() -> None:
    ids = list(range(5, 25))
    for family in ("llama", "gemma3_text"):
        whole, part = cache_of(family, ids), cache_of(family, ids[:6])
        # What a sliding window has dropped cannot be had again.
        window = getattr(model_of(family).config, "sliding_window", None) if family != "llama" else None
        found = caches.cut(whole, 0, 20, 6)
        if window is not None and window < 20:
            assert found is None
            found = caches.cut(cache_of(family, ids[:7]), 0, 7, 7)
            part = cache_of(family, ids[:7])
        for one, other in zip(found.layers, part.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)
            assert one.get_seq_length() == other.get_seq_length()


def test_beginnings_are_told_by_ids_and_steering() -> None:
    ids = list(range(5, 25))
    cache = cache_of("llama", ids)
    size = caches.bytes_of(cache)
    kept = Prefixes(2 * size)
    kept.keep("a", ids[:10], caches.cut(cache, 0, 20, 10))
    kept.keep("a", ids, caches.cut(cache, 0, 20, 20))
    assert (len(kept), kept.used) == (1, size)  # the shorter one is part of it
    assert kept.find("a", [*ids, 7]).tokens == 20
    assert kept.find("a", [*ids[:12], 299, 7]).tokens == 12
    assert kept.find("a", ids).tokens == 19  # the last token has to be read
    assert kept.find("b", [*ids, 7]) is NOTHING
    assert kept.find("a", [299, *ids]) is NOTHING
    assert kept.knows("a", ids[:3])
    assert not kept.knows("b", ids[:3])
    for name in ("b", "c"):
        kept.keep(name, ids, caches.cut(cache, 0, 20, 20))
    assert kept.find("a", [*ids, 7]) is NOTHING  # used longest ago
    assert kept.used == 2 * size
    kept.clear()
    assert (len(kept), kept.used) == (0, 0)


def test_two_vectors_of_one_name_are_refused(tmp_path: Any) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        vector_for(model_of(), scope="all").save(tmp_path / place / "v.safetensors")
    with pytest.raises(CompositionError, match="two vectors are called 'v'"):
        Catalogue(allowed=[str(tmp_path / place / "v.safetensors") for place in ("one", "two")])


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"max_tokens": 0}, {"temperature": -1}, {"top_p": 0.0}, {"stop": ("",)}, {"logprobs": 21}]
)
def test_values_out_of_their_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        Request("Hi", **wrong)


def test_addresses() -> None:
    assert [is_local(one) for one in ("localhost", "127.0.0.1", "::1", "127.8.8.8")] == [True] * 4
    assert [is_local(one) for one in ("0.0.0.0", "::", "example.org", "10.0.0.1")] == [False] * 4
    with bound("127.0.0.1", 0) as taken, pytest.raises(Exception, match="cannot be listened at"):
        bound("127.0.0.1", taken.getsockname()[1])
