"""`steerkit methods`: what there is to fit with."""

from __future__ import annotations

from steerkit.cli._shared import Json, print_json, stdout, table

__all__ = ["run"]


def run(as_json: Json = False) -> None:
    """List the methods: name, paper, which tokens they write by default, what they are fitted on."""
    from steerkit.registry import method_names, resolve

    rows = [
        {
            "name": name,
            "title": kind.title,
            "paper": kind.paper,
            "scope": kind.from_settings({}).default_scope,
            "data": kind.data,
        }
        for name, kind in ((name, resolve(name)) for name in method_names())
    ]
    if as_json:
        print_json(rows)
        return
    shown = table("name", "title", "paper", "scope", "data")
    for row in rows:
        shown.add_row(*row.values())
    stdout().print(shown)
