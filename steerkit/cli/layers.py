"""`steerkit layers`: how well a method separates the data at every block, and what it does there at an equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import (
    BatchSize,
    Json,
    ReadoutOption,
    number,
    print_json,
    readout_of,
    stderr,
    stdout,
    table,
)
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.evaluate.blocks import BlockEffect, Separation
    from steerkit.evaluate.setup import Setup

__all__ = ["run"]

_BAR = 20


@loads_model
@takes_data
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, behaviour or file.")] = None,
    given: DataChoice = NO_DATA,
    method: Annotated[str | None, typer.Option(help="See `steerkit methods`. (default: the recipe's or caa)")] = None,
    readout: ReadoutOption = None,
    layers: Annotated[
        str | None, typer.Option(help="Blocks from 0, such as 4-12. (default: a fifth to four fifths of the depth)")
    ] = None,
    effect: Annotated[bool, typer.Option(help="Steer at every block too, which takes longest.")] = True,
    max_kl: Annotated[float, typer.Option(help="What steering costs at every block, in nats per token.")] = 0.15,
    plot: Annotated[Path | None, typer.Option(help="Draw it too: a .png, .svg or .pdf file.", dir_okay=False)] = None,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Show block by block how well a method separates held-out items, and what it does there at an equal cost.

    The strength of each block is the one that costs the same KL divergence on neutral texts, so that blocks compare.
    Where items have no two answers to one prompt, only the separation is shown.
    """
    check_written(layers=layers, readout=readout, method=method)
    chosen_recipe = recipe_of(recipe, given, method)
    from steerkit.evaluate.blocks import best_layer, effect_by_block, middle_layers, separation_by_block
    from steerkit.evaluate.fits import Fits
    from steerkit.evaluate.setup import Setup
    from steerkit.network.sites import parse_layers

    if plot is not None:
        from steerkit.report.plots.drawing import ready

        ready()
        check_writable(plot)
    part = chosen_recipe.method_part(method)
    part = replace(part, readout=readout_of(readout)) if readout is not None else part
    train, kept = chosen_recipe.split(part.name)
    model = model.of(chosen_recipe.model)
    model.check_layers(layers, chosen_recipe.model)
    loaded, tokenizer = model.load()
    setup = Setup(loaded, tokenizer, kept, batch_size=batch_size)
    depth = setup.decoder.num_layers
    chosen = middle_layers(depth) if layers is None else parse_layers(layers, depth)
    fits = Fits(setup, train, part.name, chosen, part.settings, part.readout)
    if effect and (reason := _no_answers(setup)):
        effect = False
        stderr().print(f"separation only: {reason}")
    with status("comparing blocks") as step:
        apart = separation_by_block(fits, kept, chosen)
        does = effect_by_block(fits, [one.layer for one in apart], max_kl=max_kl, step=step) if effect else []
    best = best_layer(apart)
    if plot is not None:
        from steerkit.report.plots.separation import plot_blocks

        plot_blocks(apart, does, best, plot, title=f"{chosen_recipe.name}: {part.name} by block")
        if not as_json:
            stderr().print(f"wrote {plot}")
    if as_json:
        print_json(_as_json(apart, does, best, depth))
    else:
        _show(apart, does, best, len(kept), max_kl)


def _no_answers(setup: Setup) -> str | None:
    """Why the effect cannot be measured on the held-out items; None where it can."""
    from steerkit.errors import DataError

    try:
        return None if setup.pairs else "there are no items"
    except DataError as error:
        return str(error)


def _as_json(apart: Sequence[Separation], does: Sequence[BlockEffect], best: int, depth: int) -> dict[str, Any]:
    by_layer = {one.layer: one for one in does}
    rows: list[dict[str, Any]] = []
    for one in apart:
        row: dict[str, Any] = {"layer": one.layer, "auc": one.auc, "cohens_d": one.cohens_d}
        if one.layer in by_layer:
            own = by_layer[one.layer]
            row |= {"strength": own.strength, "kl": own.kl, "effect": list(own.effect)}
        rows.append(row)
    return {"num_layers": depth, "best_separation": best, "best_effect": _best_effect(does), "layers": rows}


def _best_effect(does: Sequence[BlockEffect]) -> int | None:
    return max(does, key=lambda one: one.effect.mean).layer if does else None


def _show(apart: Sequence[Separation], does: Sequence[BlockEffect], best: int, items: int, max_kl: float) -> None:
    by_layer = {one.layer: one for one in does}
    columns = ("block", "AUC", "d", *(("strength", "effect (95 %)") if does else ()), "")
    shown = table(*columns, right=columns[:-1])
    largest = max((one.effect.mean for one in does), default=0.0) if does else max(one.cohens_d for one in apart)
    for one in apart:
        own = by_layer.get(one.layer)
        length = (own.effect.mean if own else 0.0) if does else one.cohens_d
        cells = [str(one.layer), f"{one.auc:.3f}", f"{one.cohens_d:.2f}"]
        if does:
            cells += (
                [number(own.strength), f"{own.effect.mean:+.3f} ({own.effect.low:+.3f}, {own.effect.high:+.3f})"]
                if own
                else ["-", "-"]
            )
        bar = "#" * round(_BAR * max(length, 0.0) / largest) if largest > 0 else ""
        shown.add_row(*cells, bar)
    console = stdout()
    console.print(shown)
    console.print(f"separation of {items} held-out items; best at block {best}")
    if does:
        console.print(
            f"effect: change of the preference margin at the strength that costs a KL of {max_kl:g}; largest at block "
            f"{_best_effect(does)}"
        )
