"""Interference: several vectors measured alone and together, with the cosines between their directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steerkit.errors import DataError, StrengthError, VectorFileError
from steerkit.evaluate.joint_effect import Effect, effects_of
from steerkit.evaluate.overlap import Overlap, orthogonalise, overlaps
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.methods._registry import default_strength
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Interference", "interference", "named"]


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
        strengths: one for each; None takes each vector's own, else its suggested one.
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
    given = [None] * len(listed) if strengths is None else strengths
    used = {
        name: vector.at(strength=_strength(name, vector) if strength is None else strength)
        for (name, vector), strength in zip(listed.items(), given, strict=True)
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
        for effect in effects_of(name, items, used, bent, scorer, seed)
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


def _strength(name: str, vector: SteeringVector) -> float:
    """What `steer` would take for this vector.

    Raises:
        StrengthError: one strength per row, which a set of items has no use for; or there is none.
    """
    if isinstance(vector.strength, tuple):
        raise StrengthError(f"{name}: got {len(vector.strength)} strengths, one per row; give one")
    return default_strength(vector) if vector.strength is None else vector.strength
