"""Files around commands: prompts of any format, and whether an output can be written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerkit._support.files import check_place
from steerkit.errors import VectorFileError

if TYPE_CHECKING:
    from steerkit.prompts.files.columns import Columns

__all__ = ["check_writable", "read_prompts"]

Prompt = str | list[dict[str, Any]]


def read_prompts(
    source: str | Path, columns: Columns | None = None, *, raw: bool = False, escapes: bool = False
) -> list[Prompt]:
    """Read prompts of a file of any format, as JSON holds them: texts and lists of messages.

    Args:
        source: a file, - for stdin, or ``hf:`` and the name of a data set.
        columns: names of columns that are not the usual ones.
        raw: whether they are left without the chat template; only what is told of them depends on it.
        escapes: read written line breaks.

    Warns:
        UserWarning: chats end with an answer; and see `read_prompts` of the room `prompts`.
    """
    from steerkit.prompts.files import prompts
    from steerkit.prompts.files.source import name_of

    read = prompts.read_prompts(source, columns, raw=raw, escapes=escapes)
    found = [prompts.plain_prompt(one) for one in read]
    answered = sum(one.answer is not None for one in read)
    if answered:
        what = "the assistant's turn, which is continued and not answered anew"
        warnings.warn(f"{name_of(source)}: {answered} of {len(found)} chats end with {what}", stacklevel=2)
    return found


def check_writable(path: Path) -> None:
    """Find out whether a file could be written, before work is spent on what it would hold. Leaves nothing behind.

    Args:
        path: the file to be; missing folders on the way are fine.

    Raises:
        VectorFileError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise VectorFileError(f"{path}: is a folder; give the name of a file, such as {path / 'x.safetensors'}")
    check_place(path, VectorFileError)
