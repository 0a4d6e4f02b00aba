"""The network of a weighted controller: its layers, and the gate that asks it about each prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from steerkit._support.precision import full_precision
from steerkit.errors import VectorMismatchError
from steerkit.methods._gate import Decision, Gate
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["GAIN", "PROBE", "WEIGHTS", "ControllerGate", "begun", "gain_logits", "probe_logits", "weight_logits"]

GAIN = ("shared/first_weight", "shared/first_bias", "shared/gain_weight", "shared/gain_bias")
WEIGHTS = ("shared/block_weight", "shared/block_bias")
PROBE = ("shared/probe_weight", "shared/probe_bias")


def begun(width: int, hidden: int, blocks: int, seed: int) -> dict[str, Tensor]:
    """The network before training: as torch begins linear layers, but from a seed of its own; the probe at zero.

    Args:
        width: of the features.
        hidden: width of the network.
        blocks: that are written.
        seed: of the draw.

    Returns:
        ``"shared/<layer>_weight"`` [outputs, inputs] and ``"shared/<layer>_bias"`` [outputs].
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, inputs: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1) / math.sqrt(inputs)

    return {
        "shared/first_weight": drawn(hidden, width, inputs=width),
        "shared/first_bias": drawn(hidden, inputs=width),
        "shared/gain_weight": drawn(hidden, inputs=hidden),
        "shared/gain_bias": drawn(1, inputs=hidden),
        "shared/block_weight": drawn(blocks, hidden, inputs=hidden),
        "shared/block_bias": drawn(blocks, inputs=hidden),
        "shared/probe_weight": torch.zeros(width, dtype=torch.float32),
        "shared/probe_bias": torch.zeros(1, dtype=torch.float32),
    }


def _inner(net: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """[b, hidden] what both heads read."""
    return torch.relu(x @ net["shared/first_weight"].T + net["shared/first_bias"])


@full_precision()
def gain_logits(net: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The network's z, the logit of a row's gain.

    Args:
        net: the network's tensors.
        x: [b, f] standardised features.

    Returns:
        [b]
    """
    return _inner(net, x) @ net["shared/gain_weight"] + net["shared/gain_bias"]


@full_precision()
def weight_logits(net: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Logits of the block weights; their last layer alone is ever trained through them.

    Args:
        net: the network's tensors.
        x: [b, f] standardised features.

    Returns:
        [b, blocks]
    """
    return _inner(net, x).detach() @ net["shared/block_weight"].T + net["shared/block_bias"]


@full_precision()
def probe_logits(net: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The probe's z, the logit of a row's gain.

    Args:
        net: the network's tensors.
        x: [b, f] standardised features.

    Returns:
        [b]
    """
    return x @ net["shared/probe_weight"] + net["shared/probe_bias"]


class ControllerSettings(Protocol):
    """The settings of a controller that its gate goes by; see `WeightedController`."""

    @property
    def gate(self) -> str:
        """``"mlp"`` or ``"probe"``."""

    @property
    def weights(self) -> str:
        """``"uniform"``, ``"random"``, ``"fixed"`` or ``"learned"``."""

    @property
    def schedule(self) -> str:
        """``"online"`` decides again behind every token."""

    @property
    def dead_zone(self) -> float:
        """A row whose gain is below it is left alone."""

    @property
    def graded(self) -> bool:
        """Whether the gain scales what an open row gets."""

    @property
    def limit(self) -> float:
        """No block is moved further than so many typical norms."""


class ControllerGate(Gate):
    """Runs the network of a vector.

    Args:
        method: the controller's settings.
        vector: the vector, with the network in its shared tensors.

    Raises:
        VectorMismatchError: the vector lacks a part of the network, or its parts do not fit.
    """

    def __init__(self, method: ControllerSettings, vector: SteeringVector) -> None:
        follows = method.schedule == "online"
        super().__init__(vector.reads, vector.readout, limit=method.limit, follows=follows)
        self._method, self._writes = method, vector.sites
        needed = ["shared/mean", "shared/spread", *GAIN, *PROBE]
        needed += {"fixed": ["shared/fixed"], "uniform": []}.get(method.weights, list(WEIGHTS))
        missing = [name for name in needed if name not in vector.tensors]
        if missing:
            raise VectorMismatchError(f"controller: the vector holds no {missing[0]}; fit it again")
        self._net = {
            torch.device("cpu"): {name: tensor for name, tensor in vector.tensors.items() if "shared/" in name}
        }
        blocks = vector.tensors[needed[-1]].shape[0] if method.weights != "uniform" else len(self._writes)
        width = vector.tensors["shared/mean"].shape[0]
        if vector.tensors["shared/first_weight"].shape[1:] != (width,) or blocks != len(self._writes):
            raise VectorMismatchError(f"controller: the network does not fit {len(self._writes)} written blocks")

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._net:
            self._net[device] = {name: tensor.to(device) for name, tensor in self._net[torch.device("cpu")].items()}
        return self._net[device]

    def _read(self, found: Mapping[Site, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        features = torch.cat([found[site].float() for site in self.reads], dim=-1)
        net = self._on(features.device)
        return net, (features - net["shared/mean"]) / net["shared/spread"]

    def gain(self, found: Mapping[Site, Tensor], gate: str | None = None) -> Tensor:
        """[b] s, of the gate in use or of another one."""
        net, x = self._read(found)
        return torch.sigmoid(probe_logits(net, x) if (gate or self._method.gate) == "probe" else gain_logits(net, x))

    def opening(self, found: Mapping[Site, Tensor]) -> Tensor:
        """The gain of every row.

        Args:
            found: per read site [b, d] float32.
        """
        return self.gain(found).double()

    def weights(self, found: Mapping[Site, Tensor]) -> Tensor:
        """[b, blocks] how much each written block counts."""
        net, x = self._read(found)
        if self._method.weights == "uniform":
            return torch.ones(len(x), len(self._writes), device=x.device, dtype=torch.float32)
        if self._method.weights == "fixed":
            return net["shared/fixed"].expand(len(x), -1)
        return torch.sigmoid(weight_logits(net, x))

    def decide(self, found: Mapping[Site, Tensor]) -> Decision:
        """Gains and weights of every row.

        Args:
            found: per read site [b, d] float32.
        """
        gain, weights = self.gain(found), self.weights(found)
        by = gain if self._method.graded else torch.ones_like(gain)
        gains = {site: by * weights[:, number] for number, site in enumerate(self._writes)}
        return Decision(gain >= self._method.dead_zone, gains)

    def explain(self, found: Mapping[Site, Tensor], strength: float) -> list[dict[str, Any]]:
        """Gain, weights, what each block gets in typical norms, and what network and probe say, per row.

        Args:
            found: per read site [b, d] float32.
            strength: at which it would steer.
        """
        decision, weights, limit = self.decide(found), self.weights(found), self._method.limit
        scores = {name: self.gain(found, name) for name in ("mlp", "probe")}
        rows = []
        for row, flag in enumerate(decision.is_open.tolist()):
            blocks = {site: strength * float(gain[row]) for site, gain in decision.gains.items()}
            rows.append(
                {
                    "open": flag,
                    "gain": float(scores[self._method.gate][row]),
                    "dead_zone": self._method.dead_zone,
                    "gate": self._method.gate,
                    "scores": {name: float(score[row]) for name, score in scores.items()},
                    "weights": {str(site): float(weights[row, number]) for number, site in enumerate(self._writes)},
                    "blocks": {str(site): min(max(by, -limit), limit) if flag else 0.0 for site, by in blocks.items()},
                }
            )
        return rows
