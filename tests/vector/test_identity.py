"""What says for which tokenizer a vector was fitted."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from steerkit.fitting.fitting import tokenizer_digest
from tests.tiny_tokenizers import byte_tokenizer


def plainly(tokenizer: Any) -> str:
    """The same, word by word."""
    lines = [f"{index} {token}" for index, token in sorted((i, t) for t, i in tokenizer.get_vocab().items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_vocabulary_is_read_once_until_tokens_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, reads = byte_tokenizer(), []
    first = plainly(tokenizer)
    of_class = type(tokenizer).get_vocab
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: (reads.append(1), of_class(self))[1])
    assert [tokenizer_digest(tokenizer) for _ in range(3)] == [first] * 3
    assert len(reads) == 1
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) == plainly(tokenizer) != first
    assert tokenizer_digest(byte_tokenizer()) == first
