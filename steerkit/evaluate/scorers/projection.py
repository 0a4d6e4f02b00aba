"""Projection: how far the activations lie along a direction under steering, where later blocks have had their say.

    projection(text) = mean over answer tokens of h . u  /  mean length of the unsteered texts' activations

with `u` of length 1 and `h` the activations at one site, the last block's output unless told otherwise. Taking a
direction out of one site does not take it out of the model: later blocks write it anew, and what is left of it at the
end is what this scorer shows. Read on teacher-forced neutral texts. Activations are averaged over each text's answer
tokens, and the length is that of these averages, so that the number has no unit.

By name, the direction is that of the trial's own vector, which the unsteered model does not have; so the column is the
change against the unsteered model. `Projection.along(vector)` knows the direction, and gives the projection itself, of
any trial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate.scorers._answers import activations, calm_texts
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.maths.directions import coordinates, unit
from steerkit.methods._registry import method_of
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Projection", "ProjectionAlong"]


@dataclass(frozen=True)
class Projection(Scorer):
    """Change of the projection on the vector's own direction, against the unsteered model.

    Attributes:
        site: where to read, such as ``"resid_post.12"``; empty is the last block's output.
    """

    site: str = ""

    name: ClassVar[str] = "projection"
    title: ClassVar[str] = "how far activations move along the vector's direction, at the last block"
    against_baseline: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]] = {
        "projection_change": Column("change of the projection", "activation norms", share=False),
    }

    @classmethod
    def along(cls, vector: SteeringVector | Sequence[SteeringVector], site: str = "") -> ProjectionAlong:
        """The scorer of the projection itself, for any trial.

        Args:
            vector: whose direction; its first site that has one. Of several vectors the first that has one.
            site: where to read; empty is the last block's output.

        Raises:
            DataError: the vector has no single direction.
        """
        listed = (vector,) if isinstance(vector, SteeringVector) else tuple(vector)
        return ProjectionAlong(site=site, direction=tuple(_direction(listed).tolist()))

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every neutral text.

        Args:
            trial: whose neutral texts are read.

        Returns:
            ``{"projection_change": [n]}``; zeros for the unsteered model.

        Raises:
            DataError: the vector has no single direction, or one of another width than the site's.
            SiteError: the model lacks the site.
        """
        if trial.is_baseline:
            return {"projection_change": torch.zeros(len(calm_texts(trial.setup)), dtype=torch.float32)}
        direction = _direction(trial.vectors)
        after, before = (_projections(each, direction, self.site) for each in (trial, trial.baseline))
        return {"projection_change": after - before}


@dataclass(frozen=True)
class ProjectionAlong(Scorer):
    """Projection on a given direction. Made by `Projection.along`.

    Attributes:
        site: where to read, such as ``"resid_post.12"``; empty is the last block's output.
        direction: [d], of any length but 0.
    """

    site: str = ""
    direction: tuple[float, ...] = ()

    name: ClassVar[str] = "projection_along"
    title: ClassVar[str] = "how far activations lie along a direction, at the last block"
    columns: ClassVar[Mapping[str, Column]] = {
        "projection": Column("projection on the direction", "activation norms", share=False),
    }

    def score(self, trial: Trial) -> dict[str, Tensor]:
        """Score every neutral text.

        Args:
            trial: whose neutral texts are read.

        Returns:
            ``{"projection": [n]}``

        Raises:
            DataError: the direction has another width than the site.
            FitError: the direction has no length.
            SiteError: the model lacks the site.
        """
        return {"projection": _projections(trial, unit(torch.tensor(self.direction, dtype=torch.float32)), self.site)}


def _direction(vectors: Sequence[SteeringVector]) -> Tensor:
    """[d] of length 1: of the first site that has one."""
    for vector in vectors:
        method = method_of(vector)
        for site in vector.sites:
            found = method.direction(vector.params(site))
            if found is not None:
                return unit(found.float())
    names = ", ".join(dict.fromkeys(vector.method for vector in vectors)) or "no vector"
    raise DataError(f"projection: {names} has no single direction to project on; leave this scorer out")


def _projections(trial: Trial, direction: Tensor, site: str) -> Tensor:
    """[n] projections in units of the unsteered model's activations."""
    texts, place = calm_texts(trial.setup), _site(trial.setup, site)
    rows, baseline = activations(trial, texts, place), activations(trial.baseline, texts, place)
    if rows.shape[1] != len(direction):
        raise DataError(
            f"projection: the direction has width {len(direction)} but {place} has {rows.shape[1]}; "
            "give the site at which it was fitted"
        )
    length: Tensor = torch.linalg.vector_norm(baseline, dim=-1).mean()
    return coordinates(rows, direction) / length


def _site(setup: Setup, site: str) -> str:
    return str(Site.parse(site)) if site else str(Site(setup.decoder.num_layers - 1, "resid_post"))
