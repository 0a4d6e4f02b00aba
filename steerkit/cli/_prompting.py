"""System prompts beside steering: which ones, and how their figures are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import typer

from steerkit.cli._shared import stdout, table

if TYPE_CHECKING:
    from steerkit.evaluate.prompting import Prompting
    from steerkit.evaluate.scoring import Measured
    from steerkit.prompts.system_prompts import SystemPrompts
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["show_prompting", "systems_for", "systems_of"]


def systems_of(
    prompting: SystemPrompts | None, given: Sequence[str] | None, side: Literal["positive", "negative"] = "positive"
) -> tuple[str, ...]:
    """The system prompts that are set beside steering.

    Args:
        prompting: the recipe's.
        given: on the command line, which come first.
        side: of the recipe's.

    Returns:
        The wordings; none where the recipe has none and none was given.

    Raises:
        BadParameter: one that was given has no words in it.
    """
    if not all(one.strip() for one in given or ()):
        raise typer.BadParameter("--system: got an empty system prompt; give its text")
    if given:
        return tuple(dict.fromkeys(given))
    if prompting is None:
        return ()
    return prompting.positive if side == "positive" else prompting.negative


def systems_for(vector: SteeringVector, given: Sequence[str] | None, strength: float) -> tuple[str, ...]:
    """The system prompts that ask for what a vector brings about at a strength: for the opposite where that is below 0.

    Args:
        vector: the vector, which names its recipe or its trait.
        given: on the command line, which come first.
        strength: at which it is measured.

    Raises:
        BadParameter: there are none.
    """
    from steerkit._support.shipped import recipes, traits
    from steerkit.persona import TraitSpec
    from steerkit.recipe import find_recipe

    known, trait = None, str(vector.extra.get("persona", {}).get("trait", ""))
    if vector.recipe in recipes():
        known = find_recipe(vector.recipe).prompting
    elif trait in traits():
        known = TraitSpec.load(trait).prompting
    found = systems_of(known, given, "positive" if strength >= 0 else "negative")
    if not found:
        raise typer.BadParameter("--prompting: the vector's recipe names no system prompts; give --system TEXT")
    return found


def show_prompting(name: str, strength: float, found: Mapping[str, Prompting]) -> None:
    """Print what asking does: every wording, and their mean with the range, alone and under the vector.

    Args:
        name: of the vector.
        strength: of the vector.
        found: `alone` and `with_vector`.
    """
    columns = list(found["alone"].wordings[0].scores)
    shown = [columns[0], *(one for one in ("kl", "perplexity_ratio", "repetition") if one in columns[1:])]
    console = stdout()
    for title, key in (
        ("system prompts: change against the unsteered model", "alone"),
        (f"the same under {name} at strength {strength:g}", "with_vector"),
    ):
        rows = table("wording", *(_short(one) for one in shown), right=[_short(one) for one in shown])
        for number, wording in enumerate(found[key].wordings, start=1):
            rows.add_row(str(number), *(_cell(wording.scores[one]) for one in shown))
        spreads = [found[key].spread(one) for one in shown]
        rows.add_row("mean", *(f"{one.mean:+.2f}" for one in spreads))
        rows.add_row("range", *(f"{one.lowest:+.2f} to {one.highest:+.2f}" for one in spreads))
        console.print(title, soft_wrap=True)
        console.print(rows)
    for number, wording in enumerate(found["alone"].wordings, start=1):
        console.print(f"{number}: {wording.system}")


def _short(column: str) -> str:
    return {"preference_margin": "margin", "kl": "KL", "perplexity_ratio": "ppl x"}.get(column, column)


def _cell(measured: Measured) -> str:
    """The effect of a wording with its interval."""
    effect = measured.effect
    return f"{effect.mean:+.2f} ({effect.low:+.2f}, {effect.high:+.2f})"
