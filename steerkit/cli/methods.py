"""`steerkit methods`: what there is to fit with."""

from __future__ import annotations

import typer

from steerkit.cli._shared import Json, print_json, stdout, table

__all__ = ["run"]


def run(as_json: Json = False) -> None:
    """List the methods: name, paper, which tokens they write, what strengths count, what they are fitted on."""
    from steerkit.methods._listing import listed_methods

    usable, broken = listed_methods()
    for problem in broken.values():
        typer.echo(f"note: {problem}", err=True)
    shown_at = ("name", "title", "paper", "scope", "strength", "neutral", "data")
    rows = [{key: facts.as_json()[key] for key in shown_at} for facts in usable.values()]
    if as_json:
        print_json(rows)
        return
    columns = ("name", "title", "scope", "strength", "neutral", "data")
    shown = table(*columns)
    for row in rows:
        cells = row | {"neutral": "none" if row["neutral"] is None else f"{row['neutral']:g}"}
        shown.add_row(*(str(cells[column]) for column in columns))
    stdout().print(shown)
    typer.echo("At the neutral strength nothing changes. Papers and full titles: --json")
