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
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations, record
from steerkit.errors import DataError, FitError
from steerkit.evaluate.intervals import Estimate
from steerkit.fitting.subject import ModelSubject
from steerkit.methods._base import Method
from steerkit.methods._protocols import PreparesData
from steerkit.methods._registry import method_of
from steerkit.methods._subject import Subject
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Refits", "Spread", "refits", "refits_of"]

FEWEST = 4
SAME_AXIS = 0.9
TAIL = 0.025

Kind = TypeVar("Kind")

# Rows [n] and [m] of the pooled activations (positive ones first) that stand for the positive and the negative side.
_Arrangement = tuple[Tensor, Tensor]


class Spread(NamedTuple):
    """How far a direction moves when the items are drawn anew.

    Attributes:
        cosine: median cosine to the vector's own direction.
        cosine_low: 2.5 % quantile of that.
        length: mean length of the directions, with the 2.5 % and 97.5 % quantiles, in activation units.
    """

    cosine: float
    cosine_low: float
    length: Estimate


@dataclass(frozen=True, eq=False)
class Refits:
    """What a method makes of rearranged items.

    Attributes:
        vector: the vector the refits are held against.
        reason: why there are none; None where there are.
        items: items of the larger side.
        shuffled: vectors fitted on shuffled labels, as long as they came out.
        split_half: per site the cosine between directions of two halves: mean, 2.5 % and 97.5 % quantile over draws.
        bootstrap: per site how far direction and length move.
        reproduced: per site the cosine between the vector's direction and that of a refit on the rows as they are. It
            is 1 where model, precision and data are those the vector was fitted on.
        skipped: per kind of refit the draws whose sides did not differ, which have no direction.
    """

    vector: SteeringVector
    reason: str | None = None
    items: int = 0
    shuffled: tuple[SteeringVector, ...] = ()
    split_half: Mapping[Site, Estimate] = field(default_factory=dict)
    bootstrap: Mapping[Site, Spread] = field(default_factory=dict)
    reproduced: Mapping[Site, float] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    def matched(self) -> tuple[SteeringVector, ...]:
        """The vectors of shuffled labels with the directions' lengths of the vector itself, site by site.

        So both comparisons can be made: as fitted, and at equal size. Tensors that are no directions stay as fitted.
        Those of `same_axis` are left out.
        """
        return tuple(_as_long_as(self.vector, other) for other in self.shuffled if not self._is_same_axis(other))

    @property
    def same_axis(self) -> int:
        """How many fits on shuffled labels found the vector's own axis again, and so are no controls.

        A method that looks for the axis of largest difference (RepE) needs labels for its sign only: swapping the two
        sides of a pair changes nothing but the sign of their difference.
        """
        return sum(map(self._is_same_axis, self.shuffled))

    def _is_same_axis(self, other: SteeringVector) -> bool:
        method = method_of(self.vector)
        found = [(_direction(method, self.vector, site), _direction(method, other, site)) for site in self.vector.sites]
        cosines = [_cosine(again, own) for own, again in found if own is not None and again is not None]
        return bool(cosines) and min(map(abs, cosines)) > SAME_AXIS

    def as_json(self) -> dict[str, Any]:
        """Plain data; a shuffled vector is told by its length in parts of the vector's, and by its cosine to it."""
        if self.reason is not None:
            return {"reason": self.reason}
        method = method_of(self.vector)
        sites: dict[str, dict[str, Any]] = {}
        for site in self.vector.reads:
            own = _direction(method, self.vector, site)
            if own is None:
                continue
            others = [found for other in self.shuffled if (found := _direction(method, other, site)) is not None]
            length = float(own.norm())
            entry: dict[str, Any] = {
                "length": length,
                "reproduced": self.reproduced.get(site),
                "shuffled": [
                    {"relative_length": float(other.norm()) / length, "cosine": _cosine(other, own)}
                    for other in others
                    if length > 0
                ],
            }
            if site in self.split_half:
                entry["split_half"] = self.split_half[site]._asdict()
            if site in self.bootstrap:
                spread = self.bootstrap[site]
                entry["bootstrap"] = {**spread._asdict(), "length": spread.length._asdict()}
            sites[str(site)] = entry
        return {
            "items": self.items,
            "sites": sites,
            "skipped": dict(self.skipped),
            "shuffled_on_the_same_axis": self.same_axis,
        }


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
    if vector.data_digest not in (None, data.digest):
        raise DataError(
            f"refits: the vector was fitted on data {str(vector.data_digest)[:12]}, got {data.digest[:12]}; "
            "give the training items without the held-out ones"
        )
    _check_items(len(data.positive), len(data.negative))
    vector.check(model, tokenizer)
    readout: Any = Readout.parse(vector.readout or method.readout)
    common: dict[str, Any] = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
    items, longest = (method.contrast(data), method.longest_text) if isinstance(method, PreparesData) else (data, None)
    acts = record(model, tokenizer, items, vector.reads, readout=readout, max_tokens=longest, **common)
    subject = ModelSubject(model, tokenizer, data, find_decoder(model), batch_size, chat_template_kwargs, method.name)
    return refits_of(acts, subject, vector, shuffled=shuffled, halves=halves, resamples=resamples, seed=seed)


def refits_of(
    acts: Activations,
    subject: Subject,
    vector: SteeringVector,
    *,
    shuffled: int = 5,
    halves: int = 10,
    resamples: int = 50,
    seed: int = 0,
) -> Refits:
    """The same from activations that have been read.

    Args:
        acts: both sides at the vector's sites, one row per item.
        subject: the door to the model for methods that need more than rows; never used by others.
        vector: the vector.
        shuffled: fits on shuffled labels.
        halves: draws of two halves.
        resamples: draws of the bootstrap.
        seed: fixes the draws; each kind has its own, so that the number of one does not change another.

    Returns:
        The refits.

    Raises:
        DataError: too few items, or a negative number of draws.
        FitError: the rows as they are give no direction.
    """
    for name, number in (("shuffled", shuffled), ("halves", halves), ("resamples", resamples)):
        if number < 0:
            raise DataError(f"{name}={number}: give 0 or more draws")
    rows = _Rows(acts, subject, vector)
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
            site: _estimate(found)
            for site in reproduced
            if (found := [cosines[site] for cosines in agreed if site in cosines])
        },
        bootstrap={site: spread for site in reproduced if (spread := rows.spread(site, again)) is not None},
        reproduced=reproduced,
        skipped={"shuffled": unmixed, "split_half": unhalved, "bootstrap": undrawn},
    )


class _Rows:
    """Recorded activations whose rows can be rearranged and fitted again, without a pass of the model."""

    def __init__(self, acts: Activations, subject: Subject, vector: SteeringVector) -> None:
        self._method, self._vector, self._subject, self._acts = method_of(vector), vector, subject, acts
        self._pooled = {site: acts[site] for site in vector.reads}
        self.positives, self.negatives = (len(side[vector.reads[0]]) for side in (acts.positive, acts.negative))

    def unchanged(self) -> _Arrangement:
        """Every row in its place."""
        every = torch.arange(self.positives + self.negatives)
        return every[: self.positives], every[self.positives :]

    def shuffled(self, generator: torch.Generator) -> _Arrangement:
        """Half of the pairs with swapped sides (of an odd number one more or one less); unpaired rows permuted."""
        positive, negative = self.unchanged()
        if not self._acts.paired:
            order = torch.randperm(self.positives + self.negatives, generator=generator)
            return order[: self.positives], order[self.positives :]
        extra = int(torch.randint(2, (1,), generator=generator)) if self.positives % 2 else 0
        swapped = torch.zeros(self.positives, dtype=torch.bool)
        swapped[torch.randperm(self.positives, generator=generator)[: self.positives // 2 + extra]] = True
        return torch.where(swapped, negative, positive), torch.where(swapped, positive, negative)

    def halves(self, generator: torch.Generator) -> tuple[_Arrangement, _Arrangement]:
        """Two halves of the items; of an odd number the second has one more."""
        (left, right), (others_left, others_right) = (
            (order[: len(order) // 2], order[len(order) // 2 :])
            for order in self._by_side(lambda count: torch.randperm(count, generator=generator))
        )
        return (left, others_left + self.positives), (right, others_right + self.positives)

    def resampled(self, generator: torch.Generator) -> _Arrangement:
        """As many items, drawn with replacement."""
        positive, negative = self._by_side(lambda count: torch.randint(count, (count,), generator=generator))
        return positive, negative + self.positives

    def _by_side(self, draw: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
        """Items drawn of each side; pairs stay together."""
        positive = draw(self.positives)
        return positive, positive if self._acts.paired else draw(self.negatives)

    def fit(self, arrangement: _Arrangement) -> SteeringVector:
        """The vector that the method makes of rearranged rows.

        Raises:
            FitError: the sides do not differ.
        """
        positive, negative = ({site: rows[chosen] for site, rows in self._pooled.items()} for chosen in arrangement)
        # As `fit` does it: what a method streams, it also gets here.
        streams = {site: self._method.statistics(site) for site in self._vector.reads}
        kept = {site: stream for site, stream in streams.items() if stream is not None}
        if len(kept) == len(streams):
            for site, stream in kept.items():
                stream.update(positive[site], negative[site])
                positive[site], negative[site] = stream.result()
        acts = replace(self._acts, positive=positive, negative=negative)
        tensors = self._method.fit(acts, self._subject, list(self._vector.reads))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise FitError(f"{self._method.name}: {name} is not finite on rearranged rows")
        if type(self._method).written is Method.written:  # applied where it is fitted
            return replace(self._vector, tensors=tensors)
        reads = self._vector.reads
        written = tuple(self._method.written(list(reads), tensors, self._subject.decoder))
        return replace(self._vector, tensors=tensors, sites=written, fitted_at=None if written == reads else reads)

    def cosines(self, one: SteeringVector, other: SteeringVector) -> dict[Site, float]:
        """Cosine between two vectors' directions at each site that has one."""
        found = {}
        for site in self._vector.reads:
            directions = [_direction(self._method, vector, site) for vector in (one, other)]
            if directions[0] is not None and directions[1] is not None:
                found[site] = _cosine(directions[0], directions[1])
        return found

    def spread(self, site: Site, again: list[SteeringVector]) -> Spread | None:
        """Cosines to the vector and lengths of directions of drawn items; None where no draw has one here."""
        own = _direction(self._method, self._vector, site)
        found = [direction for one in again if (direction := _direction(self._method, one, site)) is not None]
        if own is None or not found:
            return None
        cosines = torch.tensor([_cosine(direction, own) for direction in found], dtype=torch.double)
        return Spread(
            cosine=float(cosines.quantile(0.5)),
            cosine_low=float(cosines.quantile(TAIL)),
            length=_estimate([float(direction.norm()) for direction in found]),
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


def _direction(method: Method, vector: SteeringVector, site: Site) -> Tensor | None:
    direction = method.direction(vector.params(site))
    return None if direction is None else direction.double()


def _cosine(one: Tensor, other: Tensor) -> float:
    """Cosine between two directions [d]; nan where one has no length."""
    return float(torch.dot(one, other) / (one.norm() * other.norm()))


def _estimate(values: list[float]) -> Estimate:
    """Mean and the quantiles that hold 95 % of the draws."""
    drawn = torch.tensor(values, dtype=torch.double)
    return Estimate(float(drawn.mean()), float(drawn.quantile(TAIL)), float(drawn.quantile(1 - TAIL)))


def _as_long_as(vector: SteeringVector, other: SteeringVector) -> SteeringVector:
    """A vector whose directions have the lengths of another's, row by row."""
    tensors = dict(other.tensors)
    for name, tensor in tensors.items():
        wanted = vector.tensors.get(name)
        if wanted is None or wanted.shape != tensor.shape or name.rpartition("/")[2] != "direction":
            continue
        lengths = [torch.linalg.vector_norm(one.double(), dim=-1, keepdim=True) for one in (wanted, tensor)]
        factor = torch.where(lengths[1] > 0, lengths[0] / lengths[1], 0.0)
        tensors[name] = (tensor.double() * factor).to(tensor.dtype)
    return replace(other, tensors=tensors)
