"""Blocks of README.md: `python -m tests.readme` puts the table of results there (`docs.generate` that of methods)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def block(name: str) -> str:
    """What stands in a block of the README."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found, f"README has no block {name!r}"
    return found[1]


def put(name: str, content: str) -> None:
    """Replace a block of the README."""
    old = f"<!-- {name} -->\n{block(name)}<!-- end -->"
    new = f"<!-- {name} -->\n{content}<!-- end -->"
    README.write_text(README.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def results() -> str:
    """The table of results, as the kept comparison states it."""
    from tests.docs.results import table

    return table()


if __name__ == "__main__":
    put("results", results())
