"""Probe after removal: is what was taken out gone, or hidden where one direction does not look?

    direction:  AUC of held-out items along the vector's own direction
    probe:      AUC of held-out items by a logistic probe that is fitted on the training items' activations

Both on activations that are read while the model is steered, at the sites the vector was fitted at and behind the last
block, beside the same on the unsteered model. Taking a direction out makes its own AUC 1/2 at that site, by
construction. The probe's falls to 1/2 only where no other direction tells the two sides apart either: where it stays,
the concept is hidden from that direction, not gone, and later blocks can read it, as the row of the last block shows.

Zhang, Choshen and Andreas (2024), "Unforgettable Generalization in Language Models", arXiv 2409.02228: probes still
solve tasks that a model was made to forget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import DataError
from steerkit.evaluate.intervals import Estimate, separability
from steerkit.evaluate.trial import Trial
from steerkit.maths.directions import coordinates, unit
from steerkit.maths.probes import linear_probe
from steerkit.methods._protocols import read_direction
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Removal", "probe_after_removal", "removes"]

REMOVING = ("project_out", "set_projection")
_ROUNDING = 32  # spacings of the type, of the activation's length: what taking a component out leaves of it


@dataclass(frozen=True)
class Removal:
    """How well two sides can be told apart at one site, steered and unsteered.

    Attributes:
        site: where activations were read.
        direction: AUC along the vector's direction, unsteered and steered; None where it has none at that site.
        probe: AUC of a logistic probe, unsteered and steered, each fitted on activations of its own kind.
    """

    site: Site
    direction: tuple[Estimate, Estimate] | None
    probe: tuple[Estimate, Estimate]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {"site": str(self.site), "direction": None}
        for name, pair in (("direction", self.direction), ("probe", self.probe)):
            if pair is not None:
                found[name] = {kind: one._asdict() for kind, one in zip(("unsteered", "steered"), pair, strict=True)}
        return found


def removes(vector: SteeringVector) -> bool:
    """Whether a vector takes a component out of the activations, or replaces it by the same for every token.

    Args:
        vector: the vector.
    """
    return vector.edit in REMOVING


def probe_after_removal(trial: Trial, train: ContrastSet) -> tuple[Removal, ...]:
    """Fit probes on steered and on unsteered activations, and see whether they tell held-out items apart.

    Args:
        trial: one vector at a strength, with held-out items of two sides.
        train: items of two sides that the probes are fitted on.

    Returns:
        One entry for each site the vector was fitted at, and one for the last block's output.

    Raises:
        DataError: not one vector, or no held-out items.
        FitError: no activation varies.
    """
    setup = trial.setup
    if len(trial.vectors) != 1 or setup.data is None:
        raise DataError(f"probe after removal: got {len(trial.vectors)} vectors; give a trial of one, with data")
    (vector,) = trial.vectors
    sites = list(dict.fromkeys([*vector.reads, Site(setup.decoder.num_layers - 1)]))
    read = [[_sides(one, data, vector, sites) for data in (train, setup.data)] for one in (trial.baseline, trial)]
    eps = torch.finfo(setup.decoder.model.dtype).eps
    found = []
    for site in sites:
        direction = None
        if site in vector.reads:
            direction = read_direction(method_of(vector), vector.params(site))
        probes, along = [], []
        for fitted_on, held_out in read:
            probe = linear_probe(*(side[site] for side in fitted_on))
            probes.append(separability(*(probe.scores(side[site]) for side in held_out)))
            if direction is not None:
                along.append(separability(*(_coordinates(side[site], direction, eps) for side in held_out)))
        found.append(Removal(site, (along[0], along[1]) if along else None, (probes[0], probes[1])))
    return tuple(found)


def _sides(trial: Trial, data: ContrastSet, vector: SteeringVector, sites: Sequence[Site]) -> list[Activations]:
    """Both sides' activations under a trial's steering, read where the vector's fit read."""
    readout = vector.readout or method_of(vector).readout or "last"
    return [trial.record([trial.setup.render(item) for item in side], sites, readout=readout) for side in data.sides]


def _coordinates(rows: Tensor, direction: Tensor, eps: float) -> Tensor:
    """[n] coordinates along a direction; what is no more than rounding is 0."""
    along = coordinates(rows.float(), unit(direction.float()))
    return along.where(along.abs() > _ROUNDING * eps * torch.linalg.vector_norm(rows, dim=-1), 0.0)
