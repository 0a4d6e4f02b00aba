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
It lets alpha = 1, empty answers and values that are not finite through; here they are refused. It draws the gates of
neurons, whose sign is that of the mean input, as if it meant reinforcing or suppressing; here tables and pictures show
the magnitude, whose sign means that. Scores leave a neuron's activity out by design: one that is nearly always silent
scores like a busy one. Where a norm follows the layer (Gemma 2 and 3, OLMo 2), activations are read and weights changed
before it. Heads are query heads, or value heads of linear attention. Of routed experts, which the released code lacks,
each neuron of each routed expert is a component, v is what all of them write together, and m is the mean over the
tokens that were routed to that expert, on either side. Router weights enter none of it: a weight is a positive factor
of what an expert writes, and g does not see it. An expert to which no token of one side was routed has no m and is left
alone. A shared expert beside them is an ordinary MLP. As a hook, the experts run a second time to find what their gates
say, since no module gives what they read; in the weights there is nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.moments import Means
from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.directions import mean_difference
from steerkit.maths.rank_one import check_penalty, score_components
from steerkit.methods._base import Method
from steerkit.methods._protocols import HeatMap, Params, PartsTable, Prepared, WeightUpdate
from steerkit.methods._steer2edit_parts import (
    TENSORS,
    WRITTEN,
    RoundedMeans,
    WriterInput,
    expert_gates,
    fits_width,
    head_width_of,
    matrix_edits,
    nothing_edited,
    parts_of,
    random_edit,
    read_and_written,
)
from steerkit.methods._steer2edit_tables import edited_parts, magnitude_maps
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.experts import experts_at
from steerkit.network.linears import writers_at
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.activations.expert_activations import ExpertMeans
    from steerkit.maths.rank_one import Components

__all__ = ["Steer2Edit"]


@dataclass(frozen=True)
class Steer2Edit(Method):
    """Change the heads and neurons that write along, or against, the difference between two sides.

    The vector edits exactly the weights it was fitted on and refuses others. `steerkit.edited` (or `bake`) puts it into
    the weights; `steer` does the same with hooks. Strength 1 is the edit, 0 the model as it was.

    Example:
        >>> import torch
        >>> from steerkit.maths.rank_one import rank_one_edit
        >>> rank_one_edit(torch.eye(2), torch.tensor([2.0, 0.0]), torch.ones(2), rho=0.5, alpha=0.5)
        tensor([3., 0.])
    """

    name: ClassVar[str] = "steer2edit"
    title: ClassVar[str] = "Steer2Edit"
    paper: ClassVar[str] = "Sun et al. 2026, arXiv 2602.09870"
    readout: ClassVar[str | None] = "response_mean"
    scope: ClassVar[str] = "all"
    params: ClassVar[Mapping[str, str]] = {"direction": "o"}
    also: ClassVar[Mapping[str, str]] = TENSORS
    default_strength: ClassVar[float | None] = 1.0
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
        super().__post_init__()
        check_penalty("rho_attn", self.rho_attn, self.alpha)
        check_penalty("rho_mlp", self.rho_mlp, self.alpha)
        if self.rho_attn <= 0 and self.rho_mlp <= 0:
            raise FitError("steer2edit: rho_attn and rho_mlp are both 0, which edits nothing; give one of them")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "rank_one"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def _rho(self, site: Site) -> float:
        """The penalty at a site."""
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
        return RoundedMeans() if self.precision == "bfloat16" else Means()

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
        pairs = read_and_written(sites)
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
            raise FitError(nothing_edited({block: getattr(self, block) * self.alpha for block in largest}, largest))
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
        super().check(site, params)
        shapes = [tuple(params[name].shape) if name in params else None for name in ("gate", "magnitude")]
        if site.kind not in WRITTEN or not all(map(fits_width, parts_of(params))):
            raise VectorMismatchError(
                f"{site}: steer2edit needs a gate (inputs,) and a magnitude for each component of it, at a site that a "
                f"linear layer writes; the vector has {shapes[0]} and {shapes[1]}"
            )

    def inputs_at(self, model: nn.Module | Decoder, vector: SteeringVector) -> dict[Site, WriterInput]:
        """What the linear layer that writes at each site reads; of experts, what their gates find in it.

        Args:
            model: the model to be steered.
            vector: a vector of this method.

        Raises:
            SiteError: neither one linear layer nor routed experts write at a site.
        """
        writers = writers_at(model, vector.sites)
        return {site: WriterInput(writers[site], partial(expert_gates, vector.params(site))) for site in writers}

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Both factors, rounded once, and the strength. Of experts the input is what the gates have found already."""
        gate = params["gate"] if params["gate"].dim() == 1 else torch.ones(1, dtype=torch.float32)
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
        return random_edit(vector, generator)

    def table(self, vector: SteeringVector) -> PartsTable:
        """Every edited head, and the neurons of every layer by what is done to them, the largest change first."""
        return edited_parts(vector)

    def maps(self, vector: SteeringVector) -> list[HeatMap]:
        """Heads in their order; neurons of each layer from the most reinforced to the most suppressed one."""
        return magnitude_maps(vector)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The rank-1 change of every edited matrix, each expert's by itself; of the matrix inside an adapter around it.

        Raises:
            SiteError: neither one linear layer nor routed experts write at a site, or an adapter does more than add.
        """
        return matrix_edits(model, vector, strength, precision=self.precision)
