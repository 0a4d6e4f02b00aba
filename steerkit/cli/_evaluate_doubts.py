"""What `evaluate` asks besides: would another fit have said the same, and is what was taken out gone?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from steerkit.cli._shared import number, stdout, table

if TYPE_CHECKING:
    from steerkit.evaluate.scorers._base import Scorer
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Evaluated", "RefitIntervals", "check_refits", "doubted", "show_doubts"]

RefitIntervals = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Fit N times on resampled training items, and resample held-out items: an interval of both together. "
        "Slow; 40 or more to be believed.",
    ),
]


class Evaluated(Protocol):
    """What the command measures: a vector, applied in one way, and the items it was fitted on where they are known."""

    setup: Setup
    vector: SteeringVector
    way: dict[str, Any]
    scorers: list[Scorer]
    train: ContrastSet | None


def check_refits(vector: str, train: ContrastSet | None, fits: int) -> None:
    """Refuse refits of a vector whose training items are not known, before a model is loaded.

    Args:
        vector: its name.
        train: the items it was fitted on.
        fits: how many are asked for.

    Raises:
        DataError: they are not known.
    """
    from steerkit.errors import DataError

    if fits and train is None:
        raise DataError(f"{vector}: the items it was fitted on are not known here, so --refit-intervals cannot be had")


def doubted(evaluated: Evaluated, strength: float, fits: int, step: Callable[[str], None]) -> dict[str, Any]:
    """Intervals over refits, and probes after a removal, as plain data.

    Args:
        evaluated: the vector, the items, and the scorers, of which the first shows the effect.
        strength: the strongest that was measured.
        fits: on resampled items; 0 leaves that out.
        step: called with what is done.

    Returns:
        ``{"refit_interval": ..., "removal": ...}``; each None where it was not asked for or cannot be had.
    """
    from steerkit.errors import FitError
    from steerkit.evaluate.refit_intervals import refit_interval
    from steerkit.evaluate.removal import probe_after_removal, removes

    found: dict[str, Any] = {"refit_interval": None, "removal": None}
    setup, train = evaluated.setup, evaluated.train
    trial = setup.trial(evaluated.vector, strength, **evaluated.way)
    if removes(evaluated.vector) and train is not None and setup.data is not None:
        step("probing what was taken out")
        try:
            found["removal"] = [one.as_json() for one in probe_after_removal(trial, train)]
        except FitError as error:
            found["removal"] = {"reason": str(error)}
    if fits and train is not None:
        found["refit_interval"] = refit_interval(trial, train, evaluated.scorers[0], fits=fits, step=step).as_json()
    return found


def show_doubts(found: Mapping[str, Any]) -> None:
    """Print what `doubted` found.

    Args:
        found: its answer, perhaps among others.
    """
    console = stdout()
    both, removal = found["refit_interval"], found["removal"]
    if both is not None:
        shown = table("what is drawn anew", both["column"], "fits", right=("fits",))
        shown.add_row("held-out items", _cell(both["one_fit"]), "1")
        shown.add_row("held-out items and fit", _cell(both["fit_and_items"]), str(both["fits"]))
        console.print("what steering changes, with 95 % intervals")
        console.print(shown)
    if isinstance(removal, list):
        columns = ("site", "direction", "steered", "probe", "steered")
        shown = table(*columns)
        for row in removal:
            cells = [
                "-" if row[name] is None else _cell(row[name][kind], ".2f")
                for name in ("direction", "probe")
                for kind in ("unsteered", "steered")
            ]
            shown.add_row(row["site"], *cells)
        console.print(
            "is it gone? AUC of held-out items along the direction, and by a probe fitted on such activations"
        )
        console.print(shown)


def _cell(found: Mapping[str, float | None], form: str = "+.3f") -> str:
    mean, low, high = (number(found[name], form) for name in ("mean", "low", "high"))
    return f"{mean} ({low}, {high})"
