"""`steerkit latents`: which latents of a dictionary tell your data's sides apart, and a vector of the best."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._data import NO_DATA, DataChoice, takes_data
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import (
    BatchSize,
    Json,
    ReadoutOption,
    number,
    print_json,
    readout_of,
    stdout,
    table,
    usage_line,
)
from steerkit.cli._written import check_written
from steerkit.cli.dictionary import SiteOption, read_dictionary

if TYPE_CHECKING:
    from steerkit.evaluate.latents import Latents
    from steerkit.evaluate.setup import Setup
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

_QUESTION = "How was your day?"


class By(StrEnum):
    """What latents are ranked by."""

    gap = "gap"
    gradient = "gradient"
    saif = "saif"


class Op(StrEnum):
    """What a vector does with latents."""

    add = "add"
    clamp = "clamp"
    scale = "scale"
    ablate = "ablate"


class Correction(StrEnum):
    """What holds chance off."""

    bh = "benjamini-hochberg"
    holm = "holm"


@loads_model
@takes_data
def run(
    dictionary: Annotated[
        str, typer.Option(metavar="PATH", help="The dictionary, see `steerkit dictionary check`.", show_default=False)
    ],
    given: DataChoice = NO_DATA,
    site: SiteOption = None,
    by: Annotated[By, typer.Option(help="gap of firing, gradient of the preference margin, or SAIF's rule.")] = By.gap,
    readout: ReadoutOption = None,
    top: Annotated[int, typer.Option(min=1, help="Latents that are listed.")] = 20,
    correction: Annotated[Correction, typer.Option(help="For the number of latents.")] = Correction.bh,
    beta: Annotated[float, typer.Option(help="SAIF: standard deviations that are added to the mean.")] = 0.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a vector of the best too.", dir_okay=False)
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, help="Latents in the vector; those that write nothing are left out.")
    ] = 1,
    choose: Annotated[str | None, typer.Option(metavar="IDS", help="The vector's latents, such as 12,40.")] = None,
    op: Annotated[Op, typer.Option(help="What the vector does with them.")] = Op.add,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    as_json: Json = False,
) -> None:
    """Rank the latents of a dictionary on your contrast set, and make a vector of the best.

    share + and share - are in how many texts of either side a latent fires; q is what chance would do with as many
    latents. The output score tells whether a latent writes what it reads: under .01 it steers badly.
    """
    given.check(needed=True)
    check_written(readout=readout)
    chosen = _ids(choose)
    if out is not None:
        check_writable(out)
    one = read_dictionary(dictionary, site)
    from steerkit.evaluate.latents import find_latents
    from steerkit.evaluate.setup import Setup

    train, _ = given.parts()
    loaded, tokenizer = model.load()
    setup = Setup(loaded, tokenizer, train, batch_size=batch_size)
    reading = readout_of(readout)
    how: dict[str, Any] = {"ranking": by.value, "correction": correction.value, "beta": beta}
    with status("ranking latents"):
        found = find_latents(setup, one, readout="last" if reading is None else reading, top=top, **how)
    vector = None
    if out is not None:
        settings: dict[str, Any] = {"dictionary": dictionary, "site": site or "", "op": op.value}
        with status("fitting"):
            vector = _vector(setup, found, settings, chosen, count, reading)
        vector.save(out)
    if as_json:
        print_json({"file": None if out is None else str(out), **jsonable(found.as_json())})
        return
    _show(found)
    if vector is not None and out is not None:
        from steerkit.methods._registry import example_strength

        typer.echo(
            f"wrote {out}\nuse it:\n  {usage_line(_QUESTION, str(out), strength=example_strength(vector), model=model)}"
        )


def _ids(text: str | None) -> list[int]:
    """The latents that were named.

    Raises:
        BadParameter: something else was.
    """
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--choose {text}: write numbers parted by commas, such as 12,40")
    return [int(part) for part in parts]


def _vector(
    setup: Setup, found: Latents, settings: dict[str, Any], named: list[int], count: int, readout: Any
) -> SteeringVector:
    """A vector of the latents that were named, else of the best."""
    import steerkit
    from steerkit.evaluate.suggesting import with_suggestion

    rows = [] if named else found.best(count)
    settings["latents"] = named or [row.latent for row in rows]
    if rows and all(row.amount is not None for row in rows):
        settings |= {"amounts": [row.amount for row in rows], "unit": "raw"}
    how: dict[str, Any] = {"readout": readout, "batch_size": setup.batch_size}
    assert setup.data is not None
    vector = steerkit.fit(setup.model, setup.tokenizer, setup.data, method="latent", settings=settings, **how)
    return with_suggestion(setup.model, setup.tokenizer, vector, batch_size=setup.batch_size)


def _show(found: Latents) -> None:
    own = {"gradient": ("gradient",), "saif": ("saif",)}.get(found.ranking, ())
    columns = ("latent", "share +", "share -", "mean gap", "q", *own, "output score", "stands for")
    shown = table(*columns, right=columns[:-1])
    for row in found.rows:
        more = [number(getattr(row, name), "+.4g" if name == "gradient" else ".0%") for name in own]
        shown.add_row(
            str(row.latent),
            f"{row.positive_share:.0%}",
            f"{row.negative_share:.0%}",
            f"{row.mean_gap:+.3g}",
            f"{row.q:.2g}",
            *more,
            number(row.output_score, ".3f"),
            " ".join(repr(word) for word in row.words),
        )
    console = stdout()
    console.print(shown)
    fit, texts = found.fitness, found.texts
    console.print(
        f"{texts[0]} and {texts[1]} texts; q among {found.tested} latents that fire on some of them; the dictionary "
        f"leaves {fit.fvu:.0%} of the variance unexplained, {fit.l0:.0f} latents fire on a token"
    )
