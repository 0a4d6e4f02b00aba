"""From the terms of a composition to vectors that can be applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from steerkit._support.shipped import vector_path
from steerkit.composition.terms import Composition, Term
from steerkit.errors import FitError, SteerError
from steerkit.maths.directions import unit
from steerkit.methods._registry import default_strength, method_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["bound", "described", "without"]

_NOTHING = 1e-5  # of a direction's length: what is left when a direction is projected off itself, but for rounding


def bound(terms: Sequence[Term], known: Mapping[str, SteeringVector], model: str = "") -> list[SteeringVector]:
    """The vectors of terms, each as its term wants it applied.

    Args:
        terms: of a composition.
        known: vectors by name, which come before files and shipped vectors of that name.
        model: alias of the model in use, whose shipped vectors come first.

    Raises:
        SteerError: a name that nothing answers to, a file that is no vector, or a term that its vector cannot do.
    """

    def load(name: str) -> SteeringVector:
        return known[name] if name in known else SteeringVector.load(vector_path(name, model))

    made = []
    for number, term in enumerate(terms, start=1):
        try:
            vector = load(term.vector)
            if term.without is not None:
                vector = without(vector, load(term.without))
            strength = -default_strength(vector) if term.minus else term.strength
            vector = vector.at(strength=strength, scope=term.scope_on(vector), unit=term.unit, fade=term.fade)
        except SteerError as error:
            where = f"term {number}" if term.column is None else f"column {term.column}"
            raise type(error)(f"steering, {where}: {error}") from None
        # What is read says its own place.
        when = None if term.when is None else term.when.bound(load)
        hold = None if term.hold is None else term.hold.bound(load)
        made.append(vector.at(when=when, hold=hold))
    return made


def without(vector: SteeringVector, other: SteeringVector) -> SteeringVector:
    """A vector whose directions have nothing left of another's: h' = v - (v . u) u, u = w / |w|.

    Args:
        vector: the vector; directions [d].
        other: what is projected off, a direction [d] at each of the vector's sites.

    Raises:
        FitError: one of both has no single direction at a site of the vector, or nothing is left.
    """
    changed = {f"{site}/direction": _left(site, vector, other) for site in vector.sites}
    note = {**vector.extra, "without": other.digest}
    return replace(vector, tensors={**vector.tensors, **changed}, held_out={}, extra=note)


def _left(site: Site, vector: SteeringVector, other: SteeringVector) -> Tensor:
    """What is left [d] of a direction without its part along another."""
    own, off = _direction(vector, site), _direction(other, site)
    if own is None or off is None:
        which = vector if own is None else other
        acts = ", ".join(map(str, which.sites))
        raise FitError(
            f"{site}: the vector of {which.method} at {acts} has no single direction there, so nothing can be "
            "projected off; take two vectors that act at the same sites"
        )
    along = unit(off.double())
    left = own.double() - (own.double() @ along) * along
    if not float(left.norm()) > _NOTHING * float(own.double().norm()):
        raise FitError(f"{site}: both directions are the same, so nothing is left; leave one out")
    return left.to(own.dtype)


def _direction(vector: SteeringVector, site: Site) -> Tensor | None:
    """The single direction of a vector at a site; None where it has none."""
    return method_of(vector).direction(vector.params(site)) if site in vector.sites else None


def described(terms: Sequence[Term], vectors: Sequence[SteeringVector]) -> Composition:
    """The composition that vectors are, every strength written out.

    Args:
        terms: that name the vectors.
        vectors: of these, as they are applied, none with strengths per row.

    Raises:
        StrengthError: a vector has no strength and suggests none, or one per row.
    """
    found = []
    for term, vector in zip(terms, vectors, strict=True):
        strength: Any = vector.strength
        if strength is None and vector.hold is None:
            strength = default_strength(vector)
        scope = term.scope if term.window or not vector.own_scope else vector.scope
        counted = vector.unit if vector.own_unit else None
        found.append(replace(term, strength=strength, minus=False, unit=counted, scope=scope))
    return Composition(tuple(found))
