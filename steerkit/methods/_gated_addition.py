"""Shared by the methods that add a direction to the rows a gate opens: data in parts, operating point, direction.

The positive side of the contrast set are prompts that should open the gate. Of the negative side, those whose topic is
one of `beside` (alarming-sounding ones) may be fitted on, but no promise is made about them; all others are ordinary.
Where a promise is asked for, every second ordinary prompt is kept apart from the fit, and the gate opens from where
these say (`_operating`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.directions import mean_difference, unit
from steerkit.maths.rank_two import RankTwo, rank_two
from steerkit.methods._base import TWO_KINDS, FittedOn, Method
from steerkit.methods._fingerprint import fits
from steerkit.methods._gate import Gate
from steerkit.methods._operating import OperatingPoint, checked_promise, operating_point
from steerkit.methods._protocols import Params, Prepared
from steerkit.methods._refusal import response_contrast, unembedding_direction
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.likeness import Turns, turns_of
from steerkit.prompts.rendering import spread
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["ANSWERED", "RIDGE", "GatedAddition", "Parts", "behaviour", "blocks_written", "folds_of"]

ANSWERED = 64
"""Prompts on which the direction of answers is read; more of them hardly move a mean over both openings."""
RIDGE = 0.4
"""How much the weights of a linear probe cost: the penalty of their squared length, for each item it is fitted on."""
_CALIBRATES = 2  # every second ordinary prompt


class Parts(NamedTuple):
    """Which items a gate is fitted on and which it is calibrated on.

    Attributes:
        positive: [n] bool, fitted on.
        negative: [m] bool, fitted on.
        calibrating: [m] bool, of the negative side, kept apart.
    """

    positive: Tensor
    negative: Tensor
    calibrating: Tensor


@dataclass(frozen=True)
class GatedAddition(Method):
    """Shared by the methods that add a direction to the rows that a gate opens."""

    data: ClassVar[FittedOn] = TWO_KINDS
    params: ClassVar[Mapping[str, str]] = {"direction": "d"}

    max_false_alarm: float | None = None
    """The share of ordinary prompts that may open the gate, at most: it then opens from where calibration prompts that
    are kept apart from the fit promise that, whatever else is set. None leaves the threshold to the method."""
    confidence: float = 0.95
    """With which that is promised."""
    beside: tuple[str, ...] = ("alarming",)
    """Topics of negative prompts that are not ordinary: no promise is made about them."""
    spared: bool = True
    """Whether these are fitted on all the same, so that the gate learns to spare them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_false_alarm is not None:
            try:
                checked_promise(self.max_false_alarm, self.confidence)
            except FitError as error:
                raise FitError(f"{self.name}: {error}") from None

    def editor(self, vector: SteeringVector) -> Gate:
        """The gate of a vector.

        Args:
            vector: a vector of this method.

        Raises:
            VectorMismatchError: the vector lacks what the gate needs.
        """
        raise NotImplementedError

    def opening_above(self, vector: SteeringVector, threshold: float) -> SteeringVector:
        """The same vector, its gate open where `Gate.opening` is larger than a threshold, and nowhere else.

        Args:
            vector: a vector of this method.
            threshold: of the gate's scores.

        Raises:
            FitError: this gate cannot open there.
        """
        raise NotImplementedError

    def opens_above(self, vector: SteeringVector) -> float:
        """The score over which the gate opens.

        Args:
            vector: a vector of this method.
        """
        raise NotImplementedError

    def kinds(self, data: ContrastSet) -> dict[str, Tensor]:
        """The negative side, kind by kind.

        Args:
            data: the items.

        Returns:
            ``"ordinary"`` and each topic of `beside` that occurs to [m] bool.
        """
        topics = data.topics[1] or ("",) * len(data.negative)
        found = {topic: torch.tensor([one == topic for one in topics], dtype=torch.bool) for topic in self.beside}
        ordinary = torch.tensor([one not in self.beside for one in topics], dtype=torch.bool)
        return {"ordinary": ordinary, **{topic: mask for topic, mask in found.items() if bool(mask.any())}}

    def parts(self, data: ContrastSet) -> Parts:
        """What is fitted on, and what is kept apart to calibrate on.

        Args:
            data: the items.

        Raises:
            FitError: no negative item is left to be fitted on.
        """
        ordinary = self.kinds(data)["ordinary"]
        calibrating = torch.zeros_like(ordinary)
        if self.max_false_alarm is not None:
            turns = torch.tensor(turns_of(data.sides, paired=data.paired)[1], dtype=torch.long)
            place = torch.unique(turns[ordinary], return_inverse=True)[1]  # what is alike has the same
            calibrating[ordinary] = place % _CALIBRATES == _CALIBRATES - 1
        negative = ~calibrating & (ordinary | self.spared)
        if not bool(negative.any()):
            raise FitError(f"{self.name}: no negative prompt is left to be fitted on; give more, or promise nothing")
        positive = negative if data.paired else torch.ones(len(data.positive), dtype=torch.bool)
        return Parts(positive, negative, calibrating)

    def ordinary(self, data: ContrastSet) -> list[Conversation]:
        """The prompts that the promise is about.

        Args:
            data: the items.
        """
        ordinary = self.kinds(data)["ordinary"].tolist()
        return [one for one, is_ordinary in zip(data.negative, ordinary, strict=True) if is_ordinary]

    def kept_apart(self, data: ContrastSet) -> list[Conversation]:
        """The ordinary prompts that the fit leaves for the calibration.

        Args:
            data: what is fitted on.
        """
        kept = self.parts(data).calibrating.tolist()
        return [one for one, is_kept in zip(data.negative, kept, strict=True) if is_kept]

    def fitted_turns(self, data: ContrastSet) -> Turns:
        """The turns (`steerkit.prompts.likeness.turns_of`) of the items that are fitted on.

        Args:
            data: the items.
        """
        parts = self.parts(data)
        turns = turns_of(data.sides, paired=data.paired)
        positive, negative = (
            [turn for turn, is_fitted in zip(side, mask.tolist(), strict=True) if is_fitted]
            for side, mask in zip(turns, (parts.positive, parts.negative), strict=True)
        )
        return positive, negative

    def settled(self, vector: SteeringVector, data: ContrastSet, acts: Activations) -> SteeringVector:
        """Let a vector that has just been fitted open from where its calibration prompts say.

        Args:
            vector: of this method.
            data: what it was fitted on.
            acts: activations of both sides at `vector.reads`.

        Returns:
            The vector at its operating point; itself where no promise is asked for.

        Raises:
            FitError: there are too few ordinary prompts to promise so much.
        """
        if self.max_false_alarm is None:
            return vector
        kept = self.parts(data).calibrating
        return self.calibrated(vector, {site: acts.negative[site][kept] for site in vector.reads})

    def calibrated(self, vector: SteeringVector, found: Mapping[Site, Tensor]) -> SteeringVector:
        """Let a gate open from where ordinary prompts say that had no part in the fit.

        Args:
            vector: of this method.
            found: per read site [n, d] float32, of these prompts.

        Returns:
            The vector at its operating point, with what that promises under ``extra["gate"]``.

        Raises:
            FitError: the method promises nothing, or these are too few prompts for what it promises.
        """
        if self.max_false_alarm is None:
            raise FitError(f"{self.name}: max_false_alarm is None, so there is nothing to calibrate for; give a share")
        with torch.no_grad():
            scores = self.editor(vector).opening(found)
        point: OperatingPoint = operating_point(scores, self.max_false_alarm, self.confidence)
        moved = self.opening_above(vector, point.threshold)
        return replace(moved, extra={**moved.extra, "gate": point.facts})

    def opened(self, vector: SteeringVector, data: ContrastSet, acts: Activations) -> dict[str, dict[str, int]]:
        """How many prompts open the gate, kind by kind.

        Args:
            vector: of this method.
            data: the prompts.
            acts: their activations at `vector.reads`.

        Returns:
            ``"positive"``, ``"ordinary"`` and each topic of `beside` to ``{"opened": k, "of": n}``.
        """
        gate = self.editor(vector)
        with torch.no_grad():
            flags = [gate.decide(side).is_open for side in (acts.positive, acts.negative)]
        found = {"positive": flags[0], **{kind: flags[1][mask] for kind, mask in self.kinds(data).items()}}
        return {kind: {"opened": int(rows.sum()), "of": len(rows)} for kind, rows in found.items() if len(rows)}

    def check_model(self, vector: SteeringVector, decoder: Decoder) -> None:
        """Refuse other weights: a gate has learned where the activations of one model lie.

        Raises:
            VectorMismatchError: the model's weights are others than when it was fitted.
        """
        known = vector.tensors.get("shared/fingerprint")
        if known is not None and not fits(known, decoder):
            raise VectorMismatchError(
                f"{self.name}: the gate was fitted on other weights than those of this {type(decoder.model).__name__}; "
                "fit it on this model"
            )

    def length(self, params: Params) -> float | None:
        """Norm of the direction."""
        return float(torch.linalg.vector_norm(params["direction"].float()))

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Direction and strength apart, since every row has a gain of its own between them."""
        return {"direction": params["direction"].to(device).float(), "strength": strength.float()}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * direction`: what an open gate with gain 1 does."""
        return edits.add(h, (prepared["strength"] * prepared["direction"]).to(h.dtype))

    def rank_two(self, params: Params) -> RankTwo:
        """What an open gate with gain 1 does, as numbers.

        Args:
            params: the tensors of one site.
        """
        return rank_two(params["direction"], {("one", "strength"): 1.0})


def behaviour(subject: Subject, source: str, sites: list[Site]) -> dict[Site, Tensor]:
    """The direction to be added at each written site, and with it the typical norms there.

    Args:
        subject: the door to the model.
        source: ``response`` (refusing minus complying answers to the positive prompts), ``mean_difference`` (last
            tokens of the positive minus those of the negative prompts) or ``unembed`` (refusal words minus complying
            words in the output embedding, as long as a typical activation).
        sites: where it will be written.

    Returns:
        site to [d] float32.

    Raises:
        FitError: no direction can be had; the site is named.
    """
    data = subject.data
    if source == "response":
        return response_contrast(subject, spread(data.positive, ANSWERED), sites)
    positive = subject.record(data.positive, sites, readout="last")
    if source == "unembed":
        direction = unit(unembedding_direction(subject))
        return {site: direction * positive.norms[site] for site in sites}
    negative, found = subject.record(data.negative, sites, readout="last"), {}
    for site in sites:
        try:
            found[site] = mean_difference(positive[site], negative[site])
        except FitError as error:
            raise FitError(f"{site}: {error}") from None
    return found


def blocks_written(decoder: Decoder, layers: tuple[int, ...], default: list[int]) -> list[Site]:
    """The outputs of the blocks that a setting names.

    Args:
        decoder: the model's decoder.
        layers: blocks counted from 0; none takes the default.
        default: blocks.

    Raises:
        SiteError: a block outside the model.
    """
    chosen = list(dict.fromkeys(layers)) or default
    outside = [layer for layer in chosen if not 0 <= layer < decoder.num_layers]
    if outside:
        raise SiteError(f"writes: layer {outside[0]} is outside 0..{decoder.num_layers - 1}")
    return [Site(layer) for layer in chosen]


def folds_of(turns: Turns, folds: int) -> list[tuple[Tensor, Tensor]]:
    """Part two sides into folds; an item whose turn is i goes to fold i mod folds.

    Args:
        turns: of the items [n] and [m] of either side (`steerkit.prompts.likeness.turns_of`); the same for items that
            must not be parted.
        folds: at most; fewer where a side has fewer turns.

    Returns:
        Per fold the masks [n] and [m] of its items; none where there are not two of each.
    """
    count = min(folds, *(len(set(side)) for side in turns))
    if count < 2:
        return []
    places = [torch.tensor(side, dtype=torch.long) % count for side in turns]
    return [(places[0] == fold, places[1] == fold) for fold in range(count)]
