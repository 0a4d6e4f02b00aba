"""Which known directions a checkpoint's change lies along, from weights alone.

    D = W_after - W_before                     of every matrix with a side in the residual stream, turned to [n, d]
    part i     = the i-th right singular vector of D, with sizes_i^2 / |D|^2 of the change
    cosine(u)  = the largest |u . part| over all matrices and their leading parts
    energy(u)  = d * sum |D u|^2 / sum |D|^2   over all matrices; 1 where the change lies along u no more than elsewhere

A vector that was baked or trained into a model leaves a change of low rank whose side in the residual stream is that
direction: in what writes to the stream, or in a bias. The same is asked of random directions, and what is large is what
is beyond them. They are drawn alike in all directions, and neither activations nor changes are: directions of large
variance in activations (those of a few coordinates, say) attract both, so two vectors of one model share some of it. A
vector that stands out among random directions and not among the library's other vectors says nothing special of itself.

Read tensor by tensor; in memory are two tensors, their difference and the directions. Of a LoRA the products of its
matrices are D, and what it is added to is read for the relative sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit._support.precision import full_precision
from steerkit.errors import DataError, ModelError
from steerkit.maths.directions import unit
from steerkit.monitor.adapters import AdapterDifference
from steerkit.monitor.checkpoints import Checkpoint
from steerkit.network.sites import Site

__all__ = ["Audit", "Changed", "Lies", "audit", "leading_parts"]

SPARE, ROUNDS = 8, 4
INNER = ("z", "mlp_post", "router")
"""Kinds of site whose directions are not of the residual stream."""


class Changed(NamedTuple):
    """A tensor that differs.

    Attributes:
        tensor: its name.
        size: Frobenius norm of the difference.
        relative: the same over the norm before; None where that is 0 or the tensor is new.
        shares: of the leading parts in the squared norm, largest first.
    """

    tensor: str
    size: float
    relative: float | None
    shares: tuple[float, ...]


class Lies(NamedTuple):
    """How far the change lies along one direction.

    Attributes:
        vector: what it is called.
        site: of the direction.
        cosine: the largest with a leading part of a matrix, whatever its sign.
        tensor: that matrix.
        part: which of its parts, from 0.
        share: of that part in the change of the matrix.
        energy: the change along the direction, over an even spread.
        beyond: share of the random directions whose cosine is smaller.
    """

    vector: str
    site: Site
    cosine: float
    tensor: str
    part: int
    share: float
    energy: float
    beyond: float


@dataclass(frozen=True)
class Audit:
    """What is found.

    Attributes:
        changed: every tensor with a side in the residual stream that differs, largest difference first.
        lies: every direction of the library, largest cosine first.
        random: [r] the largest cosine of each random direction.
        random_energy: [r] the energy of each.
        compared: tensors that both have.
        left_out: tensor name to why it was not compared.
    """

    changed: tuple[Changed, ...]
    lies: tuple[Lies, ...]
    random: Tensor
    random_energy: Tensor
    compared: int
    left_out: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain data; of the random directions the median and the 99 % quantile."""
        quantiles = torch.tensor([0.5, 0.99], dtype=torch.float64)
        found = {
            name: dict(zip(("median", "q99"), torch.quantile(values.double(), quantiles).tolist(), strict=True))
            for name, values in (("cosine", self.random), ("energy", self.random_energy))
        }
        return {
            "compared": self.compared,
            "changed": [one._asdict() for one in self.changed],
            "vectors": [{**one._asdict(), "site": str(one.site)} for one in self.lies],
            "random": {"count": len(self.random), **found},
            "left_out": dict(self.left_out),
        }


@full_precision()
def audit(
    before: Checkpoint,
    after: Checkpoint | AdapterDifference,
    library: Mapping[str, Mapping[Site, Tensor]],
    *,
    parts: int = 4,
    random: int = 200,
    seed: int = 0,
) -> Audit:
    """Compare two checkpoints tensor by tensor, and the change with known directions.

    Args:
        before: the model as it was.
        after: the same architecture, changed; or the LoRA that changes it, whose products are what changed.
        library: name to the directions [d] of a vector by site; those inside of heads and neurons are left out.
        parts: leading parts of each matrix.
        random: directions that show what is large.
        seed: of these.

    Raises:
        ModelError: the two share no tensor, the LoRA is another model's, or nothing says how wide the residual stream
            is.
        DataError: no direction is of that width, or fewer than one part or two random directions are asked for.
    """
    if parts < 1 or random < 2:
        raise DataError(f"{parts} parts, {random} random directions: give at least 1 and 2")
    compared = _comparable(before, after)
    width = before.width or (after.width if isinstance(after, Checkpoint) else None)
    if width is None:
        raise ModelError(f"{before.name}: no config.json says how wide the residual stream is; give a whole folder")
    known = [
        (name, site, unit(direction.float()))
        for name, directions in library.items()
        for site, direction in directions.items()
        if site.kind not in INNER and direction.numel() == width
    ]
    if not known:
        raise DataError(f"no vector has a direction of width {width}; give --vectors with some of {before.name}")
    drawn = torch.randn(random, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    along = _Along(torch.stack([*(one[2] for one in known), *unit(drawn)]))
    changed, left_out = list[Changed](), dict[str, str]()
    if isinstance(after, Checkpoint):
        changes = _changes(before, after, width, left_out)
    else:
        changes = _added(before, after, width)
    for tensor, old, change in changes:
        size = float(torch.linalg.vector_norm(change))
        if size == 0.0:
            continue
        shares = along.take(tensor, change, parts)
        norm = float(torch.linalg.vector_norm(old))
        changed.append(Changed(tensor, size, size / norm if norm else None, shares))
    changed.sort(key=lambda one: -one.size)
    count = len(known)
    cosines, energy = along.cosine.clone(), along.energies(width)
    lies = [
        Lies(name, site, float(cosines[row]), *along.where[row], float(energy[row]), _rank(cosines, row, count))
        for row, (name, site, _) in enumerate(known)
    ]
    lies.sort(key=lambda one: -one.cosine)
    return Audit(tuple(changed), tuple(lies), cosines[count:], energy[count:], compared, left_out)


def _comparable(before: Checkpoint, after: Checkpoint | AdapterDifference) -> int:
    """How many tensors are compared: those that both have; with an adapter all of the base's.

    Raises:
        ModelError: there are none, or the adapter is another model's.
    """
    if isinstance(after, Checkpoint):
        shared = sum(name in after for name in before.files)
        if not shared:
            some = [next(iter(one.files), "nothing") for one in (before, after)]
            raise ModelError(
                f"{after.name}: has no tensor of {before.name} ({some[1]}, {some[0]}); give its own base model"
            )
        return shared
    for name, shape in after.shapes.items():
        if name not in before or before.shape(name) != shape:
            held = list(before.shape(name)) if name in before else "none"
            raise ModelError(
                f"{after.name}: changes {name} of {list(shape)}, and {before.name} has {held}; give its own base model"
            )
    return len(before.files)


def _rank(cosines: Tensor, row: int, count: int) -> float:
    """The share of the random directions, behind the first `count`, with a smaller cosine."""
    return float((cosines[count:] < cosines[row]).double().mean())


class _Along:
    """Directions [m, d] of length 1, and how far the changes seen so far lie along each.

    Args:
        directions: [m, d] float32.
    """

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions
        self.cosine = torch.zeros(len(directions), dtype=torch.float32)
        self.where: list[tuple[str, int, float]] = [("", 0, 0.0)] * len(directions)
        self._along = torch.zeros(len(directions), dtype=torch.float64)
        self._all = 0.0

    def take(self, tensor: str, change: Tensor, parts: int) -> tuple[float, ...]:
        """Add a tensor's change, float32, with at least one side as wide as the directions.

        Returns:
            The shares of its leading parts in its squared norm; of a square matrix those on the side of its rows.
        """
        width, shares = self.directions.shape[1], tuple[float, ...]()
        sides = [change[None]] if change.dim() == 1 else []
        if change.dim() > 1 and change.shape[-1] == width:
            sides.append(change.reshape(-1, width))
        if change.dim() > 1 and change.shape[-2] == width:
            sides.append(change.transpose(-1, -2).reshape(-1, width))
        for rows in sides:
            self._along += (rows @ self.directions.T).double().square().sum(0)
            total = float(rows.double().square().sum())
            self._all += total
            sizes, found = leading_parts(rows, parts)
            own = tuple((sizes.double().square() / total).tolist())
            shares = shares or own
            cosines = (self.directions @ found.T).abs()  # [m, parts]
            best = cosines.max(dim=1)
            for row in (best.values > self.cosine).nonzero()[:, 0].tolist():
                part = int(best.indices[row])
                self.cosine[row], self.where[row] = best.values[row], (tensor, part, own[part])
        return shares

    def energies(self, width: int) -> Tensor:
        """The changes along each direction over an even spread, [m] float64; 0 where nothing changed."""
        return self._along * width / self._all if self._all else self._along


def leading_parts(rows: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The leading singular values and right singular vectors of a matrix, by subspace iteration.

    Args:
        rows: [n, d] float32.
        parts: how many, at the most as many as there are.

    Returns:
        Sizes [r] float32, largest first, and directions [r, d] of length 1.
    """
    wanted = min(parts, *rows.shape)
    drawn = torch.randn(
        rows.shape[0], min(wanted + SPARE, *rows.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    basis = torch.linalg.qr(rows.T @ drawn.to(rows)).Q  # [d, w]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    _, sizes, right = torch.linalg.svd(rows @ basis, full_matrices=False)
    return sizes[:wanted], (right @ basis.T)[:wanted]


def _added(before: Checkpoint, adapter: AdapterDifference, width: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every tensor with a side in the residual stream that an adapter changes, float32, before; and its change.

    Raises:
        ModelError: the base is quantised there.
    """
    for tensor in before.files:
        if tensor not in adapter.shapes or not _is_residual(tensor, before.shape(tensor), width):
            continue
        old = before.read(tensor)
        if not old.is_floating_point():
            raise ModelError(f"{before.name}: {tensor} is quantised; give the model before quantisation")
        yield tensor, old.float(), adapter.rows(tensor, 0, len(old))


def _changes(
    before: Checkpoint, after: Checkpoint, width: int, left_out: dict[str, str]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every tensor with a side in the residual stream, float32, before; and its change. What is left out is noted."""
    for tensor in dict.fromkeys([*before.files, *after.files]):
        if tensor not in after:
            left_out[tensor] = f"{after.name} lacks it"
            continue
        shape = after.shape(tensor)
        if tensor not in before:
            is_bias = len(shape) == 1 and tensor.endswith("bias")
            new = after.read(tensor).float() if is_bias else torch.ones(1, dtype=torch.float32)
            if is_bias and shape[0] == width:
                yield tensor, torch.zeros_like(new), new  # a bias that was not there added nothing
            elif bool(new.any()):  # one that adds nothing now is no difference
                left_out[tensor] = f"{before.name} lacks it"
            continue
        if not _is_residual(tensor, shape, width):
            continue
        was = before.shape(tensor)
        rows = min(shape[0], was[0]) if shape[1:] == was[1:] and len(shape) > 1 else None
        if shape != was and rows is None:
            left_out[tensor] = f"{list(was)} became {list(shape)}"
            continue
        old, new = before.read(tensor), after.read(tensor)
        if not (old.is_floating_point() and new.is_floating_point()):
            left_out[tensor] = "its numbers are quantised; compare the models before quantisation"
            continue
        if shape != was:
            left_out[tensor] = f"only its first {rows} rows are compared: {list(was)} became {list(shape)}"
        was_there = old[:rows].float()
        yield tensor, was_there, new[:rows].float() - was_there


def _is_residual(tensor: str, shape: Sequence[int], width: int) -> bool:
    """Whether a side of a tensor is the residual stream. A norm's gain multiplies the stream and adds no direction."""
    if len(shape) == 1:
        return shape[0] == width and tensor.endswith("bias")
    return len(shape) > 1 and width in shape[-2:]
