"""`--after`: how far finetuning has moved a model along the vector, between two checkpoints or by an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerkit._support.progress import status
from steerkit.cli._shared import number, print_json, stdout, table
from steerkit.cli.monitor.asked import Asked
from steerkit.cli.monitor.items import Item
from steerkit.cli.monitor.summary import Tally, ends, estimate, plain, write

if TYPE_CHECKING:
    from steerkit.cli._model import ModelChoice

__all__ = ["before_and_after", "shift"]


def shift(asked: Asked, rows: list[Item], after: str) -> None:
    """Show items before and after finetuning, and the mean tuning shift.

    Args:
        asked: the call.
        rows: the items.
        after: the finetuned model, or the folder of an adapter.

    Raises:
        DataError: no item has what is to be read.
    """
    import steerkit

    before, other = before_and_after(asked.model, asked.choice, after)
    with status("reading"):
        found = steerkit.finetuning_shift(
            before, other, asked.tokenizer, asked.texts(rows), asked.vector, read=asked.read, **asked.options
        )
    parts = zip(rows, plain(found.before), plain(found.after), plain(found.values), strict=True)
    tally = Tally("shift")
    listed = [
        tally.noted({**row, "before": first, "after": second, "shift": moved}) for row, first, second, moved in parts
    ]
    tally.check()
    write(listed, asked.out)
    scored, mean = sum(row["shift"] is not None for row in listed), estimate(found.estimate)
    if asked.as_json:
        facts = {"after": after, "unit": asked.unit, "items": len(rows), "scored": scored, "shift": mean}
        print_json({"items": listed, "summary": facts})
        return
    kept = ~found.values.isnan()
    means = [float(one[kept].mean()) for one in (found.before, found.after)]
    shown = table("", asked.unit, right=(asked.unit,))
    shown.add_row("before", number(means[0], "+.3f"))
    shown.add_row("after", number(means[1], "+.3f"))
    shown.add_row("shift", f"{number(mean['mean'], '+.3f')} ({ends(mean)})")
    stdout().print(shown)
    left = f" ({len(rows) - scored} of {len(rows)} items have no response to read)" if scored < len(rows) else ""
    stdout().print(f"means over {scored} items; 95 % interval of the shift{left}")


def before_and_after(model: Any, choice: ModelChoice, after: str) -> tuple[Any, Any]:
    """The model before and after; None before an adapter, which is switched off for that.

    Args:
        model: the model before finetuning.
        choice: which model it is, and how it was loaded.
        after: the finetuned model, or the folder of an adapter.
    """
    from steerkit.monitor.shift import with_adapter

    folder = Path(after).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return None, with_adapter(model, folder)
    return model, choice.another(after).load()[0]
