"""What a command fits or measures on: one group of options, the same at every command that takes data of one's own.

A command has one parameter for it, `given: DataChoice = NO_DATA`, in whose place `takes_data` puts the options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._groups import spread

if TYPE_CHECKING:
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.files.columns import Columns
    from steerkit.recipe import DataPart, Recipe

__all__ = [
    "NO_DATA",
    "PANEL",
    "ColumnsOption",
    "DataChoice",
    "EscapesOption",
    "check_reading",
    "columns_of",
    "recipe_of",
    "takes_data",
]

PANEL = "Data"
_FORMATS = "JSON, JSONL, CSV, TSV or parquet; - reads stdin, hf:NAME:SPLIT a data set"


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=PANEL)


ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="ROLE=NAME", help="Columns with unusual names, such as prompt=goal; several by commas."),
]
EscapesOption = Annotated[bool, typer.Option("--escapes", help="With --raw: read a written \\n as a line break.")]


@dataclass(frozen=True)
class DataChoice:
    """Data of one's own as the command line names it; None where it says nothing.

    Attributes:
        data: a file of pairs or of labelled prompts.
        positive: a file of prompts that show the behaviour.
        negative: a file of prompts that do not.
        columns: what columns with unusual names are for.
        label: of labelled prompts, the positive side's.
        raw: prompts that are text are left without the chat template.
        escapes: written line breaks are read.
        held_out: the share that is held out.
    """

    data: Annotated[str | None, _option(f"Pairs or labelled prompts: {_FORMATS}.", metavar="FILE")] = None
    positive: Annotated[str | None, _option("Prompts that show the behaviour, any format.", metavar="FILE")] = None
    negative: Annotated[str | None, _option("Prompts that do not.", metavar="FILE")] = None
    columns: Annotated[
        list[str] | None,
        _option("Columns with unusual names: prompt=goal,positive=good,negative=bad.", metavar="ROLE=NAME"),
    ] = None
    label: Annotated[str | None, _option("Of labelled prompts: the label of the positive side.")] = None
    raw: Annotated[bool, _option("Leave prompts as they are, without the chat template.", "--raw")] = False
    escapes: Annotated[bool, _option("With --raw: read a written \\n as a line break.", "--escapes")] = False
    held_out: Annotated[
        float | None, _option("Share of the items that is held out to measure on.", metavar="FRACTION")
    ] = None

    @property
    def is_given(self) -> bool:
        """Whether there is data."""
        return any(self.files)

    @property
    def files(self) -> list[str]:
        """The files that are read."""
        return [file for file in (self.data, self.positive, self.negative) if file is not None]

    @property
    def name(self) -> str:
        """What to call the data: the first file's name without its ending."""
        file = self.files[0]
        if file == "-":
            return "stdin"
        stem = file.split(":")[1].rstrip("/").rpartition("/")[2] if file.startswith("hf:") else Path(file).stem
        return re.sub(r"[^\w.\-]+", "-", stem).strip("-.") or "data"

    def check(self, recipe: str | None = None, *, needed: bool = False, is_read: bool = False) -> None:
        """Refuse options that do not go together, before anything is read.

        Args:
            recipe: what the data stands in the place of, if it was given.
            needed: one of them has to be there.
            is_read: another file is read with the same options.

        Raises:
            BadParameter: two sources, half of one, or options of data without any.
        """
        sources = [recipe, self.data, self.positive or self.negative]
        if sum(source is not None for source in sources) > 1 or (needed and not any(sources)):
            one = "RECIPE, " if needed else ""
            raise typer.BadParameter(f"give one of: {one}--data, --positive with --negative")
        if (self.positive is None) != (self.negative is None):
            raise typer.BadParameter("--positive and --negative go together")
        if self.escapes and not self.raw:
            raise typer.BadParameter("--escapes goes with --raw; a chat template is not written with escapes")
        if self.is_given or is_read:
            return
        for option in ("columns", "label", "raw"):
            if getattr(self, option):
                raise typer.BadParameter(f"--{option} is for your own prompts; a recipe's data says it itself")

    def prompts(self, source: str) -> list[Conversation]:
        """Read a file of prompts with the same options.

        Args:
            source: the file.

        Raises:
            DataError: it cannot be read, or holds no prompt.
        """
        from steerkit.prompts.files.prompts import read_prompts

        return read_prompts(source, columns_of(self.columns), raw=self.raw, escapes=self.escapes)

    def items(self) -> ContrastSet:
        """Read the data.

        Raises:
            DataError: it cannot be read, or is no contrast.
        """
        from steerkit.prompts.contrast_set import ContrastSet

        return ContrastSet.from_file(
            self.data or self.positive or "",
            against=self.negative,
            columns=columns_of(self.columns).named,
            positive=self.label,
            raw=self.raw,
            escapes=self.escapes,
        )

    def parts(self) -> tuple[ContrastSet, ContrastSet | None]:
        """What is fitted on and what is held out: nothing unless an option or the file says so.

        Raises:
            DataError: it cannot be read, or parted in that way.
        """
        items = self.items()
        return items.split(held_out=self.held_out) if self.held_out is not None or items.marks else (items, None)

    def part(self, folder: Path | None = None) -> DataPart:
        """The same as a recipe says it.

        Args:
            folder: of the recipe, for files that are named relative to it; None leaves names as they are.

        Raises:
            DataError: the data cannot be read.
        """
        from steerkit.recipe import DataPart

        files = [file if folder is None else _relative(file, folder) for file in self.files]
        marked = self.held_out is None and bool(self.items().marks)
        share = {} if self.held_out is None else {"held_out": self.held_out}
        return DataPart(
            file=files[0],
            against=files[1] if files[1:] else None,
            columns=dict(columns_of(self.columns).named) or None,
            positive=self.label,
            raw=self.raw or None,
            escapes=self.escapes or None,
            marked=marked or None,
            **share,  # type: ignore[arg-type] # one number, or nothing
        )

    def recipe(self, method: str | None = None) -> Recipe:
        """The data as a recipe that stands in no file.

        Args:
            method: by which vectors are fitted; None takes the usual one.

        Raises:
            DataError: the data cannot be read.
        """
        from steerkit.recipe import MethodPart, Recipe

        part = MethodPart() if method is None else MethodPart(name=method)
        return Recipe(name=self.name, behaviour=self.name, data=self.part(), method=part)

    def words(self) -> list[str]:
        """The options that say the same on another command line."""
        found: list[str] = []
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value is True:
                found.append(flag)
            elif value not in (None, False, []):
                found += [flag, ",".join(value) if isinstance(value, list) else str(value)]
        return found


NO_DATA = DataChoice()


def recipe_of(name: str | None, given: DataChoice, method: str | None = None) -> Recipe:
    """What is fitted: a recipe by its name, or data of one's own.

    Args:
        name: of the recipe.
        given: the data, or the share of the recipe's items that is held out.
        method: by which vectors are fitted on data of one's own.

    Raises:
        BadParameter: both are given, or neither.
        SteerError: the recipe or the data cannot be read.
    """
    from steerkit.recipe import find_recipe

    given.check(name, needed=True)
    if name is None:
        return given.recipe(method)
    recipe = find_recipe(name)
    if given.held_out is None:
        return recipe
    return replace(recipe, data=replace(recipe.data, held_out=given.held_out, marked=None))


def check_reading(source: str | None, columns: list[str] | None, *, raw: bool, escapes: bool) -> None:
    """Refuse options of a file of prompts where there is none, or that do not go together.

    Args:
        source: the file.
        columns: what columns with unusual names are for.
        raw: prompts are left without the chat template.
        escapes: written line breaks are read.

    Raises:
        BadParameter: an option has nothing to say.
    """
    if source is None and (columns or escapes):
        raise typer.BadParameter(f"{'--columns' if columns else '--escapes'} says how a file is read; give one")
    if escapes and not raw:
        raise typer.BadParameter("--escapes goes with --raw; a chat template is not written with escapes")


def takes_data(run: Callable[..., Any]) -> Callable[..., Any]:
    """Put the options of data in the place of a command's parameter of type `DataChoice`.

    Args:
        run: the command.

    Returns:
        The command as typer reads it.
    """
    return spread(run, DataChoice)


def columns_of(texts: Sequence[str] | None) -> Columns:
    """Columns as the command line names them.

    Args:
        texts: such as ``prompt=goal``.

    Raises:
        BadParameter: a text is of another form.
    """
    from steerkit.errors import DataError
    from steerkit.prompts.files.columns import Columns

    try:
        return Columns.parse(texts) if texts else Columns()
    except DataError as error:
        raise typer.BadParameter(f"--{error}") from None


def _relative(file: str, folder: Path) -> str:
    """A file's name as seen from a folder."""
    if file.startswith("hf:"):
        return file
    return Path(os.path.relpath(Path(file).absolute(), folder.absolute())).as_posix()
