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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.expert_activations import ExpertMeans
from steerkit.activations.moments import Means
from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.directions import mean_difference, random_direction
from steerkit.maths.rank_one import add_in_order, check_penalty, score_components
from steerkit.methods._base import Method, check_direction
from steerkit.methods._parts import fits_width, head_width_of, head_widths, neuron_width, parts_of
from steerkit.methods._protocols import HeatMap, Params, PartsTable, Prepared, Subject, WeightUpdate
from steerkit.network.decoder import Decoder
from steerkit.network.experts import Experts, experts_at
from steerkit.network.linears import writers_at
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.maths.rank_one import Components
    from steerkit.methods._parts import MatrixPart

__all__ = ["Steer2Edit"]

_WRITTEN = ("attn_out", "attn_raw", "mixer_out", "mlp_out", "mlp_raw")


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
        check_penalty("rho_attn", self.rho_attn, self.alpha)
        check_penalty("rho_mlp", self.rho_mlp, self.alpha)
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
                    head_width_of(decoder, Site(layer, written.kind), read.width)
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
            subject.weight(site), direction, means, site, head_width_of(subject.decoder, site, len(means[0]))
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
        fits = site.kind in _WRITTEN and all(map(fits_width, parts_of(params)))
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
            for part in parts_of(params):
                gates = part.gate.reshape(part.magnitude.numel(), -1).clone()
                for row in part.magnitude.flatten().nonzero().flatten().tolist():
                    gates[row] = random_direction(gates[row], generator)
                tensors[f"{site}/{part.prefix}gate"] = gates.reshape(part.gate.shape)
        return replace(vector, tensors=tensors)

    def table(self, vector: SteeringVector) -> PartsTable:
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
            for part in parts_of(params):
                counts["neuron" if is_mlp else "head"] += int(part.magnitude.count_nonzero())
                rows += neuron_width(site, part) if is_mlp else head_widths(site, part.magnitude)
        title = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items() if count)
        note = "gate: length of its part of the gate at strength 1. reinforce: it writes along the direction already"
        if idle:
            note += f". {idle} expert{'' if idle == 1 else 's'} left alone: no token of one side was routed there"
        return PartsTable(
            f"{title} edited",
            ("layer", "block", "edited", "gate", "what"),
            sorted(rows, key=lambda row: -float(row[3])),
            note,
        )

    def maps(self, vector: SteeringVector) -> list[HeatMap]:
        """Heads in their order; neurons of each layer from the most reinforced to the most suppressed one.

        Args:
            vector: what this method fitted.
        """
        heads: dict[int, list[float]] = {}
        neurons: dict[int, list[float]] = {}
        for site in vector.sites:
            magnitude = torch.cat([part.magnitude.flatten() for part in parts_of(vector.params(site))])
            if site.kind.startswith("mlp"):
                neurons[site.layer] = magnitude[magnitude != 0].sort(descending=True).values.tolist()
            else:
                heads[site.layer] = magnitude.tolist()
        words = "reinforce", "suppress"
        maps = [HeatMap("heads", "head", heads, *words)] if heads else []
        return maps + ([HeatMap("neurons", "rank among the edited neurons", neurons, *words)] if neurons else [])

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
            parts = parts_of(params)
            if len(parts) != len(layouts):
                raise SiteError(f"{site}: {len(layouts)} matrices write there and the vector edits {len(parts)}")
            for name, transposed, part in zip(writer.parameters, layouts, parts, strict=True):
                updates.append(WeightUpdate(name, self._update(params["direction"], part, strength, transposed)))
        return updates

    def _update(
        self, direction: Tensor, part: MatrixPart, strength: float, transposed: bool
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
