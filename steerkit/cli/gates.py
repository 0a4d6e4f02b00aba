"""`steerkit gates`: how often a gated vector opens by mistake, and the same vector at another operating point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit.cli._data import NO_DATA, DataChoice, takes_data
from steerkit.cli._files import check_writable
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._shared import BatchSize, Json, print_json, stdout, table

if TYPE_CHECKING:
    from steerkit.methods._protocols import SetsOperatingPoint
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["run"]

_TITLES = {"positive": "harmful"}
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
_CONFIRMED = 0.5


@loads_model
@takes_data
def run(
    vector: Annotated[str, typer.Argument(metavar="VECTOR", help="A gated vector: a file or a shipped one's name.")],
    max_false_alarm: Annotated[
        float, typer.Option(help="The share of ordinary requests that may open the gate, at most.")
    ] = 0.05,
    confidence: Annotated[float, typer.Option(help="With which that is promised.")] = 0.95,
    given: DataChoice = NO_DATA,
    model: ModelChoice = DEFAULT,
    batch_size: BatchSize = 16,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the vector at the chosen operating point.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose how seldom a gate opens by mistake, and see what that costs.

    The threshold is the lowest that keeps the promise on ordinary requests that the fit has not seen: of the vector's
    own recipe, or of --data (labelled requests; half of them, or --held-out, are kept to confirm it on). A promise is
    about requests of that kind. Requests that only sound alarming are counted beside, and never promised about.
    """
    import steerkit
    from steerkit._support.shipped import vector_path
    from steerkit.errors import UnknownNameError
    from steerkit.methods._operating import checked_promise, least_items
    from steerkit.methods._protocols import SetsOperatingPoint
    from steerkit.methods._registry import method_of
    from steerkit.vector.steering_vector import SteeringVector

    given.check()
    checked_promise(max_false_alarm, confidence)
    found = SteeringVector.load(vector_path(vector))
    method = method_of(found)
    if not isinstance(method, SetsOperatingPoint):
        raise UnknownNameError(f"{vector}: method {found.method} has no gate, it steers every prompt")
    ordinary, held_out = _requests(found, vector, method, given)
    if out is not None:
        check_writable(out)
    loaded, tokenizer = model.load()
    can = [share for share in _SHARES if least_items(share, confidence) <= len(ordinary)]
    shares = sorted({*can, max_false_alarm})
    points = steerkit.operating_points(
        loaded, tokenizer, found, ordinary, held_out, shares, confidence=confidence, batch_size=batch_size
    )
    chosen = points[shares.index(max_false_alarm)]
    if out is not None:
        chosen.save(out)
    if as_json:
        rows = [{"chosen": one is chosen, **_facts(one)} for one in points]
        print_json({"file": None if out is None else str(out), "points": rows})
        return
    _show(points, chosen)
    if out is not None:
        stdout().print(f"Wrote {out}: at most {100 * max_false_alarm:g} % of ordinary requests open it.")


def _requests(
    found: SteeringVector, name: str, method: SetsOperatingPoint, given: DataChoice
) -> tuple[list[Conversation], ContrastSet]:
    """Ordinary requests to calibrate on, and requests of both sides to confirm on.

    Raises:
        DataError: there are none that the fit has not seen.
    """
    from steerkit.errors import DataError
    from steerkit.recipe import find_recipe

    if given.is_given:
        apart, held_out = given.items().split(held_out=_CONFIRMED if given.held_out is None else given.held_out)
        return method.ordinary(apart), held_out
    wanted = "give --data with labelled requests that it was not fitted on"
    if found.recipe is None:
        raise DataError(f"{name} comes from no recipe, so which requests its fit has not seen is not known; {wanted}")
    train, held_out = find_recipe(found.recipe).split()
    if train.digest != found.data_digest:
        raise DataError(f"{name} was fitted on other requests than recipe {found.recipe} now holds; {wanted}")
    kept = method.kept_apart(train)
    if not kept:
        raise DataError(f"{name} was fitted on all requests of its recipe; {wanted}")
    return kept, held_out


def _facts(vector: SteeringVector) -> dict[str, Any]:
    """A point as JSON."""
    from steerkit.methods._protocols import SetsOperatingPoint
    from steerkit.methods._registry import method_of
    from steerkit.vector.frozen import thawed

    method = method_of(vector)
    assert isinstance(method, SetsOperatingPoint)
    return {
        **thawed(vector.extra["gate"]),
        "opens_above": method.opens_above(vector),
        "opened": thawed(vector.held_out["gate"]["opened"]),
    }


def _show(points: Sequence[SteeringVector], chosen: SteeringVector) -> None:
    """The table: one row for each point, the chosen one marked."""
    from steerkit.evaluate.by_prompt_kind import in_order, share_text

    rows = [_facts(one) for one in points]
    kinds = in_order(rows[0]["opened"])
    columns = ("", "at most", "bound", "opens above", *(_TITLES.get(kind, kind) for kind in kinds))
    shown = table(*columns, right=columns[1:])
    for one, row in zip(points, rows, strict=True):
        shown.add_row(
            "->" if one is chosen else "",
            f"{100 * row['max_false_alarm']:g} %",
            f"{100 * row['bound']:.1f} %",
            f"{row['opens_above']:.4f}",
            *(share_text(**row["opened"][kind]) for kind in kinds),
        )
    console, row = stdout(), rows[0]
    console.print(shown)
    sizes = ", ".join(f"{row['opened'][kind]['of']} {_TITLES.get(kind, kind)}" for kind in kinds)
    console.print(
        f"Bound: of ordinary requests like the {row['calibration_items']} it was calibrated on, with "
        f"{100 * row['confidence']:g} % confidence.\n"
        f"Last columns: percent of held-out requests that open the gate, with 95 % intervals ({sizes})."
    )
