"""Which model a command loads, and how: one group of options, the same at every command that loads one.

A command has one parameter for it, `model: ModelChoice = DEFAULT`. `loads_model`, its decorator, puts the options in
that place, one for each field of `ModelChoice`, and hands the command what was chosen. Commands load models by
`ModelChoice.load` only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support import collector
from steerkit.cli._groups import spread

if TYPE_CHECKING:
    from steerkit.recipe import ModelPart

__all__ = ["DEFAULT", "DEFAULT_MODEL", "PANEL", "ModelChoice", "loads_model"]

DEFAULT_MODEL = "smollm2-135m"
PANEL = "Model"


class Dtype(StrEnum):
    """In which precision the weights are loaded."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Bits(StrEnum):
    """How small the weights are made while they are loaded."""

    four = "4bit"
    eight = "8bit"


def _option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PANEL)


@dataclass(frozen=True)
class ModelChoice:
    """A model as the command line names it; None where it says nothing.

    A parameter annotated `Annotated[ModelChoice, "..."]` gives `--model` another help text.

    Attributes:
        model: alias, hub name, folder or .gguf file.
        revision: branch, tag or commit on the hub.
        device: the one device that it is put on.
        device_map: how it is spread over several.
        dtype: of the weights.
        quantize: 4bit or 8bit.
        attn: how attention is computed.
        trust_remote_code: whether Python files beside the weights may run.
    """

    model: Annotated[
        str | None, _option(f"Alias, hub name, folder or .gguf file. (default: the recipe's, else {DEFAULT_MODEL})")
    ] = None
    revision: Annotated[str | None, _option("Branch, tag or commit on the hub.")] = None
    device: Annotated[
        str | None, _option("cpu, cuda, cuda:1, mps or xpu. (default: the accelerator that is there, else cpu)")
    ] = None
    device_map: Annotated[str | None, _option("Over several devices: auto, balanced, sequential.")] = None
    dtype: Annotated[Dtype | None, _option("Of the weights. (default: auto, the checkpoint's own)")] = None
    quantize: Annotated[Bits | None, _option("Smaller weights, by bitsandbytes.")] = None
    attn: Annotated[str | None, _option("Attention: eager, sdpa, flash_attention_2, ...")] = None
    trust_remote_code: Annotated[
        bool, _option("Run the Python files that come with the model.", "--trust-remote-code")
    ] = False

    @property
    def name(self) -> str:
        """What is loaded."""
        return self.model or DEFAULT_MODEL

    @property
    def is_given(self) -> bool:
        """Whether the command line says anything about a model."""
        return self != ModelChoice()

    def of(self, part: ModelPart) -> ModelChoice:
        """The same, filled in by what a recipe says of its model; the command line comes first.

        Args:
            part: the recipe's table; beside another model than its own it says nothing.

        Raises:
            RecipeError: the recipe's model brings code of its own, and the command line does not allow that.
        """
        from steerkit.errors import RecipeError

        if self.model not in (None, part.name):
            return self
        if part.trust_remote_code and not self.trust_remote_code:
            raise RecipeError(
                f"the recipe's model, {part.name}, brings Python files of its own; allow them with "
                "--trust-remote-code, or give another --model"
            )
        said = {"model": part.name} | {name: getattr(part, name) for name in _IN_RECIPES}
        if self.device or self.device_map:
            said |= {"device": None, "device_map": None}
        kept = {name: value for name, value in said.items() if getattr(self, name) is None and value is not None}
        return replace(self, **kept)

    def check_layers(self, layers: str | None, part: ModelPart) -> None:
        """Refuse a block that the recipe's own model lacks, before it is loaded.

        Args:
            layers: sets of blocks as the command line writes them; None names none.
            part: the recipe's table. How deep another model is, nobody knows before it is loaded.

        Raises:
            SiteError: it means nothing, or a block does not exist.
        """
        from steerkit.evaluate.layer_sets import parse_candidates

        if layers is not None and part.num_layers is not None and self.name == part.name:
            parse_candidates(layers, part.num_layers)

    def options(self) -> dict[str, str | None]:
        """The options that say the same on another command line, with their values; None for one that takes none."""
        given = {field.name: getattr(self, field.name) for field in fields(self)} | {"model": self.name}
        return {
            f"--{name.replace('_', '-')}": None if value is True else str(value)
            for name, value in given.items()
            if value not in (None, False)
        }

    def words(self, *, every: bool = False) -> list[str]:
        """The same as words, the default model left out.

        Args:
            every: name the default model too.
        """
        kept = {flag: value for flag, value in self.options().items() if every or value != DEFAULT_MODEL}
        return [word for flag, value in kept.items() for word in (flag, value) if word is not None]

    def load(self) -> tuple[Any, Any]:
        """Load the model, and say on stderr what was loaded.

        Returns:
            The model and its tokenizer.

        Raises:
            SteerError: see `steerkit.load_model`.
        """
        import steerkit
        from steerkit.model import describe

        said = {name: getattr(self, name) for name in (*_IN_RECIPES, "trust_remote_code")}
        given = {name: value for name, value in said.items() if value}
        options: dict[str, Any] = {
            name: value.value if isinstance(value, StrEnum) else value for name, value in given.items()
        }
        model, tokenizer = steerkit.load_model(self.name, **options)
        collector.as_usual()
        code = ", its own code allowed" if self.trust_remote_code else ""
        typer.echo(f"model: {self.name} {describe(model)}{code}", err=True)
        return model, tokenizer

    def another(self, name: str) -> ModelChoice:
        """Another model, loaded in the same way.

        Args:
            name: of that model.
        """
        return replace(self, model=name, revision=None)


DEFAULT = ModelChoice()
_IN_RECIPES = tuple(field.name for field in fields(ModelChoice) if field.name not in ("model", "trust_remote_code"))


def loads_model(run: Callable[..., Any]) -> Callable[..., Any]:
    """Put the options of the model in the place of a command's parameter of type `ModelChoice`.

    Args:
        run: the command.

    Returns:
        The command as typer reads it.
    """
    return spread(run, ModelChoice, lambda texts: {"model": Annotated[str | None, _option(texts[0])]} if texts else {})
