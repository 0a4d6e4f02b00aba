"""What to know of a contrast set before it is fitted on: repeated items, equal sides, a single pair, confounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerkit.evaluate.confounding import confounds
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import SIDES
from steerkit.prompts.likeness import said_by
from steerkit.prompts.rendering import spread

__all__ = ["confound_notes", "data_notes", "readout_note"]

_LOOKED_AT = 128  # items that are compared for confounds; a feature that needs more to be seen predicts little
_NAMED = 5
_SENTENCE = 4  # words: more than a letter or a name


def data_notes(data: ContrastSet, *, fewest: int = 2) -> list[str]:
    """What the items of a contrast set say of themselves, one line each.

    Args:
        data: what is fitted on.
        fewest: items that say more than one pair does; 1 where a method is fitted on one.

    Returns:
        How many items repeat others, which pairs have equal sides, and whether there is one pair only; empty where
        there is nothing to say.
    """
    return [*_repeated(data), *_equal_sides(data), *_single(data, fewest)]


def readout_note(data: ContrastSet, readout: str | int | None) -> str | None:
    """What to know of a readout that nobody chose: of whole sentences the last token is the full stop.

    Args:
        data: what is fitted on.
        readout: the method's own.

    Returns:
        One line; None where answers are short, such as letters, or more of them is read.
    """
    lengths = sorted(len(item.answer.split()) for side in data.sides for item in side if item.answer is not None)
    if readout != "last" or not lengths or lengths[len(lengths) // 2] < _SENTENCE:
        return None
    return (
        f"only the last token of each answer is read, which is its end (the median answer has "
        f"{lengths[len(lengths) // 2]} words); --readout response_mean reads all of it"
    )


def confound_notes(
    tokenizer: Any,
    data: ContrastSet,
    *,
    readout: str | int | tuple[int, int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[str]:
    """Every plain feature (length, position, format) that predicts the label by itself, one line each.

    Of a large set some hundred items are compared, evenly over it.

    Args:
        tokenizer: the model's tokenizer.
        data: what is fitted on.
        readout: the tokens that will be read; None leaves their place out.
        chat_template_kwargs: passed on to the chat template.

    Raises:
        DataError: see `steerkit.evaluate.confounding.confounds`.
    """
    some = data.items_at(*(spread(range(len(side)), _LOOKED_AT) for side in data.sides))
    found = confounds(tokenizer, some, readout=readout, chat_template_kwargs=chat_template_kwargs)
    return [one.message for one in found if one.warns]


def _repeated(data: ContrastSet) -> list[str]:
    counts = [len(side) - len({(said_by(item), item.system) for item in side}) for side in data.sides]
    if not any(counts):
        return []
    told = " and ".join(
        f"{count} of {len(side)} {name} items"
        for name, side, count in zip(SIDES, data.sides, counts, strict=True)
        if count
    )
    return [f"{told} repeat another of their side, which counts them twice and tells nothing new; keep one of each"]


def _equal_sides(data: ContrastSet) -> list[str]:
    pairs = zip(*data.sides, strict=True) if data.paired else ()
    equal = [number for number, (one, other) in enumerate(pairs, start=1) if one == other]
    if not equal:
        return []
    more = len(equal) - _NAMED
    listed = ", ".join(map(str, equal[:_NAMED])) + (f" and {more} more" if more > 0 else "")
    noun = "pair" if len(equal) == 1 else "pairs"
    return [f"{noun} {listed} of {len(data)}: both sides are equal, so nothing is learnt there; give two sides"]


def _single(data: ContrastSet, fewest: int) -> list[str]:
    if max(map(len, data.sides)) >= fewest:
        return []
    return ["one pair only: the vector is whatever tells these two texts apart; give more, 50 or so to be believed"]
