"""The vectors that are measured: those that ship for a model, or the same ones made on it first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from steerkit._support.shipped import recipes, shipped_vectors, traits
from steerkit.errors import SteerError, UnknownNameError, unknown_name
from steerkit.evaluate.suggesting import with_suggestion
from steerkit.evidence.questions import QuestionSet
from steerkit.methods._registry import default_strength, is_gated, method_of
from steerkit.persona.pipeline import extract as extract_trait
from steerkit.persona.traits import TraitSpec
from steerkit.recipe.recipe import Recipe
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Subject", "behaviour_of", "names_of", "subject", "usable"]

logger = logging.getLogger(__name__)
TRAIT = "-persona"


@dataclass(frozen=True, eq=False)
class Subject:
    """One vector as it is measured.

    Attributes:
        name: of the vector.
        behaviour: that it brings about.
        vector: the vector.
        strength: at which it is measured, in its own unit.
        two_way: whether minus the strength means something; with a gate, or a method whose strength is a share, not.
        asked: which questions.
    """

    name: str
    behaviour: str
    vector: SteeringVector
    strength: float
    two_way: bool
    asked: QuestionSet


def names_of(only: Sequence[str], *, with_traits: bool) -> list[str]:
    """The vectors to measure: one of every recipe and trait, whether it ships for the model or has to be made.

    Args:
        only: names of vectors; none takes all.
        with_traits: those of traits too.

    Raises:
        UnknownNameError: a name that is no vector's.
    """
    known = [*recipes(), *(f"{name}{TRAIT}" for name in traits())]
    for name in only:
        if name not in known:
            raise unknown_name("vector", name, known)
    return list(only) or [name for name in known if with_traits or not name.endswith(TRAIT)]


def behaviour_of(name: str) -> str:
    """What a vector brings about.

    Args:
        name: of a recipe, or of a trait's vector.
    """
    return name.removesuffix(TRAIT) if name.endswith(TRAIT) else Recipe.load(recipes()[name]).behaviour


def subject(
    name: str, alias: str, model: nn.Module, tokenizer: Any, folder: Path, *, batch_size: int = 16, **told: Any
) -> Subject:
    """One vector, made on the model first where none ships for it.

    Args:
        name: of the vector.
        alias: of the model.
        model: the model.
        tokenizer: its tokenizer.
        folder: where what is made goes.
        batch_size: rows per pass of a fit.
        told: how a trait's extraction tells its progress (`bar`, `line`).

    Raises:
        SteerError: it cannot be made on this model, or has no strength.
    """
    vector = _vector(name, alias, model, tokenizer, folder, batch_size, told)
    if name.endswith(TRAIT):
        behaviour, strength, low = name.removesuffix(TRAIT), None, -1.0
    else:
        recipe = Recipe.load(recipes()[name])
        behaviour, strength = recipe.behaviour, recipe.apply.strength
        low = -1.0 if recipe.apply.range is None else recipe.apply.range[0]
    gated = is_gated(vector)
    asked: QuestionSet = "questions" if behaviour != "refusal" else "requests" if gated else "harmful"
    is_share = method_of(vector).natural_strength is not None
    return Subject(
        name,
        behaviour,
        vector,
        _strength(model, tokenizer, vector, strength, batch_size),
        low < 0 and not gated and not is_share,
        asked,
    )


def _strength(model: nn.Module, tokenizer: Any, vector: SteeringVector, recipe: float | None, batch_size: int) -> float:
    """What the file suggests, the method's own, a measured one, or the recipe's, in that order."""
    for found in (vector, with_suggestion(model, tokenizer, vector, batch_size=batch_size)):
        try:
            return default_strength(found)
        except SteerError:
            continue
    if recipe is None:
        return default_strength(vector)
    return recipe


def _vector(
    name: str, alias: str, model: nn.Module, tokenizer: Any, folder: Path, batch_size: int, told: Any
) -> SteeringVector:
    if f"{alias}/{name}" in shipped_vectors(alias):
        return SteeringVector.load(f"{alias}/{name}")
    if name.endswith(TRAIT):
        trait = name.removesuffix(TRAIT)
        spec = TraitSpec.load(traits()[trait])
        return extract_trait(model, tokenizer, spec, folder / trait, batch_size=batch_size, **told).vector
    file = folder / f"{name}.safetensors"
    if file.is_file():
        return SteeringVector.load(file)
    vector = Recipe.load(recipes()[name]).extract(model, tokenizer, batch_size=batch_size)
    vector.save(file)
    return vector


def usable(names: Sequence[str], make: Callable[[str], Subject]) -> Iterator[Subject]:
    """The vectors that can be had; of the others the log says why.

    Args:
        names: of vectors.
        make: from a name to the vector.

    Yields:
        One after the other.
    """
    for name in names:
        try:
            yield make(name)
        except UnknownNameError:
            raise
        except SteerError as error:
            logger.warning("%s is not measured: %s", name, error)
