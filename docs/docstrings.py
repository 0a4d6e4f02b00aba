"""Docstrings as they are written here, as reStructuredText: code in single backticks, formulas indented."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["as_rst"]

_CODE = re.compile(r"``.+?``|`[^`]+`", flags=re.DOTALL)


def as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Rewrite a docstring in place, before napoleon reads its sections.

    Args:
        app: Sphinx.
        what: the kind of object, such as ``"module"``.
        name: its name.
        obj: itself.
        options: of the directive.
        lines: the docstring.
    """
    found: list[str] = []
    text: list[str] = []
    for part, is_code in _parts(lines, is_module=what == "module"):
        if is_code:
            found += [*_prose(text), *part]
            text = []
        else:
            text += part
    lines[:] = [*found, *_prose(text)]
    if what == "attribute" and lines:
        lines[0] = lines[0].replace(": ", " - ")  # napoleon takes what stands before a colon for the type


def _parts(lines: list[str], *, is_module: bool) -> list[tuple[list[str], bool]]:
    """Runs of lines, each with whether it is code: indented blocks of modules, and the sections called Example."""
    parts: list[tuple[list[str], bool]] = []
    at = 0
    while at < len(lines):
        line, end = lines[at], at + 1
        is_example = line.strip() == "Example:"
        is_formula = is_module and line.startswith("    ") and not (lines[at - 1].strip() if at else "")
        if not is_example and not is_formula:
            parts.append(([line], False))
            at = end
            continue
        margin = len(line) - len(line.lstrip()) if is_example else 3
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > margin):
            end += 1
        block = lines[at:end]
        if is_formula:
            block = [".. code-block:: text", "", *block]
        elif not block[1].strip().startswith(">>>"):
            block = [line.replace("Example:", "Example::"), "", *block[1:]]
        parts.append(([*block, ""], True))
        at = end
    return parts


def _prose(lines: list[str]) -> list[str]:
    """Text in which nothing but code in backticks is markup."""
    text, out, at = "\n".join(lines), [], 0
    for code in _CODE.finditer(text):
        out += [_escaped(text[at : code.start()]), "``" + re.sub(r"\s+", " ", code[0].strip("`")) + "``"]
        if text[code.end() : code.end() + 1].isalnum():
            out.append("\\ ")
        at = code.end()
    out.append(_escaped(text[at:]))
    return "".join(out).split("\n") if lines else []


def _escaped(text: str) -> str:
    return re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", text)
