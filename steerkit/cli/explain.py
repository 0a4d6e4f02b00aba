"""`steerkit explain`: what a gated vector decides about prompts, without generating."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, number, print_json, stdout, table

__all__ = ["run"]


@loads_model
def run(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What would be answered.")],
    vector: Annotated[str, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")],
    strength: Annotated[
        float | None, typer.Option(help="Strength it would steer with. (default: the file's suggested strength)")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show what a gated vector decides about prompts: open or closed, and the scores behind it."""
    import steerkit
    from steerkit._support.shipped import vector_path
    from steerkit.errors import UnknownNameError
    from steerkit.methods._protocols import editor_of
    from steerkit.methods._registry import method_of
    from steerkit.vector.steering_vector import SteeringVector

    found = SteeringVector.load(vector_path(vector))
    if editor_of(method_of(found), found) is None:  # before a model is loaded
        raise UnknownNameError(f"{vector}: method {found.method} has no gate, it steers every prompt")
    loaded, tokenizer = model.load()
    rows = steerkit.explain(loaded, tokenizer, prompts, found, strength=strength, raw=raw)
    if as_json:
        print_json(rows)
        return
    shown = table("prompt", "gate", "gain", "why", right=("gain",))
    for row in rows:
        shown.add_row(row["prompt"], "open" if row["open"] else "closed", number(row["gain"], ".3f"), _why(row))
    stdout().print(shown)


def _why(row: dict[str, Any]) -> str:
    """The scores behind a decision."""
    if "scores" in row:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
        blocks = [value for value in row["blocks"].values() if value]
        moved = f"; blocks {min(blocks):.3g} to {max(blocks):.3g} norms" if blocks else ""
        return f"{scores}; dead zone {row['dead_zone']:.3g}{moved}"
    return "; ".join(
        f"{name} {facts['score']:.4f}, met {facts['compare']} {facts['threshold']:.4f}"
        for name, facts in row.get("conditions", {}).items()
    )
