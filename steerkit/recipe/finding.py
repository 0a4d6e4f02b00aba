"""Recipes by path, by name, or by the behaviour that they bring about."""

from __future__ import annotations

from pathlib import Path

from steerkit._support.shipped import recipe_path, recipes
from steerkit.errors import unknown_name
from steerkit.recipe.recipe import Recipe

__all__ = ["find_recipe", "of_behaviour"]


def find_recipe(name: str) -> Recipe:
    """Find a recipe by path, by its file's name, or by its behaviour where one recipe of it is the default.

    Args:
        name: ``optimism-caa``, ``optimism`` or a path.

    Raises:
        UnknownNameError: nothing answers to it, or several recipes of the behaviour and none is the default.
        RecipeError: the file has a mistake in it.
    """
    if Path(name).suffix == ".toml":
        return Recipe.load(name)
    if name in recipes():
        return Recipe.load(recipe_path(name))
    answering = of_behaviour(name)
    chosen = [recipe for recipe in answering if recipe.default]
    if len(chosen) == 1:
        return chosen[0]
    if answering:
        raise unknown_name("recipe", name, [recipe.name for recipe in answering])
    raise unknown_name("recipe", name, recipes())


def of_behaviour(behaviour: str) -> list[Recipe]:
    """The shipped recipes of a behaviour, sorted by name.

    Args:
        behaviour: such as ``optimism``.
    """
    return [recipe for recipe in map(Recipe.load, recipes().values()) if recipe.behaviour == behaviour]
