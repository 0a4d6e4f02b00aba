"""The options of `steerkit monitor`, and which of its four readings they ask for."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from steerkit.cli._data import ColumnsOption, check_reading, columns_of
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json
from steerkit.cli.monitor.asked import Asked
from steerkit.cli.monitor.difference import difference as show_difference
from steerkit.cli.monitor.items import KEYS, Item, check_column, items_of, prompts_of
from steerkit.cli.monitor.score import score, score_stream
from steerkit.cli.monitor.shift import shift as show_shift
from steerkit.cli.monitor.tuning import Tuning, check_tuning

if TYPE_CHECKING:
    from steerkit.prompts.files.columns import Columns

__all__ = ["run"]


class Reads(StrEnum):
    """Which tokens are read."""

    prompt_last = "prompt_last"
    response_mean = "response_mean"


class Kinds(StrEnum):
    """What is computed of them."""

    proj = "proj"
    cos = "cos"


DataOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Prompts, prompts with responses, or chats, any format; - streams stdin."),
]
ReadOption = Annotated[
    Reads | None,
    typer.Option(help="The prompt's last token, or the mean over the response. (default: prompt_last)"),
]
UncalibratedOption = Annotated[
    bool, typer.Option("--uncalibrated", help="Raw numbers, not standard deviations of neutral texts.")
]
AfterOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A finetuned model or adapter: show its tuning shift.")
]
TuningOption = Annotated[
    bool,
    typer.Option("--tuning-contribution", help="With --after, in the place of --vector: the share of finetuning."),
]
DifferenceOption = Annotated[
    bool, typer.Option("--difference", help="Compare the responses of --data with the model's own.")
]
CheapOption = Annotated[
    bool, typer.Option("--cheap", help="With --difference: the prompt's last token instead of own answers.")
]
MaxNewTokensOption = Annotated[
    int | None, typer.Option(min=1, help="With --difference: length of own answers, in tokens. (default: 64)")
]
HeatOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw every token's projection: .html, .png, .svg, .pdf.")
]
NoThinkingOption = Annotated[
    bool, typer.Option("--no-thinking", help="Tell the chat template not to think first, where it can.")
]


@loads_model
def run(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to read.")] = None,
    vector: Annotated[str, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")] = "",
    data: DataOption = None,
    columns: ColumnsOption = None,
    read: ReadOption = None,
    kind: Annotated[Kinds, typer.Option(help="Projection or cosine.")] = Kinds.proj,
    uncalibrated: UncalibratedOption = False,
    after: AfterOption = None,
    tuning_contribution: TuningOption = False,
    difference: DifferenceOption = False,
    cheap: CheapOption = False,
    max_new_tokens: MaxNewTokensOption = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the items go, with their numbers.")] = None,
    column: Annotated[str | None, typer.Option(help="Name of the new column. (default: projection)")] = None,
    heat: HeatOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    no_thinking: NoThinkingOption = False,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Show how far prompts, answers, a data set or a finetuned model lie along a vector.

    Numbers count in standard deviations of neutral texts, from their mean. Items of --data go out again with a new
    column; where they bring a `score` or a true-or-false `label` (or 1 and 0), its correlation or AUC is shown too.
    Of a stream (--data -), a line that is no item is answered with an object that says what is wrong with it.
    """
    if tuning_contribution:
        check_tuning(after, [vector, read, uncalibrated, difference, cheap, heat, max_new_tokens])
    elif not vector:
        raise typer.BadParameter("give --vector, a file or a shipped vector's name")
    is_stream = _check_source(prompts, data, is_other=bool(difference or after or heat or as_json or out))
    if not tuning_contribution:
        _check_forms(data, after, read, kind, column, heat, difference=difference, raw=raw)
    check_column(column, [dict.fromkeys(KEYS)])
    _check_own_answers(max_new_tokens, difference=difference, cheap=cheap)
    for path in filter(None, (out, heat)):
        check_writable(path)
    check_reading(data, columns, raw=raw, escapes=False)
    named = columns_of(columns)
    rows, is_table = _rows(prompts, None if is_stream else data, named, column)

    options: dict[str, Any] = {"batch_size": batch_size}
    options["chat_template_kwargs"] = {"enable_thinking": False} if no_thinking else None
    if tuning_contribution and after is not None:
        Tuning(model, after, options, named, is_table, data is not None, column, out, as_json).show(rows, raw=raw)
        return

    from steerkit._support.shipped import vector_path
    from steerkit.vector.steering_vector import SteeringVector

    found = SteeringVector.load(vector_path(vector, model.name))
    loaded, tokenizer = model.load()
    options |= {"kind": kind.value, "calibrated": not uncalibrated}
    unit = "standard deviations" if not uncalibrated else "cosine" if kind == Kinds.cos else "activation units"
    tokens: Literal["prompt_last", "response_mean"] = "response_mean" if read is Reads.response_mean else "prompt_last"
    asked = Asked(loaded, model, tokenizer, found, tokens, options, unit, named, is_table, column, out, as_json)
    if difference:
        show_difference(asked, list(rows), cheap=cheap, max_new_tokens=max_new_tokens or 64)
    elif after is not None:
        show_shift(asked, list(rows), after)
    elif is_stream:
        score_stream(asked, raw=raw)
    else:
        score(asked, rows, raw=raw, heat=heat, is_data=data is not None)


def _check_source(prompts: list[str] | None, data: str | None, *, is_other: bool) -> bool:
    """Refuse prompts beside a file of them, and a stream for what is not answered line by line.

    Returns:
        Whether the items come as a stream.

    Raises:
        BadParameter: neither or both are given, or the stream is asked for something else.
    """
    if bool(prompts) == (data is not None):
        raise typer.BadParameter("give prompts, or a file of them with --data")
    if data == "-" and is_other:
        raise typer.BadParameter("a stream (--data -) is answered line by line; it takes none of the other forms")
    return data == "-"


def _rows(
    prompts: list[str] | None, data: str | None, columns: Columns, column: str | None
) -> tuple[Iterable[Item], bool]:
    """The items of the command line or of a file, and whether they are rows of a table."""
    return (prompts_of(prompts or []), False) if data is None else items_of(data, columns, column)


def _check_forms(
    data: str | None,
    after: str | None,
    read: Reads | None,
    kind: Kinds,
    column: str | None,
    heat: Path | None,
    *,
    difference: bool,
    raw: bool,
) -> None:
    """Refuse options that belong to different readings.

    Raises:
        BadParameter: two of them do not go together.
    """
    if difference and (data is None or after is not None):
        raise typer.BadParameter("--difference compares the responses of --data, before any training")
    if (difference or after) and (raw or heat):
        raise typer.BadParameter("--raw and --heat stand with plain scores; leave out --difference and --after")
    if heat and kind is Kinds.cos:
        raise typer.BadParameter("--heat draws projections; leave out --kind cos")
    if column is not None and after is not None:
        raise typer.BadParameter("--column names the one new column; --after writes before, after and shift")
    if difference and read is not None:
        raise typer.BadParameter("--difference reads responses, --cheap prompts too; leave out --read")


def _check_own_answers(max_new_tokens: int | None, *, difference: bool, cheap: bool) -> None:
    """Refuse options of own answers where none are asked for.

    Raises:
        BadParameter: an option of --difference stands without it.
    """
    if cheap and not difference:
        raise typer.BadParameter("--cheap is a form of --difference; give both")
    if max_new_tokens is not None and (not difference or cheap):
        raise typer.BadParameter(
            "--max-new-tokens is the length of own answers, which --difference without --cheap asks for"
        )
