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
weights changed before it. Heads are query heads, or value heads of linear attention. Routed experts are left alone:
no module gives what each expert reads, so that their means over routed tokens cannot be had.
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
from steerkit.linears import linears_at
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
        """All blocks, as far as one linear layer writes there.

        Args:
            decoder: the model's decoder.
        """
        return self.sites_at(decoder, range(decoder.num_layers))

    def sites_at(self, decoder: Decoder, layers: Sequence[int]) -> list[Site]:
        """What the last linear layers of chosen blocks read and write; halves without one are left out.

        Args:
            decoder: the model's decoder.
            layers: blocks counted from 0.

        Raises:
            SiteError: no block has such a layer; the reason is the first one's.
        """
        found: list[Site] = []
        reasons: list[SiteError] = []
        for layer, anatomy in anatomies(decoder, set(layers)).items():
            for kind in ("mixer_out" if anatomy.recurrent else "attn_raw", "mlp_raw"):
                if self._rho(Site(layer, kind)) <= 0:
                    continue
                try:
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
            subject: gives the weights.
            sites: what linear layers read and write: z beside attn_out, mlp_post beside mlp_out.

        Returns:
            For each site with an edit ``"<site>/direction"`` [o] of length 1, ``"<site>/gate"`` [i] and
            ``"<site>/magnitude"`` [a].

        Raises:
            FitError: a site lacks its partner, an activation is not finite, or no component is edited.
        """
        assert acts is not None
        tensors: dict[str, Tensor] = {}
        largest: dict[str, float] = {}
        for read, site in _pairs(sites):
            try:
                found = self._components(acts, subject, read, site)
            except FitError as error:
                raise FitError(f"{error} ({site})") from None
            if found is None:
                continue
            direction, parts = found
            block = "rho_mlp" if site.kind.startswith("mlp") else "rho_attn"
            largest[block] = max(largest.get(block, 0.0), float(parts.score.abs().max()))
            if bool(parts.magnitude.any()):
                named = {"direction": direction, "gate": parts.gate, "magnitude": parts.magnitude}
                tensors.update({f"{site}/{name}": value.float() for name, value in named.items()})
        if not tensors:
            raise FitError(self._nothing(largest))
        return tensors

    def _components(
        self, acts: Activations, subject: Subject, read: Site, site: Site
    ) -> tuple[Tensor, Components] | None:
        """The direction at a site and the components that write there; None where the sides do not differ."""
        means = [
            [side[place].to(self._dtype).mean(dim=0) for side in (acts.positive, acts.negative)]
            for place in (site, read)
        ]
        if not all(bool(torch.isfinite(mean).all()) for pair in means for mean in pair):
            raise FitError("steer2edit: activations are not finite; load the model in float32 or bfloat16")
        (positive, negative), (positive_input, negative_input) = means
        try:
            mean_difference(positive[None], negative[None])
        except FitError:
            return None
        direction = positive - negative
        parts = score_components(
            subject.weight(site).to(self._dtype),
            direction,
            0.5 * (positive_input + negative_input),
            rho=self._rho(site),
            alpha=self.alpha,
            head_width=_head_width(subject.decoder, site, len(positive_input)),
            no_reversal=self.no_reversal,
        )
        return direction / torch.linalg.vector_norm(direction), parts

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
        """A direction [o], a gate [i] and a magnitude for each of its components.

        Raises:
            VectorMismatchError: one is missing or has another shape, or no linear layer writes at the site.
        """
        check_direction(f"{site}: steer2edit writes one direction of shape (width,)", params, dims=1)
        gate, magnitude = params.get("gate"), params.get("magnitude")
        shapes = [None if one is None else tuple(one.shape) for one in (gate, magnitude)]
        fits = gate is not None and magnitude is not None and gate.dim() == magnitude.dim() == 1
        if not fits or len(gate) % len(magnitude) or site.kind not in _WRITTEN:  # type: ignore[arg-type]
            raise VectorMismatchError(
                f"{site}: steer2edit needs a gate (inputs,) and a magnitude for each component of it, at a site that a "
                f"linear layer writes; the vector has {shapes[0]} and {shapes[1]}"
            )

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Both factors, rounded once, and the strength."""
        return {
            "direction": params["direction"].to(device, dtype),
            "gate": params["gate"].to(device, dtype),
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
            gates = params["gate"].reshape(len(params["magnitude"]), -1).clone()
            for row in params["magnitude"].nonzero().flatten().tolist():
                gates[row] = random_direction(gates[row], generator)
            tensors[f"{site}/gate"] = gates.flatten()
        return replace(vector, tensors=tensors)

    def table(self, vector: SteeringVector) -> Listing:
        """Every edited head, and the neurons of every layer by what is done to them, the largest change first.

        Args:
            vector: what this method fitted.
        """
        rows: list[tuple[str | int | float, ...]] = []
        counts = {"head": 0, "neuron": 0}
        for site in vector.sites:
            magnitude = vector.params(site)["magnitude"]
            block, is_mlp = site.kind.partition("_")[0], site.kind.startswith("mlp")
            counts["neuron" if is_mlp else "head"] += int(magnitude.count_nonzero())
            for does, chosen in (("reinforce", magnitude > 0), ("suppress", magnitude < 0)):
                numbers = chosen.nonzero().flatten().tolist()
                if is_mlp and numbers:
                    plural = "s" if len(numbers) > 1 else ""
                    size = float(torch.linalg.vector_norm(magnitude[chosen]))
                    rows.append((site.layer, block, f"{len(numbers)} neuron{plural}", size, does))
                elif not is_mlp:
                    heads = [(head, abs(float(magnitude[head]))) for head in numbers]
                    rows += [(site.layer, block, f"head {head}", size, does) for head, size in heads]
        title = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count)
        return Listing(
            f"{title} edited",
            ("layer", "block", "edited", "gate", "what"),
            sorted(rows, key=lambda row: -float(row[3])),
            "gate: length of its part of the gate at strength 1. reinforce: it writes along the direction already",
        )

    def maps(self, vector: SteeringVector) -> list[Map]:
        """Heads in their order; neurons of each layer from the most reinforced to the most suppressed one.

        Args:
            vector: what this method fitted.
        """
        heads: dict[int, list[float]] = {}
        neurons: dict[int, list[float]] = {}
        for site in vector.sites:
            magnitude = vector.params(site)["magnitude"]
            if site.kind.startswith("mlp"):
                neurons[site.layer] = magnitude[magnitude != 0].sort(descending=True).values.tolist()
            else:
                heads[site.layer] = magnitude.tolist()
        words = "reinforce", "suppress"
        maps = [Map("heads", "head", heads, *words)] if heads else []
        return maps + ([Map("neurons", "rank among the edited neurons", neurons, *words)] if neurons else [])

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The rank-1 change of every edited matrix; of the matrix inside, where an adapter adds to it.

        Raises:
            SiteError: the model has no one linear layer at a site, or an adapter does more than add to it.
        """
        updates = []
        for site, linear in linears_at(model, vector.sites).items() if strength else ():
            if not linear.additive:
                raise SiteError(f"{site}: an adapter around {linear.parameter} rescales what it gives; merge it first")
            update = self._update(vector.params(site), strength, linear.transposed)
            updates.append(WeightUpdate(linear.parameter, update))
        return updates

    def _update(self, params: Params, strength: float, transposed: bool) -> Callable[[Tensor | None], Tensor]:
        """From the old weight to the new one, as it is stored."""
        direction, gate, magnitude = params["direction"], params["gate"], params["magnitude"]

        def update(old: Tensor | None) -> Tensor:
            assert old is not None
            weight = old.T if transposed else old
            if self.precision == "float32":
                edited = weight + torch.outer((strength * direction).to(old.device), gate.to(old.device))
            else:
                parts = gate.reshape(len(magnitude), -1)
                inputs = torch.where(magnitude[:, None] != 0, parts / magnitude[:, None], torch.zeros_like(parts))
                edited = add_in_order(weight.bfloat16(), direction, inputs, strength * magnitude).float()
            return edited.T if transposed else edited

        return update


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
    """Each written site behind the one that its linear layer reads.

    Raises:
        FitError: a site lacks its partner, or is of another kind.
    """
    pairs = []
    for site in sites:
        if site.kind in _WRITTEN:
            read = Site(site.layer, "mlp_post" if site.kind.startswith("mlp") else "z")
            if read not in sites:
                raise FitError(f"steer2edit: {site} needs {read} beside it; give both, or choose layers instead")
            pairs.append((read, site))
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
