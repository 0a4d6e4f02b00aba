"""`steerkit recipe new`: a recipe for data of one's own, with every key explained, to be changed and kept."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._data import NO_DATA, DataChoice, takes_data
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._program import Command, paragraphs
from steerkit.cli._shared import Json, print_json

if TYPE_CHECKING:
    from steerkit.recipe import ModelPart, Recipe

__all__ = ["app"]

BehaviourOption = Annotated[str | None, typer.Option(help="What the vector brings about. (default: the data's name)")]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="The recipe to be. (default: <data>.toml)")]

app = typer.Typer(no_args_is_help=True, help="Recipes of your own.")


@loads_model
@takes_data
def new(
    given: DataChoice = NO_DATA,
    method: Annotated[str, typer.Option(help="See `steerkit methods`.")] = "caa",
    behaviour: Annotated[
        str | None, typer.Option(help="What the vector brings about. (default: the data's name)")
    ] = None,
    model: Annotated[ModelChoice, "The model that the recipe names; it is not loaded."] = DEFAULT,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The recipe to be. (default: <behaviour>.toml)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a recipe for your own data: a commented TOML file that every command takes in the place of a recipe.

    The data is read once, so that the recipe is known to work; files are named relative to it. A file that is there is
    not replaced.
    """
    from steerkit.errors import RecipeError
    from steerkit.methods._base import takes_pair
    from steerkit.methods._registry import resolve

    if "-" in given.files:
        raise typer.BadParameter("a recipe names files; stdin is none")
    if not given.is_given:
        raise typer.BadParameter("give one of: --data, --positive with --negative")
    given.check()
    if takes_pair(resolve(method)):
        raise RecipeError(f"{method} is fitted on one pair of prompts, which a recipe holds itself ([data] pair)")
    target = out or Path(f"{given.name}.toml")
    if target.suffix != ".toml":
        raise typer.BadParameter(f"--out {target}: a recipe is a .toml file")
    if target.exists():
        raise RecipeError(f"{target}: is there already; choose another name with --out")
    check_writable(target)
    recipe, sizes = _written(given, behaviour or given.name, method, _model_part(model), target)
    if as_json:
        print_json({"file": str(target), **recipe.resolved(), "items": list(sizes)})
        return
    typer.echo(f"wrote {target}: {sizes[0]} items to fit on, {sizes[1]} held out")
    typer.echo(f"use it:\n  steerkit extract {target}\n  steerkit calibrate {target}")


def _model_part(model: ModelChoice) -> ModelPart:
    from steerkit.recipe import ModelPart

    said: dict[str, Any] = {
        one.name: getattr(model, one.name)
        for one in fields(ModelPart)
        if hasattr(model, one.name) and one.name != "name"
    }
    plain: dict[str, Any] = {key: value.value if isinstance(value, StrEnum) else value for key, value in said.items()}
    return ModelPart(name=model.name, **plain)


def _written(
    given: DataChoice, name: str, method: str, model: ModelPart, target: Path
) -> tuple[Recipe, tuple[int, int]]:
    """Write the recipe and read it back; one that does not work is taken away again.

    Raises:
        SteerError: the data cannot be used.
    """
    from steerkit._support.files import write_whole
    from steerkit.recipe import MethodPart, Recipe
    from steerkit.recipe.writing import recipe_text, usual_questions, usual_readout

    items = given.items()
    text = recipe_text(
        name,
        f"what {' and '.join(given.files)} shows",
        data=given.part(target.parent),
        model=model,
        method=MethodPart(name=method, readout=usual_readout(items, method)),
        questions=usual_questions(items),
    )
    write_whole(target, text.encode())
    try:
        recipe = Recipe.load(target)
        train, held_out = recipe.split()
    except BaseException:
        with contextlib.suppress(OSError):
            target.unlink()
        raise
    return recipe, (len(train), len(held_out))


for _command in (new,):
    app.command(_command.__name__, cls=Command, help=paragraphs(_command))(_command)
