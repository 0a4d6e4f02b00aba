"""How well a dictionary fits: against sums written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steerkit.dictionary.fitness import check_dictionary, fitness_of
from steerkit.errors import DataError, VectorMismatchError
from tests.dictionary.made import WIDTH, made
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ROWS = torch.randn(1500, WIDTH, generator=torch.Generator().manual_seed(3)) * 2


def test_figures_are_those_of_the_formulas() -> None:
    one = made()
    found = fitness_of(one, ROWS)
    latents = one.encode(ROWS)
    back = one.decode(latents)
    mean = ROWS.mean(dim=0)
    missed = sum(float((a - b).double().square().sum()) for a, b in zip(ROWS, back, strict=True))
    spread = sum(float((a - mean).double().square().sum()) for a in ROWS)
    assert found.fvu == pytest.approx(missed / spread, rel=1e-5)
    assert found.explained == pytest.approx(1 - missed / spread, abs=1e-5)
    assert found.l0 == pytest.approx(sum(int((row > 0).sum()) for row in latents) / 1500)
    assert found.dead == sum(not bool((latents[:, k] > 0).any()) for k in range(40)) / 40
    assert found.peak == sorted(float(row.max()) for row in latents)[749]


def test_a_perfect_dictionary_and_one_of_another_scale() -> None:
    eye = torch.eye(WIDTH)
    changes = {"encoder": torch.cat([eye, -eye]), "decoder": torch.cat([eye, -eye]), "latents": 2 * WIDTH}
    plain = {"encoder_bias": torch.zeros(2 * WIDTH), "decoder_bias": torch.zeros(WIDTH)}
    perfect = made("relu", **changes, **plain)
    assert fitness_of(perfect, ROWS).fvu < 1e-10
    assert fitness_of(replace(perfect, decoder=perfect.decoder * 3), ROWS).fvu > 1.0


def test_on_a_model_the_first_tokens_are_left_out() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    one = made(width=32)
    found = check_dictionary(model, tokenizer, one, ["a bright day", "rain"], max_tokens=12)
    assert 0 < found.tokens <= 2 * 11
    with pytest.raises(VectorMismatchError, match="reads width 16"):
        check_dictionary(model, tokenizer, made())
    with pytest.raises(DataError, match="two tokens"):
        check_dictionary(model, tokenizer, one, ["a"], max_tokens=1)
    with pytest.raises(DataError, match="1 tokens"):
        fitness_of(made(), ROWS[:1])
    with pytest.raises(DataError, match="the same"):
        fitness_of(made(), ROWS[:1].repeat(4, 1) * 0)
