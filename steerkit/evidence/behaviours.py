"""The behaviours that are looked for: those of the shipped recipes, and the shipped traits.

Each has system prompts in opposite pairs, under which the unsteered model answers: what a classifier is trained on, and
what steering is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steerkit._support.shipped import recipes, traits
from steerkit.errors import RecipeError
from steerkit.evidence.questions import Question, QuestionSet, open_questions, requests
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.files.source import located
from steerkit.prompts.system_prompts import SystemPrompts
from steerkit.recipe.recipe import Recipe

__all__ = ["REFUSAL", "WORDINGS", "Behaviour", "asked_of", "behaviours"]

WORDINGS = 3
REFUSAL = "refusal"


@dataclass(frozen=True)
class Behaviour:
    """One behaviour.

    Attributes:
        name: as recipes or traits call it.
        described: in a few words, for judges.
        prompting: system prompts that ask for it and for its opposite, three wordings each.
        asked: which questions its vectors are measured on.
        written: answers of the recipe's training items that show it, and such that show its opposite.
        written_held_out: those of the held-out items.
    """

    name: str
    described: str
    prompting: SystemPrompts
    asked: QuestionSet = "questions"
    written: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    written_held_out: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def behaviours() -> dict[str, Behaviour]:
    """All behaviours, by name: of recipes first."""
    found: dict[str, Behaviour] = {}
    for path in recipes().values():
        recipe = Recipe.load(path)
        if recipe.prompting is not None and (recipe.default or recipe.behaviour not in found):
            found[recipe.behaviour] = _of_recipe(recipe)
    for name, path in traits().items():
        spec = TraitSpec.load(path)
        found[name] = Behaviour(name, spec.description, _first(spec.prompting))
    return found


def asked_of(asked: QuestionSet, use: Literal["measure", "train"]) -> list[Question]:
    """All questions of a kind.

    Args:
        asked: open questions or requests.
        use: measure or train.

    Raises:
        RecipeError: no recipe with a gate ships, whose requests are wanted.
    """
    if asked == "questions":
        return open_questions(use)
    for path in recipes().values():
        recipe = Recipe.load(path)
        if recipe.data.held_out_sources:
            file = Path(located(recipe.source.parent, recipe.data.file))
            return requests(file, recipe.data.held_out_sources, use)
    raise RecipeError("no shipped recipe holds out sources of requests; refusal is measured on those")


def _of_recipe(recipe: Recipe) -> Behaviour:
    assert recipe.prompting is not None
    train, held_out = recipe.split()
    return Behaviour(
        recipe.behaviour,
        f"the text is {recipe.title.partition(',')[0].replace(' against ', ', not ')}",
        _first(recipe.prompting),
        "harmful" if recipe.behaviour == REFUSAL else "questions",
        (_answers(train.positive), _answers(train.negative)),
        (_answers(held_out.positive), _answers(held_out.negative)),
    )


def _first(prompting: SystemPrompts) -> SystemPrompts:
    return SystemPrompts(prompting.positive[:WORDINGS], prompting.negative[:WORDINGS])


def _answers(side: Sequence[object]) -> tuple[str, ...]:
    return tuple(str(answer) for one in side if (answer := getattr(one, "answer", None)) is not None)
