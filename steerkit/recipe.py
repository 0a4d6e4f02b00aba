"""Recipes: one TOML file says which data, model and method make a vector, and how it is meant to be used.

Plain data: no code, no interpolation, unknown keys are errors. `Recipe.resolved()` is the recipe with every default
filled in; it travels in the vector file.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from steerkit._support.shipped import recipe_path, recipes
from steerkit.activations.readout import Readout
from steerkit.errors import DataError, RecipeError, SteerError, near_miss, unknown_name
from steerkit.evaluate.calibration.budget import default_candidates
from steerkit.fitting.fitting import fit
from steerkit.methods._base import Method, takes_pair
from steerkit.methods._registry import resolve
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site, parse_layers
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.tokens.scope import Scope
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["ApplyPart", "DataPart", "EvaluatePart", "MethodPart", "ModelPart", "Recipe", "find_recipe", "of_behaviour"]

FORMAT = 1


@dataclass(frozen=True)
class ModelPart:
    """Which model the recipe was made on."""

    name: str = "smollm2-135m"


@dataclass(frozen=True)
class DataPart:
    """Which prompts, relative to the recipe's folder, and how much of them is held out.

    `pair` is one positive and one negative prompt, for methods fitted on one pair of raw prompts; the file's held-out
    items then only measure. `positive` makes it a file of labelled prompts: the label of the positive side, and where
    the file has more than two `negative`, the other. `held_out_sources` holds out whole sources instead of a share.
    """

    file: str
    held_out: float = 0.25
    seed: int = 0
    pair: tuple[str, ...] | None = None
    positive: str | None = None
    negative: str | None = None
    held_out_sources: tuple[str, ...] | None = None


@dataclass(frozen=True)
class MethodPart:
    """How the vector is fitted."""

    name: str = "caa"
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None
    readout: str | int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ApplyPart:
    """How the vector is meant to be used: suggested strength, useful range, tokens, unit."""

    strength: float = 1.0
    range: tuple[float, float] | None = None
    scope: str | None = None
    unit: Literal["paper", "norm"] = "paper"


@dataclass(frozen=True)
class EvaluatePart:
    """What shows its effect: strengths of the dose-response curve, and questions answered before and after."""

    strengths: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    questions: tuple[str, ...] = ("How was your day?",)


_PARTS: dict[str, type] = {
    "model": ModelPart,
    "data": DataPart,
    "method": MethodPart,
    "apply": ApplyPart,
    "evaluate": EvaluatePart,
}


@dataclass(frozen=True)
class Recipe:
    """One recipe, checked.

    Attributes:
        name: the file's name without its ending.
        behaviour: what the vector brings about.
        title: one line on the two sides.
        default: this recipe answers to its behaviour's plain name.
        source: the file it was read from.
    """

    name: str
    behaviour: str
    data: DataPart
    title: str = ""
    default: bool = False
    model: ModelPart = ModelPart()
    method: MethodPart = MethodPart()
    apply: ApplyPart = ApplyPart()
    evaluate: EvaluatePart = EvaluatePart()
    source: Path = Path()

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a recipe file.

        Args:
            path: a .toml file.

        Raises:
            RecipeError: missing or malformed file, unknown key (with near misses), wrong type, newer format.
        """
        path = Path(path)
        try:
            text = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not a TOML file ({error})") from None
        number = text.pop("format", None)
        if number != FORMAT:
            raise RecipeError(
                f"{path}: format {number!r} is not {FORMAT}, the one this version reads; upgrade steerkit-hf"
            )
        _check_keys(path, "", text, {"behaviour", "title", "default", *_PARTS})
        if not isinstance(text.get("behaviour"), str) or not text["behaviour"]:
            raise RecipeError(f"{path}: behaviour is missing; name what the vector brings about")
        parts = {name: _part(path, name, kind, text.get(name)) for name, kind in _PARTS.items()}
        recipe = cls(
            name=path.stem,
            behaviour=text["behaviour"],
            title=str(text.get("title", "")),
            default=bool(text.get("default", False)),
            source=path,
            **parts,
        )
        _check_title(path, text)
        _check_meaning(path, recipe)
        for name in ("strengths", "questions"):
            if not getattr(recipe.evaluate, name):
                raise RecipeError(f"{path}: [evaluate] {name} is an empty list; give at least one, or leave it out")
        if recipe.apply.unit not in ("paper", "norm"):
            raise RecipeError(f"{path}: [apply] unit {recipe.apply.unit!r} is neither 'paper' nor 'norm'")
        return recipe

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain data."""
        plain = {name: asdict(getattr(self, name)) for name in _PARTS}
        # As a vector file gives them back.
        plain["method"]["settings"] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in plain["method"]["settings"].items()
        }
        for key in ("pair", "positive", "negative", "held_out_sources"):
            if plain["data"][key] is None:  # nothing to say, for most recipes
                del plain["data"][key]
        return {
            "format": FORMAT,
            "name": self.name,
            "behaviour": self.behaviour,
            "title": self.title,
            **plain,
        }

    def split(self, method: str | None = None) -> tuple[ContrastSet, ContrastSet]:
        """The items to fit on and the items held out.

        Args:
            method: another method than the recipe's. A recipe's pair is for methods that are fitted on one.

        Raises:
            RecipeError: the prompt file is missing or malformed.
        """
        try:
            path, part = self.source.parent / self.data.file, self.data
            if part.positive is None:
                data = ContrastSet.from_jsonl(path)
            else:
                data = ContrastSet.from_labelled(path, positive=part.positive, negative=part.negative)
            if part.held_out_sources:
                train, held_out = data.split(held_out_sources=part.held_out_sources)
            else:
                train, held_out = data.split(held_out=part.held_out, seed=part.seed)
        except (DataError, ValueError) as error:  # ValueError: a file name that no system allows
            raise RecipeError(f"{self.source}: [data] {error}") from None
        if self.data.pair is None or not takes_pair(resolve(method or self.method.name)):
            return train, held_out
        positive, negative = self.data.pair
        pair = ContrastSet.from_prompts([positive], [negative])
        return replace(pair, source=self.data.file), held_out

    def extract(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        method: str | Method | None = None,
        layers: str | Sequence[int] | None = None,
        readout: str | int | None = None,
        batch_size: int = 16,
        progress: bool = False,
    ) -> SteeringVector:
        """Fit the recipe's vector and measure its separation on the held-out items.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            method: another method than the recipe's.
            layers: other layers than the recipe's.
            readout: other tokens read than the recipe's; another method brings its own.
            batch_size: rows per pass.
            progress: show a progress bar on stderr.

        Returns:
            The vector, with the recipe's suggested strength.

        Raises:
            SteerError: see `steerkit.fit`.
        """
        part = self.method_part(method)
        train, held_out = self.split(part.name)
        if layers is not None:
            listed = parse_layers(layers, find_decoder(model).num_layers)
            part = replace(part, layers=tuple(listed), sites=None)
        if readout is not None:
            part = replace(part, readout=readout)
        vector = fit(
            model,
            tokenizer,
            train,
            method=part.name,
            settings=part.settings,
            layers=part.layers,
            sites=part.sites,
            readout=part.readout,
            batch_size=batch_size,
            held_out=None if resolve(part.name).readout is None else held_out,
            progress=progress,
        )
        return self.signed(vector, part)

    def method_part(self, method: str | Method | None = None) -> MethodPart:
        """How the vector is fitted, by the recipe's own method or by another.

        Args:
            method: another method than the recipe's; its settings and readout are its own, not the recipe's.
        """
        if method is None or method == self.method.name:
            return self.method
        name = method if isinstance(method, str) else method.name
        settings = {} if isinstance(method, str) else method.settings
        return replace(self.method, name=name, settings=settings, readout=None)

    def kinds(self, part: MethodPart) -> list[str] | None:
        """Kinds of the sites that the recipe names; None where it names layers, or another method is used.

        Args:
            part: how the vector is fitted.
        """
        named = part.sites if part.name == self.method.name else None
        return None if named is None else list(dict.fromkeys(Site.parse(site).kind for site in named))

    def validation(self, method: str | None = None) -> ContrastSet | None:
        """Items to choose on that a method fitted on one pair leaves free; None for methods fitted on the items.

        Args:
            method: another method than the recipe's.
        """
        kind = resolve(method or self.method.name)
        return replace(self, data=replace(self.data, pair=None)).split()[0] if takes_pair(kind) else None

    def candidates(self, num_layers: int, method: str | None = None) -> list[tuple[int, ...]]:
        """Sets of layers worth trying: the recipe's own, and those that the method names.

        Args:
            num_layers: of the model.
            method: another method than the recipe's.
        """
        sites = [Site.parse(site).layer for site in self.method.sites or ()]
        own = tuple(layer for layer in self.method.layers or sites if layer < num_layers)
        return default_candidates(resolve(method or self.method.name), num_layers, [own] if own else [])

    def signed(self, vector: SteeringVector, part: MethodPart) -> SteeringVector:
        """A vector fitted on this recipe's data, with where it came from written into it.

        Args:
            vector: the vector.
            part: how it was fitted. Scope and strength of the recipe were found for its own way, and go with that only.
        """
        same = part == self.method
        return replace(
            vector,
            scope=(self.apply.scope or vector.scope) if same else vector.scope,
            unit=self.apply.unit if same else vector.unit,
            suggested_strength=self.apply.strength if same else None,
            seed=self.data.seed,
            data_source=self.data.file,
            recipe=self.name,
            extra={**vector.extra, "recipe": replace(self, method=part).resolved()},
        )


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


def _check_title(path: Path, text: Mapping[str, Any]) -> None:
    if not isinstance(text.get("title", ""), str):
        raise RecipeError(f"{path}: title = {text['title']!r}: a text is wanted")
    if not isinstance(text.get("default", False), bool):
        raise RecipeError(f"{path}: default = {text['default']!r}: true or false is wanted")


def _check_meaning(path: Path, recipe: Recipe) -> None:
    """What each value may be beyond its type, so that a mistake is told before a model is loaded."""
    method, apply = recipe.method, recipe.apply
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
    if scope is not None and scope.kind not in known.scopes:
        raise RecipeError(f"{path}: [apply] scope '{scope}' is none of {method.name}'s: {', '.join(known.scopes)}")
    pair = recipe.data.pair
    if pair is not None and len(pair) != 2:
        raise RecipeError(f"{path}: [data] pair has {len(pair)} prompts; give a positive and a negative one")
    if recipe.data.negative is not None and recipe.data.positive is None:
        raise RecipeError(f"{path}: [data] negative = {recipe.data.negative!r} without positive; name both labels")
    if recipe.data.held_out_sources == ():
        raise RecipeError(f"{path}: [data] held_out_sources is an empty list; give at least one, or leave it out")
    if apply.range is not None and (len(apply.range) != 2 or apply.range[0] >= apply.range[1]):
        raise RecipeError(f"{path}: [apply] range {list(apply.range)} is not a lower and a higher strength")
    numbers = (apply.strength, *(apply.range or ()), *recipe.evaluate.strengths, recipe.data.held_out)
    if not all(math.isfinite(number) for number in numbers):
        raise RecipeError(f"{path}: a strength or share is not a finite number")


def _part(path: Path, name: str, kind: type, given: Any) -> Any:
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: [{name}] is {type(given).__name__}, not a table")
    known = {entry.name: entry for entry in fields(kind)}
    _check_keys(path, name, given, set(known))
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


def _check_keys(path: Path, table: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            place = f"[{table}] " if table else ""
            raise RecipeError(f"{path}: {place}unknown key {key!r}; {near_miss(key, known)}")
