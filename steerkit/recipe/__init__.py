"""Recipes: one TOML file says which data, model and method make a vector, and how it is meant to be used.

`recipe` reads one and fits its vector, `finding` finds one by its name, `parts` are its tables, `checking` refuses
mistakes before a model is loaded.
"""

from __future__ import annotations

from steerkit.recipe.finding import find_recipe, of_behaviour
from steerkit.recipe.parts import ApplyPart, DataPart, EvaluatePart, MethodPart, ModelPart
from steerkit.recipe.recipe import Recipe

__all__ = ["ApplyPart", "DataPart", "EvaluatePart", "MethodPart", "ModelPart", "Recipe", "find_recipe", "of_behaviour"]
