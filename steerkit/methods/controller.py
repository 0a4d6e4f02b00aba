"""Weighted controllers: a small network reads the prompt and says how strongly each block is steered.

    features   x = (h at the last prompt token of the read sites, side by side - mean) / spread      float32
    network    z, w = MLP(x);   s = sigmoid(z)                        gain of the row
    blocks     w_l = 1 (uniform), sigmoid(w)_l (random, learned), or given (fixed)
    where s >= dead_zone, at every written block l:
               h' = h + clip(strength * s * w_l) * m_l * v_l          m_l the typical norm there, |v_l| = 1

"Guiding Giants: Lightweight Controllers for Weighted Activation Steering in LLMs" (2025), arXiv 2505.20309.

Where this file departs. The paper's loss touches s alone, so its weights w are an untrained projection (`random` here);
the default is `uniform`, and `learned` gives w a signal through the frozen model. s is unbounded there, and steers
harmless prompts the other way when it falls below 0; here it is a probability. Strength counts in typical activation
norms: a direction of length 1 does nothing to a stream of norm 100. The paper steers from the second new token on
(`paper`), which leaves out the token that decides about a refusal: `replay` feeds the last prompt token again. Features
are standardised. The direction is read from answers; the paper's, from words of the output embedding, is
`direction_from="unembed"`. A linear probe (logistic regression, its weights held down by `ridge`) is fitted beside the
network on the same features, and can take its place: it is the baseline the network has to beat, and does not, where
items are few beside features. With `max_false_alarm` the dead zone is not given but found (`_operating`). A small s
that is over it need not mean a weak refusal: `graded=False` steers what opens the gate with all of the strength. The
released code differs from the paper in many ways, above all it reaches the last block alone; it is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.maths.directions import unit
from steerkit.maths.probes import auc, fpr_at_tpr, linear_probe
from steerkit.methods._controller_gate import (
    GAIN,
    WEIGHTS,
    ControllerGate,
    begun,
    gain_logits,
    probe_logits,
    weight_logits,
)
from steerkit.methods._fingerprint import fingerprint
from steerkit.methods._gate import Gate
from steerkit.methods._gated_addition import RIDGE, GatedAddition, Parts, behaviour, blocks_written
from steerkit.methods._protocols import Params
from steerkit.methods._refusal import COMPLYING, REFUSING
from steerkit.methods._subject import Schedule, Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.prompts.rendering import spread
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["WeightedController", "permuted_weights"]

_SCOPES = {"paper": "generated", "replay": "response", "two_pass": "all", "online": "response"}
_VALIDATION = 5  # every fifth item of either side ends the training in time


_COST = 0.05
_FIRST_WORDS = 4  # tokens: "I'm sorry,"


@dataclass(frozen=True)
class WeightedController(GatedAddition):
    """Add a direction to many blocks, per row as strongly as a network that reads the prompt says.

    The positive side of the contrast set are prompts to be steered (harmful requests), the negative side prompts to be
    left alone. Sites given to `fit` are all read. Strength 1 is one typical activation norm at each written block.
    """

    name: ClassVar[str] = "controller"
    title: ClassVar[str] = "Weighted controller"
    paper: ClassVar[str] = "Guiding Giants 2025, arXiv 2505.20309"
    also: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("mean", "spread", "probe_weight"), "f"),
        **{"first_weight": "h f", "first_bias": "h", "gain_weight": "h", "gain_bias": "k", "probe_bias": "k"},
        **{"block_weight": "b h", "block_bias": "b", "fixed": "b", "fingerprint": "p"},
    }
    readout: ClassVar[str | None] = "last"
    scopes: ClassVar[tuple[str, ...]] = ("all", "response", "generated")
    ladder: ClassVar[tuple[float, ...]] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)

    gate: Literal["mlp", "probe"] = "mlp"
    """What gives s: the network, or the linear probe that is fitted beside it."""
    weights: Literal["uniform", "random", "fixed", "learned"] = "uniform"
    """The weights of the written blocks: all 1, the paper's untrained ones, given ones, or trained ones."""
    fixed: tuple[float, ...] = ()
    """One weight per written block, where `weights` is `fixed`; scaled to mean 1."""
    schedule: Literal["replay", "paper", "two_pass", "online"] = "replay"
    """When it acts: from the first new token (`replay`), from the second (`paper`), on the prompt as well (`two_pass`),
    or deciding again behind every token (`online`)."""
    direction_from: Literal["response", "mean_difference", "unembed"] = "response"
    """What is added: refusing minus complying answers, the prompts' own difference, or words of answers' beginnings."""
    writes: tuple[int, ...] = ()
    """Blocks after which it is added; none takes all."""
    hidden: int = 64
    """Width of the network; the paper has 1024."""
    dead_zone: float = 0.05
    """A row whose s is below it stays bitwise the unsteered model's (with routed experts: see `conditional`)."""
    graded: bool = True
    """Whether s scales the steering, as in the paper; if not, rows over the dead zone get all of it."""
    limit: float = 1.0
    """No block is moved further than so many typical norms."""
    epochs: int = 20
    """Passes over the items, at most; a fifth of them is kept apart to end it in time."""
    rate: float = 1e-3
    """Learning rate."""
    ridge: float = RIDGE
    """How much the probe's weights cost: the penalty of their squared length, for each item that it is fitted on."""
    seed: int = 0
    """Of the network's first weights and the order of the items."""
    reach: float = 0.1
    """Strength at which weights are learned."""
    learn_items: int = 32
    """Items of either side on which weights are learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights == "fixed") != bool(self.fixed):
            raise FitError(f"controller: weights={self.weights!r} with fixed={list(self.fixed)}; the two go together")
        if self.fixed and (min(self.fixed) < 0 or not 0 < sum(self.fixed) < math.inf):
            raise FitError(f"controller: fixed={list(self.fixed)}; give weights from 0, not all 0")
        for name, low in (("hidden", 1), ("epochs", 1), ("learn_items", 1)):
            if getattr(self, name) < low:
                raise FitError(f"controller: {name} {getattr(self, name)!r}: give at least {low}")
        for name in ("rate", "ridge", "limit", "reach"):
            if not 0 < getattr(self, name) < math.inf:
                raise FitError(f"controller: {name} {getattr(self, name)!r}: give a number over 0")
        if not 0 <= self.dead_zone < 1:
            raise FitError(f"controller: dead_zone {self.dead_zone!r}: give a number from 0 to below 1")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add_weighted"

    @property
    def default_scope(self) -> str:
        """The tokens that the schedule writes."""
        return _SCOPES[self.schedule]

    def sites(self, decoder: Decoder) -> list[Site]:
        """What is read: the outputs of the last third of the blocks, as in the paper.

        Args:
            decoder: the model's decoder.
        """
        first = min(math.ceil(2 * decoder.num_layers / 3), decoder.num_layers - 1)
        return [Site(layer) for layer in range(first, decoder.num_layers)]

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Train the network and the probe, and read the directions.

        Args:
            acts: activations of both sides at every site.
            subject: whose stream is written.
            sites: where it reads.

        Returns:
            ``"shared/..."``: mean and spread of the features [f], the network's layers, the probe's, block weights;
            per written site ``"<site>/direction"`` [d], as long as a typical activation there.

        Raises:
            FitError: the features do not vary, no direction can be had, or `fixed` has another number of blocks.
        """
        assert acts is not None
        written = self._written(subject.decoder)
        if self.fixed and len(self.fixed) != len(written):
            raise FitError(f"controller: fixed has {len(self.fixed)} weights for {len(written)} blocks; give one each")
        parts = self.parts(subject.data)
        rows = [
            torch.cat([side[site][kept].float() for site in sites], dim=-1)
            for side, kept in ((acts.positive, parts.positive), (acts.negative, parts.negative))
        ]
        features, labels = (
            torch.cat(rows),
            torch.cat([torch.ones(len(rows[0]), dtype=torch.float32), torch.zeros(len(rows[1]), dtype=torch.float32)]),
        )
        mean, spread = features.mean(dim=0), features.std(dim=0, correction=0)
        if not bool((spread > 0).any()):
            raise FitError("controller: the features do not vary, so nothing can be told apart")
        net = begun(len(mean), self.hidden, len(written), self.seed)
        net |= {"shared/mean": mean, "shared/spread": spread.clamp_min(1e-6)}
        standard = (features - mean) / net["shared/spread"]
        self._train_network(subject, net, standard, labels, parts)
        probe = linear_probe(standard[: len(rows[0])], standard[len(rows[0]) :], penalty=self.ridge * len(standard))
        bias = torch.tensor([probe.bias], dtype=torch.float32)
        net |= {"shared/probe_weight": probe.weight, "shared/probe_bias": bias}
        directions = behaviour(subject, self.direction_from, written)
        # The same norms as go into the file: of the prompts where they were read, else of the answers just read.
        norms = {**subject.norms(written), **acts.norms}
        tensors = {f"{site}/direction": unit(value) * norms[site] for site, value in directions.items()}
        if self.weights == "learned":
            moves = {site: tensors[f"{site}/direction"] for site in written}
            self._learn_weights(subject, net, standard, parts, moves)
        if self.fixed:
            net["shared/fixed"] = torch.tensor(self.fixed, dtype=torch.float32) * len(self.fixed) / sum(self.fixed)
        mark = fingerprint(subject.decoder)
        return {**net, **tensors, **({"shared/fingerprint": mark} if len(mark) else {})}

    def _written(self, decoder: Decoder) -> list[Site]:
        return blocks_written(decoder, self.writes, list(range(decoder.num_layers)))

    def _train_network(self, subject: Subject, net: dict[str, Tensor], x: Tensor, labels: Tensor, parts: Parts) -> None:
        """Train the network's gain to tell the sides apart; its weights of blocks get no gradient."""
        positives = int(parts.positive.sum())
        places = [torch.tensor(side, dtype=torch.long) for side in self.fitted_turns(subject.data)]
        kept = torch.cat(places) % _VALIDATION == _VALIDATION - 1
        has_both = bool(kept[:positives].any()) and bool(kept[positives:].any())
        training = (~kept if has_both else torch.ones_like(kept)).nonzero()[:, 0]
        leaves = [net[name].requires_grad_() for name in GAIN]

        def loss(rows: Tensor) -> Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(gain_logits(net, x[rows]), labels[rows])

        subject.train(
            leaves,
            lambda batch: loss(training[batch]),
            len(training),
            Schedule(self.epochs, rate=self.rate, decay=0.01, seed=self.seed, patience=3),
            judge=(lambda: float(loss(kept.nonzero()[:, 0]))) if has_both else None,
            title="training the gate",
        )
        for name in GAIN:
            net[name] = net[name].detach()

    def _learn_weights(
        self, subject: Subject, net: dict[str, Tensor], x: Tensor, parts: Parts, directions: Mapping[Site, Tensor]
    ) -> None:
        """Train the block weights alone: likely refusals of the positive side, little change of the negative one.

        The loss is the cross-entropy of the first words of a refusal on positive prompts, the divergence from the
        unsteered model over a complying opening on negative prompts, and a cost of writing at all. Behind its first
        words a refusal is as likely as the model's own habits make it, steered or not.
        """
        sides = ((subject.data.positive, parts.positive), (subject.data.negative, parts.negative))
        prompts = [one for side, kept in sides for one, is_kept in zip(side, kept.tolist(), strict=True) if is_kept]
        positives = int(parts.positive.sum())
        counts = [min(self.learn_items, positives), min(self.learn_items, len(x) - positives)]
        rows = [*spread(range(positives), counts[0]), *spread(range(positives, len(x)), counts[1])]
        texts = [
            replace(prompts[row], answer=(REFUSING if row < positives else COMPLYING)[number % len(REFUSING)])
            for number, row in enumerate(rows)
        ]
        with torch.no_grad():
            gains = torch.sigmoid(self._score(net, x[rows]))
        leaves = [net[name].requires_grad_() for name in WEIGHTS]

        def loss(batch: Tensor) -> Tensor:
            weights, gain = torch.sigmoid(weight_logits(net, x[[rows[place] for place in batch]])), gains[batch]
            by = (self.reach * gain[:, None] * weights).clamp_max(self.limit)
            shifts = {site: by[:, number, None] * value for number, (site, value) in enumerate(directions.items())}
            items = [texts[place] for place in batch]
            logits, ids, predicts = subject.shifted(items, shifts, prompts=self.default_scope == "all")
            likely = torch.log_softmax(logits.float(), dim=-1)
            first = predicts & (predicts.cumsum(dim=1) <= _FIRST_WORDS)
            wanted = -likely[:, :-1].gather(-1, ids[:, 1:, None])[..., 0] * first[:, :-1]
            each = wanted.sum(dim=1) / first.sum(dim=1)
            left = [row for row, place in enumerate(batch.tolist()) if rows[place] >= positives]
            if left:
                with torch.no_grad():
                    baseline = torch.log_softmax(subject.shifted([items[row] for row in left], {})[0].float(), dim=-1)
                width = baseline.shape[1]  # pads stand behind, so fewer rows are at most narrower
                moved = (baseline.exp() * (baseline - likely[left, :width])).sum(dim=-1) * predicts[left, :width]
                moved = moved.sum(dim=1) / predicts[left].sum(dim=1)
                each = each.index_copy(0, torch.tensor(left, device=each.device, dtype=torch.long), moved)
            return each.mean() + _COST * (gain[:, None] * weights).mean().to(logits.device)

        subject.train(
            leaves,
            loss,
            len(rows),
            Schedule(epochs=2, batch_size=8, rate=10 * self.rate, seed=self.seed),
            title="learning weights",
        )
        for name in WEIGHTS:
            net[name] = net[name].detach()

    def _score(self, net: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return gain_logits(net, x) if self.gate == "mlp" else probe_logits(net, x)

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The outputs of the blocks that `writes` names.

        Args:
            sites: unused.
            tensors: unused.
            decoder: the model's decoder.
        """
        return self._written(decoder)

    def read_direction(self, params: Params) -> Tensor | None:
        """None: a network tells the sides apart, and no direction does.

        Args:
            params: unused.
        """
        return None

    def opens_above(self, vector: SteeringVector) -> float:
        """The dead zone, from which on the gate is open.

        Args:
            vector: a vector of this method.
        """
        return float(vector.settings.get("dead_zone", self.dead_zone))

    def opening_above(self, vector: SteeringVector, threshold: float) -> SteeringVector:
        """The same vector with the dead zone that ends just above a gain.

        Args:
            vector: a vector of this method.
            threshold: the gain.

        Raises:
            FitError: no gain is larger.
        """
        gain, top = torch.tensor([threshold, torch.inf], dtype=torch.float32)
        zone = float(torch.nextafter(gain, top))
        if not zone < 1:
            raise FitError(
                "controller: too many calibration prompts have the largest gain there is, so no dead zone tells them "
                "apart; give a larger max_false_alarm or ridge"
            )
        settings = {**vector.settings, **self.settings, "dead_zone": zone}
        return replace(vector, settings=settings)

    def editor(self, vector: SteeringVector) -> Gate:
        """The gate: reads at `vector.reads`, and gives every row a gain and weights.

        Args:
            vector: a vector of this method.

        Raises:
            VectorMismatchError: the vector lacks a part of the network, or its parts do not fit.
        """
        return ControllerGate(self, vector)

    def measure(self, vector: SteeringVector, held_out: Activations) -> dict[str, Any]:
        """How well network and probe tell held-out items apart, and how many rows are steered.

        Args:
            vector: a vector of this method.
            held_out: both sides at `vector.reads`.
        """
        gate = ControllerGate(self, vector)
        measured: dict[str, Any] = {}
        for name in ("mlp", "probe"):
            plus, minus = gate.gain(held_out.positive, name), gate.gain(held_out.negative, name)
            measured[name] = {
                "auroc": round(auc(plus, minus), 4),
                "fpr_at_95_tpr": round(fpr_at_tpr(plus, minus, 0.95), 4),
            }
        ranks = {name: (measured[name]["auroc"], -measured[name]["fpr_at_95_tpr"]) for name in ("mlp", "probe")}
        better = "neither" if ranks["mlp"] == ranks["probe"] else max(ranks, key=lambda name: ranks[name])
        shares = [float(gate.decide(side).is_open.float().mean()) for side in (held_out.positive, held_out.negative)]
        return {**measured, "better": better, "tpr": round(shares[0], 4), "fpr": round(shares[1], 4)}


def permuted_weights(vector: SteeringVector, seed: int = 0) -> SteeringVector:
    """The same controller with every block's weight given to another block: the control that weights have to beat.

    Args:
        vector: a controller's vector whose weights are not uniform.
        seed: of the permutation (one cycle through all blocks); the same for all rows.

    Raises:
        FitError: the weights are uniform, or there is one block, so no order of them is another one.
    """
    kind = vector.settings.get("weights")
    names = {"fixed": ("shared/fixed",), "random": WEIGHTS, "learned": WEIGHTS}.get(str(kind), ())
    if not names:
        raise FitError(f"controller: weights {kind!r} cannot be permuted; fit random, fixed or learned ones")
    blocks = len(vector.tensors[names[0]])
    if blocks < 2:
        raise FitError("controller: weights of one block cannot be permuted; fit a vector that writes several blocks")
    # A cycle through the blocks in a drawn order: nothing stays in its place, and not all move by one distance.
    cycle = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return replace(vector, tensors={**vector.tensors, **{name: vector.tensors[name][order] for name in names}})
