"""Affine maps at sites as changes of the linear layers around them, exactly.

With h' = D h + c at a site (D diagonal), a linear layer that gives h, and one that reads it, become

    gives h = W x + b        W <- D W        b <- D b + c
    reads h, gives W h + b   W <- W D        b <- b + W c

The output of a norm before a half is read by linear layers alone, so it takes the second form, whatever norm it is;
a constant needs their biases. A norm on the way to the residual stream has no layer behind it: there is no form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.maths.directions import coordinates
from steerkit.methods._protocols import WeightUpdate
from steerkit.network.anatomy import Anatomy
from steerkit.network.block_trace import Call
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.kernel_share import PROJECTED
from steerkit.network.linears import Linear
from steerkit.network.output_biases import output_biases
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, anatomies

__all__ = ["folded"]

Map = tuple[Tensor, Tensor]
"""What a site's numbers are multiplied by, less 1, and what is then added: [d] each, float32."""


@dataclass
class _Around:
    """A linear layer with the maps of what it reads and of what it gives."""

    linear: Linear
    reads: Map | None = None
    gives: Map | None = None

    def updates(self, dtype: torch.dtype) -> Iterator[WeightUpdate]:
        """The changes of its weight and its bias, as far as there are any."""
        rows, columns = (
            None if one is None or not bool(one[0].any()) else 1 + one[0] for one in (self.gives, self.reads)
        )
        if rows is not None or columns is not None:
            change = _scaled(rows, columns, self.linear.transposed)
            both = rows is not None and columns is not None
            separable = None if both else int((rows is not None) != self.linear.transposed)
            yield WeightUpdate(self.linear.parameter, change, separable)
        added = torch.zeros(self.linear.tap.width, dtype=torch.float32)
        if self.reads is not None and bool(self.reads[1].any()):
            matrix = self.linear.weight(dtype)
            added = coordinates(matrix, self.reads[1].to(matrix.device)).cpu()
        has_bias = getattr(self.linear.tap.module, "bias", None) is not None
        shift = added if rows is None else rows * added
        shift = shift if self.gives is None else shift + self.gives[1]
        if bool(shift.any()) or (rows is not None and has_bias):
            yield WeightUpdate(f"{self.linear.tap.name}.bias", _moved(rows, shift))


def folded(model: nn.Module, maps: Mapping[Site, Map]) -> list[WeightUpdate]:
    """Put affine maps at some sites into the linear layers around them.

    Args:
        model: the transformers model.
        maps: by canonical site, [d] each.

    Raises:
        SiteError: no linear layers alone give or read what is mapped there.
    """
    decoder = find_decoder(model)
    found = anatomies(decoder, {site.layer for site in maps})
    around: dict[str, _Around] = {}
    more: list[WeightUpdate] = []
    for site, one in maps.items():
        try:
            if site.kind == "resid_post":
                more += _at_output(decoder, site, one)
                continue
            reads = site.kind in ("attn_in", "mlp_in", "block_in", *PROJECTED)
            for call in _readers(found[site.layer], site.kind) if reads else [found[site.layer].giver(site.kind)]:
                linear = _linear(decoder, site, call)
                entry = around.setdefault(linear.parameter, _Around(linear))
                entry.reads, entry.gives = (one, entry.gives) if reads else (entry.reads, one)
        except SiteError as error:
            raise SiteError(
                f"{site}: an affine map there has no exact weight form ({error}); steer with hooks"
            ) from None
    return [update for entry in around.values() for update in entry.updates(decoder.model.dtype)] + more


def _factors(one: Map | None) -> Tensor | None:
    """What a map multiplies by; None where it only shifts."""
    return None if one is None or not bool(one[0].any()) else 1 + one[0]


def _readers(anatomy: Anatomy, kind: str) -> list[Call]:
    """The linear layers that read a site.

    Raises:
        SiteError: something else reads it too.
    """
    if kind not in PROJECTED:
        return anatomy.readers(kind)
    place = anatomy.find(kind)
    return [call for call in anatomy.calls if call.module is place.module][:1]


def _linear(decoder: Decoder, site: Site, call: Call) -> Linear:
    """A linear layer by its call in a block.

    Raises:
        SiteError: it is no plain linear layer.
    """
    name = f"{decoder.path}.{site.layer}.{call.name}"
    if hasattr(call.module, "base_layer"):
        raise SiteError(f"`{name}` has an adapter beside it; merge it first")
    assert call.read is not None
    assert call.gave is not None
    tap = Tap(site, call.module, name, "output", flat=False, width=call.gave.values.shape[-1])
    return Linear(tap, site, call.read.values.shape[-1])


def _at_output(decoder: Decoder, site: Site, one: Map) -> list[WeightUpdate]:
    """A constant at a block's output, which its last layer's bias takes.

    Raises:
        SiteError: the map is no constant, or nothing takes it.
    """
    gain, shift = one
    if bool(gain.any()):
        raise SiteError("the residual stream is a sum that no one layer gives; a shift alone (kind = mean) would do")
    return [WeightUpdate(name, _moved(None, shift)) for name in output_biases(decoder, {site.layer})[site.layer]]


def _scaled(rows: Tensor | None, columns: Tensor | None, transposed: bool) -> Callable[[Tensor | None], Tensor]:
    """A change that scales a matrix [o, i] (or [i, o]) by rows [o] and columns [i]."""

    def update(old: Tensor | None) -> Tensor:
        assert old is not None
        new = old.T if transposed else old
        new = new if rows is None else new * rows.to(new)[:, None]
        new = new if columns is None else new * columns.to(new)
        return new.T if transposed else new

    return update


def _moved(rows: Tensor | None, shift: Tensor) -> Callable[[Tensor | None], Tensor]:
    """A change that scales a bias by rows [o] and adds to it [o], and makes the bias where there is none."""

    def update(old: Tensor | None) -> Tensor:
        if old is None:
            return shift.clone()
        return (old if rows is None else old * rows.to(old)) + shift.to(old)

    return update
