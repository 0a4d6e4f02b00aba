"""Recipes: one TOML file says which data, model and method make a vector, and how it is meant to be used.

Plain data: no code, no interpolation, unknown keys are errors. `Recipe.resolved()` is the recipe with every default
filled in; it travels in the vector file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from steerkit.errors import DataError, RecipeError
from steerkit.evaluate.layer_sets import default_candidates
from steerkit.evaluate.suggesting import with_suggestion
from steerkit.fitting.fitting import fit
from steerkit.methods._base import Method, takes_pair
from steerkit.methods._registry import resolve
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site, parse_layers
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.files.source import located
from steerkit.prompts.system_prompts import SystemPrompts
from steerkit.recipe.checking import check_keys, check_meaning, check_title, part_of, prompting_of, read_toml
from steerkit.recipe.parts import PARTS, ApplyPart, DataPart, EvaluatePart, MethodPart, ModelPart
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.evaluate.calibration import Calibration
    from steerkit.evaluate.setup import Setup

__all__ = ["Recipe"]

FORMAT = 1
_SELDOM = ("no_effect", "steering")  # keys of [apply] that are left out where they say nothing
NO_EFFECT: Mapping[str, Any] = {"by": "calibrate", "confirmed": False}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """One recipe, checked.

    Attributes:
        name: the file's name without its ending.
        behaviour: what the vector brings about.
        title: one line on the two sides.
        default: this recipe answers to its behaviour's plain name.
        source: the file it was read from; empty where it stands in no file.
        prompting: system prompts that ask for the behaviour and for its opposite; None where it names none.
    """

    name: str
    behaviour: str
    data: DataPart
    title: str = ""
    default: bool = False
    model: ModelPart = field(default_factory=ModelPart)
    method: MethodPart = field(default_factory=MethodPart)
    apply: ApplyPart = field(default_factory=ApplyPart)
    evaluate: EvaluatePart = field(default_factory=EvaluatePart)
    source: Path = Path()
    prompting: SystemPrompts | None = None

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read and check a recipe file.

        Args:
            path: a .toml file.

        Raises:
            RecipeError: missing or malformed file, unknown key (with near misses), wrong type, newer format.
        """
        path = Path(path)
        text = read_toml(path)
        number = text.pop("format", None)
        if number != FORMAT:
            raise RecipeError(
                f"{path}: format {number!r} is not {FORMAT}, the one this version reads; upgrade steerkit-hf"
            )
        check_keys(path, "", text, {"behaviour", "title", "default", "prompting", *PARTS})
        if not isinstance(text.get("behaviour"), str) or not text["behaviour"]:
            raise RecipeError(f"{path}: behaviour is missing; name what the vector brings about")
        parts = {name: part_of(path, name, kind, text.get(name)) for name, kind in PARTS.items()}
        recipe = cls(
            name=path.stem,
            behaviour=text["behaviour"],
            title=str(text.get("title", "")),
            default=bool(text.get("default", False)),
            source=path,
            prompting=prompting_of(path, text.get("prompting")),
            **parts,
        )
        check_title(path, text)
        check_meaning(path, recipe)
        for name in ("strengths", "questions"):
            if not getattr(recipe.evaluate, name):
                raise RecipeError(f"{path}: [evaluate] {name} is an empty list; give at least one, or leave it out")
        if recipe.apply.unit not in ("paper", "norm"):
            raise RecipeError(f"{path}: [apply] unit {recipe.apply.unit!r} is neither 'paper' nor 'norm'")
        return recipe

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default filled in, as plain data: what a vector is made by, so no system prompts."""
        plain = {name: asdict(getattr(self, name)) for name in PARTS}
        # As a vector file gives them back.
        plain["method"]["settings"] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in plain["method"]["settings"].items()
        }
        # What most recipes say nothing about is left out.
        plain["data"] = {key: value for key, value in plain["data"].items() if value is not None}
        plain["model"] = {key: value for key, value in plain["model"].items() if value not in (None, False)}
        plain["apply"] = {key: value for key, value in plain["apply"].items() if key not in _SELDOM or value}
        plain["model"].pop("num_layers", None)  # a vector file says it of the model it was fitted on
        return {
            "format": FORMAT,
            "name": self.name,
            "behaviour": self.behaviour,
            "title": self.title,
            **plain,
        }

    def items(self) -> ContrastSet:
        """All items of the data.

        Raises:
            DataError: the file cannot be read, or is no contrast.
        """
        part, folder = self.data, self.source.parent
        return ContrastSet.from_file(
            located(folder, part.file),
            against=None if part.against is None else located(folder, part.against),
            columns=part.columns,
            positive=part.positive,
            negative=part.negative,
            raw=bool(part.raw),
            escapes=bool(part.escapes),
        )

    def split(self, method: str | None = None) -> tuple[ContrastSet, ContrastSet]:
        """The items to fit on and the items held out.

        Args:
            method: another method than the recipe's. A recipe's pair is for methods that are fitted on one.

        Raises:
            RecipeError: the prompt file is missing or malformed.
            DataError: the same, where the recipe stands in no file.
        """
        part = self.data
        try:
            data = self.items()
            if part.held_out_sources:
                train, held_out = data.split(held_out_sources=part.held_out_sources)
            else:
                train, held_out = data.split(held_out=None if part.marked else part.held_out, seed=part.seed)
        except DataError as error:
            if self.source == Path():  # data that was given, and no file of a recipe
                raise
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
            The vector, with the recipe's suggested strength, else one that is measured (`suggest_strength`).

        Raises:
            SteerError: see `steerkit.fit`.
        """
        part = self.method_part(method)
        train, held_out = self.split(part.name)
        depth = find_decoder(model).num_layers
        if layers is not None:
            part = replace(part, layers=tuple(parse_layers(layers, depth)), sites=None)
        else:
            part = self.at_depth(part, depth)
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
        vector = self.signed(vector, part)
        if self._is_own(vector, part) and self.apply.no_effect:
            return replace(vector, calibration=NO_EFFECT)
        return with_suggestion(model, tokenizer, vector, batch_size=batch_size)

    def at_depth(self, part: MethodPart, num_layers: int) -> MethodPart:
        """The same with the blocks of a model of another depth, where the recipe says how many its own has.

        Args:
            part: how the vector is fitted; its blocks count for the recipe's own model.
            num_layers: blocks of the model at hand.

        Returns:
            The blocks scaled by depth, each once; a line in the log says so.
        """
        own = self.model.num_layers
        if own is None or own == num_layers or (part.layers is None and part.sites is None):
            return part

        def placed(layer: int) -> int:
            return min(round(layer * (num_layers - 1) / max(own - 1, 1)), num_layers - 1)

        sites = [Site.parse(site) for site in part.sites or ()]
        moved = {layer: placed(layer) for layer in (*(part.layers or ()), *(site.layer for site in sites))}
        logger.info(
            "recipe %s counts %d blocks and this model has %d; by depth %s",
            self.name,
            own,
            num_layers,
            ", ".join(f"block {layer} becomes {here}" for layer, here in sorted(moved.items())),
        )
        return replace(
            part,
            layers=None if part.layers is None else tuple(dict.fromkeys(moved[layer] for layer in part.layers)),
            sites=None
            if part.sites is None
            else tuple(dict.fromkeys(str(Site(moved[site.layer], site.kind)) for site in sites)),
        )

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
        """Kinds of the sites that the recipe names; None where it names layers or the method is another.

        Args:
            part: how the vector is fitted.
        """
        named = part.sites if part.name == self.method.name else None
        return None if named is None else list(dict.fromkeys(Site.parse(site).kind for site in named))

    def validation(self, method: str | None = None) -> ContrastSet | None:
        """Training items to choose on, for methods fitted on one pair; None for others, which fit on them.

        Args:
            method: another method than the recipe's.
        """
        kind = resolve(method or self.method.name)
        return replace(self, data=replace(self.data, pair=None)).split()[0] if takes_pair(kind) else None

    def scope_of(self, part: MethodPart) -> str | None:
        """Which tokens are written; None takes the method's own, since the recipe's was found for its own way.

        Args:
            part: how the vector is fitted.
        """
        return self.apply.scope if part == self.method else None

    def calibrate(self, setup: Setup, train: ContrastSet, part: MethodPart, **options: Any) -> Calibration:
        """Find the layers and the strength with the largest effect inside a budget; see `steerkit.calibrate`.

        Args:
            setup: model, tokenizer and the held-out items.
            train: what is fitted on.
            part: how the vector is fitted.
            options: budget, search, scorers, store and progress, as for `steerkit.calibrate`.

        Raises:
            SteerError: see `steerkit.calibrate`.
        """
        from steerkit.evaluate.calibration.search import calibrate

        return calibrate(
            setup,
            train,
            method=part.name,
            settings=dict(part.settings),
            readout=part.readout,
            scope=self.scope_of(part),
            validation=self.validation(part.name),
            kinds=self.kinds(part),
            **options,
        )

    def candidates(self, num_layers: int, method: str | None = None) -> list[tuple[int, ...]]:
        """Sets of layers worth trying: the recipe's own, and those that the method names.

        Args:
            num_layers: of the model.
            method: another method than the recipe's.
        """
        part = self.at_depth(self.method, num_layers)
        sites = [Site.parse(site).layer for site in part.sites or ()]
        own = tuple(layer for layer in part.layers or sites if layer < num_layers)
        return default_candidates(resolve(method or self.method.name), num_layers, [own] if own else [])

    def _is_own(self, vector: SteeringVector, part: MethodPart) -> bool:
        """Whether a vector was fitted in the recipe's own way, on a model as deep as the recipe's."""
        return part == self.method and self.model.num_layers in (None, vector.num_layers)

    def signed(self, vector: SteeringVector, part: MethodPart) -> SteeringVector:
        """Write into a vector which recipe and data it came from.

        Args:
            vector: the vector.
            part: how it was fitted. Scope and strength of the recipe were found for its own way on its own model, and
                go with that only.
        """
        same = self._is_own(vector, part)
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
