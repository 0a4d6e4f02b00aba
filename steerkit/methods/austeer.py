"""AUSteer: scale a few single neurons, those that most pairs move the same way, wherever in the depth they are.

A neuron here is one scalar of one kind of site: (layer, dimension). Over the pairs, with x its value at the last token,

    r+ = share of pairs with x(positive) > x(negative),      r- = share with x(positive) < x(negative)
    beta = +r+  where r+ >= r-,  else -r-                     the signed share, one per neuron
    x' = x + gamma x,   gamma = strength * beta               for the k neurons of largest |beta| in all layers together

Zijian Feng et al. (2026), "Fine-Grained Activation Steering: Steering Less, Achieving More", ICLR 2026,
arXiv 2602.04428.

Magnitudes never enter: it is a sign test, which makes layers comparable. What the paper calls a column of a matrix is
one only at `z` (scaling neuron i is scaling column i of the output projection); at `mlp_raw` the released code scales
what the down projection gives, which is its row i. With the strengths the paper tunes (8 to 100) a neuron of negative
share changes its sign and grows, although the paper speaks of suppression; and scaling moves a neuron away from zero,
not towards the positive side: where the positive side's values are the larger but negative ones, a positive share
drives them down.

Where this file departs. By default texts go through the chat template; answers that stand on both sides of several
pairs ("Yes" and "No") are balanced, since a neuron that only tells them apart would reach the commoner one's share;
differences are taken in float32, those of rounding size counting as none; pairs of which a text is all zero at a site
(no expert took its token) count neither way nor in the denominator; equal shares, which are the rule and not the
exception with n pairs, are ranked by the standardised mean difference; and the factor 1 + gamma stops at 0, so that no
neuron changes its sign (`flip` allows it). `AUSteer.published()` is the released code: float16 differences, texts
without a template and cut at 512 tokens, equal shares in the order of the network. Its k = 0 is k = 1 here, and 0 is
refused. The paper gives equal shares of both directions the negative sign, its code the positive one: `tie`.
Activations that are not finite are an error here, and the released code's way of counting them is kept in
`activation_momentum`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from steerkit.activations.moments import PairSigns
from steerkit.activations.recording import Activations
from steerkit.errors import DataError, FitError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.probes import head_count
from steerkit.methods._austeer_data import as_it_stands, balanced
from steerkit.methods._austeer_neurons import neurons_table, scaled_weights
from steerkit.methods._base import PAIRS, FittedOn, Method, whole_and_thirds
from steerkit.methods._protocols import Params, PartsTable, Prepared, WeightUpdate
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import sites_of_kind
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.prompts.contrast_set import ContrastSet
    from steerkit.prompts.conversation import Conversation

__all__ = ["AUSteer", "activation_momentum", "select_neurons"]

Tie = Literal["positive", "negative"]


def activation_momentum(positive: Tensor, negative: Tensor, *, tie: Tie = "positive") -> Tensor:
    """The signed share of pairs that move each neuron the same way.

    Differences are taken in the dtype given. One that is zero or not a number (of two infinities, for one) counts for
    neither side and stays in the denominator; nothing is raised for values that are not finite.

    Args:
        positive: [n, l, d], row i of both belonging to pair i.
        negative: [n, l, d].
        tie: the sign where as many pairs move it up as down; the released code's is positive, the paper's negative.

    Returns:
        [l, d] float32 from -1 to 1, 0 where no pair moves the neuron.

    Raises:
        FitError: there is no pair, the sides differ in shape, or `tie` is no sign.

    Example:
        >>> import torch
        >>> activation_momentum(torch.tensor([[[2.0]], [[3.0]], [[1.0]]]), torch.tensor([[[1.0]], [[1.0]], [[1.0]]]))
        tensor([[0.6667]])
    """
    if positive.shape != negative.shape or positive.dim() < 2 or not len(positive):
        shapes = f"{list(positive.shape)} and {list(negative.shape)}"
        raise FitError(f"activation_momentum: got {shapes}; give both sides of at least one pair, [n, l, d] each")
    difference = positive - negative
    return _signed_share((difference > 0).sum(0), (difference < 0).sum(0), len(positive), tie)


def select_neurons(beta: Tensor, k: int) -> list[tuple[int, int, float]]:
    """The k neurons of largest share, over all layers together.

    Args:
        beta: [l, d] signed shares.
        k: how many; where fewer have a share that is not zero, those.

    Returns:
        (layer, neuron, signed share), the largest first; equal ones in the order of layers and neurons.

    Raises:
        FitError: `beta` is no [l, d], or `k` no whole number from 0.
    """
    if beta.dim() != 2:
        raise FitError(f"select_neurons: beta has shape {list(beta.shape)}; give [l, d]")
    if isinstance(k, bool) or not isinstance(k, int) or k < 0:
        raise FitError(f"select_neurons: k = {k!r}; give a whole number from 0")
    places = _ranked(beta.reshape(-1), None)[:k]
    width = beta.shape[1]
    shares = beta.reshape(-1)[places].tolist()
    return [(place // width, place % width, share) for place, share in zip(places.tolist(), shares, strict=True)]


@dataclass(frozen=True)
class AUSteer(Method):
    """Scale the k neurons of one kind of site, in all layers, that most pairs move the same way.

    Strength 0 is the identity; a negative one mirrors all signs. Fit it at all layers, which is the default: it chooses
    where it acts. The fitted vector's `sites` are the chosen ones, its `fitted_at` all that were looked at.
    """

    name: ClassVar[str] = "austeer"
    title: ClassVar[str] = "AUSteer: scaling single neurons"
    paper: ClassVar[str] = "Feng et al. 2026, arXiv 2602.04428"
    data: ClassVar[FittedOn] = PAIRS
    params: ClassVar[Mapping[str, str]] = {"units": "int64 j", "beta": "j", "width": "int64"}
    also: ClassVar[Mapping[str, str]] = {"tied": "int64 k", "head_width": "int64"}
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "all"
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

    kind: Literal["z", "mlp_raw", "resid_post"] = "z"
    """Whose neurons: of the heads side by side, of the MLP's output before any post-norm, or of the residual stream."""
    k: int = 100
    """How many neurons, in all layers together."""
    tie: Tie = "positive"
    """The sign of a neuron that as many pairs move up as down."""
    tie_break: Literal["difference", "order"] = "difference"
    """What comes first among equal shares: the larger standardised mean difference, or the earlier neuron."""
    precision: Literal["float32", "float16"] = "float32"
    """In which differences are taken. In float16 all pairs count, in float32 those with activations at the site."""
    template: bool = True
    """Read texts in the chat template; else prompt and answer as they stand, joined."""
    max_tokens: int = 0
    """Read no more tokens of a text, cut at the right; 0 reads all."""
    balance: bool = True
    """Where two answers stand on either side of several pairs, use as many pairs of one order as of the other."""
    alone: str = ""
    """A positive answer with this phrase in it is read without its prompt (released code: a refusal's apology)."""
    flip: bool = False
    """Let a factor go below 0, where a neuron changes its sign."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("k", 1), ("max_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise FitError(f"austeer: {name} = {value!r}; give a whole number from {least}")

    @classmethod
    def published(cls, **settings: Any) -> Self:
        """The settings of the released code.

        Args:
            settings: others than those, such as `kind` and `k`.
        """
        own: dict[str, Any] = {"tie_break": "order", "precision": "float16", "template": False, "max_tokens": 512}
        return cls.from_settings({**own, "balance": False, "flip": True, **settings})

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "scale_units"

    @property
    def longest_text(self) -> int | None:
        """`max_tokens`; None where all are read."""
        return self.max_tokens or None

    def sites(self, decoder: Decoder) -> list[Site]:
        """The chosen kind of site in every block that has it.

        Args:
            decoder: the model's decoder.

        Raises:
            SiteError: no block has it.
        """
        if self.kind == "resid_post":
            return [Site(layer, self.kind) for layer in range(decoder.num_layers)]
        return sites_of_kind(decoder, self.kind)

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, and each third of them: the neurons of several blocks are ranked together.

        Args:
            num_layers: of the model.
        """
        return whole_and_thirds(num_layers)

    def contrast(self, data: ContrastSet) -> ContrastSet:
        """The pairs as they are read: balanced, without a template, good answers alone, as the settings say.

        Args:
            data: pairs.

        Raises:
            DataError: the items are no pairs.
        """
        if not data.paired:
            counts = f"{len(data.positive)} positive and {len(data.negative)} negative items"
            raise DataError(f"austeer compares the two sides of pairs, got {counts} that are none; give pairs")
        if self.balance:
            data = balanced(data)
        positive = tuple(self._alone(item) for item in data.positive) if self.alone else data.positive
        negative = data.negative
        if not self.template:
            positive, negative = tuple(map(as_it_stands, positive)), tuple(map(as_it_stands, negative))
        return replace(data, positive=positive, negative=negative)

    def _alone(self, item: Conversation) -> Conversation:
        """An answer as a raw text of its own, where the text `alone` stands in it; else the item as it is."""
        if item.answer is None or self.alone not in item.answer:
            return item
        return replace(item, prompt=item.answer, answer=None, system=None, raw=True)

    def statistics(self, site: Site) -> PairSigns:
        """Counts of pairs by the sign of their difference; no activation is kept.

        Args:
            site: where they accumulate.
        """
        if self.precision == "float16":
            return PairSigns(torch.float16)
        return PairSigns(rounding=1e-5, skip_zeros=True)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Rank the neurons of all sites together and keep the first k.

        Args:
            acts: what `statistics` gave at every site.
            subject: whose heads are counted.
            sites: where to look.

        Returns:
            ``"<site>/units"`` [j] int64, ``"<site>/beta"`` [j] and ``"<site>/width"`` [] of each site that has some;
            ``"shared/tied"`` [2], how many neurons have the last one's share, and how many of these were chosen; at
            `z` ``"shared/head_width"`` [].

        Raises:
            FitError: the sites are of several kinds, or no pair moves any neuron.
        """
        assert acts is not None
        if len({site.kind.replace("_raw", "_out") for site in sites}) > 1:
            raise FitError(
                f"austeer ranks neurons of one kind of site, got {', '.join(map(str, sites))}; give one kind"
            )
        counted = {site: PairSigns.read(acts.positive[site], acts.negative[site]) for site in sites}
        betas = {site: _signed_share(one.up, one.down, one.pairs, self.tie) for site, one in counted.items()}
        beta = torch.cat(list(betas.values()))
        effect = torch.cat([one.effect for one in counted.values()]) if self.tie_break == "difference" else None
        chosen = _ranked(beta, effect)[: self.k]
        if not len(chosen):
            raise FitError("austeer: no pair moves any neuron; the two sides read the same at every site")
        at_the_cut = beta.abs() == beta[chosen[-1]].abs()
        tensors = {"shared/tied": torch.stack([at_the_cut.sum(), at_the_cut[chosen].sum()])}
        if sites[0].kind == "z" and (heads := head_count(subject.decoder.model)):
            tensors["shared/head_width"] = torch.tensor(len(betas[sites[0]]) // heads, dtype=torch.long)
        start = 0
        for site, own in betas.items():
            neurons = (chosen[(chosen >= start) & (chosen < start + len(own))] - start).sort().values
            start += len(own)
            if len(neurons):
                tensors[f"{site}/units"], tensors[f"{site}/beta"] = neurons, own[neurons]
                tensors[f"{site}/width"] = torch.tensor(len(own), dtype=torch.long)
        return tensors

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The sites that have chosen neurons.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: unused.
        """
        return [site for site in sites if f"{site}/units" in tensors]

    def check(self, site: Site, params: Params) -> None:
        """Different neurons of the site, each with its share.

        Raises:
            VectorMismatchError: something is missing, or does not fit together.
        """
        super().check(site, params)
        neurons, beta, width = (params[name] for name in ("units", "beta", "width"))
        if neurons.dtype != torch.int64 or not beta.is_floating_point():
            raise VectorMismatchError(f"{site}: neurons and width are whole numbers and shares are not; fit again")
        if len(set(neurons.tolist())) < len(neurons) or int(neurons.min()) < 0 or int(neurons.max()) >= int(width):
            raise VectorMismatchError(f"{site}: neurons must be different ones of 0..{int(width) - 1}; fit again")

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What is added of each neuron, 0 for those that stay; multiplied in float32 and rounded once."""
        gains = self._gains(params, strength)
        gamma = torch.zeros(*gains.shape[:-1], int(params["width"]), device=device, dtype=torch.float32)
        return {"gamma": gamma.index_copy(-1, params["units"].to(device), gains).to(dtype)}

    def _gains(self, params: Params, strength: Tensor) -> Tensor:
        """[..., j] float32 on the strength's device."""
        gains = strength * params["beta"].to(strength.device).float()
        return gains if self.flip else gains.clamp_min(-1.0)

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + gamma * h`; neurons that were not chosen are bitwise what they were."""
        return edits.scale_units(h, prepared["gamma"])

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """As many neurons at each site with the same shares, drawn from all neurons of that site.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        drawn = {}
        for site in vector.sites:
            params = vector.params(site)
            order = torch.randperm(int(params["width"]), generator=generator)
            drawn[f"{site}/units"] = order[: len(params["units"])]
        return replace(vector, tensors={**vector.tensors, **drawn})

    def table(self, vector: SteeringVector) -> PartsTable:
        """The chosen neurons, the largest share first.

        Args:
            vector: what this method fitted.
        """
        return neurons_table(vector)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """Columns of attention's output projection, or rows and bias entries of the MLP's down projection.

        Raises:
            SiteError: neurons of the residual stream or behind a post-norm; or no one plain linear layer gives or reads
                them, as with routed experts or an adapter.
        """
        return [
            update
            for site in vector.sites
            for update in scaled_weights(model, site, *self._places(vector.params(site), strength))
        ]

    def _places(self, params: Params, strength: float) -> tuple[Tensor, Tensor]:
        """The neurons [j] of a site and what each is scaled by, less 1 [j]."""
        return params["units"], self._gains(params, torch.tensor(float(strength), dtype=torch.float32))


def _signed_share(up: Tensor, down: Tensor, pairs: int | Tensor, tie: Tie) -> Tensor:
    """Share of the commoner direction, with its sign.

    Raises:
        FitError: `tie` is no sign.
    """
    if tie not in ("positive", "negative"):
        raise FitError(f"tie {tie!r} is neither positive nor negative")
    share = torch.maximum(up, down) / pairs
    is_down = down > up if tie == "positive" else (down >= up) & (down > 0)
    return torch.where(is_down, -share, share)


def _ranked(beta: Tensor, effect: Tensor | None) -> Tensor:
    """Places of all shares that are not zero, the largest first, then by `effect`, then in order."""
    order = torch.arange(len(beta)) if effect is None else effect.argsort(descending=True, stable=True)
    size = beta.abs().nan_to_num(0.0)[order]
    order = order[size.argsort(descending=True, stable=True)]
    return order[: int((size > 0).sum())]
