"""Pairs whose two answers are nearly one thing to the model, by the centred hidden embedding similarity (CHES).

    a        = sum of the last hidden states h over the tokens that predict the answer (the prompt's last token, and the
               answer's without its last), T of them
    CHES     = <a+, a-> - |a+|^2                              0 for two equal answers
    per token  <a+, a-> / (T+ T-)  -  |a+|^2 / T+^2           the same without the answers' lengths
    likeness = 1 + (per token) / (|a+|^2 / T+^2)              1 for two equal answers, 0 at right angles

Pairs of high likeness teach little: their difference is small beside what each holds in common with everything, and
preference training on them pushes both answers down. Last hidden states are those the output matrix reads, behind the
final norm.

Razin et al. (2024), "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization", arXiv
2410.08847. Where this file departs: the released length-normalised score divides by the padded length of the batch;
here each row's own length counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.activations.reading import position_inputs
from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device
from steerkit.prompts.batching import Batch, batches, pad_token_id, run_batches
from steerkit.prompts.rendering import Rendered

__all__ = ["AnswerLikeness", "Ches", "answer_likeness", "ches"]


class Ches(NamedTuple):
    """The score of one pair.

    Attributes:
        total: with the answers' lengths.
        per_token: without.
        likeness: the latter in units of the positive answer's own square.
    """

    total: float
    per_token: float
    likeness: float


@dataclass(frozen=True)
class AnswerLikeness:
    """How alike the two answers of each pair are to the model.

    Attributes:
        scores: one for each pair, in their order.
    """

    scores: tuple[Ches, ...]

    def alike(self, limit: float) -> tuple[int, ...]:
        """Places of the pairs whose likeness is at least so much, the most alike first.

        Args:
            limit: 1 names equal answers only.
        """
        found = [place for place, score in enumerate(self.scores) if score.likeness >= limit]
        return tuple(sorted(found, key=lambda place: -self.scores[place].likeness))

    def as_json(self) -> list[dict[str, Any]]:
        """Plain data, one row a pair."""
        return [{"pair": place, **score._asdict()} for place, score in enumerate(self.scores)]


def ches(positive: Tensor, negative: Tensor) -> Ches:
    """The score of one pair.

    Args:
        positive: [t, d] last hidden states that predict the positive answer's tokens.
        negative: [s, d] the same of the negative one.

    Example:
        >>> import torch
        >>> ches(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 0.0]])).total
        -3.0
    """
    return _score(positive.double().sum(0), negative.double().sum(0), len(positive), len(negative))


def answer_likeness(setup: Setup) -> AnswerLikeness:
    """Score every pair of a setup's data on the unsteered model.

    Args:
        setup: needs data with both answers to each prompt.

    Returns:
        The scores, in the pairs' order.

    Raises:
        DataError: there is no data, or a pair lacks an answer or has two prompts.
    """
    texts = [text for pair in setup.pairs for text in pair]
    for text in texts:
        if text.prompt_length < 1:
            raise DataError(f"{text.text[:40]!r} has nothing before its answer; give prompts")
    sums = _sums(setup, texts)
    lengths = [len(text.ids) - text.prompt_length for text in texts]
    scores = [_score(sums[at], sums[at + 1], lengths[at], lengths[at + 1]) for at in range(0, len(texts), 2)]
    return AnswerLikeness(tuple(scores))


def _score(a: Tensor, b: Tensor, own: int, other: int) -> Ches:
    square, product = float(a @ a), float(a @ b)
    per_token = product / (own * other) - square / own**2
    return Ches(product - square, per_token, 1.0 + per_token * own**2 / square if square > 0 else 1.0)


def _sums(setup: Setup, texts: Sequence[Rendered]) -> Tensor:
    """[n, d] float64: last hidden states of each text, summed over the tokens that predict its answer."""
    decoder, device = setup.decoder, execution_device(setup.decoder)

    def run(batch: Batch) -> Tensor:
        ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **position_inputs(decoder.body, mask)}
        with torch.no_grad(), evaluation_mode(decoder.body):
            states = decoder.body(**inputs).last_hidden_state
        rows = []
        for place, row in enumerate(batch.rows):
            text = texts[row]
            rows.append(states[place, text.prompt_length - 1 : len(text.ids) - 1].double().sum(0).cpu())
        return torch.stack(rows)

    found: dict[int, Tensor] = {}
    for batch, rows in run_batches(batches(texts, setup.batch_size, pad_id=pad_token_id(setup.tokenizer)), run):
        found |= dict(zip(batch.rows, rows, strict=True))
    return torch.stack([found[row] for row in range(len(texts))])
