"""`steerkit attribute`: how fast a vector's effect begins at every site, head and neuron, before any sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.files import write_whole
from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, recipe_of, takes_data
from steerkit.cli._evidence import Items, OnOption, data_of, items_on
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, ReadoutOption, number, print_json, readout_of, stdout, table
from steerkit.cli._written import check_written

if TYPE_CHECKING:
    from steerkit.evaluate.attribution import Attribution
    from steerkit.evaluate.intervals import Estimate
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

_BAR = 20
VectorOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A fitted vector, in the place of a recipe: a file or a shipped name."),
]
LayersOption = Annotated[str | None, typer.Option(help="Blocks from 0, such as 4-12. (default: all)")]
KindsOption = Annotated[
    str | None, typer.Option(help="Kinds of site, such as resid_post,attn_out,z,mlp_post. (default: the method's)")
]
PartsOption = Annotated[int, typer.Option(min=0, help="Heads (of z) and neurons (of mlp_post) that are listed.")]
OutOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write it all as JSON too.", dir_okay=False)]


@loads_model
@takes_data
def run(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, behaviour or file.")] = None,
    vector: VectorOption = None,
    given: DataChoice = NO_DATA,
    method: Annotated[str | None, typer.Option(help="Another method than the recipe's.")] = None,
    readout: ReadoutOption = None,
    layers: LayersOption = None,
    kinds: KindsOption = None,
    scorer: Annotated[str, typer.Option(help="What the slopes are of; gradients have to go through it.")] = (
        "preference_margin"
    ),
    on: OnOption = Items.validation,
    controls: Annotated[int, typer.Option(min=0, help="Random directions, which z counts in.")] = 20,
    parts: PartsOption = 10,
    out: OutOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Fixes the random directions.")] = 0,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Show where a vector's effect begins fastest: slopes at every site, head and neuron from one backward pass.

    Of a recipe, or of your own pairs (--data), fitted at all blocks; or of a fitted vector (--vector) at its sites. A
    slope is the change of the preference margin per unit of strength, at strength 0, with its interval over items; z
    counts it in standard deviations of random directions. What stands at the heads or the neurons is told with the
    share of it that the projection behind sees. Slopes tell where to look; `steerkit calibrate` says what it costs.
    """
    from steerkit.evaluate.attribution import attribute
    from steerkit.evaluate.setup import Setup

    check_written(layers=layers, readout=readout, kinds=kinds, method=method, slopes_of=scorer)
    _check(recipe, vector, {"--method": method, "--readout": readout, "--layers": layers, "--kinds": kinds})
    if out is not None:
        check_writable(out)
    with status("attributing") as step:
        if vector is not None:
            chosen, items, model = *_stored(vector, given, model), model
            loaded, tokenizer = model.load()
            chosen.check(loaded, tokenizer)
        else:
            wanted = recipe_of(recipe, given, method)
            part = wanted.method_part(method)
            part = replace(part, readout=readout_of(readout)) if readout is not None else part
            train, items = items_on(wanted, part.name, on)
            model = model.of(wanted.model)
            model.check_layers(layers, wanted.model)
            loaded, tokenizer = model.load()
            step("fitting")
            scope = wanted.apply.scope if part == wanted.method else None
            own = wanted.kinds(part) if kinds is None else [one.strip() for one in kinds.split(",")]
            chosen = _fitted(Setup(loaded, tokenizer, batch_size=batch_size), train, part, layers, own, scope)
        step("slopes")
        setup = Setup(loaded, tokenizer, items, batch_size=batch_size)
        found = attribute(setup, chosen, scorer, controls=controls, seed=seed)
    answer = jsonable(found.as_json(parts))
    if out is not None:
        write_whole(out, (json.dumps(answer, indent=2) + "\n").encode())
    if as_json:
        print_json({"file": None if out is None else str(out), **answer})
        return
    _show(found, parts)
    if out is not None:
        typer.echo(f"wrote {out}")


def _check(recipe: str | None, vector: str | None, options: Mapping[str, object]) -> None:
    """Refuse a vector beside a recipe, or beside what says how one is fitted.

    Raises:
        BadParameter: there is one.
    """
    named = [name for name, value in options.items() if value is not None]
    if vector is not None and (recipe is not None or named):
        raise typer.BadParameter(f"--vector is fitted already; leave {named[0] if recipe is None else 'RECIPE'} out")


def _stored(vector: str, given: DataChoice, model: ModelChoice) -> tuple[SteeringVector, ContrastSet]:
    """A vector of a file, and the items to measure it on.

    Raises:
        BadParameter: no items are known.
    """
    from steerkit._support.shipped import vector_path
    from steerkit.vector.steering_vector import SteeringVector

    loaded = SteeringVector.load(vector_path(vector, model.name))
    items = data_of(loaded, given)[1]
    if items is None:
        raise typer.BadParameter(f"{vector}: its held-out items are not known; give --data with both answers")
    return loaded, items


def _fitted(
    setup: Any, train: ContrastSet, part: Any, layers: str | None, kinds: Sequence[str] | None, scope: str | None
) -> SteeringVector:
    """One vector at all sites asked for."""
    from steerkit.evaluate.fits import Fits
    from steerkit.network.sites import parse_layers

    depth = setup.decoder.num_layers
    chosen = list(range(depth)) if layers is None else parse_layers(layers, depth)
    return Fits(setup, train, part.name, chosen, part.settings, part.readout, scope, kinds).at(chosen)


def _show(found: Attribution, parts: int) -> None:
    """A line for each site, the whole, and the first heads and neurons."""
    seen = ("seen",) if found.seen else ()
    columns = ("site", f"slope of {found.column} (95 %)", "z", *seen, "")
    shown = table(*columns, right=columns[1:-1])
    largest = max((abs(one.estimate.mean) for one in found.sites.values()), default=0.0)
    for site, slope in found.sites.items():
        share = [number(found.seen.get(site), ".0%")] if seen else []
        length = round(_BAR * abs(slope.estimate.mean) / largest) if largest > 0 else 0
        shown.add_row(str(site), _estimate(slope.estimate), number(slope.z, "+.1f"), *share, "#" * length)
    console = stdout()
    console.print(shown)
    if len(found.sites) > 1:
        total = found.total
        console.print(f"all sites together: {_estimate(total.estimate)}, z {number(total.z, '+.1f')}")
    listed = found.parts(parts)
    if listed:
        own = table(
            "part", "slope (95 %)", right=("slope (95 %)",), title=f"the {len(listed)} largest heads and neurons"
        )
        for part in listed:
            own.add_row(f"{part.site}[{part.number}]", _estimate(part.slope))
        console.print(own)
    console.print(
        "per unit of strength, at the strength that changes nothing; z in random directions of the same norms"
    )


def _estimate(found: Estimate) -> str:
    return f"{found.mean:+.4f} ({found.low:+.4f}, {found.high:+.4f})"
