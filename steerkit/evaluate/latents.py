"""Which latents of a dictionary to steer by: those that tell two sides apart and write what they read.

Three ways to rank them:

    gap        share of positive texts in which a latent fires minus that of negative ones; chance is held off by q
    gradient   sum over answer tokens of f_k * (D_k . d margin / d h), mean over pairs: how much of the preference
               margin each latent carries, to first order, from one backward pass
    saif       share of pairs in which a latent fires on the positive text and not on the negative one; second-hand,
               see `steerkit.dictionary.selecting`

and, for those at the head, the output score (`steerkit.evaluate.output_score`): latents that tell sides apart often do
not write what they read, and those steer badly. Marks, Rager, Michaud, Belinkov, Bau, Mueller (2024), arXiv 2403.19647
(gradients of latents); Arad, Mueller, Belinkov (2025), arXiv 2505.20063 (output score).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from steerkit.activations import record
from steerkit.dictionary.dictionary import Dictionary
from steerkit.dictionary.fitness import Fitness, check_dictionary
from steerkit.dictionary.selecting import Correction, Gaps, activation_gap, saif_amounts, saif_sensitivity
from steerkit.errors import DataError
from steerkit.evaluate.attribution.gradients import products_of_texts
from steerkit.evaluate.attribution.slopes import differentiable
from steerkit.evaluate.output_score import LEAST, in_the_stream, output_scores
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Answer
from steerkit.maths.directions import coordinates
from steerkit.network.tap import locate
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["RANKINGS", "FoundLatent", "Latents", "find_latents", "latent_gradients"]

Ranking = Literal["gap", "gradient", "saif"]
RANKINGS = ("gap", "gradient", "saif")
_PUBLISHED = 10.0
"""How many times the usual strongest latent is written for the output score."""


@dataclass(frozen=True)
class FoundLatent:
    """One latent, and what is known of it.

    Attributes:
        latent: its number.
        share_gap, mean_gap: between the sides; see `steerkit.dictionary.selecting`.
        positive_share, negative_share: of the texts of either side in which it fires.
        p, q: of firing against side, and corrected for the number of latents.
        gradient: see `latent_gradients`; None where it was not asked for.
        saif: share of pairs; None where it was not asked for.
        amount: what SAIF adds, in the latent's own unit; None where it was not asked for.
        output_score: None at sites that the head cannot read.
        words: tokens that it stands for.
    """

    latent: int
    share_gap: float
    mean_gap: float
    positive_share: float
    negative_share: float
    p: float
    q: float
    gradient: float | None
    saif: float | None
    amount: float | None
    output_score: float | None
    words: tuple[str, ...]

    @property
    def writes(self) -> bool:
        """Whether its output score is enough, or not known."""
        return self.output_score is None or self.output_score >= LEAST


@dataclass(frozen=True, eq=False)
class Latents:
    """Latents ranked on a contrast set.

    Attributes:
        rows: the best, in order.
        ranking: by what.
        tested: latents that fire on some texts and not on all; `q` is corrected for so many.
        texts: how many there are on either side.
        fitness: of the dictionary on neutral texts of the model.
        dictionary: which one.
    """

    rows: tuple[FoundLatent, ...]
    ranking: Ranking
    tested: int
    texts: tuple[int, int]
    fitness: Fitness
    dictionary: Dictionary

    def best(self, count: int) -> list[FoundLatent]:
        """The first that write what they read.

        Args:
            count: how many at the most.

        Raises:
            DataError: none does.
        """
        found = [row for row in self.rows if row.writes][:count]
        if not found:
            raise DataError(
                f"latents: none of the first {len(self.rows)} has an output score of {LEAST:g} or more, so none is "
                "chosen; look at more of them, or name those that you want"
            )
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "dictionary": {**self.dictionary.facts(), "latents": self.dictionary.num_latents},
            "ranking": self.ranking,
            "tested": self.tested,
            "texts": list(self.texts),
            "fitness": {**asdict(self.fitness), "explained": self.fitness.explained},
            "latents": [{**asdict(row), "words": list(row.words), "writes": row.writes} for row in self.rows],
        }


def find_latents(
    setup: Setup,
    dictionary: Dictionary,
    *,
    ranking: Ranking = "gap",
    readout: str | int = "last",
    top: int = 20,
    correction: Correction = "benjamini-hochberg",
    beta: float = 0.0,
) -> Latents:
    """Rank a dictionary's latents on a contrast set, and score the best by what they write.

    Args:
        setup: model, tokenizer and the contrast set.
        dictionary: trained on this model.
        ranking: by what.
        readout: which token of a text is read, see `steerkit.record`; a mean over tokens is no activation of one, so
            that latents of it are less sparse than those of its tokens.
        top: how many are kept.
        correction: for the number of latents.
        beta: of SAIF's amounts, in standard deviations.

    Returns:
        The latents, the best first.

    Raises:
        DataError: there is no data; or, by gradient, no two answers to each prompt; or, by SAIF, no pairs.
        VectorMismatchError: the dictionary is of another width than its site.
        SiteError: the model lacks the site.
        ModelError: by gradient, none goes through the model.
    """
    data = setup.data
    if data is None:
        raise DataError("latents: there is no contrast set to tell them by; give data")
    if ranking == "saif" and not data.paired:
        raise DataError("latents: SAIF compares each text with itself without the instruction; give pairs")
    fitness = check_dictionary(setup.model, setup.tokenizer, dictionary)
    how: dict[str, Any] = {"batch_size": setup.batch_size, "chat_template_kwargs": setup.chat_template_kwargs}
    acts = record(setup.model, setup.tokenizer, data, [dictionary.site], readout=readout, **how)
    on, off = (dictionary.encode(next(iter(side.values()))) for side in (acts.positive, acts.negative))
    gaps = activation_gap(on, off, correction=correction)
    gradient = latent_gradients(setup, dictionary) if ranking == "gradient" else None
    saif = saif_sensitivity(on, off) if ranking == "saif" else None
    ranked = _ranked(gaps, gradient, saif)[:top]
    amounts = saif_amounts(on, ranked, beta) if saif is not None else [None] * len(ranked)
    written = _written(setup, dictionary, ranked, fitness)
    rows = [
        _row(latent, gaps, gradient, saif, amount, *told)
        for latent, amount, told in zip(ranked, amounts, written, strict=True)
    ]
    return Latents(tuple(rows), ranking, gaps.tested, (len(on), len(off)), fitness, dictionary)


def _ranked(gaps: Gaps, gradient: Tensor | None, saif: Tensor | None) -> list[int]:
    """Latents from the best on; a stable sort on top of the order by gap."""
    order = gaps.order()
    keys = gradient if gradient is not None else saif
    return order if keys is None else sorted(order, key=lambda latent: -float(keys[latent]))


def _written(
    setup: Setup, dictionary: Dictionary, latents: list[int], fitness: Fitness
) -> list[tuple[float | None, tuple[str, ...]]]:
    """Output score and words of each latent; nothing where the head cannot read what is written."""
    (site,) = locate(setup.model, [dictionary.site])
    if not in_the_stream(site) or not latents:
        return [(None, ())] * len(latents)
    rows = dictionary.rows(latents).decoder
    peak = fitness.peak if fitness.peak > 0 else 1.0
    amounts = torch.full((len(rows),), _PUBLISHED * peak, dtype=torch.float32)
    found = output_scores(setup.model, setup.tokenizer, site, rows, amounts=amounts)
    return list(zip(found.scores.tolist(), (words[:5] for words in found.words), strict=True))


def _row(
    latent: int,
    gaps: Gaps,
    gradient: Tensor | None,
    saif: Tensor | None,
    amount: float | None,
    score: float | None,
    words: tuple[str, ...],
) -> FoundLatent:
    own = ("share_gap", "mean_gap", "positive_share", "negative_share", "p", "q")
    return FoundLatent(
        latent=latent,
        **{name: float(getattr(gaps, name)[latent]) for name in own},
        gradient=None if gradient is None else float(gradient[latent]),
        saif=None if saif is None else float(saif[latent]),
        amount=amount,
        output_score=score,
        words=words,
    )


def latent_gradients(setup: Setup, dictionary: Dictionary, *, scope: str = "response") -> Tensor:
    """How much of the preference margin each latent carries, to first order.

    Args:
        setup: model, tokenizer and pairs with two answers to each prompt.
        dictionary: trained on this model.
        scope: which tokens count.

    Returns:
        [k] float32: mean over pairs of the sum over tokens of `f_k * (D_k . gradient)`.

    Raises:
        DataError: a pair lacks an answer or has two prompts.
        ModelError: no gradient goes through the model.
    """
    dictionary.check(setup.model)
    scorer = differentiable("preference_margin")
    (site,) = locate(setup.model, [dictionary.site])
    place = SteeringVector(
        method="caa",
        tensors={f"{site}/direction": torch.ones(dictionary.width, dtype=torch.float32)},
        sites=(site,),
        edit="add",
        scope=scope,
        unit="paper",
        widths={site: dictionary.width},
        **model_facts(setup.model, setup.tokenizer),
    )

    def score(answer: Answer) -> Tensor:
        return scorer.of_text(answer)[None]

    told = partial(_carried, dictionary, dictionary.rows(range(dictionary.num_latents)).decoder)
    _, found = products_of_texts(setup, scorer.texts(setup), score, place, told, dictionary.num_latents)
    return scorer.of_items(found[:, 0]).mean(dim=-1)


def _carried(dictionary: Dictionary, decoder: Tensor, h: Tensor, gradient: Tensor) -> Tensor:
    """[k, b]: `f_k * (D_k . gradient)` summed over the tokens of each row, which are taken one by one."""
    turned = decoder.to(gradient.device).T
    rows = [
        (dictionary.encode(acts) * coordinates(slopes, turned)).sum(dim=0)
        for acts, slopes in zip(h, gradient, strict=True)
    ]
    return torch.stack(rows, dim=-1)
