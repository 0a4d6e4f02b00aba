"""Several vectors at once: how alike their directions are, and whether their effects add up.

    change(v)    = score under v - score of the unsteered model, item by item
    interaction  = change(all together) - sum of change(v) over the vectors, item by item

An interaction whose interval leaves out 0 says that together the vectors do something else than the sum. Vectors that
share a site and a direction push each other along; there they can be made orthogonal, with their lengths kept:

    Gram and Schmidt   each one orthogonal to those before it; the first stays as it is, the order matters
    Loewdin            all of them bent as little as possible, none preferred: (U U^T)^(-1/2) U of the unit rows U

Loewdin (1950), "On the non-orthogonality problem connected with the use of atomic wave functions". On the log scale
(perplexity) changes are ratios, their sum is a product, and an interaction of 1 is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from steerkit.errors import DataError, FitError, StrengthError, VectorFileError
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.scoring import scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.maths.directions import orthonormalise, unit
from steerkit.methods._registry import default_strength, method_of
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Effect", "Interference", "Overlap", "interference", "named", "orthogonalise", "overlaps"]

# Unit rows whose smallest singular value is below this are one another's sum but for rounding.
_DEPENDENT = 1e-5


@dataclass(frozen=True)
class Overlap:
    """How alike two vectors are.

    Attributes:
        first: name of one.
        second: name of the other.
        cosines: cosine of their directions at each site they share; empty where they share none.
    """

    first: str
    second: str
    cosines: Mapping[Site, float]

    @property
    def note(self) -> str | None:
        """Why there is no cosine; None where there is."""
        return None if self.cosines else f"{self.first} and {self.second} have no direction at a site they share"


@dataclass(frozen=True)
class Effect:
    """What the vectors do to one figure of one set of items, alone and together.

    Attributes:
        data: name of the items.
        name: name of the figure.
        column: what the figure is.
        alone: per vector the change it makes by itself.
        joint: the change they make together.
        added: the sum of the changes that they make alone.
        interaction: joint minus added, paired by item.
        orthogonal: the change that the orthogonalised vectors make together; None unless asked for.
        items: items scored in every trial; the others count nowhere.
        failures: the others.
    """

    data: str
    name: str
    column: Column
    alone: Mapping[str, Estimate]
    joint: Estimate
    added: Estimate
    interaction: Estimate
    orthogonal: Estimate | None
    items: int
    failures: int = 0

    @property
    def interferes(self) -> bool:
        """Whether the interval of the interaction leaves out what no interaction would be."""
        none = 1.0 if self.column.scale == "log" else 0.0
        return not self.interaction.low <= none <= self.interaction.high

    def as_row(self) -> dict[str, Any]:
        """Plain data for JSON; an end of an interval that is not finite is null."""
        return {
            "data": self.data,
            "score": self.name,
            "unit": self.column.unit,
            "alone": {name: _plain(estimate) for name, estimate in self.alone.items()},
            "sum": _plain(self.added),
            "joint": _plain(self.joint),
            "interaction": _plain(self.interaction),
            "interferes": self.interferes,
            "orthogonal": None if self.orthogonal is None else _plain(self.orthogonal),
            "items": self.items,
            "failures": self.failures,
        }


@dataclass(frozen=True)
class Interference:
    """Several vectors used together.

    Attributes:
        vectors: by name, with the strengths they were tried at.
        overlaps: every pair of them.
        effects: every figure on every set of items.
    """

    vectors: Mapping[str, SteeringVector]
    overlaps: tuple[Overlap, ...]
    effects: tuple[Effect, ...] = field(default=())

    def orthogonalised(self, *, symmetric: bool = False) -> dict[str, SteeringVector]:
        """The vectors made orthogonal where they share a site.

        Args:
            symmetric: bend all alike (Loewdin) instead of each against those before it (Gram and Schmidt).

        Raises:
            FitError: they are linearly dependent, or one has no direction at a shared site.
        """
        return dict(zip(self.vectors, orthogonalise(list(self.vectors.values()), symmetric=symmetric), strict=True))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "vectors": {
                name: {"method": vector.method, "strength": vector.strength, "sites": [str(s) for s in vector.sites]}
                for name, vector in self.vectors.items()
            },
            "cosines": [
                {
                    "first": overlap.first,
                    "second": overlap.second,
                    "sites": {str(site): value for site, value in overlap.cosines.items()},
                    "note": overlap.note,
                }
                for overlap in self.overlaps
            ],
            "effects": [effect.as_row() for effect in self.effects],
        }


def interference(
    setup: Setup,
    vectors: Mapping[str, SteeringVector] | Sequence[SteeringVector],
    strengths: Sequence[float] | None = None,
    *,
    scorers: Sequence[str | Scorer] = ("preference_margin",),
    data: Mapping[str, ContrastSet] | None = None,
    measure_orthogonal: bool = False,
    symmetric: bool = False,
    seed: int = 0,
) -> Interference:
    """Compare what several vectors do together with what each does alone.

    Args:
        setup: model and tokenizer, and the items where `data` gives none.
        vectors: two or more, by name; in a list they are called by their recipes.
        strengths: one for each; None takes each vector's own, else its suggested one, else 1.
        scorers: what is measured.
        data: held-out items by name, such as one set for each vector's behaviour; None takes the setup's own, and
            without any only directions are compared.
        measure_orthogonal: measure the orthogonalised vectors together too.
        symmetric: orthogonalise them by Loewdin's way.
        seed: fixes the intervals.

    Returns:
        Cosines and effects.

    Raises:
        DataError: fewer than two vectors, other numbers of strengths, or the items lack what a scorer needs.
        FitError: vectors that should be made orthogonal are linearly dependent.
        VectorMismatchError: a vector does not belong to the model.
    """
    listed = named(vectors)
    if strengths is not None and len(strengths) != len(listed):
        raise DataError(f"{len(strengths)} strengths for {len(listed)} vectors; give as many, or none")
    doses = [None] * len(listed) if strengths is None else strengths
    used = {
        name: vector.at(strength=_strength(name, vector) if dose is None else dose)
        for (name, vector), dose in zip(listed.items(), doses, strict=True)
    }
    for vector in used.values():
        vector.check(setup.model, setup.tokenizer)
    bent = orthogonalise(list(used.values()), symmetric=symmetric) if measure_orthogonal else None
    sets: dict[str, Setup] = {}
    if data is not None:
        sets = {name: replace(setup, data=items) for name, items in data.items()}
    elif setup.data is not None or setup.prompts is not None:
        sets = {"items": setup}
    chosen = [scorer_of(scorer) for scorer in scorers]
    effects = [
        effect
        for name, items in sets.items()
        for scorer in chosen
        for effect in _effects(name, items, used, bent, scorer, seed)
    ]
    return Interference(used, overlaps(used), tuple(effects))


def named(vectors: Mapping[str, SteeringVector] | Sequence[SteeringVector]) -> dict[str, SteeringVector]:
    """Vectors by name; those of a list are called by their recipes, else by their methods.

    Args:
        vectors: two or more.

    Raises:
        DataError: fewer than two.
        VectorFileError: something else than a vector.
    """
    found: dict[str, SteeringVector] = {}
    items = vectors.items() if isinstance(vectors, Mapping) else [(None, vector) for vector in vectors]
    for given, vector in items:
        if not isinstance(vector, SteeringVector):
            raise VectorFileError(f"got {vector!r} for a vector; load a file with SteeringVector.load(path)")
        name, number = given or vector.recipe or vector.method, 2
        while name in found:
            name, number = f"{given or vector.recipe or vector.method} {number}", number + 1
        found[name] = vector
    if len(found) < 2:
        raise DataError(f"interference: got {len(found)} vectors; give two or more")
    return found


def overlaps(vectors: Mapping[str, SteeringVector]) -> tuple[Overlap, ...]:
    """Cosines between directions, for every pair of vectors at every site both act at.

    Args:
        vectors: by name. Signs are those of the stored directions, whatever the strengths.
    """
    found = []
    for first, second in combinations(vectors, 2):
        cosines: dict[Site, float] = {}
        for site in vectors[first].sites:
            if site not in vectors[second].sites:
                continue
            one, other = (method_of(vectors[name]).direction(vectors[name].params(site)) for name in (first, second))
            if one is None or other is None or not (bool(one.any()) and bool(other.any())):
                continue
            one, other = unit(one.double()), unit(other.double())
            cosines[site] = float(torch.dot(one, other))
        found.append(Overlap(first, second, cosines))
    return tuple(found)


def orthogonalise(vectors: Sequence[SteeringVector], *, symmetric: bool = False) -> tuple[SteeringVector, ...]:
    """Make directions orthogonal at every site that several vectors share; their lengths are kept.

    Args:
        vectors: in order of precedence.
        symmetric: bend all alike (Loewdin) instead of each against those before it (Gram and Schmidt).

    Returns:
        The vectors in the same order, complete; figures measured on held-out items are dropped from changed ones.

    Raises:
        FitError: the directions at a site are linearly dependent, or a vector has none there.
    """
    changed: list[dict[str, Tensor]] = [{} for _ in vectors]
    for site in dict.fromkeys(site for vector in vectors for site in vector.sites):
        group = [place for place, vector in enumerate(vectors) if site in vector.sites]
        if len(group) < 2:
            continue
        rows = torch.stack([_only_direction(vectors[place], site) for place in group])
        try:
            turned = _turned(rows, symmetric)
        except FitError as error:
            raise FitError(f"{site}: {error}") from None
        # The first of Gram and Schmidt's stays to the bit.
        for place, row in list(zip(group, turned, strict=True))[0 if symmetric else 1 :]:
            kept = vectors[place].params(site)["direction"]
            changed[place][f"{site}/direction"] = row.to(kept.dtype)
    note = {"orthogonalised": "symmetric" if symmetric else "in order", "of": [one.digest for one in vectors]}
    return tuple(
        replace(vector, tensors={**vector.tensors, **tensors}, held_out={}, extra={**vector.extra, **note})
        if tensors
        else vector
        for vector, tensors in zip(vectors, changed, strict=True)
    )


def _only_direction(vector: SteeringVector, site: Site) -> Tensor:
    direction = vector.params(site).get("direction")
    if direction is None or direction.dim() != 1 or not bool(direction.any()):
        raise FitError(f"{site}: a vector of {vector.method} has no single direction there to be made orthogonal")
    return direction.double()


def _turned(rows: Tensor, symmetric: bool) -> Tensor:
    """Orthogonal rows [k, d] of the lengths of the rows given."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    units = unit(rows)
    left, singular, right = torch.linalg.svd(units, full_matrices=False)
    if len(units) > units.shape[1] or float(singular[-1]) < _DEPENDENT:
        raise FitError("the directions are linearly dependent; drop one of the vectors")
    # With U = left S right, (U U^T)^(-1/2) U is left right.
    turned: Tensor = left @ right if symmetric else orthonormalise(units).double()
    return turned * length


def _strength(name: str, vector: SteeringVector) -> float:
    """What `steer` would take for this vector.

    Raises:
        StrengthError: one strength per row, which a set of items has no use for; or there is none.
    """
    if isinstance(vector.strength, tuple):
        raise StrengthError(f"{name}: got {len(vector.strength)} strengths, one per row; give one")
    return default_strength(vector) if vector.strength is None else vector.strength


def _effects(
    data: str,
    setup: Setup,
    vectors: Mapping[str, SteeringVector],
    bent: Sequence[SteeringVector] | None,
    scorer: Scorer,
    seed: int,
) -> list[Effect]:
    """Every column of one scorer on one set of items."""
    baseline = None if scorer.against_baseline else scorer.score(setup.baseline)
    alone = {name: scorer.score(setup.trial(vector)) for name, vector in vectors.items()}
    joint = scorer.score(setup.trial(list(vectors.values())))
    orthogonal = None if bent is None else scorer.score(setup.trial(list(bent)))
    found = []
    for name, column in scorer.columns.items():
        before = None if baseline is None else baseline[name]
        changes = {one: _change(scores[name], before, column.neutral) for one, scores in alone.items()}
        together = _change(joint[name], before, column.neutral)
        added = torch.stack(list(changes.values())).sum(dim=0)
        after = None if orthogonal is None else _change(orthogonal[name], before, column.neutral)
        # An item counts everywhere or nowhere, or the parts would not add up.
        lost = torch.isnan(added + together + (0 if after is None else after))
        scored = joint[name]
        weights = scored.weights if isinstance(scored, Weighted) else None

        def estimate(values: Tensor, lost: Tensor = lost, weights: Tensor | None = weights) -> Estimate:
            return interval(values.masked_fill(lost, math.nan), weights=weights, seed=seed)

        shown = Estimate.exp if column.scale == "log" else _same
        found.append(
            Effect(
                data=data,
                name=name,
                column=column,
                alone={one: shown(estimate(values)) for one, values in changes.items()},
                joint=shown(estimate(together)),
                added=shown(estimate(added)),
                interaction=shown(estimate(together - added)),
                orthogonal=None if after is None else shown(estimate(after)),
                items=int((~lost).sum()),
                failures=int(lost.sum()),
            )
        )
    return found


def _same(estimate: Estimate) -> Estimate:
    return estimate


def _change(after: Tensor | Weighted, before: Tensor | Weighted | None, neutral: float = 0.0) -> Tensor:
    """Per item the change to the unsteered model [n]; a scorer that compares by itself gives it already.

    Raises:
        DataError: the scorer gave other items the second time.
    """
    values = (after.values if isinstance(after, Weighted) else after).detach().cpu().double()
    if before is None:
        return values - neutral
    base = (before.values if isinstance(before, Weighted) else before).detach().cpu().double()
    if values.shape != base.shape:
        raise DataError(f"a scorer gave {len(values)} items under steering and {len(base)} without; give the same")
    return values - base


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: end if math.isfinite(end) else None for name, end in estimate._asdict().items()}
