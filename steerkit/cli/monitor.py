"""`steerkit monitor`: how far prompts, answers, a data set or a finetuned model lie along a vector."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._files import check_writable
from steerkit.cli._shared import DEFAULT_MODEL, BatchSize, Json, Model, number, print_json, stderr, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from steerkit.evaluate.intervals import Estimate
    from steerkit.monitor.monitor import Monitor
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

_HEATED = 20
_KEYS = ("prompt", "system", "response", "messages", "own_response")


class Reads(StrEnum):
    """Which tokens are read."""

    prompt_last = "prompt_last"
    response_mean = "response_mean"


class Kinds(StrEnum):
    """What is computed of them."""

    proj = "proj"
    cos = "cos"


def run(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to read.")] = None,
    vector: Annotated[str, typer.Option(metavar="FILE", help="A vector file, or a shipped vector's name.")] = "",
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSONL of prompts, prompts with responses, or messages; - reads stdin."),
    ] = None,
    read: Annotated[
        Reads | None,
        typer.Option(help="The prompt's last token, or the mean over the response. (default: prompt_last)"),
    ] = None,
    kind: Annotated[Kinds, typer.Option(help="Projection or cosine.")] = Kinds.proj,
    uncalibrated: Annotated[
        bool, typer.Option("--uncalibrated", help="Raw numbers, not standard deviations of neutral texts.")
    ] = False,
    after: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A finetuned model or adapter: show how far it has moved.")
    ] = None,
    difference: Annotated[
        bool, typer.Option("--difference", help="Compare the responses of --data with the model's own.")
    ] = False,
    cheap: Annotated[
        bool, typer.Option("--cheap", help="With --difference: the prompt's last token instead of own answers.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --difference: length of own answers, in tokens. (default: 64)")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the items go, with their numbers.")] = None,
    column: Annotated[str | None, typer.Option(help="Name of the new column. (default: projection)")] = None,
    heat: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw every token's projection: .html, .png, .svg, .pdf.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    no_thinking: Annotated[
        bool, typer.Option("--no-thinking", help="Tell the chat template not to think first, where it can.")
    ] = False,
    model: Model = DEFAULT_MODEL,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Show how far prompts, answers, a data set or a finetuned model lie along a vector.

    Numbers count in standard deviations of neutral texts, from their mean. Items of --data go out again with a new
    column; where they bring a `score` or a true-or-false `label` (or 1 and 0), its correlation or AUC is shown too.
    """
    if not vector:
        raise typer.BadParameter("give --vector, a file or a shipped vector's name")
    if bool(prompts) == (data is not None):
        raise typer.BadParameter("give prompts, or a file of them with --data")
    if difference and (data is None or after is not None):
        raise typer.BadParameter("--difference compares the responses of --data, before any training")
    if (difference or after) and (raw or heat):
        raise typer.BadParameter("--raw and --heat stand with plain scores; leave out --difference and --after")
    if heat and kind is Kinds.cos:
        raise typer.BadParameter("--heat draws projections; leave out --kind cos")
    if cheap and not difference:
        raise typer.BadParameter("--cheap is a form of --difference; give both")
    if column is not None and after is not None:
        raise typer.BadParameter("--column names the one new column; --after writes before, after and shift")
    _check_column(column, [dict.fromkeys(_KEYS)])
    if difference and read is not None:
        raise typer.BadParameter("--difference reads responses, --cheap prompts too; leave out --read")
    if max_new_tokens is not None and (not difference or cheap):
        raise typer.BadParameter(
            "--max-new-tokens is the length of own answers, which --difference without --cheap asks for"
        )
    if data == "-" and (difference or after or heat or as_json or out):
        raise typer.BadParameter("a stream (--data -) is answered line by line; it takes none of the other forms")
    for path in (out, heat):
        if path is not None:
            check_writable(path)
    items = _given(prompts or []) if data is None else _items(data)
    rows = items if data == "-" else list(items)
    if isinstance(rows, list):
        _check_column(column, rows)

    import steerkit
    from steerkit._support.shipped import vector_path
    from steerkit.vector.steering_vector import SteeringVector

    found = SteeringVector.load(vector_path(vector, model))
    loaded, tokenizer = steerkit.load_model(model)
    options: dict[str, Any] = {"kind": kind.value, "calibrated": not uncalibrated, "batch_size": batch_size}
    options["chat_template_kwargs"] = {"enable_thinking": False} if no_thinking else None
    reading: dict[str, Any] = {"read": (read or Reads.prompt_last).value, **options}
    unit = "standard deviations" if not uncalibrated else "cosine" if kind == Kinds.cos else "activation units"
    if difference:
        assert isinstance(rows, list)
        store = None if out is None or cheap else out.with_name(out.name + ".own.jsonl")
        options |= {"cheap": cheap, "max_new_tokens": max_new_tokens or 64, "store": store}
        with status("comparing"):
            flagged = steerkit.projection_difference(loaded, tokenizer, rows, found, **options)
        name = column or "projection_difference"
        extra = [{}] * len(rows) if flagged.answers is None else [{"own_response": one} for one in flagged.answers]
        rows = [
            {**row, **more, name: value} for row, more, value in zip(rows, extra, _plain(flagged.values), strict=True)
        ]
        _finish(rows, name, _summary(rows, name, unit), out=out, as_json=as_json, is_data=True)
        return
    if after is not None:
        assert isinstance(rows, list)
        _shift(loaded, tokenizer, rows, found, after, reading, unit, out, as_json)
        return
    monitor = steerkit.Monitor(loaded, tokenizer, found, **reading)
    name = column or "projection"
    if data == "-":
        for row in rows:
            _check_column(column, [row])
            (value,) = _plain(monitor.score([row], raw=raw))
            _print_line({**row, name: value})
            sys.stdout.flush()
        return
    assert isinstance(rows, list)
    with status("reading"):
        values = _plain(monitor.score(rows, raw=raw))
    _check_read(values)
    if heat is not None:
        _draw(monitor, rows, heat, found, raw)
    rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    _finish(rows, name, _summary(rows, name, unit), out=out, as_json=as_json, is_data=data is not None)


def _check_column(column: str | None, rows: Sequence[dict[str, Any]]) -> None:
    if column is not None and any(column in row for row in rows):
        raise typer.BadParameter(f"--column {column}: items have a key of that name; give another one")


def _given(prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for prompt in prompts:
        yield {"prompt": prompt}


def _items(data: str) -> Iterator[dict[str, Any]]:
    """The items of a JSONL file or of stdin, one at a time.

    Raises:
        DataError: the file is missing, empty or no UTF-8, or, with the line's number, a line is no item.
    """
    from steerkit.errors import DataError

    if data == "-":
        try:
            yield from _parsed("stdin", sys.stdin)
        except UnicodeDecodeError as error:
            raise DataError(f"stdin: it is not {error.encoding.upper()}; give one JSON object a line") from None
        return
    try:
        content = Path(data).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{data}: cannot read the file ({reason}); give a JSONL file") from None
    rows = list(_parsed(data, content.split("\n")))
    if not rows:
        raise DataError(f"{data}: the file holds no item; write one JSON object a line")
    yield from rows


def _parsed(name: str, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    from steerkit.errors import DataError
    from steerkit.monitor.items import conversation_of

    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            row = item if isinstance(item, dict) else {"prompt" if isinstance(item, str) else "messages": item}
            conversation_of(row)
        except DataError as error:
            raise DataError(f"{name}, line {place}: {error}") from None
        except (ValueError, RecursionError):
            raise DataError(f"{name}, line {place}: malformed JSON; write one object a line") from None
        yield row


def _check_read(values: Sequence[float | None]) -> None:
    """Refuse numbers that are none.

    Raises:
        DataError: nothing could be read.
    """
    from steerkit.errors import DataError

    if all(value is None for value in values):
        raise DataError(
            f"none of {len(values)} items has a response to read; give --data with responses, or --read prompt_last"
        )


def _plain(values: Any) -> list[float | None]:
    """Numbers as JSON can hold them; null for what has none."""
    return [None if value != value else round(value, 6) for value in values.tolist()]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _print_line(row: dict[str, Any]) -> None:
    is_unicode = (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")
    typer.echo(json.dumps(row, ensure_ascii=not is_unicode))


def _summary(rows: Sequence[dict[str, Any]], name: str, unit: str) -> dict[str, Any]:
    """Mean, spread, and how the column goes with `score` and `label` where the items bring them."""
    import torch

    from steerkit.evaluate.intervals import NotScored, correlation, interval, separability

    def numbers(values: Iterable[Any]) -> Any:
        listed = [float(one) if isinstance(one, int | float) else float("nan") for one in values]
        return torch.tensor(listed, dtype=torch.double)

    values = numbers(row[name] for row in rows)
    kept = values[~values.isnan()]
    found: dict[str, Any] = {"column": name, "unit": unit, "items": len(rows), "scored": len(kept)}
    if len(kept):
        found |= {"mean": _estimate(interval(values, shares=False)), "sd": float(kept.std()) if len(kept) > 1 else None}
    labels = [row.get("label") for row in rows]
    scores = [None if isinstance(row.get("score"), bool) else row.get("score") for row in rows]
    try:
        if any(isinstance(score, int | float) for score in scores):
            found["correlation_with_score"] = _estimate(correlation(values, numbers(scores)))
    except NotScored:
        found["correlation_with_score"] = None
    truths = [bool(label) if isinstance(label, int | float) and label in (0, 1) else None for label in labels]
    if True in truths and False in truths:
        sides = [values[torch.tensor([truth is side for truth in truths])] for side in (True, False)]
        try:
            found["auc_of_label"] = _estimate(separability(*sides))
        except NotScored:
            found["auc_of_label"] = None
    return found


def _estimate(found: Estimate) -> dict[str, float | None]:
    ends = {name: getattr(found, name) for name in ("mean", "low", "high")}
    return {name: None if abs(value) == float("inf") else value for name, value in ends.items()}


def _finish(
    rows: list[dict[str, Any]], name: str, summary: dict[str, Any], *, out: Path | None, as_json: bool, is_data: bool
) -> None:
    """Write the items, and show the summary."""
    _write(rows, out)
    if as_json:
        print_json({"items": rows, "summary": summary})
        return
    if not is_data:
        shown = table("prompt", name, right=(name,))
        for row in rows:
            shown.add_row(str(row["prompt"]), number(row[name], "+.3f"))
        stdout().print(shown)
        stdout().print(f"in {summary['unit']}")
        return
    if out is None:
        for row in rows:
            _print_line(row)
    _print_summary(stdout() if out is not None else stderr(), summary)
    if out is not None:
        stdout().print(f"wrote {out}")


def _write(rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    if out is not None:
        from steerkit._support.files import write_whole

        write_whole(out, "".join(_line(row) + "\n" for row in rows).encode())


def _print_summary(console: Console, summary: dict[str, Any]) -> None:
    shown = table("", "mean", "95 % interval", right=("mean",))
    titles = {
        "mean": f"{summary['column']} ({summary['unit']})",
        "correlation_with_score": "correlation with score",
        "auc_of_label": "AUC of label",
    }
    for key, title in titles.items():
        one = summary.get(key)
        if one is not None:
            shown.add_row(title, number(one["mean"], "+.3f"), _ends(one))
    console.print(shown)
    console.print(f"{summary['scored']} of {summary['items']} items could be read")


def _ends(one: dict[str, Any]) -> str:
    return f"{number(one['low'], '+.3f')} to {number(one['high'], '+.3f')}"


def _shift(
    loaded: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    vector: SteeringVector,
    after: str,
    options: dict[str, Any],
    unit: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """The finetuning shift, between two checkpoints or of an adapter."""
    import steerkit
    from steerkit.monitor.shift import with_adapter

    folder = Path(after).expanduser()
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    other = with_adapter(loaded, folder) if is_adapter else steerkit.load_model(after)[0]
    with status("reading"):
        shift = steerkit.finetuning_shift(None if is_adapter else loaded, other, tokenizer, rows, vector, **options)
    moves = _plain(shift.values)
    _check_read(moves)
    parts = zip(rows, _plain(shift.before), _plain(shift.after), moves, strict=True)
    listed = [{**row, "before": first, "after": second, "shift": moved} for row, first, second, moved in parts]
    _write(listed, out)
    estimate = _estimate(shift.estimate)
    scored = sum(move is not None for move in moves)
    found = {"after": after, "unit": unit, "items": len(rows), "scored": scored, "shift": estimate}
    if as_json:
        print_json({"items": listed, "summary": found})
        return
    kept = ~shift.values.isnan()
    means = [float(one[kept].mean()) for one in (shift.before, shift.after)]
    shown = table("", unit, right=(unit,))
    shown.add_row("before", number(means[0], "+.3f"))
    shown.add_row("after", number(means[1], "+.3f"))
    shown.add_row("shift", f"{number(estimate['mean'], '+.3f')} ({_ends(estimate)})")
    stdout().print(shown)
    left = f" ({len(rows) - scored} of {len(rows)} items have no response to read)" if scored < len(rows) else ""
    stdout().print(f"means over {scored} items; 95 % interval of the shift{left}")


def _draw(monitor: Monitor, rows: list[dict[str, Any]], path: Path, vector: SteeringVector, raw: bool) -> None:
    """The heat map of the first items."""
    from steerkit.report.heat_page import write_heat

    texts = [monitor.heat(row, raw=raw) for row in rows[:_HEATED]]
    write_heat(texts, path, title=f"{vector.method} at {monitor.sites[0]}", middle=monitor.middle())
    left = f" (the first {_HEATED} of {len(rows)} items)" if len(rows) > _HEATED else ""
    stderr().print(f"wrote {path}{left}")
