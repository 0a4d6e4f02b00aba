"""What is read without an error and still looks wrong, told once for a file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from steerkit.prompts.conversation import Conversation

__all__ = ["tell"]

_MARKS = re.compile(
    r"<\|[A-Za-z_]{2,}\|>|<\uff5c[^\uff5c\n]{2,}\uff5c>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|### (?:Instruction|Response):"
)
_WRITTEN = re.compile(r"(?<!\\)\\n")


def tell(name: str, found: Iterable[tuple[str, Conversation]], *, raw: bool, escapes: bool) -> None:
    """Warn of a template inside a template, and of line breaks that are written out.

    Args:
        name: of the file.
        found: what was read, each with its place; an empty place is not known.
        raw: prompts are left as they are.
        escapes: written line breaks are read.

    Warns:
        UserWarning: see above.
    """
    texts = [(place, one.prompt) for place, one in found if isinstance(one.prompt, str)]
    marked = [(place, said[0]) for place, text in texts if (said := _MARKS.search(text))]
    written = [place for place, text in texts if _WRITTEN.search(text)]
    if marked and not raw:
        place, mark = marked[0]
        more = f" and {len(marked) - 1} more" if marked[1:] else ""
        warnings.warn(
            f"{_at(name, place)}{more}: {mark!r} is a mark of a chat template, and the model's own template is written "
            "around it; --raw leaves prompts as they are",
            stacklevel=3,
        )
    if written and not escapes and (raw or marked):
        warnings.warn(
            f"{_at(name, written[0])}: a written \\n stays two characters; --raw with --escapes makes it a line break",
            stacklevel=3,
        )


def _at(name: str, place: str) -> str:
    return f"{name}, {place}" if place else name
