"""`steerkit evaluate --steering`: what a composition does and what it costs, as it stands.

Controls are made of one vector and of the items it was fitted on; a composition has neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from steerkit._support.json_values import jsonable
from steerkit._support.progress import status
from steerkit.cli._evidence import columns_table
from steerkit.cli._shared import print_json, stdout
from steerkit.cli._steering import check_chosen, chosen

if TYPE_CHECKING:
    from steerkit.cli._data import DataChoice
    from steerkit.cli._model import ModelChoice
    from steerkit.evaluate.scorers._base import Scorer

__all__ = ["evaluate_steering"]


def evaluate_steering(
    steering: str | None,
    alone: Mapping[str, Any],
    given: DataChoice,
    prompts: str | None,
    scorers: Sequence[Scorer],
    sizes: Mapping[str, Any],
    model: ModelChoice,
    as_json: bool,
) -> None:
    """Measure a composition beside the unsteered model and show it.

    Args:
        steering: the composition, or a file that holds one.
        alone: options that say something of a --vector, by name.
        given: data to measure on, all of it or what is held out of it.
        prompts: a file of prompts that are answered.
        scorers: what is measured.
        sizes: of the setup, and `neutral` texts.
        model: which model.
        as_json: print JSON.

    Raises:
        BadParameter: no composition, options beside it, or nothing to measure on.
    """
    if steering is None:
        raise typer.BadParameter("give a --vector, or several in one line with --steering")
    check_chosen(None, None, steering, **alone)
    if not given.is_given and prompts is None:
        raise typer.BadParameter("a composition has no held-out items of its own; give --data or --prompts")
    used = chosen(None, None, steering, model.name)
    asked = None if prompts is None else given.prompts(prompts)
    held_out = next((part for part in reversed(given.parts()) if part is not None), None) if given.is_given else None
    kept = [one for one in scorers if held_out is not None or one.name != "preference_margin"]

    from steerkit.evaluate.scoring import measure
    from steerkit.evaluate.setup import Setup

    loaded, tokenizer = model.load()
    options = {name: size for name, size in sizes.items() if name != "neutral"}
    setup = Setup(loaded, tokenizer, held_out, prompts=asked, **options).first_neutral(sizes["neutral"])
    with status("measuring"):
        measured = measure(setup.trial(used.vectors), kept)
    line = str(used.composition)
    if as_json:
        print_json(jsonable({"steering": line, "scores": {name: one.as_row() for name, one in measured.items()}}))
        return
    stdout().print(line, soft_wrap=True)
    stdout().print(columns_table(measured))
