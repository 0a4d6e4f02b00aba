"""MELBO: directions that nobody has named, found because a push of fixed length along them changes a later block most.

    Z(i, t)            output of the target block at token t of prompt i, unsteered
    Z(i, t; v)         the same while v is added at the source block's output, to every token
    change of v        mean over i of ( sum over t of |Z(i, t; v) - Z(i, t)|^p ) ^ (1/q)
    v_1, v_2, ...      each of length R, orthogonal to those before it, with as large a change as gradients find

Mack and Turner (2024), "Mechanistically Eliciting Latent Behaviors in Language Models",
https://www.lesswrong.com/posts/ioPnHKFyy4Cw2Gr2x, with p = q = 2, 300 steps, and the source and the target seven and
eight blocks from the ends of the model. No text says what a direction should do; what it does is looked at afterwards.

Where this file departs. All vectors are trained at once, each a row of the batch of its own: a row is kept orthogonal
to those before it, which do not feel it, so that the first one is what it would be alone (the released code trains one
after the other). Each token's change is a norm over the width; the released code takes it over the tokens, which is
the same for p = 2 only. Pads are never counted, nor is each row's first token: it holds the massive activations that
attention rests on, is the same in every prompt, and moves further than all others under any push. The released code
reports the loss of the last prompt; here the change of every vector, over all prompts, is kept for every step. The
optimiser is AdamW without AMSGrad, on the logarithm of the change, so that a rate means the same whatever R and the
model are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerkit.errors import DataError, FitError
from steerkit.maths.directions import orthonormalise, random_direction
from steerkit.methods import PROMPTS, AddDirection, FittedOn, PartsTable, Schedule, Subject
from steerkit.network import Decoder, Site

if TYPE_CHECKING:
    from steerkit.activations import Activations
    from steerkit.prompts.rendering import Rendered
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["MELBO"]

_SOURCE, _TARGET, _SHARE = 0.25, 0.75, 0.125


@dataclass(frozen=True)
class MELBO(AddDirection):
    """Add the direction of fixed length that changes a later block most. Strength 1 is that length.

    One fit finds `count` directions; the vector adds the one with the largest change, and `apart` gives all of them.
    Strength 0 is the identity; a negative strength pushes the other way, which nothing was optimised for.
    """

    name: ClassVar[str] = "melbo"
    title: ClassVar[str] = "MELBO: unsupervised directions"
    paper: ClassVar[str] = "Mack and Turner 2024, Alignment Forum"
    data: ClassVar[FittedOn] = PROMPTS
    also: ClassVar[Mapping[str, str]] = {"directions": "k d", "change": "n s"}
    readout: ClassVar[str | None] = None
    default_strength: ClassVar[float | None] = 1.0
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)

    count: int = 8
    """How many directions are found, orthogonal to each other."""
    norm: float = 0.0
    """Their length R; 0 takes an eighth of the median norm of the source's activations."""
    target: int = -1
    """The block whose output is to change; -1 takes the one at three quarters of the depth."""
    power: float = 2.0
    """p of the change, 1 or more: the larger, the more it is the change of a few tokens that counts."""
    root: float = 2.0
    """q of the change, 1 or more: the larger, the less a prompt with large changes outweighs the others."""
    last: int = 0
    """How many tokens at a prompt's end are counted; 0 counts all but the first one of the prompt."""
    steps: int = 60
    """Steps of the optimiser; 0 leaves the random directions that it starts from, the control."""
    rate: float = 0.01
    """Learning rate, of directions of length 1."""
    seed: int = 0
    """Of the directions that it starts from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"count": 1, "norm": 0, "target": -1, "power": 1, "root": 1, "last": 0, "steps": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise FitError(f"melbo: setting {name} = {getattr(self, name)}; give {low} or more")
        if not self.rate > 0:
            raise FitError(f"melbo: setting rate = {self.rate}; give more than 0")

    def sites(self, decoder: Decoder) -> list[Site]:
        """The output of the block at a quarter of the depth.

        Args:
            decoder: the model's decoder.
        """
        return [Site(round(_SOURCE * (decoder.num_layers - 1)), "resid_post")]

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """Blocks of the first half: what is steered later leaves the target too little to be changed in.

        Args:
            num_layers: of the model.
        """
        return [layers for layers in super().candidates(num_layers) if layers[0] <= (num_layers - 1) // 2]

    def target_site(self, decoder: Decoder) -> Site:
        """The block whose output is to change.

        Args:
            decoder: the model's decoder.
        """
        layer = round(_TARGET * (decoder.num_layers - 1)) if self.target < 0 else self.target
        return Site(layer, "resid_post")

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Find all directions by gradients through the blocks from the source to the target.

        Args:
            acts: unused; the method records for itself.
            subject: the model, and the prompts.
            sites: the source, one site.

        Returns:
            ``"<site>/direction"`` [d], the one with the largest change; ``"<site>/directions"`` [k, d], all of them,
            the largest change first; ``"<site>/change"`` [k, s], theirs before each step and after the last one.

        Raises:
            FitError: there is not one source before the target, or more directions are asked for than the site is wide.
            DataError: a prompt has no token that is counted.
        """
        if len(sites) != 1:
            raise FitError(f"melbo: got {len(sites)} sites ({', '.join(map(str, sites))}); it acts at one, give one")
        search = _Search.over(self, subject, sites[0])
        if self.count > search.width:
            raise FitError(f"melbo: count = {self.count}; {sites[0]} holds at most {search.width} directions")
        like = torch.ones(self.count, search.width, dtype=torch.float32)
        free = random_direction(like / search.width**0.5, torch.Generator().manual_seed(self.seed)).requires_grad_()
        curve: list[Tensor] = []

        def loss(_: Tensor) -> Tensor:
            shifts = _orthogonal(free) * search.radius
            change, slopes = search.slopes(shifts.detach())
            curve.append(change)
            # The gradient of -log(change), whose passes are over: only its slope is left to be carried on.
            carried = -(shifts * slopes / change[:, None]).sum()
            return carried - (carried + change.log().sum()).detach()

        once = Schedule(epochs=self.steps, batch_size=len(search.prompts), rate=self.rate, seed=self.seed, clip=None)
        subject.train([free], loss, len(search.prompts), once, title="learning directions")
        with torch.no_grad():
            found = _orthogonal(free) * search.radius
            curve.append(search.changes(found))
        changes = torch.stack(curve, dim=1)  # [k, steps + 1]
        order = changes[:, -1].argsort(descending=True, stable=True)
        site = sites[0]
        return {
            f"{site}/direction": found[order[0]],
            f"{site}/directions": found[order],
            f"{site}/change": changes[order],
        }

    def apart(self, vector: SteeringVector) -> list[SteeringVector]:
        """All directions that a fit found, each as a vector, the largest change first.

        Args:
            vector: what this method fitted.
        """
        (site,) = vector.sites
        params = vector.params(site)
        if "directions" not in params:
            return [vector]
        rows = zip(params["directions"], params["change"], strict=True)
        return [
            replace(vector, tensors={f"{site}/direction": direction, f"{site}/change": change[None]})
            for direction, change in rows
        ]

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """A random direction of the same length, and nothing of what was found.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        (site,) = vector.sites
        kept = {name: one for name, one in vector.tensors.items() if name == f"{site}/direction"}
        return super().control(replace(vector, tensors=kept), generator)

    def table(self, vector: SteeringVector) -> PartsTable:
        """The directions with their changes, the largest first.

        Args:
            vector: what this method fitted.
        """
        (site,) = vector.sites
        changes = vector.params(site).get("change", torch.empty(0, 1, dtype=torch.float32))
        rows = [(place, float(one[-1]), float(one[0])) for place, one in enumerate(changes, start=1)]
        note = "random: the change of the random direction that each was learned from"
        return PartsTable(f"{len(rows)} directions", ("direction", "change", "random"), rows, note)


@dataclass(frozen=True, eq=False)
class _Search:
    """What directions at one source change at the target."""

    method: MELBO
    subject: Subject
    source: Site
    target: Site
    radius: float
    width: int
    prompts: Sequence[Rendered]
    unsteered: Sequence[Tensor]
    """Of each prompt [t, d] at the target, float32, on the device of the model."""

    @classmethod
    def over(cls, method: MELBO, subject: Subject, source: Site) -> _Search:
        """Read what does not change: the prompts, the source's scale and the target unsteered."""
        depth = subject.decoder.num_layers
        target = method.target_site(subject.decoder)
        if not source.layer < target.layer < depth:
            raise FitError(
                f"melbo: target = {target.layer} with the source {source}; give a later block, up to {depth - 1}"
            )
        prompts = subject.rendered(subject.prompts)
        for number, prompt in enumerate(prompts):
            if len(prompt.ids) < 2:
                raise DataError(
                    f"prompt {number} is one token, and a prompt's first one is not counted; give more text"
                )
        read = subject.record(prompts, [source], readout="mean").positive
        (activations,) = read.values()
        radius = method.norm or _SHARE * subject.norms(list(read))[next(iter(read))]
        with torch.no_grad():
            unsteered = [subject.read_shifted([prompt], {}, target)[0][0] for prompt in prompts]
        return cls(method, subject, source, target, radius, activations.shape[-1], prompts, unsteered)

    def changes(self, shifts: Tensor) -> Tensor:
        """[k] the change that each of [k, d] makes, without gradients, on the CPU."""
        with torch.no_grad():
            return self._mean([self._pass(shifts, rows) for rows in self._rows(shifts)], len(shifts))

    def slopes(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """[k] the changes of [k, d], and their gradients [k, d]; one pass at a time is in memory."""
        leaf, found = shifts.clone().requires_grad_(), []
        for rows in self._rows(shifts):
            part = self._pass(leaf, rows)
            part.sum().backward()  # type: ignore[no-untyped-call]
            found.append(part.detach())
        assert leaf.grad is not None
        return self._mean(found, len(shifts)), leaf.grad / len(self.prompts)

    def _rows(self, shifts: Tensor) -> list[Tensor]:
        """Every vector on every prompt, vector by vector: [b] numbers of rows, no more than a pass may hold."""
        rows, size = torch.arange(len(shifts) * len(self.prompts)), self.subject.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _mean(self, found: Sequence[Tensor], count: int) -> Tensor:
        """[k] means over the prompts of what the passes gave."""
        return torch.cat(list(found)).reshape(count, -1).mean(dim=1).cpu()

    def _pass(self, shifts: Tensor, rows: Tensor) -> Tensor:
        """[b] the change of some vectors on some prompts."""
        which = (rows % len(self.prompts)).tolist()
        vectors = shifts[rows // len(self.prompts)]
        items = [self.prompts[place] for place in which]
        h, real = self.subject.read_shifted(items, {self.source: vectors}, self.target)
        before = pad_sequence([self.unsteered[place] for place in which], batch_first=True)
        moved = torch.linalg.vector_norm(h - before, dim=-1).pow(self.method.power)  # [b, t]
        position = torch.arange(real.shape[1], device=real.device)
        counted = real & (position > 0)
        if self.method.last:
            counted = counted & (position >= real.sum(dim=1, keepdim=True) - self.method.last)
        found: Tensor = (moved * counted).sum(dim=1).pow(1 / self.method.root)
        return found


def _orthogonal(rows: Tensor) -> Tensor:
    """[k, d] of length 1, each orthogonal to those before it, which get no gradient from it."""
    basis = orthonormalise(rows.detach()).to(rows.device)
    left = rows - (rows @ basis.T).tril(-1) @ basis
    length: Tensor = torch.linalg.vector_norm(left, dim=-1, keepdim=True)
    return left / length
