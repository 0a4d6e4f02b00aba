"""Controls by refitting: the same method on rearranged rows, to see how much of a direction is the contrast itself.

Three questions, answered from activations that are read once:

    shuffled labels   what the method makes of a contrast in which nothing is left to learn: half of the pairs swap
                      sides (unpaired: the labels are permuted). A mean difference of these is much shorter. Methods
                      that look for the axis of largest difference find the same axis again: no controls.
    split half        whether two halves of the items, drawn at random, give the same direction: their cosine.
    bootstrap         how far the direction and its length move when the items are drawn anew, with replacement.

A high cosine between halves says that the direction is stable, not that it means what its name says: a difference in
length of the answers is stable too (`steerkit.evaluate.confounds`). The bootstrap (Efron 1979) takes items as they
came; its lengths lie a little above that of the vector, because noise adds to a length and never takes from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations, record
from steerkit.errors import DataError, FitError
from steerkit.evaluate.rearranged import RearrangedRows
from steerkit.evaluate.refit_results import Refits, estimate_of
from steerkit.fitting.subject import ModelSubject
from steerkit.methods._protocols import PreparesData
from steerkit.methods._registry import method_of
from steerkit.methods._subject import Subject
from steerkit.network.decoder import find_decoder
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.likeness import Turns, turns_of
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["FEWEST", "read_again", "refits", "refits_of"]

FEWEST = 4
Kind = TypeVar("Kind")


def refits(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    vector: SteeringVector,
    *,
    shuffled: int = 5,
    halves: int = 10,
    resamples: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    acts: Activations | None = None,
) -> Refits:
    """Read the training items once and fit the vector's method again on rearranged rows.

    Args:
        model: the model the vector was fitted on, unsteered.
        tokenizer: its tokenizer.
        data: the set the vector was fitted on, without what was held out.
        vector: the vector.
        shuffled: fits on shuffled labels.
        halves: draws of two halves.
        resamples: draws of the bootstrap.
        seed: fixes the draws.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        acts: every row of the items at the vector's sites, and perhaps others, as its fit read them; None reads them.

    Returns:
        The refits; only a `reason` where the method reads no contrast set.

    Raises:
        DataError: other data than the vector was fitted on (where the vector knows), or too few items to rearrange.
        FitError: the rows as they are give no direction.
        VectorMismatchError: the model has another width or depth.
    """
    method = method_of(vector)
    if method.readout is None:
        return Refits(vector, f"{method.name} reads no contrast set, so there are no rows to rearrange")
    acts, subject, turns = read_again(
        model, tokenizer, data, vector, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs, acts=acts
    )
    return refits_of(
        acts, subject, vector, shuffled=shuffled, halves=halves, resamples=resamples, seed=seed, turns=turns
    )


def read_again(
    model: nn.Module,
    tokenizer: Any,
    data: ContrastSet,
    vector: SteeringVector,
    *,
    batch_size: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    acts: Activations | None = None,
) -> tuple[Activations, Subject, Turns]:
    """Read the items a vector was fitted on as its fit did, row by row.

    Args:
        model: the model the vector was fitted on, unsteered.
        tokenizer: its tokenizer.
        data: the set the vector was fitted on, without what was held out.
        vector: the vector, of a method that reads a contrast set.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.
        acts: what was read before; None, or a site of the vector's that is not there, reads again.

    Returns:
        Both sides at the vector's sites, the door to the model, and which rows belong together.

    Raises:
        DataError: other data than the vector was fitted on (where the vector knows), or too few items to rearrange.
        VectorMismatchError: the model has another width or depth.
    """
    method = method_of(vector)
    if vector.data_digest not in (None, data.digest):
        raise DataError(
            f"refits: the vector was fitted on data {str(vector.data_digest)[:12]}, got {data.digest[:12]}; "
            "give the training items without the held-out ones"
        )
    _check_items(len(data.positive), len(data.negative))
    vector.check(model, tokenizer)
    readout: Any = Readout.parse(vector.readout or method.readout or "last")
    chat_template_kwargs = as_fitted([vector], tokenizer, chat_template_kwargs)
    common: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    items, longest = (method.contrast(data), method.longest_text) if isinstance(method, PreparesData) else (data, None)
    if acts is None or not set(vector.reads) <= set(acts.sites):
        acts = record(model, tokenizer, items, vector.reads, readout=readout, max_tokens=longest, **common)
    subject = ModelSubject(model, tokenizer, data, find_decoder(model), batch_size, chat_template_kwargs, method.name)
    return acts, subject, turns_of(items.sides, paired=items.paired)


def refits_of(
    acts: Activations,
    subject: Subject,
    vector: SteeringVector,
    *,
    shuffled: int = 5,
    halves: int = 10,
    resamples: int = 50,
    seed: int = 0,
    turns: Turns | None = None,
) -> Refits:
    """Fit the vector's method again on rearranged rows of activations that have been recorded.

    Args:
        acts: both sides at the vector's sites, one row per item.
        subject: the door to the model for methods that need more than rows; never used by others.
        vector: the vector.
        shuffled: fits on shuffled labels.
        halves: draws of two halves.
        resamples: draws of the bootstrap.
        seed: fixes the draws; each kind has its own, so that the number of one does not change another.
        turns: of the rows [n] and [m] of either side (`steerkit.prompts.likeness.turns_of`): rows of one turn stay
            together. None keeps none together.

    Returns:
        The refits.

    Raises:
        DataError: too few items, or a negative number of draws.
        FitError: the rows as they are give no direction.
    """
    for name, number in (("shuffled", shuffled), ("halves", halves), ("resamples", resamples)):
        if number < 0:
            raise DataError(f"{name}={number}: give 0 or more draws")
    rows = RearrangedRows(acts, subject, vector, turns)
    _check_items(rows.positives, rows.negatives)
    reproduced = rows.cosines(rows.fit(rows.unchanged()), vector)
    # A generator for each kind of draw, so that the number of one does not change another.
    mixing, halving, drawing = (torch.Generator().manual_seed(3 * seed + kind) for kind in range(3))
    mixed, unmixed = _draws(shuffled, lambda: rows.fit(rows.shuffled(mixing)))
    agreed, unhalved = _draws(halves, lambda: rows.cosines(*map(rows.fit, rows.halves(halving))))
    again, undrawn = _draws(resamples, lambda: rows.fit(rows.resampled(drawing)))
    return Refits(
        vector=vector,
        items=max(rows.positives, rows.negatives),
        shuffled=tuple(
            replace(one, held_out={}, extra={**vector.extra, "control": f"shuffled labels, seed {seed}, {number}"})
            for number, one in enumerate(mixed)
        ),
        # A method that selects its sites may leave one out of some draws, or of all.
        split_half={
            site: estimate_of(found)
            for site in reproduced
            if (found := [cosines[site] for cosines in agreed if site in cosines])
        },
        bootstrap={site: spread for site in reproduced if (spread := rows.spread(site, again)) is not None},
        reproduced=reproduced,
        skipped={"shuffled": unmixed, "split_half": unhalved, "bootstrap": undrawn},
    )


def _check_items(positives: int, negatives: int) -> None:
    if min(positives, negatives) < FEWEST:
        raise DataError(
            f"refits: {positives} positive and {negatives} negative items cannot be rearranged; "
            f"give at least {FEWEST} of each"
        )


def _draws(count: int, attempt: Callable[[], Kind]) -> tuple[list[Kind], int]:
    """What so many attempts gave, and how many gave no direction."""
    found = []
    for _ in range(count):
        with contextlib.suppress(FitError):
            found.append(attempt())
    return found, count - len(found)
