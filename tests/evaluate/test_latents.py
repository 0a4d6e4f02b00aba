"""Ranking latents, the output score and the gradients, against what a loop over tokens and latents finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import DataError
from steerkit.evaluate.latents import find_latents, latent_gradients
from steerkit.evaluate.output_score import lens_tokens, output_scores, score_of
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests.dictionary.made import made
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(CHATML)
PAIRS = [
    ("How was it?", "Lovely.", "Dreadful."),
    ("And then?", "We sang.", "We wept."),
    ("Why?", "For joy.", "Of pain."),
]
DATA = ContrastSet.from_answers(PAIRS)


def setup(family: str = "llama", data: ContrastSet | None = DATA) -> steerkit.Setup:
    return steerkit.Setup(build(family), TOKENIZER, data, batch_size=2)


def dictionary(activation: str = "relu", **changes: Any) -> Any:
    return made(activation, width=32, encoder_bias=torch.zeros(40), **changes)


# output score


def test_the_score_of_the_toy() -> None:
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04], [0.5, 0.3, 0.1, 0.06, 0.04]])
    found = score_of(p, torch.tensor([[3, 1], [0, 4]]))
    assert found.tolist() == pytest.approx([(1 - 1 / 5) * 0.3, 0.5])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_lens_is_the_last_norm_and_the_head(family: str) -> None:
    model: Any = build(family)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    found = lens_tokens(model, TOKENIZER, rows, count=7)
    body = find_decoder(model).body
    norm = getattr(body, "norm", None) or body.ln_f
    with torch.no_grad():
        expected = model.get_output_embeddings()(norm(rows / rows.norm(dim=-1, keepdim=True) * 1e4))
    scaled = lens_tokens(model, TOKENIZER, rows * 1e-3, count=7)
    assert torch.equal(found, scaled)
    for own, logits in zip(found, expected, strict=True):  # a norm's epsilon moves what is nearly equal
        assert len(set(own.tolist()) & set(logits.topk(7).indices.tolist())) >= 6


def test_output_scores_are_those_of_steering_behind_the_prefix() -> None:
    model: Any = build("llama")
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    amounts = torch.tensor([1.0, 5.0, 40.0])
    found = output_scores(model, TOKENIZER, "resid_post.1", rows, amounts=amounts, count=5)
    ids = torch.tensor([render(TOKENIZER, Conversation.of("From my experience,", raw=True)).ids])
    for place in range(3):
        vector = SteeringVector.from_directions({1: rows[place]}, model, scope="response")
        with torch.no_grad(), steerkit.steer(model, vector, float(amounts[place]), prompt_lengths=ids.shape[1]):
            p = torch.softmax(model(input_ids=ids).logits[0, -1], dim=-1)
        listed = p.argsort(descending=True).tolist()
        best = min(listed.index(token) for token in found.tokens[place].tolist())
        most = max(float(p[token]) for token in found.tokens[place].tolist())
        assert float(found.scores[place]) == pytest.approx((1 - best / len(p)) * most, rel=1e-4)
        assert found.words[place][0] == TOKENIZER.decode([int(found.tokens[place][0])])
    with pytest.raises(DataError, match="no place in the residual stream"):
        output_scores(model, TOKENIZER, "z.1", rows)
    with pytest.raises(DataError, match="length 0"):
        output_scores(model, TOKENIZER, "resid_post.1", rows * 0)
    with pytest.raises(DataError, match=r"give \[k, 32\]"):
        output_scores(model, TOKENIZER, "resid_post.1", rows[:, :8])


def test_as_a_scorer_it_takes_the_strength_that_is_measured() -> None:
    one = setup()
    vector = SteeringVector.from_directions({1: torch.randn(32, generator=torch.Generator().manual_seed(1))}, one.model)
    found = steerkit.measure(one.trial(vector, 30.0), ["output_score"])["output_score"]
    assert found.items == 8
    assert found.estimate.mean > 0.01
    nothing = steerkit.measure(one.trial(vector, 0.0), ["output_score"])["output_score"]
    assert abs(nothing.estimate.mean) < 1e-6


# gradients


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_gradients_are_those_of_each_text(activation: str) -> None:
    one, latents = setup(), dictionary(activation, site=Site(1))
    found = latent_gradients(one, latents)
    expected = torch.zeros(40, dtype=torch.float64)
    block: Any = find_decoder(one.model).blocks[1]
    for prompt, good, bad in PAIRS:
        for answer, sign in ((good, 1), (bad, -1)):
            text = render(TOKENIZER, Conversation(prompt, answer=answer))
            seen: list[Tensor] = []

            def keep(_module: Any, _args: Any, out: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(out.detach().requires_grad_(True))
                return seen[0]

            handle = block.register_forward_hook(keep)
            model: Any = one.model
            logs = torch.log_softmax(model(input_ids=torch.tensor([text.ids])).logits[0], dim=-1)
            handle.remove()
            start = text.prompt_length
            targets = torch.tensor(text.ids[start:])
            score = logs[start - 1 : -1].gather(-1, targets[:, None]).mean()
            (gradient,) = torch.autograd.grad(score, seen[0])
            f = latents.encode(seen[0].detach()[0])
            for token in range(start - 1, len(text.ids)):
                along = latents.decoder.double() @ gradient[0, token].double()
                expected += sign * f[token].double() * along / len(PAIRS)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


# the table


@pytest.mark.parametrize("ranking", ["gap", "gradient", "saif"])
def test_the_table_is_in_order_and_complete(ranking: Any) -> None:
    found = find_latents(setup(), dictionary(site=Site(1)), ranking=ranking, top=6, beta=1.0)
    assert len(found.rows) == 6
    assert found.texts == (3, 3)
    keys = {
        "gap": [(row.share_gap, row.mean_gap) for row in found.rows],
        "gradient": [row.gradient for row in found.rows],
        "saif": [row.saif for row in found.rows],
    }[ranking]
    assert keys == sorted(keys, reverse=True)  # type: ignore[type-var]
    assert all((row.amount is not None) == (ranking == "saif") for row in found.rows)
    assert all(row.output_score is not None and len(row.words) == 5 for row in found.rows)
    plain = found.as_json()
    assert plain["latents"][0]["latent"] == found.rows[0].latent
    assert [row.latent for row in found.rows if row.writes][:2] == [row.latent for row in found.best(2)]


def test_where_the_head_cannot_read_there_is_no_output_score() -> None:
    found = find_latents(setup(), dictionary(site=Site(1, "z")), top=3)
    assert [row.output_score for row in found.rows] == [None] * 3
    assert all(row.writes for row in found.rows)


def test_what_the_data_lacks_is_said() -> None:
    unpaired = ContrastSet.from_prompts(["a", "b"], ["c"], raw=True)
    with pytest.raises(DataError, match="give pairs"):
        find_latents(setup(data=unpaired), dictionary(site=Site(1)), ranking="saif")
    with pytest.raises(DataError, match="give data"):
        find_latents(setup(data=None), dictionary(site=Site(1)))
