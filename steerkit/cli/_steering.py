"""Which vectors a command applies: files one by one, or a composition in one line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

if TYPE_CHECKING:
    from steerkit.composition.terms import Composition, Term
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Chosen", "SteeringOption", "check_chosen", "chosen", "composition_of"]

SteeringOption = Annotated[
    str | None,
    typer.Option(
        "--steering",
        metavar="EXPR",
        help="Vectors in one line, such as 'optimism-caa*1.5 - pirate-persona[8:40]'; or a .json, .txt or recipe file.",
    ),
]


class Chosen(NamedTuple):
    """Vectors with the terms that name them, as a command applies them."""

    terms: tuple[Term, ...]
    vectors: list[SteeringVector]

    @property
    def names(self) -> list[str]:
        """What the vectors are called."""
        return [one.vector if one.without is None else f"{one.vector}~{one.without}" for one in self.terms]

    @property
    def composition(self) -> Composition:
        """The same as a composition, every strength written out."""
        from steerkit.composition.binding import described

        return described(self.terms, self.vectors)


def check_chosen(
    names: Sequence[str] | None, strengths: Sequence[float] | None, steering: str | None, **said: Any
) -> None:
    """Refuse options that do not go together, before anything is loaded.

    Args:
        names: given by --vector.
        strengths: given by --strength.
        steering: given by --steering.
        said: other options that say how a --vector acts, by name.

    Raises:
        BadParameter: both ways of naming vectors, or another number of strengths than of vectors.
    """
    given = [f"--{name}" for name, value in {"vector": names, "strength": strengths, **said}.items() if value]
    if steering is not None and given:
        raise typer.BadParameter(f"--steering says all of {given[0]} in its line; give one of both")
    if strengths and len(strengths) != len(names or ()):
        raise typer.BadParameter(f"{len(strengths)} --strength for {len(names or ())} --vector; give as many, or none")


def chosen(
    names: Sequence[str] | None,
    strengths: Sequence[float] | None,
    steering: str | None,
    model: str,
    *,
    scope: str | None = None,
    unit: Any = None,
) -> Chosen:
    """Load the vectors that a command applies, each as it is applied.

    Args:
        names: given by --vector: files or shipped names.
        strengths: one for each of these, or none.
        steering: given by --steering: a composition, or a file that holds one.
        model: alias of the model in use, whose shipped vectors come first.
        scope: for all of `names`.
        unit: for all of `names`.

    Raises:
        SteerError: a file that cannot be read, or a composition that is none.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.composition.terms import Term
    from steerkit.vector.steering_vector import SteeringVector

    if steering is not None:
        found = composition_of(steering)
        return Chosen(found.terms, found.vectors(model=model))
    terms = tuple(Term(name) for name in names or ())
    loaded = [SteeringVector.load(vector_path(name, model)) for name in names or ()]
    pairs = itertools.zip_longest(loaded, strengths or ())
    return Chosen(terms, [one.at(strength=strength, scope=scope, unit=unit) for one, strength in pairs])


def composition_of(text: str) -> Composition:
    """The composition that a text is, or that a file holds.

    Args:
        text: given by --steering.

    Raises:
        RecipeError: a recipe without one.
    """
    from steerkit.composition.terms import Composition
    from steerkit.errors import RecipeError

    path = Path(text)
    if path.suffix in (".json", ".txt"):
        return Composition.load(path)
    if path.suffix != ".toml":
        return Composition.parse(text)
    from steerkit.recipe import Recipe

    found = Recipe.load(path).apply.steering
    if found is None:
        raise RecipeError(f"{path}: [apply] steering is missing; write the composition there")
    return Composition.parse(found)
