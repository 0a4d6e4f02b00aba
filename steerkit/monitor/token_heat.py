"""Token heat maps: how far each token of a text lies along a vector's direction.

    value(i) = h_i . u        with h_i the activation of token i at a site, and u the direction, of length 1

The activation of token i is what the model holds *at* token i, after reading it. Nothing is shifted: the value that
stands with a token was read at that token, the first one included.

A character that is spread over several tokens (an emoji in a byte-level vocabulary) is shown once, with the mean of its
tokens' values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from steerkit.activations.recording import record_ids
from steerkit.errors import DataError
from steerkit.evaluate.trial import Trial
from steerkit.maths.directions import coordinates, unit
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.prompts.rendering import Rendered
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["TokenScores", "direction_of", "readable", "token_projections"]

_REPLACEMENT = "\ufffd"
_LONGEST = 8


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The tokens of a text with a number each.

    Attributes:
        tokens: their texts, in order; joined they are the whole text.
        values: [t] projections, one per entry of `tokens`, in activation units.
        site: where they were read.
        counts: how many of the model's tokens each entry stands for; 1 but for characters in several parts.
        prompt: how many entries belong to the prompt.
    """

    tokens: tuple[str, ...]
    values: Tensor
    site: Site
    counts: tuple[int, ...]
    prompt: int


def token_projections(
    trial: Trial,
    rendered: Rendered,
    vector: SteeringVector,
    *,
    site: Site | str | None = None,
    direction: Tensor | None = None,
) -> TokenScores:
    """Project every token of one text on a vector's direction.

    Args:
        trial: who reads: the baseline model, or the model under steering, whose values are those after the edit.
        rendered: the text.
        vector: whose direction.
        site: where to read; None takes the vector's first site with a direction. At a site that is not the vector's,
            the direction of its first site is taken.
        direction: [d] another one to project on, at `site`; None takes the vector's.

    Returns:
        Each token with its own projection.

    Raises:
        DataError: the vector has no single direction, or one of another width than the site's.
        SiteError: the model lacks the site.
        FitError: the direction has no length, or an activation is not finite.
    """
    place = None if site is None else Site.of(site)
    if place is None or direction is None:
        home, direction = direction_of(vector, place)
        place = place or home
    with trial.steering([rendered.prompt_length]):
        rows = next(iter(record_ids(trial.setup.model, [rendered.ids], [place]).values()))[0]
    if rows.shape[1] != len(direction):
        raise DataError(
            f"heat map: the direction has width {len(direction)} but {place} has {rows.shape[1]}; "
            "give the site at which it was fitted"
        )
    values = coordinates(rows, unit(direction.float()))
    parts = readable(trial.setup.tokenizer, rendered.ids)
    counts = tuple(count for _, count in parts)
    return TokenScores(
        tokens=tuple(text for text, _ in parts),
        values=torch.stack([part.mean() for part in torch.split(values, list(counts))]),
        site=place,
        counts=counts,
        prompt=sum(end <= rendered.prompt_length for end in accumulate(counts)),
    )


def direction_of(vector: SteeringVector, site: Site | str | None = None) -> tuple[Site, Tensor]:
    """The direction [d] of a vector at one of the sites it was fitted at, or at the first that has one.

    Args:
        vector: the vector.
        site: a site; where it is not the vector's, or has no direction, the first one that has is taken.

    Returns:
        The direction's site, and the direction as it is stored.

    Raises:
        DataError: the vector has no single direction.
    """
    method = method_of(vector)
    found = {own: method.direction(vector.params(own)) for own in vector.reads}
    wanted = None if site is None else Site.of(site)
    for own in (wanted, *vector.reads):
        if own in found and (direction := found[own]) is not None:
            return own, direction
    raise DataError(f"{vector.method} has no single direction to project on")


def readable(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """Token ids as texts that can be read; tokens that are parts of one character stand together.

    Args:
        tokenizer: the tokenizer.
        ids: token ids.

    Returns:
        Texts, each with the number of tokens it stands for; joined they are the decoded ids.
    """
    found: list[tuple[str, int]] = []
    before, start = "", 0
    for end in range(1, len(ids) + 1):
        # From the beginning every time: what a token adds may depend on what stands before it (leading spaces).
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_part = text.endswith(_REPLACEMENT) or not text.startswith(before)
        if is_part and end < len(ids) and end - start < _LONGEST:
            continue
        found.append((text[len(before) :], end - start))
        before, start = text, end
    return found
