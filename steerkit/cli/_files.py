"""Files around commands: prompts, one a line or as JSONL, and whether an output can be written."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from steerkit.errors import DataError, VectorFileError

__all__ = ["check_writable", "read_prompts"]

Prompt = str | list[dict[str, str]]


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts: plain text, one a line, or JSONL.

    A file is JSONL if it is called so, or if its first line is a JSON list or object. A line of it is a list of
    messages, a string, or an object with `prompt` (and perhaps `system`) or `messages`. Blank lines are skipped.

    Args:
        path: the file, UTF-8.

    Raises:
        DataError: it is missing or holds no prompt, or, with the line's number, a line is not what it should be.
    """
    from steerkit.prompts.conversation import Conversation

    lines = _lines(path)
    is_jsonl = path.suffix in (".jsonl", ".ndjson") or _is_json(lines[0][1])
    prompts: list[Prompt] = []
    for number, line in lines:
        try:
            prompt = _from_json(line) if is_jsonl else line
            Conversation.of(prompt)
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        prompts.append(prompt)
    return prompts


def check_writable(path: Path) -> None:
    """Find out whether a file could be written, before work is spent on what it would hold. Leaves nothing behind.

    Args:
        path: the file to be; missing folders on the way are fine.

    Raises:
        VectorFileError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise VectorFileError(f"{path}: is a folder; give the name of a file, such as {path / 'x.safetensors'}")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise VectorFileError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers.

    Raises:
        DataError: the file is missing, not UTF-8 (with the line), or blank.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the file ({error.strerror}); give a file with one prompt a line"
        ) from None
    found = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8; save it as UTF-8") from None
        if text.strip():
            found.append((number, text))
    if not found:
        raise DataError(f"{path}: the file holds no prompt; write one a line")
    return found


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), list | dict)
    except ValueError:
        return False


def _from_json(line: str) -> Any:
    """The prompt on one line of JSONL; what kind of thing it is, `Conversation` checks.

    Raises:
        DataError: not JSON, or an object without a prompt.
    """
    try:
        item = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"malformed JSON at column {error.colno}: {error.msg}; write a list of messages or a string"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"JSON that Python cannot read ({error}); write a list of messages or a string") from None
    if not isinstance(item, dict):
        return item
    if ("prompt" in item) == ("messages" in item):
        raise DataError(f"give 'prompt' or 'messages'; the object has {', '.join(map(repr, item)) or 'nothing'}")
    if "messages" in item:
        return item["messages"]
    if "system" in item and isinstance(item["prompt"], str):
        return [{"role": "system", "content": item["system"]}, {"role": "user", "content": item["prompt"]}]
    return item["prompt"]
