"""The linear layers that write at a site: where they read, their weights as they act, and what identifies those.

A layer writes at `attn_raw`, `mlp_raw` or `mixer_out` (the first two are `attn_out` and `mlp_out` where no norm
follows) and reads at `z` or `mlp_post` of the same block. Where a block routes tokens to experts, those write at
`mlp_raw` together (`experts.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError, SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.experts import Experts, experts_at
from steerkit.network.plain_weights import is_plain, observed_matrix
from steerkit.network.sites import Site
from steerkit.network.stored_tensors import stored
from steerkit.network.tap import Tap, anatomies

__all__ = ["Linear", "bare_parameter", "linears_at", "writers_at"]


@dataclass(frozen=True)
class Linear:
    """A linear layer that writes at a site.

    Attributes:
        tap: its output; `tap.site` is the site written, `tap.width` the rows o of its weight.
        read: the site at which it reads.
        inputs: the width i of what it reads.
    """

    tap: Tap
    read: Site
    inputs: int

    @property
    def transposed(self) -> bool:
        """Whether its weight is stored [i, o], as in GPT-2's Conv1D."""
        return type(_base(self.tap.module)).__name__ == "Conv1D"

    @property
    def additive(self) -> bool:
        """Whether it gives its weight's product plus nothing or an adapter's (LoRA); DoRA and others rescale it."""
        module: Any = self.tap.module
        return not hasattr(module, "base_layer") or (
            hasattr(module, "lora_A") and not any(getattr(module, "use_dora", {}).values())
        )

    @property
    def parameter(self) -> str:
        """The name of its weight in the transformers model, without any adapter."""
        return f"{self.tap.name}.weight"

    @property
    def parameters(self) -> tuple[str, ...]:
        """`parameter` alone, as `Experts` have several."""
        return (self.parameter,)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix by which it acts, an adapter around it included.

        Args:
            dtype: in which to run a layer whose weight does not lie open (quantised, adapted).

        Returns:
            [o, i] float32; what it is multiplied with from the left is the layer's input. Never a view of the layer's.

        Raises:
            SiteError: the layer does not act by one matrix.
        """
        module: Any = self.tap.module
        if _is_bare(module) and is_plain(module, "weight"):
            with contextlib.suppress(ModelError):  # offloaded to where only a pass finds it
                found: Tensor = stored(module, "weight").to(torch.float32, copy=True)  # type: ignore[union-attr]
                return found.T if self.transposed else found
        try:
            return observed_matrix(module, self.inputs, dtype)
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise SiteError(
                f"{self.tap.site}: the weight of {self.tap.name} ({type(module).__name__}) cannot be read "
                f"({type(error).__name__}: {error}); load the model unquantised"
            ) from None


def _is_bare(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing wrapped around one."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def linears_at(
    model: nn.Module | Decoder, sites: Iterable[Site], *, found: Mapping[int, Anatomy] | None = None
) -> dict[Site, Linear]:
    """Find the linear layers that write at some sites.

    Args:
        model: as for `find_decoder`, or its decoder.
        sites: the places written, of kind attn_out, attn_raw, mlp_out, mlp_raw or mixer_out.
        found: what `anatomies` found of their blocks; saves the pass.

    Returns:
        The layers by canonical site, in the order asked.

    Raises:
        SiteError: no one linear layer writes there (routed experts, a norm behind it), or two layers of the model are
            one.
    """
    decoder, asked, found = _asked(model, sites, found)
    linears = {}
    for site in asked:
        linear = _linear(decoder, found[site.layer], site)
        linears[linear.tap.site] = linear
    _refuse_tied(decoder, linears)
    return linears


def writers_at(
    model: nn.Module | Decoder, sites: Iterable[Site], *, found: Mapping[int, Anatomy] | None = None
) -> dict[Site, Linear | Experts]:
    """Find what writes at some sites: a linear layer, or routed experts.

    Args:
        model: as for `linears_at`.
        sites: as for `linears_at`.
        found: as for `linears_at`.

    Returns:
        The writers by canonical site, in the order asked.

    Raises:
        SiteError: neither writes there, or one matrix writes at two places of the model.
    """
    decoder, asked, found = _asked(model, sites, found)
    writers: dict[Site, Linear | Experts] = {}
    for site in asked:
        anatomy = found[site.layer]
        writer = experts_at(decoder, anatomy, site) or _linear(decoder, anatomy, site)
        writers[writer.tap.site] = writer
    _refuse_tied(decoder, writers)
    return writers


def _asked(
    model: nn.Module | Decoder, sites: Iterable[Site], found: Mapping[int, Anatomy] | None
) -> tuple[Decoder, list[Site], Mapping[int, Anatomy]]:
    """The decoder, the sites, and what stands in their blocks.

    Raises:
        SiteError: a layer is outside of the model.
    """
    decoder = model if isinstance(model, Decoder) else find_decoder(model)
    asked = list(sites)
    last = decoder.num_layers - 1
    if outside := [site for site in asked if site.layer > last]:
        raise SiteError(
            f"{outside[0]}: layer {outside[0].layer} is outside 0..{last} of {type(decoder.model).__name__}"
        )
    return decoder, asked, anatomies(decoder, {site.layer for site in asked}) if found is None else found


def _linear(decoder: Decoder, anatomy: Anatomy, site: Site) -> Linear:
    """The one linear layer that writes at a site.

    Raises:
        SiteError: there is none.
    """
    read, write = anatomy.writer(site.kind)
    name = f"{decoder.path}.{site.layer}.{write.name}"
    tap = Tap(Site(site.layer, write.kind), write.module, name, "output", write.flat, write.width)
    return Linear(tap, Site(site.layer, read.kind), read.width)


def _refuse_tied(decoder: Decoder, writers: Mapping[Site, Linear | Experts]) -> None:
    """Refuse one matrix that writes at two sites.

    Raises:
        SiteError: there is one.
    """
    weights: dict[int, Site] = {}
    for site, writer in writers.items():
        for name in writer.parameters:
            weight = bare_parameter(decoder.model, name)
            other = weights.setdefault(id(weight if isinstance(weight, Tensor) else writer.tap.module), site)
            if other != site:
                raise SiteError(
                    f"{site}: {name} is the weight of {other} too (tied), so two edits of it would add up; choose one "
                    "of the sites"
                )


def bare_parameter(model: nn.Module, name: str) -> Any:
    """A weight without any adapter around it; None where the module hides it.

    Args:
        model: the transformers model.
        name: the weight's name in it.
    """
    path, _, leaf = name.rpartition(".")
    return getattr(_base(model.get_submodule(path)), leaf, None)


def _base(module: nn.Module) -> nn.Module:
    """The layer inside an adapter."""
    base = getattr(module, "base_layer", module)
    return base if isinstance(base, nn.Module) else module
