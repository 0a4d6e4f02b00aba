"""Activation Transport (AcT): carry every neuron from where one side of the data has it to where the other one does.

Per neuron, with s the values of the negative side's texts and t those of the positive side's (of any number each):

    mean:      w = 1                               b = mean(t) - mean(s)
    gaussian:  w = sd(t) / sd(s)                   b = mean(t) - w mean(s)
    linear:    w = cov(Qs, Qt) / var(Qs)           b = mean(t) - w mean(s)         Q: quantile functions (Linear-AcT)

    h' = h + strength * ((w - 1) h + b)

Strength is a share of the way: 0 leaves the activations, 1 carries the negative side's mean onto the positive side's.
Sites are fitted in the order of a pass, each on activations that the maps before it have changed (`sequential`), which
keeps a shift from being made again at every site that sees it.

Pau Rodriguez, Arno Blaas, Michal Klein, Luca Zappella, Nicholas Apostoloff, Marco Cuturi, Xavier Suau (2024),
"Controlling Language and Diffusion Models by Transporting Activations", arXiv 2410.23054.

Where this file departs. Labels: the published source is what is transported from, here the negative side. A row's first
token and pads never enter a mean; the published mean holds the first token. Samples of different sizes are compared as
they are, by the exact integral of their quantile functions; the released code cuts the larger one. No noise is added,
and all is computed in float64. A neuron whose source does not vary is shifted and not stretched, where the released
code leaves it alone (mean, gaussian) or stretches it without bounds (linear). The order of sites is that of a pass, not
of registration, and the final norm is no site. `support="pooled"` is what is published for mitigation: numbers outside
of the source's range stay. That range is one of means over tokens and is applied to single tokens, which vary far more;
so by default there is none, and `support="tokens"` takes the range of the tokens themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations
from steerkit.errors import FitError, StrengthError, VectorMismatchError
from steerkit.maths import edits
from steerkit.maths.transport import affine_map
from steerkit.methods._affine_weights import folded
from steerkit.methods._base import Method, whole_and_thirds
from steerkit.methods._protocols import Params, Prepared, WeightUpdate
from steerkit.methods._subject import Read, Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import anatomies
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.network.anatomy import Anatomy

__all__ = ["Transport"]


@dataclass(frozen=True)
class Transport(Method):
    """Map every neuron of the norms' outputs affinely from the negative side's values to the positive side's.

    Strength 0 is the identity, 1 the whole way; below 0 and above 1 it extrapolates. Fit it at all layers, which is the
    default. Where both sides are the same, such as at the template's tokens before the first block, it does not act.

    Example:
        >>> import torch
        >>> source, target = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
        >>> {name: value.tolist() for name, value in Transport().fit_site(target, source).items()}
        {'scale': [1.5], 'source': [1.0], 'target': [1.5]}
    """

    name: ClassVar[str] = "transport"
    title: ClassVar[str] = "Activation Transport (Linear-AcT)"
    paper: ClassVar[str] = "Rodriguez et al. 2024, arXiv 2410.23054"
    params: ClassVar[Mapping[str, str]] = {"scale": "d", "source": "d", "target": "d"}
    also: ClassVar[Mapping[str, str]] = {"low": "d", "high": "d", "difference": "d"}
    readout: ClassVar[str | None] = "mean"
    scope: ClassVar[str] = "all"
    default_strength: ClassVar[float | None] = 1.0
    strength_unit: ClassVar[str] = "share"
    ladder: ClassVar[tuple[float, ...]] = (0.25, 0.5, 0.75, 1.0)

    kind: Literal["linear", "mean", "gaussian"] = "linear"
    """How the spread is treated: along the quantiles, not at all (a shift alone), or by standard deviations."""
    sequential: bool = True
    """Fit each site on activations that the maps of all sites before it have changed; else all at once."""
    target: Literal["mapped", "natural"] = "mapped"
    """Where a site is mapped to in a sequential fit: the positive side under the earlier maps, or as it is."""
    support: Literal["none", "pooled", "tokens"] = "none"
    """Map only numbers inside the range of the source: of its texts' rows, or of their tokens; or map all."""
    std_eps: float = 1e-4
    """A neuron whose source has a standard deviation of at most this much is shifted and not stretched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.std_eps, bool) or not 0 <= self.std_eps < math.inf:
            raise FitError(f"transport: std_eps = {self.std_eps!r}; give a finite number of at least 0")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "affine"

    @property
    def takes_rows(self) -> bool:
        """Each row can have a map of its own."""
        return True

    def sites(self, decoder: Decoder) -> list[Site]:
        """The outputs of the norms in every block: behind attention and MLP where norms stand there, else before them.

        Args:
            decoder: the model's decoder.
        """
        layers = set(range(decoder.num_layers))
        return [Site(layer, kind) for layer, one in anatomies(decoder, layers).items() for kind in _norms(one)]

    def sites_at(self, decoder: Decoder, layers: Sequence[int]) -> list[Site]:
        """The same at chosen layers.

        Args:
            decoder: the model's decoder.
            layers: blocks counted from 0.
        """
        found = anatomies(decoder, set(layers))
        return [Site(layer, kind) for layer in layers for kind in _norms(found[layer])]

    @classmethod
    def candidates(cls, num_layers: int) -> list[tuple[int, ...]]:
        """All blocks, and each third of them.

        Args:
            num_layers: of the model.
        """
        return whole_and_thirds(num_layers)

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """The map of each neuron, from the negative rows to the positive ones.

        Args:
            positive: [n, d].
            negative: [m, d]; n and m may differ.

        Returns:
            ``{"scale": [d], "source": [d], "target": [d]}``, float32: the factor, and the two means.

        Raises:
            FitError: a side is empty.
        """
        found = affine_map(negative, positive, self.kind, std_eps=self.std_eps)
        return {name: value.float() for name, value in found._asdict().items()}

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Fit all sites, in the order of a pass where that is asked for.

        Args:
            acts: both sides at every site, unsteered.
            subject: the door to the model, through which later sites are read under the maps of earlier ones.
            sites: where.

        Returns:
            ``"<site>/scale"``, ``"<site>/source"``, ``"<site>/target"`` [d]; ``"<site>/low"``, ``"<site>/high"`` [d]
            where there is a support; ``"<site>/difference"`` [d] of a sequential fit, from the negative to the positive
            mean of the unsteered model.

        Raises:
            FitError: the two sides are the same at every site.
        """
        assert acts is not None
        data, plan = subject.data, Readout.parse(acts.readout)
        count, every = len(data.positive), (*data.positive, *data.negative)
        positive, negative = acts.items or (slice(count), slice(count, None))
        ends: dict[Readout, Mapping[Site, Tensor]] = {}

        def unsteered(site: Site, readout: Readout) -> Tensor:
            """What all items have at a site, read once for all sites."""
            if readout not in ends:
                ends[readout] = subject.record(every, sites, readout=readout).positive
            return ends[readout][site]

        def in_turn(site: Site, read: Read) -> dict[str, Tensor]:
            rows = read(plan)
            target = rows[positive] if self.target == "mapped" else acts.positive[site]
            found = self._map(rows[negative], target, lambda readout: read(readout)[negative], plan)
            apart = acts.positive[site].mean(dim=0) - acts.negative[site].mean(dim=0)
            return {**found, "difference": apart} if found else {}

        if self.sequential and len(sites) > 1:
            tensors = subject.advance(self, sites, in_turn)
        else:
            tensors = {}
            for site in sites:
                read: Read = lambda readout, site=site: unsteered(site, readout)[negative]  # type: ignore[misc]  # noqa: E731
                found = self._map(acts.negative[site], acts.positive[site], read, plan)
                tensors |= {f"{site}/{name}": value for name, value in found.items()}
        if not tensors:
            raise FitError(f"{self.name}: both sides have the same mean and spread at every site; read other tokens")
        return tensors

    def written(self, sites: list[Site], tensors: Mapping[str, Tensor], decoder: Decoder) -> list[Site]:
        """The sites at which the two sides differ.

        Args:
            sites: where it was fitted.
            tensors: what `fit` gave.
            decoder: unused.
        """
        return [site for site in sites if f"{site}/scale" in tensors]

    def _map(self, source: Tensor, target: Tensor, read: Read, plan: Readout) -> dict[str, Tensor]:
        """The map at one site, and the range of what it is for; nothing where the map is the identity."""
        found = self.fit_site(target, source)
        if torch.equal(found["source"], found["target"]) and bool((found["scale"] == 1).all()):
            return {}
        if self.support == "pooled":
            found |= {"low": source.amin(dim=0), "high": source.amax(dim=0)}
        elif self.support == "tokens":
            low, high = read(plan.pooled("min")), read(plan.pooled("max"))
            found |= {"low": low.amin(dim=0), "high": high.amax(dim=0)}
        return found

    def check(self, site: Site, params: Params) -> None:
        """A factor and two means for each neuron, and a range where there is a support.

        Raises:
            VectorMismatchError: something is missing, or of another width.
        """
        super().check(site, params)
        ends = [name for name in ("low", "high") if name in params]
        shapes = {params[name].shape for name in (*self.params, *self.also) if name in params}
        if len(ends) != (0 if self.support == "none" else 2) or len(shapes) > 1:
            raise VectorMismatchError(
                f"{site}: support = {self.support!r} goes with {' and '.join(ends) or 'no range'} here; fit again"
            )

    def direction(self, params: Params) -> Tensor | None:
        """From the source's mean to the target's; None where they are the same.

        Args:
            params: the tensors of one site.
        """
        if "target" not in params:  # read, and not written
            return None
        direction = params["target"] - params["source"]
        return direction if bool(direction.any()) else None

    def read_direction(self, params: Params) -> Tensor | None:
        """From the negative to the positive mean of the unsteered model; None where they are the same.

        Args:
            params: the tensors of one site.
        """
        direction = params.get("difference")
        if direction is None:
            return self.direction(params)
        return direction if bool(direction.any()) else None

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The share of the map: what each neuron is multiplied by, less 1, and what is added; in float32 at least."""
        gain, shift = self._share(params, strength)
        wide = torch.promote_types(dtype, torch.float32)
        ends = {name: params[name].to(device, wide) for name in ("low", "high") if name in params}
        return {"gain": gain.to(device, wide), "shift": shift.to(device, wide), **ends}

    def _share(self, params: Params, strength: Tensor) -> tuple[Tensor, Tensor]:
        """[..., d] each, on the strength's device."""
        scale, source, target = (params[name].to(strength.device).float() for name in ("scale", "source", "target"))
        return strength * (scale - 1), strength * (target - scale * source)

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + gain * h + shift`, inside the support."""
        inside = (prepared["low"], prepared["high"]) if "low" in prepared else None
        return edits.affine(h, prepared["gain"], prepared["shift"], inside)

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """The maps of each site dealt out anew among its neurons.

        Maps fitted on permuted labels need the rows: `steerkit.evaluate.refits` makes those.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        dealt: dict[str, Tensor] = {}
        for site in vector.sites:
            params = vector.params(site)
            order = torch.randperm(len(params["scale"]), generator=generator)
            mine = [name for name in (*self.params, *self.also) if name in params]
            dealt |= {f"{site}/{name}": params[name][order] for name in mine}
        return replace(vector, tensors={**vector.tensors, **dealt})

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The linear layers around the sites: rows of the one that gives, columns of those that read; and biases.

        Raises:
            StrengthError: the vector has a support, outside of which it leaves numbers alone.
            SiteError: no linear layers alone give or read what is mapped.
        """
        if self.support != "none":
            raise StrengthError(
                f"transport with support = {self.support!r} has no weight form: weights map every number; steer with "
                "hooks, or fit with support = 'none'"
            )
        share = torch.tensor(float(strength), dtype=torch.float32)
        return folded(model, {site: self._share(vector.params(site), share) for site in vector.sites})


def _norms(anatomy: Anatomy) -> list[str]:
    """Kinds of site of a block at which norms give: behind its halves where there are some, else before them."""
    canonical = anatomy.canonical
    behind = [f"{half}_out" for half in ("attn", "mlp") if canonical(f"{half}_raw") == f"{half}_raw"]
    before = [kind for kind in ("block_in", "attn_in", "mlp_in") if canonical(kind)]
    rest = [kind for kind in ("attn_out", "mixer_out", "mlp_out") if canonical(kind)]
    return [kind for kind in behind if canonical(kind)] or before or rest or ["resid_post"]
