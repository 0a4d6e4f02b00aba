"""Steer2Edit: strengthen or weaken single heads and neurons along a direction, by rank-1 changes of their weights.

Per layer and block (attention, MLP), with x what the block's last linear layer W reads and y what it gives:

    v = mean of positive y - mean of negative y,    u = v / |v|,    m = (mean of positive x + mean of negative x) / 2

and for each component, a head's columns W_j of W or a neuron's single one:

    g_j = cos(v, W_j m_j)                                                 how much it already writes along v
    a_j = sign(g_j) max(|g_j| - rho alpha, 0) / (rho (1 - alpha))         elastic net, closed form; magnitude
    k_j = W_j' u / |W_j' u|                                               what it writes along v, as a function of x_j
    W_j <- W_j + strength * a_j u k_j'

so that the change of a whole matrix is one outer product `u gate'`, with gate the a_j k_j side by side. As a hook:
y <- y + strength * u (gate . x).

Sun, Yan, Wang, Weng (2026), "Steer2Edit: From Activation Steering to Component-Level Editing", arXiv 2602.09870.

`rho` is a penalty, not the budget that the paper calls it: a smaller one edits more components and each more. Below
`rho alpha` nothing is edited. A positive magnitude reinforces a component that writes along v, a negative one
suppresses one that writes against it; a magnitude is not relative to what the component writes, so that suppressing can
overshoot and reverse it (`no_reversal` stops it at nothing).

Where this file departs. The released code reads from one token before the answer to one token before its end, and does
every step in bfloat16, three roundings on the weights included; both are at hand (readout `predicting_mean`,
`precision="bfloat16"`), neither is the default: the answer's tokens are, as in the paper, and float32. It runs the
negative answers of its safety set behind the questions of the positive ones; here every answer stands behind its own.
It lets alpha = 1, empty answers and values that are not finite through to the weights; here they are refused. It draws
the gates of neurons, whose sign is that of the mean input, as if it meant reinforcing or suppressing; here tables and
pictures show the magnitude, whose sign means that. Scores leave a neuron's activity out by design: one that is nearly
always silent scores like a busy one. Where a norm follows the layer (Gemma 2 and 3, OLMo 2), activations are read and
weights changed before it. Heads are query heads, or value heads of linear attention. The released code knows no
experts; here each neuron of each routed expert is a component, v is what all of them write together, and m is the mean
over the tokens that were routed to that expert, on either side. Router weights enter none of it: a weight is a positive
factor of what an expert writes, and g does not see it. An expert to which no token of one side was routed has no m
and is left alone. A shared expert beside them is an ordinary MLP. As a hook, the experts run a second time to find what
their gates say, since no module gives what they read; in the weights there is nothing of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from steerkit import edits
from steerkit.activations import Activations
from steerkit.directions import mean_difference, random_direction
from steerkit.errors import FitError, SiteError, VectorMismatchError
from steerkit.experts import Experts, experts_at
from steerkit.linears import writers_at
from steerkit.methods._base import (
    Listing,
    Map,
    Method,
    Params,
    Prepared,
    Subject,
    WeightUpdate,
    check_direction,
)
from steerkit.moments import Means
from steerkit.routing import ExpertMeans
from steerkit.sites import Decoder, Site, anatomies
from steerkit.tokens import Tokens
from steerkit.vector import SteeringVector

__all__ = ["Components", "Steer2Edit", "add_in_order", "elastic_net", "rank_one_edit", "score_components"]

_FLOOR = 1e-8  # norms under it count as it in a cosine, as in the released code
_WRITTEN = ("attn_out", "attn_raw", "mixer_out", "mlp_out", "mlp_raw")


class Components(NamedTuple):
    """The components of one matrix, a of them, w columns each.

    Attributes:
        score: [a] how much each writes along the direction, -1 to 1.
        magnitude: [a] how much each is changed; its sign is the score's, 0 where it is not edited.
        inputs: [a, w] unit vectors k_j; zero where the component writes nothing along the direction.
    """

    score: Tensor
    magnitude: Tensor
    inputs: Tensor

    @property
    def gate(self) -> Tensor:
        """[i] magnitude times unit vector of every component, side by side."""
        return (self.magnitude[:, None] * self.inputs).flatten()


def elastic_net(g: Tensor, rho: float, alpha: float) -> Tensor:
    """Magnitudes that maximise `sum g a - rho (alpha |a|_1 + (1 - alpha) / 2 |a|^2)`, one by one.

    Args:
        g: scores, of any shape; computed in their own precision.
        rho: the penalty; 0 and below leave everything as it is.
        alpha: share of the penalty on |a|, 0 (every component is changed) to just under 1 (few are).

    Returns:
        `sign(g) max(|g| - rho alpha, 0) / (rho (1 - alpha))`, in the shape and dtype of `g`.

    Raises:
        FitError: alpha outside of [0, 1), rho not finite, or a score that is not.

    Example:
        >>> elastic_net(torch.tensor([0.5, -0.5, 0.1]), rho=0.5, alpha=0.5)
        tensor([ 1., -1.,  0.])
    """
    _check_penalty("rho", rho, alpha)
    if not bool(torch.isfinite(g).all()):
        raise FitError("steer2edit: a score is not finite; load the model in float32 or bfloat16")
    if rho <= 0:
        return torch.zeros_like(g)
    return g.sign() * (g.abs() - rho * alpha).clamp_min(0) / (rho * (1 - alpha))


def rank_one_edit(
    weight: Tensor,
    direction: Tensor,
    mean_input: Tensor,
    *,
    rho: float,
    alpha: float,
    head_width: int | None = None,
    no_reversal: bool = False,
) -> Tensor:
    """The gate of one matrix: its edited weight is `weight + outer(unit(direction), gate)`.

    Args:
        weight: [o, i], as in `y = weight @ x`.
        direction: [o], of any length; zeros edit nothing.
        mean_input: [i], what the matrix reads on average.
        rho: the penalty; 0 and below edit nothing.
        alpha: share of the penalty on the absolute value, from 0 to just under 1.
        head_width: columns that belong to one head; None edits single columns, an MLP's neurons.
        no_reversal: never suppress a component by more than it writes along the direction.

    Returns:
        [i], float32 (float64 where all three are).

    Raises:
        FitError: shapes that do not fit, values that are not finite, or alpha outside of [0, 1).
    """
    for name, tensor in (("weight", weight), ("direction", direction), ("mean_input", mean_input)):
        if not bool(torch.isfinite(tensor).all()):
            raise FitError(f"steer2edit: {name} is not finite; load the model in float32 or bfloat16")
    wide = torch.float64 if {weight.dtype, direction.dtype, mean_input.dtype} == {torch.float64} else torch.float32
    return score_components(
        weight.to(wide),
        direction.to(wide),
        mean_input.to(wide),
        rho=rho,
        alpha=alpha,
        head_width=head_width,
        no_reversal=no_reversal,
    ).gate


def score_components(
    weight: Tensor,
    direction: Tensor,
    mean_input: Tensor,
    *,
    rho: float,
    alpha: float,
    head_width: int | None = None,
    no_reversal: bool = False,
) -> Components:
    """Scores, magnitudes and input directions of the components of one matrix, in the precision of what is given.

    Args:
        weight: [o, i].
        direction: [o], in the dtype of `weight`.
        mean_input: [i], in the dtype of `weight`.
        rho: as for `elastic_net`.
        alpha: as for `elastic_net`.
        head_width: columns of one component; None takes 1.
        no_reversal: as for `rank_one_edit`.

    Raises:
        FitError: shapes that do not fit, a score that is not finite, or alpha outside of [0, 1).
    """
    width = 1 if head_width is None else head_width
    shapes = f"weight {list(weight.shape)}, direction {list(direction.shape)}, mean_input {list(mean_input.shape)}"
    if weight.dim() != 2 or [*direction.shape, *mean_input.shape] != list(weight.shape):
        raise FitError(f"steer2edit: got {shapes}; a weight [o, i] takes a direction [o] and a mean_input [i]")
    if width < 1 or weight.shape[1] % width:
        raise FitError(f"steer2edit: head_width {width} does not divide the {weight.shape[1]} columns of the weight")
    along = direction / (torch.linalg.vector_norm(direction) + 1e-12)  # a zero direction stays zero
    columns, means = weight.reshape(len(weight), -1, width), mean_input.reshape(-1, width)
    written = torch.bmm(columns.transpose(0, 1), means[..., None])[..., 0]  # [a, o]
    score = cosine_similarity(written, along[None], dim=1, eps=_FLOOR)
    reads = (weight.T @ along).reshape(-1, width)
    size = torch.linalg.vector_norm(reads, dim=1)
    magnitude = elastic_net(score, rho, alpha) * (size > 0)
    if no_reversal:
        magnitude = torch.maximum(magnitude, -size)
    return Components(score, magnitude, reads / size.where(size > 0, torch.ones_like(size))[:, None])


def add_in_order(weight: Tensor, direction: Tensor, inputs: Tensor, magnitude: Tensor) -> Tensor:
    """Add a rank-1 edit in the order of the released code: outer product, times magnitude, sum; each is rounded.

    Args:
        weight: [o, i], in the precision in which all is computed.
        direction: [o], of length 1.
        inputs: [a, w], of length 1.
        magnitude: [a]; components at 0 keep every bit.

    Returns:
        [o, i] in the dtype of `weight`.
    """
    outer = direction.to(weight)[:, None] * inputs.to(weight).flatten()
    factor = magnitude.to(weight).repeat_interleave(inputs.shape[1])
    return torch.where(factor != 0, weight + outer * factor, weight)


class _RoundedMeans(Means):
    """Means of rows that are rounded to bfloat16, and are themselves."""

    def update(self, positive: Tensor, negative: Tensor) -> None:
        """As `Means.update`.

        Args:
            positive: [k, d] float32.
            negative: [l, d] float32.
        """
        super().update(positive.bfloat16().float(), negative.bfloat16().float())

    def result(self) -> tuple[Tensor, Tensor]:
        """As `Means.result`.

        Raises:
            FitError: one side has no rows.
        """
        positive, negative = super().result()
        return positive.bfloat16().float(), negative.bfloat16().float()


@dataclass(frozen=True)
class Steer2Edit(Method):
    """Change the heads and neurons that write along, or against, the difference between two sides.

    The vector edits exactly the weights it was fitted on and refuses others. `steerkit.edited` (or `bake`) puts it into
    the weights; `steer` does the same with hooks. Strength 1 is the edit, 0 the model as it was.

    Example:
        >>> weight, direction, mean = torch.eye(2), torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> rank_one_edit(weight, direction, mean, rho=0.5, alpha=0.5)
        tensor([3., 0.])
    """

    name: ClassVar[str] = "steer2edit"
    title: ClassVar[str] = "Steer2Edit"
    paper: ClassVar[str] = "Sun et al. 2026, arXiv 2602.09870"
    readout: ClassVar[str | None] = "response_mean"
    scope: ClassVar[str] = "all"
    reads_input: ClassVar[bool] = True
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)

    rho_attn: float = 0.2
    """Penalty on changing heads: smaller edits more of them, and each more. 0 leaves attention alone."""
    rho_mlp: float = 0.4
    """Penalty on changing neurons. 0 leaves the MLPs alone."""
    alpha: float = 0.8
    """Share of the penalty on absolute values, 0 to just under 1: higher leaves more components alone."""
    no_reversal: bool = False
    """Suppress a component at the most until it writes nothing along the direction (at strength 1)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What means, scores and magnitudes are computed in and weights rounded to; `bfloat16` is the released code's."""

    def __post_init__(self) -> None:
        _check_penalty("rho_attn", self.rho_attn, self.alpha)
        _check_penalty("rho_mlp", self.rho_mlp, self.alpha)
        if self.rho_attn <= 0 and self.rho_mlp <= 0:
            raise FitError("steer2edit: rho_attn and rho_mlp are both 0, which edits nothing; give one of them")
        if self.precision not in ("float32", "bfloat16"):
            raise FitError(f"steer2edit: precision {self.precision!r} is neither float32 nor bfloat16")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "rank_one"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _rho(self, site: Site) -> float:
        return self.rho_mlp if site.kind.startswith("mlp") else self.rho_attn

    def sites(self, decoder: Decoder) -> list[Site]:
        """All blocks, as far as one linear layer, or routed experts, write there.

        Args:
            decoder: the model's decoder.
        """
        return self.sites_at(decoder, range(decoder.num_layers))

    def sites_at(self, decoder: Decoder, layers: Sequence[int]) -> list[Site]:
        """What the last linear layers of chosen blocks read and write, and where routed experts write.

        Halves without either are left out.

        Args:
            decoder: the model's decoder.
            layers: blocks counted from 0.

        Raises:
            SiteError: no block has such layers or experts; the reason is the first one's.
        """
        found: list[Site] = []
        reasons: list[SiteError] = []
        for layer, anatomy in anatomies(decoder, set(layers)).items():
            for kind in ("mixer_out" if anatomy.recurrent else "attn_raw", "mlp_raw"):
                if self._rho(Site(layer, kind)) <= 0:
                    continue
                try:
                    experts = experts_at(decoder, anatomy, Site(layer, kind))
                    if experts is not None:
                        found.append(experts.tap.site)
                        continue
                    read, written = anatomy.writer(kind)
                    _head_width(decoder, Site(layer, written.kind), read.width)
                except SiteError as error:
                    reasons.append(error)
                    continue
                found += [Site(layer, read.kind), Site(layer, written.kind)]
        if not found:
            reason = reasons[0] if reasons else "no layer was given"
            raise SiteError(f"steer2edit: no one linear layer writes in the blocks chosen ({reason})")
        return found

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, as in the paper, and the middle half of them.

        Args:
            num_layers: of the model.
        """
        middle = range(num_layers // 4, num_layers - num_layers // 4)
        return list(dict.fromkeys((tuple(range(num_layers)), tuple(middle))))

    def statistics(self, site: Site) -> Means:
        """Two running means; no activation is kept.

        Args:
            site: where they accumulate.
        """
        return _RoundedMeans() if self.precision == "bfloat16" else Means()

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Score every head and neuron and find by how much each is changed.

        Args:
            acts: activations of both sides at every site.
            subject: gives the weights, and what routed experts read.
            sites: what linear layers read and write: z beside attn_out, mlp_post beside mlp_out; where routed experts
                write, mlp_out alone.

        Returns:
            For each site with an edit ``"<site>/direction"`` [o] of length 1, ``"<site>/gate"`` [i] and
            ``"<site>/magnitude"`` [a]. Of routed experts gate and magnitude are [e, i], with ``"<site>/tokens"`` [2, e]
            the share of each side's tokens that went to each; ``"<site>/shared_gate"`` and
            ``"<site>/shared_magnitude"`` [j] are those of a shared expert.

        Raises:
            FitError: a site lacks its partner, an activation is not finite, or no component is edited.
        """
        assert acts is not None
        pairs = _pairs(sites)
        routed = subject.experts([site for read, site in pairs if read not in sites], acts.readout)
        tensors: dict[str, Tensor] = {}
        largest: dict[str, float] = {}
        for read, site in pairs:
            if read not in sites and site not in routed:
                raise FitError(f"steer2edit: {site} needs {read} beside it; give both, or choose layers instead")
            try:
                direction = self._direction(acts, site)
                if site in routed:
                    score, found = self._experts(routed[site], direction, site)
                else:
                    score, found = self._linear(acts, subject, read, site, direction)
            except FitError as error:
                raise FitError(f"{error} ({site})") from None
            if not bool(direction.any()):
                continue
            block = "rho_mlp" if site.kind.startswith("mlp") else "rho_attn"
            largest[block] = max(largest.get(block, 0.0), score)
            if any(bool(value.any()) for name, value in found.items() if name.endswith("magnitude")):
                found["direction"] = direction / torch.linalg.vector_norm(direction)
                tensors.update({f"{site}/{name}": value.float() for name, value in found.items()})
        if not tensors:
            raise FitError(self._nothing(largest))
        return tensors

    def _direction(self, acts: Activations, site: Site) -> Tensor:
        """The difference of the sides at a site; zero where they do not differ."""
        positive, negative = self._means(acts.positive[site], acts.negative[site])
        try:
            mean_difference(positive[None], negative[None])
        except FitError:
            return torch.zeros_like(positive)
        return positive - negative

    def _means(self, positive: Tensor, negative: Tensor) -> list[Tensor]:
        """The means of both sides, in the method's precision.

        Raises:
            FitError: one is not finite.
        """
        means = [side.to(self._dtype).mean(dim=0) for side in (positive, negative)]
        if not all(bool(torch.isfinite(mean).all()) for mean in means):
            raise FitError("steer2edit: activations are not finite; load the model in float32 or bfloat16")
        return means

    def _linear(
        self, acts: Activations, subject: Subject, read: Site, site: Site, direction: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        """The largest |score| of the components of one linear layer, and its gate and magnitudes."""
        means = self._means(acts.positive[read], acts.negative[read])
        parts = self._score(
            subject.weight(site), direction, means, site, _head_width(subject.decoder, site, len(means[0]))
        )
        return float(parts.score.abs().max()), {"gate": parts.gate, "magnitude": parts.magnitude}

    def _experts(self, means: ExpertMeans, direction: Tensor, site: Site) -> tuple[float, dict[str, Tensor]]:
        """The same of routed experts, one after the other, and of the one that all tokens share."""
        gate, magnitude = (torch.zeros_like(means.inputs[0]) for _ in range(2))
        largest = 0.0
        for expert in (means.tokens > 0).all(dim=0).nonzero().flatten().tolist():
            inputs = self._means(means.inputs[0, expert, None], means.inputs[1, expert, None])
            parts = self._score(means.experts.weight(expert), direction, inputs, site)
            gate[expert], magnitude[expert] = parts.gate, parts.magnitude
            largest = max(largest, float(parts.score.abs().max()))
        found = {"gate": gate, "magnitude": magnitude, "tokens": means.tokens}
        if means.shared is not None:
            inputs = self._means(means.shared[:1], means.shared[1:])
            parts = self._score(means.experts.shared_weight(), direction, inputs, site)
            found.update(shared_gate=parts.gate, shared_magnitude=parts.magnitude)
            largest = max(largest, float(parts.score.abs().max()))
        return largest, found

    def _score(
        self, weight: Tensor, direction: Tensor, means: Sequence[Tensor], site: Site, head_width: int | None = None
    ) -> Components:
        """The components of one matrix, in the method's precision, from the mean inputs of both sides."""
        return score_components(
            weight.to(self._dtype),
            direction,
            0.5 * (means[0] + means[1]),
            rho=self._rho(site),
            alpha=self.alpha,
            head_width=head_width,
            no_reversal=self.no_reversal,
        )

    def _nothing(self, largest: Mapping[str, float]) -> str:
        """Why nothing is edited, in numbers."""
        if not largest:
            return "steer2edit: at no site do the two sides differ, so there is no direction to edit along"
        said = ", ".join(
            f"the largest |score| is {score:.3g} where {block} * alpha = {getattr(self, block) * self.alpha:.3g}"
            for block, score in largest.items()
        )
        return f"steer2edit: no component passes its threshold ({said}); lower rho or alpha"

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The sites with an edit.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: unused.
        """
        return [site for site in sites if f"{site}/gate" in tensors]

    def extra(self, subject: Subject, sites: Sequence[Site]) -> dict[str, Any]:
        """The digests of the weights that the edit belongs to.

        Args:
            subject: gives them.
            sites: where it is applied.
        """
        return {"weights": subject.weight_digests(sites)}

    def check(self, site: Site, params: Params) -> None:
        """A direction [o], and for every matrix a gate [i] and a magnitude for each of its components.

        Raises:
            VectorMismatchError: one is missing or has another shape, or no linear layer writes at the site.
        """
        check_direction(f"{site}: steer2edit writes one direction of shape (width,)", params, dims=1)
        shapes = [tuple(params[name].shape) if name in params else None for name in ("gate", "magnitude")]
        fits = site.kind in _WRITTEN and all(map(_fits, _parts(params)))
        if not fits:
            raise VectorMismatchError(
                f"{site}: steer2edit needs a gate (inputs,) and a magnitude for each component of it, at a site that a "
                f"linear layer writes; the vector has {shapes[0]} and {shapes[1]}"
            )

    def expert_gates(self, params: Params) -> tuple[Tensor, Tensor | None]:
        """The gates of routed experts and of a shared one.

        Raises:
            SiteError: the vector was fitted on a model without experts.
        """
        if params["gate"].dim() != 2:
            raise SiteError("steer2edit: the vector holds no gates of experts; fit one on this model")
        return params["gate"], params.get("shared_gate")

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Both factors, rounded once, and the strength. Of experts the input is what the gates have found already."""
        gate = params["gate"] if params["gate"].dim() == 1 else torch.ones(1)
        return {
            "direction": params["direction"].to(device, dtype),
            "gate": gate.to(device, dtype),
            "strength": strength,
        }

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * direction (gate . input)`."""
        return edits.add_gated(h, prepared["input"], prepared["gate"], prepared["direction"], prepared["strength"])

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """Random directions, and in every edited component a random input direction of the same length.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        tensors = dict(vector.tensors)
        for site in vector.sites:
            params = vector.params(site)
            tensors[f"{site}/direction"] = random_direction(params["direction"], generator)
            for part in _parts(params):
                gates = part.gate.reshape(part.magnitude.numel(), -1).clone()
                for row in part.magnitude.flatten().nonzero().flatten().tolist():
                    gates[row] = random_direction(gates[row], generator)
                tensors[f"{site}/{part.prefix}gate"] = gates.reshape(part.gate.shape)
        return replace(vector, tensors=tensors)

    def table(self, vector: SteeringVector) -> Listing:
        """Every edited head, and the neurons of every layer by what is done to them, the largest change first.

        Args:
            vector: what this method fitted.
        """
        rows: list[tuple[str | int | float, ...]] = []
        counts, idle = {"head": 0, "neuron": 0}, 0
        for site in vector.sites:
            params = vector.params(site)
            is_mlp = site.kind.startswith("mlp")
            idle += int((params["tokens"] == 0).any(dim=0).sum()) if "tokens" in params else 0
            for part in _parts(params):
                counts["neuron" if is_mlp else "head"] += int(part.magnitude.count_nonzero())
                rows += _neurons(site, part) if is_mlp else _heads(site, part.magnitude)
        title = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count)
        note = "gate: length of its part of the gate at strength 1. reinforce: it writes along the direction already"
        if idle:
            note += f". {idle} expert{'' if idle == 1 else 's'} left alone: no token of one side was routed there"
        return Listing(
            f"{title} edited",
            ("layer", "block", "edited", "gate", "what"),
            sorted(rows, key=lambda row: -float(row[3])),
            note,
        )

    def maps(self, vector: SteeringVector) -> list[Map]:
        """Heads in their order; neurons of each layer from the most reinforced to the most suppressed one.

        Args:
            vector: what this method fitted.
        """
        heads: dict[int, list[float]] = {}
        neurons: dict[int, list[float]] = {}
        for site in vector.sites:
            magnitude = torch.cat([part.magnitude.flatten() for part in _parts(vector.params(site))])
            if site.kind.startswith("mlp"):
                neurons[site.layer] = magnitude[magnitude != 0].sort(descending=True).values.tolist()
            else:
                heads[site.layer] = magnitude.tolist()
        words = "reinforce", "suppress"
        maps = [Map("heads", "head", heads, *words)] if heads else []
        return maps + ([Map("neurons", "rank among the edited neurons", neurons, *words)] if neurons else [])

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The rank-1 change of every edited matrix, each expert's by itself; of the matrix inside an adapter around it.

        Raises:
            SiteError: neither one linear layer nor routed experts write at a site, or an adapter does more than add.
        """
        updates = []
        for site, writer in writers_at(model, vector.sites).items() if strength else ():
            params = vector.params(site)
            if isinstance(writer, Experts):
                self.expert_gates(params)
                layouts = [down.transposed for down in (writer.stack, writer.shared) if down is not None]
            elif not writer.additive:
                raise SiteError(f"{site}: an adapter around {writer.parameter} rescales what it gives; merge it first")
            else:
                layouts = [writer.transposed]
            parts = _parts(params)
            if len(parts) != len(layouts):
                raise SiteError(f"{site}: {len(layouts)} matrices write there and the vector edits {len(parts)}")
            for name, transposed, part in zip(writer.parameters, layouts, parts, strict=True):
                updates.append(WeightUpdate(name, self._update(params["direction"], part, strength, transposed)))
        return updates

    def _update(
        self, direction: Tensor, part: _Part, strength: float, transposed: bool
    ) -> Callable[[Tensor | None], Tensor]:
        """From the old weight to the new one, as it is stored: one matrix, or a stack of them."""
        gate, magnitude = part.gate, part.magnitude

        def update(old: Tensor | None) -> Tensor:
            assert old is not None
            weight = old.mT if transposed else old
            if self.precision == "float32":
                rows = gate.to(old.device)[..., None, :]
                edited = weight + (strength * direction).to(old.device)[:, None] * rows
            else:
                parts = gate.reshape(*magnitude.shape, -1)
                inputs = torch.where(magnitude[..., None] != 0, parts / magnitude[..., None], torch.zeros_like(parts))
                edited = weight.bfloat16()
                for expert in range(len(gate)) if gate.dim() == 2 else (...,):
                    one = edited[expert], direction, inputs[expert], strength * magnitude[expert]
                    edited[expert] = add_in_order(*one)
                edited = edited.float()
            return edited.mT if transposed else edited

        return update


class _Part(NamedTuple):
    """What a vector holds of one matrix, or one stack of them, at a site.

    Attributes:
        prefix: of the names of its tensors.
        gate: [i] or [e, i].
        magnitude: [a] or [e, i].
    """

    prefix: str
    gate: Tensor
    magnitude: Tensor


def _parts(params: Params) -> list[_Part]:
    """The matrices that a vector edits at a site: the one there, or routed experts and a shared one."""
    empty = torch.empty(0)
    prefixes = [prefix for prefix in ("", "shared_") if not prefix or f"{prefix}gate" in params]
    return [
        _Part(prefix, params.get(f"{prefix}gate", empty), params.get(f"{prefix}magnitude", empty))
        for prefix in prefixes
    ]


def _fits(part: _Part) -> bool:
    """Whether a gate has a magnitude for each of its components."""
    gate, magnitude = part.gate, part.magnitude
    if gate.dim() == 2:
        return not part.prefix and gate.numel() > 0 and gate.shape == magnitude.shape
    return (
        gate.dim() == magnitude.dim() == 1 and len(magnitude) > 0 and len(gate) > 0 and not len(gate) % len(magnitude)
    )


def _heads(site: Site, magnitude: Tensor) -> list[tuple[str | int | float, ...]]:
    """The rows of a table that tell of one block's heads."""
    return [
        (site.layer, site.kind.partition("_")[0], f"head {head}", abs(size), "reinforce" if size > 0 else "suppress")
        for head, size in enumerate(magnitude.tolist())
        if size
    ]


def _neurons(site: Site, part: _Part) -> list[tuple[str | int | float, ...]]:
    """The rows of a table that tell of one block's neurons, or of those of its experts."""
    rows: list[tuple[str | int | float, ...]] = []
    for does, chosen in (("reinforce", part.magnitude > 0), ("suppress", part.magnitude < 0)):
        count = int(chosen.count_nonzero())
        if not count:
            continue
        where = "of the shared expert" if part.prefix else ""
        if chosen.dim() == 2:
            experts = int(chosen.any(dim=1).count_nonzero())
            where = f"of {experts} expert{'' if experts == 1 else 's'}"
        what = f"{count} neuron{'' if count == 1 else 's'} {where}".rstrip()
        size = float(torch.linalg.vector_norm(part.magnitude[chosen]))
        rows.append((site.layer, site.kind.partition("_")[0], what, size, does))
    return rows


def _check_penalty(name: str, rho: float, alpha: float) -> None:
    """Refuse a penalty that is none.

    Raises:
        FitError: rho is not finite, or alpha is outside of [0, 1).
    """
    if not math.isfinite(rho):
        raise FitError(f"steer2edit: {name} {rho!r} is not a finite number; give 0 to leave that block alone")
    if not 0 <= alpha < 1:
        raise FitError(f"steer2edit: alpha {alpha!r} is outside of 0 <= alpha < 1")


def _pairs(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """Each written site behind the one that its linear layer reads; experts have none of those.

    Raises:
        FitError: no site is written, or one is of another kind.
    """
    pairs = []
    for site in sites:
        if site.kind in _WRITTEN:
            pairs.append((Site(site.layer, "mlp_post" if site.kind.startswith("mlp") else "z"), site))
        elif site.kind not in ("z", "mlp_post"):
            raise FitError(f"steer2edit: {site} is not what a linear layer reads or writes; choose layers instead")
    if not pairs:
        raise FitError("steer2edit: no site is written, only read; choose layers instead")
    return pairs


def _head_width(decoder: Decoder, site: Site, inputs: int) -> int | None:
    """Columns of one head; None for an MLP.

    Raises:
        SiteError: the config tells no number of heads that fits.
    """
    if site.kind.startswith("mlp"):
        return None
    config = decoder.model.config.get_text_config()
    name = "linear_num_value_heads" if site.kind == "mixer_out" else "num_attention_heads"
    heads = getattr(config, name, None)
    if not isinstance(heads, int) or heads < 1 or inputs % heads:
        raise SiteError(f"{site}: the config's {name} is {heads!r}, which does not part {inputs} inputs into heads")
    return inputs // heads
