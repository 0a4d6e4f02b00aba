"""`steerkit explain`: what a gated vector decides about prompts, without generating."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import Json, number, print_json, stdout, table
from steerkit.cli._steering import SteeringOption, check_chosen, chosen

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]


@loads_model
def run(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What would be answered.")],
    vector: Annotated[
        str | None, typer.Option(metavar="FILE", help="A vector file, a shipped name, or hub:USER/NAME.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength it would steer with. (default: the file's suggested strength)")
    ] = None,
    steering: SteeringOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave prompts as they are, without the chat template.")] = False,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Show what the gate of a vector decides about prompts: open or closed, and the scores behind it.

    Of a composition (--steering) those vectors are shown that a prompt decides about: by a gate of their method, or by
    when(...) without per token.
    """
    import steerkit
    from steerkit.errors import UnknownNameError
    from steerkit.methods._registry import is_gated

    if vector is None and steering is None:
        raise typer.BadParameter("give a --vector, or several in one line with --steering")
    names, strengths = [] if vector is None else [vector], [] if strength is None else [strength]
    check_chosen(names, strengths, steering)
    used = chosen(names, strengths, steering, model.name)
    gated = [one for one in zip(used.terms, used.vectors, strict=True) if is_gated(one[1]) or _asks_prompts(one[1])]
    if not gated:  # before a model is loaded
        what = " and ".join(dict.fromkeys(one.method for one in used.vectors))
        raise UnknownNameError(f"{vector or steering}: method {what} has no gate, it steers every prompt")
    loaded, tokenizer = model.load()
    rows = []
    for term, one in gated:
        of_one = steerkit.explain(loaded, tokenizer, prompts, one, raw=raw)
        rows += of_one if steering is None else [{"steering": str(term), **row} for row in of_one]
    if as_json:
        print_json(rows)
        return
    more = () if steering is None else ("steering",)
    shown = table(*more, "prompt", "gate", "gain", "why", right=("gain",))
    for row in rows:
        said = (row["prompt"], "open" if row["open"] else "closed", number(row["gain"], ".3f"), _why(row))
        shown.add_row(*(row[name] for name in more), *said)
    stdout().print(shown)


def _asks_prompts(vector: SteeringVector) -> bool:
    """Whether a rule over readings decides once for each prompt."""
    return vector.when is not None and not vector.when.per_token


def _why(row: dict[str, Any]) -> str:
    """The scores behind a decision."""
    if "scores" in row:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
        blocks = [value for value in row["blocks"].values() if value]
        moved = f"; blocks {min(blocks):.3g} to {max(blocks):.3g} norms" if blocks else ""
        return f"{scores}; dead zone {row['dead_zone']:.3g}{moved}"
    if "readings" in row:
        readings = ", ".join(f"{name} {value:.3f}" for name, value in row["readings"].items())
        return f"{readings}; {row['rule']}"
    return "; ".join(
        f"{name} {facts['score']:.4f}, met {facts['compare']} {facts['threshold']:.4f}"
        for name, facts in row.get("conditions", {}).items()
    )
