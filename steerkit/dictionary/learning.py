"""A dictionary while it is learned: BatchTopK, one step at a time.

    x   = s (h - mean)                  s so that the mean squared length of x is its width
    a   = relu(E (x - b_dec) + b_enc)
    f   = a where it is among the K n largest of the batch's n tokens, else 0
    L   = |x - (f D + b_dec)|^2 / var + aux * |e - f' D|^2 / |e|^2

with e what is left over and f' the largest latents among those that have not fired for long, which brings them back.
Rows of D have length 1. The threshold is a running mean of the smallest latent that fired in a batch; it stands for the
batch afterwards, so that a token's latents depend on no other token.

Bussmann, Leask, Nanda (2024), "BatchTopK Sparse Autoencoders", arXiv 2412.06410; the auxiliary loss and the start are
those of Gao et al. (2024), arXiv 2406.04093.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit._support.precision import full_precision
from steerkit.errors import FitError

__all__ = ["Learner", "Learning", "Step", "seed_of"]

THRESHOLD_RATE = 0.02
AUXILIARY, BROUGHT_BACK = 1 / 32, 64  # weight of the auxiliary loss; dead latents in it for each token
_NAMES = ("encoder", "decoder", "encoder_bias", "decoder_bias")


@dataclass(frozen=True)
class Learning:
    """How a dictionary is learned.

    Attributes:
        latents: how many.
        top_k: how many fire at a token, on average.
        tokens: that are learned from, each as often as it comes.
        batch: tokens of a step.
        learning_rate: of Adam; it rises over the first twentieth and falls to nothing over the last fifth.
        dead_after: tokens without firing after which a latent is dead.
        seed: fixes beginning and order.

    Raises:
        FitError: a setting is none.
    """

    latents: int = 1536
    top_k: int = 32
    tokens: int = 1_000_000
    batch: int = 512
    learning_rate: float = 1e-3
    dead_after: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "seed" else 1
            if name != "learning_rate" and value < least:
                raise FitError(f"{name} = {value}; give at least {least}")
        if not 1 <= self.top_k <= self.latents:
            raise FitError(f"top_k = {self.top_k}; give 1 to {self.latents}, the latents that there are")
        if not 0.0 < self.learning_rate < math.inf:
            raise FitError(f"learning_rate = {self.learning_rate:g}; give a number above 0")


class Step(NamedTuple):
    """What one step says of its batch, before it changes anything.

    Attributes:
        unexplained: squared error over the batch's variance.
        dead: latents that have not fired for long.
    """

    unexplained: float
    dead: int


def seed_of(*parts: str | int) -> int:
    """A seed of its own for each use: small seeds draw the random directions that are controls.

    A row that begins as one of these would be no surprise in it. The generator of the CPU looks at the lower 32 bits of
    a seed only, so parts are not to be shifted beside each other.

    Args:
        parts: what it is for.

    Returns:
        32 bits.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Learner:
    """Parameters, Adam's moments and counts of a dictionary that is being learned, float32 on the CPU.

    Args:
        first: [n, d] tokens, from which mean and scale are taken.
        how: the settings.

    Raises:
        FitError: the tokens do not differ.
    """

    def __init__(self, first: Tensor, how: Learning) -> None:
        rows = first.float()
        width = rows.shape[1]
        self.how, self.seen = how, 0
        mean = rows.mean(0)
        spread = float((rows - mean).square().sum(-1).mean())
        if not spread > 0.0:
            raise FitError("the tokens read do not differ; give other texts, or another site")
        self.scale = math.sqrt(width / spread)
        self.threshold = 0.0
        draw = torch.Generator().manual_seed(seed_of("rows", how.seed))
        decoder = torch.nn.functional.normalize(torch.randn(how.latents, width, generator=draw, dtype=torch.float32))
        self.parameters: dict[str, Tensor] = {
            "encoder": decoder.clone(),
            "decoder": decoder,
            "encoder_bias": torch.zeros(how.latents, dtype=torch.float32),
            "decoder_bias": mean * self.scale,
        }
        self.moments: dict[str, tuple[Tensor, Tensor]] = {
            name: (torch.zeros_like(one), torch.zeros_like(one)) for name, one in self.parameters.items()
        }
        self.steps = 0
        self.fired = torch.zeros(how.latents, dtype=torch.int64)
        """[k] tokens seen when a latent fired last."""

    @full_precision()
    def step(self, rows: Tensor) -> Step:
        """Learn from one batch.

        Args:
            rows: [n, d] tokens, as the model has them.

        Raises:
            FitError: the loss is not finite.
        """
        x = rows.float() * self.scale
        leaves = {name: one.detach().requires_grad_() for name, one in self.parameters.items()}
        dead = (self.seen - self.fired > self.how.dead_after).nonzero()[:, 0]
        with torch.enable_grad():
            pre = torch.relu((x - leaves["decoder_bias"]) @ leaves["encoder"].T + leaves["encoder_bias"])
            least = _least(pre.detach(), self.how.top_k * len(x))
            latents = pre * (pre >= least)
            left = x - latents @ leaves["decoder"] - leaves["decoder_bias"]
            variance = (x - x.mean(0)).square().sum()
            unexplained = left.square().sum() / variance
            loss = unexplained + self._auxiliary(pre, left, leaves["decoder"], dead)
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if not math.isfinite(float(loss.detach())):
            raise FitError(f"the loss is {float(loss.detach())} after {self.seen} tokens; lower the learning rate")
        self.seen += len(x)
        self.fired[(latents.detach() > 0).any(0)] = self.seen
        self.threshold += (1.0 if self.steps == 0 else THRESHOLD_RATE) * (least - self.threshold)
        self._descend(dict(zip(leaves, gradients, strict=True)))
        return Step(float(unexplained.detach()), len(dead))

    def _auxiliary(self, pre: Tensor, left: Tensor, decoder: Tensor, dead: Tensor) -> Tensor:
        """How badly dead latents explain what is left over."""
        if not len(dead):
            return torch.zeros((), dtype=torch.float32)
        error = left.detach()
        values, places = pre[:, dead].topk(min(BROUGHT_BACK, len(dead)), dim=-1, sorted=False)
        latents = torch.zeros(len(pre), len(dead), dtype=torch.float32).scatter(-1, places, values)
        return AUXILIARY * (error - latents @ decoder[dead]).square().sum() / error.square().sum().clamp_min(1e-12)

    def _descend(self, gradients: Mapping[str, Tensor | None]) -> None:
        """One step of Adam; rows of the decoder keep their length, and so do not move along themselves."""
        self.steps += 1
        done = self.seen / self.how.tokens
        rate = self.how.learning_rate * max(min(done / 0.05, (1.0 - done) / 0.2, 1.0), 0.0)
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            one = self.parameters[name]
            if name == "decoder":
                gradient = gradient - (gradient * one).sum(-1, keepdim=True) * one
            mean, power = self.moments[name]
            mean.lerp_(gradient, 0.1)
            power.lerp_(gradient.square(), 0.001)
            size = (power / (1.0 - 0.999**self.steps)).sqrt_().add_(1e-8)
            one.addcdiv_(mean, size, value=-rate / (1.0 - 0.9**self.steps))
        decoder = self.parameters["decoder"]
        decoder /= torch.linalg.vector_norm(decoder, dim=-1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """Everything that a later `restore` needs by name: matrices [k, d], biases [k] and [d], and counts [2]."""
        counts = torch.tensor([self.seen, self.steps], dtype=torch.int64)
        found = {"counts": counts, "fired": self.fired}
        found["numbers"] = torch.tensor([self.scale, self.threshold], dtype=torch.float64)
        for name, one in self.parameters.items():
            mean, power = self.moments[name]
            found |= {name: one, f"{name}.mean": mean, f"{name}.power": power}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Args:
            state: of a learner with the same settings: matrices [k, d], biases [k] and [d], and counts [2].

        Raises:
            FitError: it is of another one.
        """
        own = {name: one.shape for name, one in self.state().items()}
        if own != {name: one.shape for name, one in state.items()}:
            raise FitError("what was learned so far has other shapes; delete the work folder to begin anew")
        self.seen, self.steps = map(int, state["counts"])
        self.scale, self.threshold = map(float, state["numbers"])
        self.fired = state["fired"].clone()
        for name in _NAMES:
            self.parameters[name] = state[name].clone()
            self.moments[name] = state[f"{name}.mean"].clone(), state[f"{name}.power"].clone()

    @property
    def dead(self) -> int:
        """Latents that have not fired for long."""
        return int((self.seen - self.fired > self.how.dead_after).sum())

    def tensors(self) -> dict[str, Any]:
        """The fields of a `Dictionary` that were learned."""
        return {
            **{name: one.clone() for name, one in self.parameters.items()},
            "threshold": torch.full((self.how.latents,), self.threshold, dtype=torch.float32),
            "activation": "batchtopk",
            "top_k": self.how.top_k,
            "subtract": True,
            "input_scale": self.scale,
        }


def _least(pre: Tensor, count: int) -> float:
    """The `count`-th largest of all numbers, or the smallest above zero where fewer are."""
    flat = pre.flatten()
    count = min(count, len(flat))
    least = float(flat.topk(count, sorted=False).values.min())
    if least > 0.0:
        return least
    above = flat[flat > 0]
    return float(above.min()) if len(above) else math.inf
