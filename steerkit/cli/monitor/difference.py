"""`--difference`: the responses of a data set beside the model's own, before any training."""

from __future__ import annotations

from steerkit._support.progress import status
from steerkit.cli.monitor.asked import Asked
from steerkit.cli.monitor.items import Item
from steerkit.cli.monitor.summary import finish, plain

__all__ = ["difference"]


def difference(asked: Asked, rows: list[Item], *, cheap: bool, max_new_tokens: int) -> None:
    """Show how much further the given responses lie along the vector than the model's own.

    Args:
        asked: the call.
        rows: items with responses.
        cheap: read the prompt's last token instead of own answers.
        max_new_tokens: the longest own answer, in tokens.
    """
    import steerkit

    store = None if asked.out is None or cheap else asked.out.with_name(asked.out.name + ".own.jsonl")
    with status("comparing"):
        flagged = steerkit.projection_difference(
            asked.model,
            asked.tokenizer,
            asked.texts(rows),
            asked.vector,
            **asked.options,
            cheap=cheap,
            max_new_tokens=max_new_tokens,
            store=store,
        )
    name = asked.column or "projection_difference"
    own = [{}] * len(rows) if flagged.answers is None else [{"own_response": one} for one in flagged.answers]
    rows = [{**row, **more, name: value} for row, more, value in zip(rows, own, plain(flagged.values), strict=True)]
    finish(rows, name, asked.unit, out=asked.out, as_json=asked.as_json, is_data=True)
