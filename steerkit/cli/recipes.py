"""`steerkit recipes`: what is shipped. Reads the files itself, so that a list needs no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from steerkit._support.shipped import recipes
from steerkit.cli._shared import Json, number, print_json, stdout, table
from steerkit.errors import RecipeError

__all__ = ["run"]


def run(as_json: Json = False) -> None:
    """List the recipes: behaviour, method, number of items, suggested strength.

    A behaviour's plain name stands for its recipe marked as default.
    """
    rows = [_row(name, path) for name, path in recipes().items()]
    if as_json:
        print_json(rows)
        return
    shown = table("name", "behaviour", "method", "items", "default", "strength", right=("items", "strength"))
    for row in rows:
        strength, default = number(row["strength"], "g"), "yes" if row["default"] else ""
        shown.add_row(row["name"], row["behaviour"], row["method"], str(row["items"]), default, strength)
    stdout().print(shown)


def _row(name: str, path: Path) -> dict[str, Any]:
    """The facts of one recipe; what it leaves out has the defaults of `steerkit.recipe`.

    Raises:
        RecipeError: the file or its prompts cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        lines = (path.parent / content["data"]["file"]).read_bytes().split(b"\n")
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    return {
        "name": name,
        "behaviour": content.get("behaviour", ""),
        "title": content.get("title", ""),
        "method": content.get("method", {}).get("name", "caa"),
        "items": sum(bool(line.strip()) for line in lines),
        "default": content.get("default", False),
        "strength": content.get("apply", {}).get("strength"),
    }
