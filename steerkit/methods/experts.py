"""Mixture of Tunable Experts: switch off, or on, the routed experts that one side of the data uses more often.

    R = share of the positive side's tokens that were routed to an expert - share of the negative side's
    the `count` experts of largest |R| over all layers: R < 0 is dropped, R > 0 is forced

    drop:     w_e = 0, what the others of the token have is scaled to the sum of before
    scale:    w_e = factor * w_e, likewise
    replace:  the expert is struck before the router takes the largest scores, so another one takes its slot
    force:    a token without the expert gets it in its smallest slot, with the mean of its weights, likewise
    steermoe: both before the router chooses: a forced expert's score is put .01 above the largest of its token, a
              dropped one's .01 below the smallest

    w' = (1 - strength) w + strength * what the operation gives

Robert Dahlke, Henrik Klagges, Dan Zecha, Benjamin Merkel, Sven Rohr, Fabian Klemm (2025), "Mixture of Tunable Experts -
Behavior Modification of DeepSeek-R1 at Inference Time", arXiv 2502.11096. The operation `steermoe`: Mohsen Fayyaz, Ali
Modarressi, Hanieh Deilamsalehy, Franck Dernoncourt, Ryan Rossi, Trung Bui, Hinrich Schuetze, Nanyun Peng (2025),
"Steering MoE LLMs via Expert (De)Activation", arXiv 2509.09660.

Where this file departs. Nothing of the first paper's code is public; counts and a plain difference are what two
summaries of it agree on. It adds counts up over the tokens of the prompt; here they are shares, so that a long text
counts like a short one, and are read at all tokens but the first (`readout="prompt_share"` reads the prompt alone,
`"response_share"` the answer, as SteerMoE does, `"mean"` weighs by how loud the expert was). It switches off what its
behaviour uses more; here the positive side is where one wants to go, so what the negative side uses more is switched
off. How large |R| may be by chance is measured on shuffled labels, and stored: with thousands of experts some differ.
At strengths between 0 and 1 an expert that comes in has its slot at once, with a smaller weight. SteerMoE forces at
most as many experts of a layer as a token gets; here so do all operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from steerkit.activations.recording import Activations
from steerkit.errors import FitError, SiteError, StrengthError, VectorMismatchError
from steerkit.maths.expert_weights import between, with_forced, with_sum
from steerkit.methods._base import Method, whole_and_thirds
from steerkit.methods._expert_asking import AskedRouter, routers_at, with_priority, without
from steerkit.methods._expert_choice import (
    Limits,
    chance_relevance,
    chosen_experts,
    experts_table,
    matched_actions,
    tokens_seen,
)
from steerkit.methods._protocols import Params, PartsTable, Prepared, WeightUpdate
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.experts import experts_at
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies, sites_of_kind
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Experts"]

_LOOKED_AT = 16  # texts of a side in which tokens are counted that lose every expert


@dataclass(frozen=True)
class Experts(Method):
    """Drop the routed experts that the negative side uses more, force those of the positive side.

    Strength 1 is the whole operation, 0 the identity; one above 1 acts as 1, a negative one leads the other way.
    Fit it at all layers, which is the default: it chooses where it acts.
    """

    name: ClassVar[str] = "experts"
    title: ClassVar[str] = "Mixture of Tunable Experts: routed experts off and on"
    paper: ClassVar[str] = "Dahlke et al. 2025, arXiv 2502.11096"
    params: ClassVar[Mapping[str, str]] = {"action": "int64 e", "relevance": "e", "seen": "e", "slots": "int64"}
    also: ClassVar[Mapping[str, str]] = {"null": "", "silenced": ""}
    readout: ClassVar[str | None] = "share"
    scope: ClassVar[str] = "all"
    default_strength: ClassVar[float | None] = 1.0
    strength_unit: ClassVar[str] = "share"
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

    op: Literal["drop", "scale", "replace", "steermoe"] = "drop"
    """What is done to a dropped expert: see the operations above; `steermoe` also forces in its own way."""
    side: Literal["both", "negative", "positive"] = "both"
    """Whose experts: the negative side's are dropped, the positive side's are forced."""
    count: int = 10
    """How many experts, in all layers together."""
    factor: float = 0.0
    """What `scale` multiplies a weight with."""
    renormalise: bool = True
    """Keep the sum of each token's weights. Without it the others stay as they are, which weights can do as well."""
    shuffles: int = 1000
    """Draws of shuffled labels that say how large |R| is by chance."""
    seed: int = 0
    """Of these draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("count", 1), ("shuffles", 100)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise FitError(f"experts: {name} = {value!r}; give a whole number from {least}")
        if not 0 <= self.factor < float("inf"):
            raise FitError(f"experts: factor = {self.factor!r}; give a number from 0, as a weight is never below it")

    @classmethod
    def steermoe(cls, **settings: Any) -> Self:
        """SteerMoE's rule; fit it with `readout="response_share"`, which is where it counts.

        Args:
            settings: others, such as `count`, of which its authors take 5 to 500.
        """
        return cls.from_settings({"op": "steermoe", **settings})

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "route"

    @property
    def _asks(self) -> bool:
        """Whether the router has to be asked what it would choose otherwise."""
        return self.op in ("replace", "steermoe")

    def sites(self, decoder: Decoder) -> list[Site]:
        """The routers of all blocks that have one.

        Args:
            decoder: the model's decoder.

        Raises:
            SiteError: no block has one that can be served.
        """
        return sites_of_kind(decoder, "router")

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, and each third of them: the experts of several blocks are ranked together.

        Args:
            num_layers: of the model.
        """
        return whole_and_thirds(num_layers)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Rank the experts of all layers together and keep the first `count`.

        Args:
            acts: the share of each text's tokens [n, e] that each expert had, by site.
            subject: whose routers they are.
            sites: routers.

        Returns:
            Of each site with chosen experts ``"<site>/action"`` [e] (-1 dropped, 1 forced), ``"<site>/relevance"`` [e],
            ``"<site>/seen"`` [e] tokens of the data that each had, ``"<site>/slots"`` [] experts a token gets;
            ``"shared/null"`` [] what |R| passes by chance in one fit of a hundred, and ``"shared/silenced"`` [] the
            share of tokens at a written router that lose every expert.

        Raises:
            FitError: both sides are routed alike.
            SiteError: a site is no router, or one that cannot be asked where the operation needs it.
        """
        assert acts is not None
        taps = routers_at(subject.decoder.model, sites)
        relevance = {
            site: acts.positive[site].double().mean(dim=0) - acts.negative[site].double().mean(dim=0) for site in taps
        }
        slots = {site: tap.chosen.slots for site, tap in taps.items()}
        least = min(tap.chosen.experts - tap.chosen.slots for tap in taps.values())
        limits = Limits(min(slots.values()), least if self._asks else max(map(len, relevance.values())))
        action = chosen_experts(relevance, self.count, self.side, limits)
        if not action:
            used = "" if self.side == "both" else f" more by the {self.side} side"
            raise FitError(f"experts: no expert is used{used}; the two sides are routed alike")
        if self._asks:
            for site, one in action.items():
                AskedRouter(taps[site], one, without)
        both = [torch.cat([side[site] for site in taps], dim=1) for side in (acts.positive, acts.negative)]
        null = chance_relevance(both[0], both[1], paired=acts.paired, shuffles=self.shuffles, seed=self.seed)
        seen = tokens_seen(acts, subject)
        tensors = {
            "shared/null": torch.tensor(null, dtype=torch.float32),
            "shared/silenced": torch.tensor(self._silenced(subject, action, slots), dtype=torch.float32),
        }
        for site, one in action.items():
            tensors[f"{site}/action"], tensors[f"{site}/relevance"] = one, relevance[site].float()
            tensors[f"{site}/seen"] = seen[site]
            tensors[f"{site}/slots"] = torch.tensor(slots[site], dtype=torch.long)
        return tensors

    def _silenced(self, subject: Subject, action: Mapping[Site, Tensor], slots: Mapping[Site, int]) -> float:
        """The share of tokens, in a few texts of each side, that lose every expert at a written router."""
        risky = [
            site for site, one in action.items() if int((one < 0).sum()) >= slots[site] and not bool((one > 0).any())
        ]
        if self._asks or not risky or (self.op == "scale" and self.factor > 0):
            return 0.0
        texts = [side[:_LOOKED_AT] for side in (subject.data.positive, subject.data.negative)]
        rows = [one.ids for one in subject.rendered([*texts[0], *texts[1]])]
        silent = total = 0
        for site, found in subject.record_ids(rows, risky).items():
            kept = (torch.cat(found) != 0) & (action[site] >= 0)
            silent, total = silent + int((~kept.any(dim=-1)).sum()), total + len(kept)
        return silent / (total / len(risky) * len(action))

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The routers with chosen experts.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: unused.
        """
        return [site for site in sites if f"{site}/action" in tensors]

    def read_at(self, sites: list[Site], tensors: Mapping[str, Tensor]) -> list[Site]:
        """The routers with chosen experts; of the others nothing is kept.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
        """
        return [site for site in sites if f"{site}/action" in tensors]

    def check(self, site: Site, params: Params) -> None:
        """An action for each expert, at a router.

        Raises:
            VectorMismatchError: something is missing, or does not fit together.
        """
        super().check(site, params)
        action, slots = params["action"], int(params["slots"])
        if site.kind != "router" or bool((action.abs() > 1).any()) or not 1 <= slots <= len(action):
            raise VectorMismatchError(f"{site}: experts needs a router, and -1, 0 or 1 for each expert; fit it again")
        if int((action > 0).sum()) > slots:
            raise VectorMismatchError(f"{site}: more experts are forced than a token gets ({slots}); fit it again")

    def read_direction(self, params: Params) -> Tensor:
        """Along R of the chosen experts, the two sides lie apart.

        Args:
            params: the tensors of one router.
        """
        relevance = params["relevance"]
        return relevance * (params["action"] != 0).to(relevance)

    def inputs_at(self, model: nn.Module | Decoder, vector: SteeringVector) -> dict[Site, AskedRouter]:
        """What the routers would choose otherwise, where the operation needs that; else nothing.

        Args:
            model: the model to be steered.
            vector: a vector of this method.

        Raises:
            SiteError: a router chooses by more than its scores.
        """
        if not self._asks:
            return {}
        taps = routers_at(model.model if isinstance(model, Decoder) else model, vector.sites)
        change = without if self.op == "replace" else with_priority
        return {site: AskedRouter(tap, vector.params(site)["action"], change) for site, tap in taps.items()}

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Factors [e] of all experts, which are forced [e], how many a token gets, and the strength, 1 at the most."""
        action = params["action"].to(device)
        low = self.factor if self.op == "scale" else 0.0
        prepared = {
            "factor": torch.where(action < 0, low, 1.0).float(),
            "slots": params["slots"].to(device),
            "strength": strength.clamp_max(1.0),
        }
        if self.side != "negative" and self.op != "steermoe":
            prepared["forced"] = action > 0
        return prepared

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """The weights [b, t, e] with the operation done to them; tokens it does not touch stay bitwise."""
        weights, slots, asked = h.float(), prepared["slots"], prepared.get("input")
        target = weights * prepared["factor"] if asked is None else asked.float()
        total = (weights if asked is None else target).sum(dim=-1, keepdim=True)
        if "forced" in prepared:
            target = with_forced(target, prepared["forced"], total / slots, slots)
        if self.renormalise:
            target = with_sum(target, total)
        comes = asked is not None or "forced" in prepared
        found = between(weights, target, prepared["strength"], slots, may_come=comes)
        # What the router itself is asked anew comes back rounded otherwise where nothing was struck.
        near = 0.0 if asked is None else 1e-6 * weights.sum(dim=-1, keepdim=True).abs()
        is_touched = ((target - weights).abs() > near).any(dim=-1, keepdim=True)
        return torch.where(is_touched, found, weights).to(h.dtype)

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """As many experts of each router, among those that are left alone and as often used; R stays where it was.

        Args:
            vector: what this method fitted.
            generator: what draws.

        Raises:
            FitError: a router has too few other experts.
        """
        return replace(vector, tensors={**vector.tensors, **matched_actions(vector, generator)})

    def table(self, vector: SteeringVector) -> PartsTable:
        """The chosen experts, the largest |R| first, and which of them chance alone would hardly give.

        Args:
            vector: what this method fitted.
        """
        low = {"scale": f"times {self.factor:g}", "replace": "replaced"}.get(self.op, "dropped")
        return experts_table(vector, {-1: low, 1: "forced"})

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The down projections of the dropped experts, and their biases, times what is left of their weights.

        Raises:
            StrengthError: the operation does more than scale what single experts give.
            SiteError: the experts' down projections are not one stack of matrices.
        """
        forces = any(bool((vector.params(site)["action"] > 0).any()) for site in vector.sites)
        problem = (
            f"op '{self.op}' lets other experts act" if self._asks
            else "forced experts are given to tokens that did not choose them" if forces
            else "renormalise moves the weights of the other experts" if self.renormalise
            else None
        )  # fmt: skip
        if problem is not None:
            raise StrengthError(
                f"experts: {problem}, which no weights do; steer with hooks, or fit with renormalise=False and "
                "side='negative'"
            )
        decoder = find_decoder(model)
        found = anatomies(decoder, {site.layer for site in vector.sites})
        updates: list[WeightUpdate] = []
        for site in vector.sites:
            params = vector.params(site)
            prepared = self.prepare(
                params, torch.tensor(float(strength), dtype=torch.float32), torch.float32, torch.device("cpu")
            )
            left = (1 + prepared["strength"] * (prepared["factor"] - 1)).clamp_min(0.0)
            updates += _scaled(decoder, found[site.layer], site, left)
        return updates


def _scaled(decoder: Decoder, anatomy: Any, site: Site, factors: Tensor) -> list[WeightUpdate]:
    """The down projections of one block's experts, each times its factor [e]."""
    experts = experts_at(decoder, anatomy, Site(site.layer, "mlp_raw"))
    if experts is None or len(experts.tap.module.get_parameter(experts.stack.name)) != len(factors):
        raise SiteError(f"{site}: the experts' matrices are not one stack of {len(factors)}; steer with hooks")

    def by(shape: tuple[int, ...]) -> Any:
        def update(old: Tensor | None) -> Tensor:
            assert old is not None
            return old * factors.to(old).reshape(shape)

        return update

    biases = [name for name in experts.biases if experts.tap.module.get_parameter(name).dim() == 2]
    return [
        WeightUpdate(f"{experts.tap.name}.{experts.stack.name}", by((-1, 1, 1)), 1),
        *(WeightUpdate(f"{experts.tap.name}.{name}", by((-1, 1)), 1) for name in biases),
    ]
