"""Pairs whose two answers are nearly one thing to the model, by the centred hidden embedding similarity (CHES).

    a        = sum of the last hidden states h over the tokens that predict the answer (the prompt's last token, and the
               answer's without its last), T of them
    CHES     = <a+, a-> - |a+|^2                              0 for two equal answers
    per token  <a+, a-> / (T+ T-)  -  |a+|^2 / T+^2           the same without the answers' lengths

The higher it is, the less the pair teaches: preference training on it pushes both answers down. It orders the pairs of
one set. Where it is 0 two answers need not be equal (the negative one may be longer in the positive one's direction),
and all answers share most of what they are, so no number of it says "nearly one thing". The score of a pair read both
ways round does: per token, its sum is minus the squared distance |m+ - m-|^2 of the mean states m = a / T. So

    apart = |m+ - m-|^2 / median over answers of different pairs of |m+_i - m-_j|^2

is 0 for equal answers and about 1 for answers that have nothing to do with each other; of two answers of one token each
it says nothing, for both are predicted from the same state. Last hidden states are those the
output matrix reads, behind the final norm.

Razin et al. (2024), "Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization", arXiv
2410.08847. Where this file departs: the released length-normalised score divides by the padded length of the batch;
here each row's own length counts.
"""

from __future__ import annotations

import math
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

__all__ = ["ALIKE", "AnswerLikeness", "Ches", "answer_likeness", "ches"]

ALIKE = 0.03
"""How far apart two answers lie at the most that are called nearly one thing.

On SmolLM2-135M answers that differ in a comma have 0.02, "thank you" and "thanks" 0.05; shipped pairs have medians of
0.1 (optimism, where a word or two differ) to 0.4 (refusal).
"""


class Ches(NamedTuple):
    """The score of one pair.

    Attributes:
        total: with the answers' lengths.
        per_token: without.
    """

    total: float
    per_token: float


@dataclass(frozen=True)
class AnswerLikeness:
    """How alike the two answers of each pair are to the model.

    Attributes:
        scores: one for each pair, in their order.
        apart: how far the two answers of each lie apart, in units of answers of different pairs; nan where both are one
            token long.
    """

    scores: tuple[Ches, ...]
    apart: tuple[float, ...]

    def alike(self, limit: float = ALIKE) -> tuple[int, ...]:
        """Places of the pairs whose answers lie no further apart than that, the most alike first.

        Args:
            limit: 0 names equal answers only.
        """
        found = [place for place, apart in enumerate(self.apart) if apart <= limit]
        return tuple(sorted(found, key=lambda place: self.apart[place]))

    def as_json(self) -> list[dict[str, Any]]:
        """Plain data, one row a pair."""
        rows = zip(self.scores, self.apart, strict=True)
        return [{"pair": place, **score._asdict(), "apart": apart} for place, (score, apart) in enumerate(rows)]


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
    means = sums / torch.tensor(lengths, dtype=torch.double)[:, None]
    apart = _apart(means[0::2], means[1::2]).tolist()
    for place in range(len(apart)):
        if lengths[2 * place] == lengths[2 * place + 1] == 1:
            apart[place] = math.nan
    return AnswerLikeness(tuple(scores), tuple(apart))


def _score(a: Tensor, b: Tensor, own: int, other: int) -> Ches:
    square, product = float(a @ a), float(a @ b)
    return Ches(product - square, product / (own * other) - square / own**2)


def _apart(positive: Tensor, negative: Tensor) -> Tensor:
    """[n] squared distances of the pairs' means [n, d], over the median one between answers of different pairs."""
    distances = torch.cdist(positive, negative).square()
    own = distances.diagonal()
    others = distances[~torch.eye(len(own), dtype=torch.bool)]
    typical = float(others.median()) if len(others) else 0.0
    return own / typical if typical > 0 else torch.where(own > 0, 1.0, 0.0)


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
