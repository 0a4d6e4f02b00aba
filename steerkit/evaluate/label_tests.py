"""Statistics of one feature on two sides: area under the curve and p, by exact and permutation tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from steerkit.maths.probes import auc

__all__ = ["Compared", "compare_numbers", "compare_words"]

DRAWS = 20_000
_CHUNK = 1000


class Compared(NamedTuple):
    """A feature's values on both sides, compared.

    Attributes:
        auc: how often the positive side has more.
        p: how often chance alone separates as well.
        tied: whether some values of both sides are the same.
    """

    auc: float
    p: float
    tied: bool


def compare_numbers(positive: Sequence[float], negative: Sequence[float], *, paired: bool) -> Compared | None:
    """AUC and p of numbers; None where the sides have the same.

    Args:
        positive: one number per item.
        negative: one number per item.
        paired: whether items of the same place belong together.
    """
    from scipy import stats  # here, because it takes half a second to import

    if paired:
        signs = [(plus > minus) - (plus < minus) for plus, minus in zip(positive, negative, strict=True)]
        wins, losses = signs.count(1), signs.count(-1)
        if wins + losses == 0:
            return None
        p = float(stats.binomtest(wins, wins + losses).pvalue)
        return Compared((wins + signs.count(0) / 2) / len(signs), p, signs.count(0) > 0)
    if sorted(positive) == sorted(negative) or len({*positive, *negative}) == 1:
        return None
    test = stats.mannwhitneyu(positive, negative, alternative="two-sided")
    tied = bool(set(positive) & set(negative))
    sides = (torch.tensor(side, dtype=torch.double) for side in (positive, negative))
    return Compared(auc(*sides), float(test.pvalue), tied)


def compare_words(positive: Sequence[str], negative: Sequence[str], *, paired: bool) -> Compared | None:
    """AUC and p of predictions from the other items; None where the sides have the same words.

    Args:
        positive: one word per item.
        negative: one word per item.
        paired: whether items of the same place belong together.
    """
    if list(positive) == list(negative) if paired else sorted(positive) == sorted(negative):
        return None
    index = {word: number for number, word in enumerate(sorted({*positive, *negative}))}
    plus, minus = (torch.tensor([index[word] for word in side], dtype=torch.long) for side in (positive, negative))
    generator = torch.Generator().manual_seed(0)
    as_good, observed = 0, math.nan
    for start in range(0, DRAWS, _CHUNK):
        if paired:
            labels = torch.randint(2, (_CHUNK, len(plus)), generator=generator).double() * 2 - 1
            labels[0] = 1.0 if start == 0 else labels[0]
            aucs = _pair_aucs(plus, minus, labels)
        else:
            order = torch.rand(_CHUNK, len(plus) + len(minus), generator=generator, dtype=torch.float32).argsort(dim=1)
            labels = (order < len(plus)).double()
            labels[0] = (torch.arange(labels.shape[1]) < len(plus)).double() if start == 0 else labels[0]
            aucs = _side_aucs(torch.cat([plus, minus]), labels)
        observed = float(aucs[0]) if start == 0 else observed
        as_good += int((aucs > observed - 1e-9).sum())
    return Compared(observed, as_good / DRAWS, tied=True)


def _pair_aucs(plus: Tensor, minus: Tensor, signs: Tensor) -> Tensor:
    """AUC [k] of each row of swaps: signs [k, n], -1 where the pair's words, plus [n] and minus [n], change sides."""
    count = int(torch.maximum(plus.max(), minus.max())) + 1
    rows = one_hot(plus, count).double() - one_hot(minus, count).double()
    margins, own = signs @ rows, signs * (plus != minus)
    said = (margins[:, plus] - own).sign() - (margins[:, minus] + own).sign()
    return ((signs * said).sign().mean(dim=1) + 1) / 2


def _side_aucs(words: Tensor, labels: Tensor) -> Tensor:
    """AUC [k] of each row of labels [k, n], 1 for the positive side, for words [n]."""
    rows = one_hot(words).double()
    positive, every = (labels @ rows)[:, words], rows.sum(dim=0)[words]
    sizes = labels.sum(dim=1, keepdim=True), (1 - labels).sum(dim=1, keepdim=True)
    # Shares and not counts, so that the larger of two unequal sides is not predicted for its size.
    shares = (positive - labels) / (sizes[0] - labels).clamp_min(1)
    others = (every - positive - (1 - labels)) / (sizes[1] - (1 - labels)).clamp_min(1)
    said = (shares - others).sign()
    wins = torch.zeros(len(labels), dtype=torch.double)
    for value in (-1, 0, 1):
        here = (labels * (said == value)).sum(dim=1)
        below, level = (((1 - labels) * chosen).sum(dim=1) for chosen in (said < value, said == value))
        wins += here * (below + level / 2)
    return wins / sizes[0][:, 0] / sizes[1][:, 0]
