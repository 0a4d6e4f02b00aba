"""Block by block: how well a method's direction separates held-out items, and what it does there at an equal cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from steerkit.activations.recording import record
from steerkit.errors import DataError, FitError, SiteError, StrengthError
from steerkit.evaluate.fits import Fits
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scorers._base import Scorer
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.suggesting import MAX_KL, suggest_strength
from steerkit.fitting.held_out import apart
from steerkit.methods._base import Method, takes_pair
from steerkit.methods._protocols import read_direction
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = [
    "BlockEffect",
    "Separation",
    "best_layer",
    "effect_by_block",
    "find_layer",
    "middle_layers",
    "separation_by_block",
]


class Separation(NamedTuple):
    """How well a direction fitted at one block separates held-out items.

    Attributes:
        layer: the block, counted from 0.
        auc: share of (positive, negative) couples in the right order, ties counted half.
        cohens_d: distance of the means in pooled standard deviations.
    """

    layer: int
    auc: float
    cohens_d: float


@dataclass(frozen=True)
class BlockEffect:
    """What a method does at one block at the strength that a budget of KL divergence allows there.

    Attributes:
        layer: the block, counted from 0.
        strength: that costs the budget.
        kl: what it costs, nats per token.
        effect: change of the scorer's first column on the held-out items, with its interval.
    """

    layer: int
    strength: float
    kl: float
    effect: Estimate


def middle_layers(num_layers: int) -> list[int]:
    """The blocks between a fifth and four fifths of the depth, where directions steer.

    Args:
        num_layers: of the model.
    """
    last = num_layers - 1
    return list(range(round(0.2 * last), round(0.8 * last) + 1))


def separation_by_block(fits: Fits, held_out: ContrastSet, layers: Sequence[int]) -> list[Separation]:
    """Fit at every block in one pass, and read the held-out items at all of them in another.

    Args:
        fits: the method and what it is fitted on.
        held_out: items it has not seen.
        layers: blocks counted from 0.

    Returns:
        One for each block at which the method can be fitted and has a direction, in their order.

    Raises:
        DataError: an item has no token to be read, or the method has no direction at any block.
    """
    method = fits.method_object
    vectors: dict[int, tuple[Site, SteeringVector]] = {}
    fits.layers = layers
    for layer in layers:
        try:
            vector = fits.at([layer])
        except (FitError, SiteError):  # nothing to learn at this block, or no such site in it
            continue
        site = next((site for site in vector.reads if read_direction(method, vector.params(site)) is not None), None)
        if site is not None:
            vectors[layer] = (site, vector)
    if not vectors:
        raise DataError(f"{method.name} has no direction at any of the blocks {list(layers)}; choose another method")
    setup = fits.setup
    acts = record(
        setup.model,
        setup.tokenizer,
        held_out,
        dict.fromkeys(site for site, _ in vectors.values()),
        readout=next(iter(vectors.values()))[1].readout or "last",
        batch_size=setup.batch_size,
        chat_template_kwargs=setup.chat_template_kwargs,
        shares=True,
    )
    found = []
    for layer, (site, vector) in vectors.items():
        direction = read_direction(method, vector.params(site))
        assert direction is not None
        along = direction.float() / torch.linalg.vector_norm(direction.float())
        found.append(Separation(layer, *apart(acts.positive[site] @ along, acts.negative[site] @ along)))
    return found


def best_layer(found: Sequence[Separation]) -> int:
    """The block whose direction separates the held-out items furthest: the largest AUC, of equal ones the largest d.

    Args:
        found: of the blocks to choose from.
    """
    return max(found, key=lambda one: (round(one.auc, 3), one.cohens_d)).layer


def find_layer(
    setup: Setup,
    train: ContrastSet,
    method: str | Method = "caa",
    *,
    settings: Mapping[str, Any] | None = None,
    readout: str | int | None = None,
    held_out: float = 0.25,
    seed: int = 0,
) -> list[Separation]:
    """Find the block to fit at: some of the training items are kept from fitting and read at every middle block.

    Args:
        setup: gives model, tokenizer and batch size.
        train: the training items; fit on all of them at the block that is found.
        method: a name, or a method with its settings.
        settings: the method's settings where `method` is a name.
        readout: which tokens are read; None takes the method's own.
        held_out: share of the training items that is kept from fitting meanwhile.
        seed: of the split.

    Returns:
        The separation at every block between a fifth and four fifths of the depth; `best_layer` chooses.

    Raises:
        DataError: there are too few items to split, or the method has no direction, or is fitted on one pair.
    """
    fits = Fits(setup, train, method, (), settings, readout)
    if takes_pair(fits.kind):
        raise DataError(f"{fits.kind.name} is fitted on one pair, which shows no block; name the layers")
    rest, kept = train.split(held_out=held_out, seed=seed)
    return separation_by_block(replace(fits, train=rest), kept, middle_layers(setup.decoder.num_layers))


def effect_by_block(
    fits: Fits,
    layers: Sequence[int],
    scorer: str | Scorer = "preference_margin",
    *,
    max_kl: float = MAX_KL,
    texts: int = 4,
    step: Callable[[str], None] = lambda note: None,
) -> list[BlockEffect]:
    """Measure at every block what the method does at the strength that costs the same everywhere.

    Args:
        fits: the method, what it is fitted on, and the setup with the held-out items.
        layers: blocks counted from 0.
        scorer: whose first column is the effect.
        max_kl: the budget, nats per token.
        texts: neutral texts that the strength is found on.
        step: called with a few words before each measurement.

    Returns:
        One for each block at which the method can be fitted and a strength be found, in their order.

    Raises:
        DataError: the held-out items lack what the scorer needs.
    """
    found = []
    for layer in layers:
        step(f"effect at block {layer}")
        setup = fits.setup
        try:
            vector = suggest_strength(
                setup.model,
                setup.tokenizer,
                fits.at([layer]),
                max_kl=max_kl,
                texts=texts,
                batch_size=setup.batch_size,
                chat_template_kwargs=setup.chat_template_kwargs,
            )
        except (FitError, SiteError, StrengthError):
            continue
        strength = vector.suggested_strength
        assert strength is not None
        measured = measure(setup.trial(replace(vector, calibration={}), strength), [scorer])
        effect = next(iter(measured.values())).effect
        found.append(BlockEffect(layer, strength, vector.calibration["kl"], effect))
    return found
