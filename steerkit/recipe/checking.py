"""What a recipe's keys and values may be, so that a mistake is told before a model is loaded."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerkit.activations.readout import Readout
from steerkit.composition.terms import Composition
from steerkit.errors import CompositionError, DataError, RecipeError, SteerError, near_miss
from steerkit.methods._registry import resolve
from steerkit.model.placement import check_together
from steerkit.network.sites import Site
from steerkit.prompts.files.columns import Columns
from steerkit.prompts.system_prompts import SystemPrompts
from steerkit.recipe.parts import PromptingPart
from steerkit.tokens.scope import Scope

if TYPE_CHECKING:
    from steerkit.recipe.recipe import Recipe

__all__ = ["check_keys", "check_meaning", "check_title", "part_of", "prompting_of", "read_toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: of the file.

    Raises:
        RecipeError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file ({error})") from None


def check_title(path: Path, text: Mapping[str, Any]) -> None:
    """Refuse a title or a default of another type.

    Args:
        path: of the file, for the message.
        text: what TOML gave.

    Raises:
        RecipeError: one is.
    """
    if not isinstance(text.get("title", ""), str):
        raise RecipeError(f"{path}: title = {text['title']!r}: a text is wanted")
    if not isinstance(text.get("default", False), bool):
        raise RecipeError(f"{path}: default = {text['default']!r}: true or false is wanted")


def check_meaning(path: Path, recipe: Recipe) -> None:
    """Refuse values of the right type that mean nothing or do not go together.

    Args:
        path: of the file, for the message.
        recipe: read, its types checked.

    Raises:
        RecipeError: a value means nothing, or two do not go together.
    """
    method, apply = recipe.method, recipe.apply
    try:
        check_together(
            device=recipe.model.device,
            device_map=recipe.model.device_map,
            dtype=recipe.model.dtype,
            quantize=recipe.model.quantize,
        )
    except SteerError as error:
        raise RecipeError(f"{path}: [model] {error}") from None
    if method.layers is not None and method.sites is not None:
        raise RecipeError(f"{path}: [method] has both layers and sites; give one of them")
    try:
        known = resolve(method.name).from_settings(method.settings)
        sites = [Site(layer) for layer in method.layers or ()]
        sites += [Site.parse(site) for site in method.sites or ()]
        scope = None if apply.scope is None else Scope.parse(apply.scope)
        if method.readout is not None:
            Readout.parse(method.readout)
    except SteerError as error:
        raise RecipeError(f"{path}: {error}") from None
    depth = recipe.model.num_layers
    outside = [site.layer for site in sites if depth is not None and site.layer >= depth]
    if outside:
        raise RecipeError(
            f"{path}: [method] block {outside[0]} is outside of [model] num_layers = {depth}; blocks count from 0"
        )
    if scope is not None and scope.kind not in known.scopes:
        raise RecipeError(f"{path}: [apply] scope '{scope}' is none of {method.name}'s: {', '.join(known.scopes)}")
    try:
        Columns(recipe.data.columns or {})
    except SteerError as error:
        raise RecipeError(f"{path}: [data] {error}") from None
    pair = recipe.data.pair
    if pair is not None and len(pair) != 2:
        raise RecipeError(f"{path}: [data] pair has {len(pair)} prompts; give a positive and a negative one")
    if recipe.data.negative is not None and recipe.data.positive is None:
        raise RecipeError(f"{path}: [data] negative = {recipe.data.negative!r} without positive; name both labels")
    if recipe.data.held_out_sources == ():
        raise RecipeError(f"{path}: [data] held_out_sources is an empty list; give at least one, or leave it out")
    if apply.range is not None and (len(apply.range) != 2 or apply.range[0] >= apply.range[1]):
        raise RecipeError(f"{path}: [apply] range {list(apply.range)} is not a lower and a higher strength")
    if apply.steering is not None:
        try:
            Composition.parse(apply.steering)
        except CompositionError as error:
            raise RecipeError(f"{path}: [apply] {error}") from None
    if apply.no_effect and apply.strength is not None:
        raise RecipeError(f"{path}: [apply] strength = {apply.strength:g} beside no_effect; leave one of them out")
    strengths = () if apply.strength is None else (apply.strength,)
    numbers = (*strengths, *(apply.range or ()), *recipe.evaluate.strengths, recipe.data.held_out)
    if not all(math.isfinite(number) for number in numbers):
        raise RecipeError(f"{path}: a strength or share is not a finite number")


def part_of(path: Path, name: str, kind: type, given: Any) -> Any:
    """Make one table of a recipe, its keys and types checked.

    Args:
        path: of the file, for the message.
        name: of the table.
        kind: its class.
        given: what TOML gave; None takes the defaults.

    Returns:
        An object of the class.

    Raises:
        RecipeError: an unknown key, a wrong type, or a value that is missing.
    """
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: [{name}] is {type(given).__name__}, not a table")
    known = {entry.name: entry for entry in fields(kind)}
    check_keys(path, name, given, set(known))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    for key, value in values.items():
        problem = _wrong_type(str(known[key].type), value)
        if problem:
            raise RecipeError(f"{path}: [{name}] {key} = {value!r}: {problem}")
    try:
        return kind(**values)
    except TypeError:
        missing = [key for key, entry in known.items() if key not in values and _required(entry)]
        raise RecipeError(f"{path}: [{name}] lacks {', '.join(missing)}") from None


def prompting_of(path: Path, given: Any) -> SystemPrompts | None:
    """The system prompts of a recipe, from its table or from the file that the table names.

    Args:
        path: of the recipe.
        given: what TOML gave; None where there is no such table.

    Returns:
        The wordings of both sides, or None.

    Raises:
        RecipeError: an unknown key, a wrong type, a side without wordings, a file beside wordings, or one that cannot
            be read.
    """
    if given is None:
        return None
    part = part_of(path, "prompting", PromptingPart, given)
    place = f"{path}: [prompting]"
    if part.file is not None:
        if part.positive is not None or part.negative is not None:
            raise RecipeError(f"{place} has wordings beside file = {part.file!r}; give one of both")
        path = path.parent / part.file
        part = part_of(path, "prompting", PromptingPart, read_toml(path))
        place = f"{path}:"
        if part.file is not None:
            raise RecipeError(f"{place} file = {part.file!r}: wordings are wanted here, and no further file")
    try:
        return SystemPrompts(part.positive or (), part.negative or ())
    except DataError as error:
        raise RecipeError(f"{place} {error}") from None


def _required(entry: Any) -> bool:
    from dataclasses import MISSING

    return entry.default is MISSING and entry.default_factory is MISSING


def _wrong_type(annotation: str, value: Any) -> str | None:
    """What is wrong with a value, by the part's annotation; TOML has few types, so few rules do."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation.startswith("tuple"):
        items = value if isinstance(value, tuple) else None
        if items is None:
            return "a list is wanted"
        if "str" in annotation and not all(isinstance(item, str) for item in items):
            return "a list of texts is wanted"
        if "int" in annotation and not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return "a list of whole numbers is wanted"
        if "float" in annotation and not all(
            isinstance(item, int | float) and not isinstance(item, bool) for item in items
        ):
            return "a list of numbers is wanted"
        return None
    if annotation.startswith("bool"):
        return None if isinstance(value, bool) else "true or false is wanted"
    if annotation.startswith("float"):
        return None if number else "a number is wanted"
    if annotation.startswith("int"):
        return None if number and isinstance(value, int) else "a whole number is wanted"
    if annotation.startswith("str | int"):
        return None if isinstance(value, str | int) else "a text or a whole number is wanted"
    if annotation.startswith("Mapping"):
        return None if isinstance(value, dict) else "a table is wanted"
    if annotation.startswith(("str", "Literal")):
        return None if isinstance(value, str) else "a text is wanted"
    return None


def check_keys(path: Path, table: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Refuse unknown keys, with those that are close.

    Args:
        path: of the file, for the message.
        table: of the keys; empty for the file itself.
        given: what TOML gave.
        known: keys there are.

    Raises:
        RecipeError: a key is unknown.
    """
    for key in given:
        if key not in known:
            place = f"[{table}] " if table else ""
            raise RecipeError(f"{path}: {place}unknown key {key!r}; {near_miss(key, known)}")
