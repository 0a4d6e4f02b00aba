"""What is read without an error and still looks wrong, told once for a file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

from steerkit.prompts.conversation import Conversation
from steerkit.prompts.files.rows import Row

__all__ = ["tell", "tell_of_tools"]

_MARKS = re.compile(
    r"<\|[A-Za-z_]{2,}\|>|<\uff5c[^\uff5c\n]{2,}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|### (?:Instruction|Response):"
)
_WRITTEN = re.compile(r"(?<!\\)\\n")


def tell(found: Iterable[tuple[str, Conversation]], *, raw: bool, escapes: bool) -> None:
    """Warn once of a template inside a template, and of line breaks that are written out.

    Args:
        found: what was read, each with its place.
        raw: prompts are left as they are.
        escapes: written line breaks are read.

    Warns:
        UserWarning: see above.
    """
    texts = [(place, one.prompt) for place, one in found if isinstance(one.prompt, str)]
    marked = [(place, said[0]) for place, text in texts if not raw and (said := _MARKS.search(text))]
    written = [place for place, text in texts if not escapes and _WRITTEN.search(text)]
    if marked:
        place, mark = marked[0]
        also = ", and with --escapes a written \\n is a line break" if written else ""
        warnings.warn(
            f"{_at(place, len(marked))}: {mark!r} is a mark of a chat template, and the model's own template is "
            f"written around it; --raw leaves prompts as they are{also}",
            stacklevel=3,
        )
    elif written and raw:
        warnings.warn(
            f"{_at(written[0], len(written))}: a written \\n stays two characters; --escapes makes it a line break",
            stacklevel=3,
        )


def tell_of_tools(name: str, rows: Iterable[Row]) -> None:
    """Warn of declarations of tools, which stand beside the messages and are not read.

    Args:
        name: of a file.
        rows: what it holds, gone through once.

    Warns:
        UserWarning: a row declares tools.
    """
    declared = [row.place for row in rows if isinstance(row.value, Mapping) and row.value.get("tools")]
    if declared:
        warnings.warn(
            f"{_at(f'{name}, {declared[0]}', len(declared))}: 'tools' are not declared to the model; calls of "
            "them and their results are read",
            stacklevel=3,
        )


def _at(place: str, count: int) -> str:
    return f"{place} and {count - 1} more" if count > 1 else place
