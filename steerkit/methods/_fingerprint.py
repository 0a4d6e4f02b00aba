"""What tells one set of weights from another, and still knows the same ones quantised, resized or under an adapter.

A fingerprint is some values of many parameters, in the order and with the names of the architecture itself, built
without weights: what a quantiser packs or an adapter adds does not move the others. Values that cannot be had (packed,
of another shape) are 0. Two fingerprints are compared parameter by parameter, each scaled by itself, and only where
both have values: norms and biases inside the decoder's body, and matrices inside its blocks, since embeddings and heads
are resized and adapted. Rounding to four bits moves a few values of a matrix by a tenth of their length, and norms and
biases hardly; another training moves both by more.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerkit.model import quiet
from steerkit.network.decoder import Decoder
from steerkit.prompts.rendering import spread

__all__ = ["are_alike", "fingerprint", "fits"]

_NAMES, _VALUES = 64, 8  # of either kind of parameters, and of each of them
_APART = {1: 0.05, 2: 0.25}
"""How far the values of one parameter may lie apart, by its dimensions, both scaled to length 1."""
_SHARE = 0.1
"""The share of parameters that may lie further apart."""
_WRAPPED = (".base_layer", ".original_module")


@dataclass(frozen=True)
class _Entry:
    """One parameter of the architecture.

    Attributes:
        name: in the model without wrappers.
        shape: of all of it.
    """

    name: str
    shape: torch.Size

    @property
    def count(self) -> int:
        """How many of its values are noted."""
        return min(_VALUES, self.shape.numel())


_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[_Entry, ...]] = WeakKeyDictionary()


def fingerprint(decoder: Decoder) -> Tensor:
    """Some values of norms and biases, then some of matrices; both parts are scaled to a largest value of 1.

    Args:
        decoder: the model's decoder.

    Returns:
        [k] float32 on the CPU; of no length where weights are offloaded.
    """
    here = {_unwrapped(name): entry for name, entry in decoder.model.named_parameters()}
    if not here or any(entry.is_meta for entry in here.values()):
        return torch.empty(0, dtype=torch.float32)
    parts, layout = [], _layout(decoder)
    for dims in (1, 2):
        some = [_noted(here.get(entry.name), entry) for entry in layout if len(entry.shape) == dims]
        if some:
            values = torch.cat(some)
            parts.append(values / values.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float32)


def fits(known: Tensor, decoder: Decoder) -> bool:
    """Whether a fingerprint may be that of a model's weights.

    Args:
        known: an earlier fingerprint [n].
        decoder: the model's decoder.
    """
    here, layout = fingerprint(decoder), _layout(decoder)
    if not len(here) or not len(known):
        return True
    if len(known) != len(here):  # noted where matrices were packed: the norms and biases before them are comparable
        layout = tuple(entry for entry in layout if len(entry.shape) == 1)
        if len(known) < sum(entry.count for entry in layout):
            return True
    place, groups, body = 0, dict[int, list[tuple[Tensor, Tensor]]](), _body(decoder)
    for entry in layout:
        where = slice(place, place + entry.count)
        place += entry.count
        # What nobody resizes or adapts whole.
        if entry.name.startswith(f"{decoder.path}.") or (len(entry.shape) == 1 and entry.name.startswith(body)):
            groups.setdefault(len(entry.shape), []).append((known[where], here[where]))
    return all(_agree(couples, _APART[dims]) for dims, couples in groups.items())


def are_alike(fingerprints: Sequence[Tensor]) -> bool:
    """Whether fingerprints may be of the same weights, without the model: less finely than `fits`.

    Args:
        fingerprints: one or several, [n] each.
    """
    parts = [list(torch.split(one, _VALUES)) for one in fingerprints]
    return all(
        len(one) != len(other) or _agree(list(zip(one, other, strict=True)), _APART[2])
        for one, other in itertools.combinations(parts, 2)
    )


def _agree(couples: Sequence[tuple[Tensor, Tensor]], limit: float) -> bool:
    """Whether nearly all couples of values are the same, each scaled by itself; zeros tell nothing."""
    told = [couple for couple in couples if all(bool(side.any()) for side in couple)]
    apart = [float((one / one.norm() - other / other.norm()).norm()) for one, other in told]
    return sum(distance > limit for distance in apart) <= _SHARE * len(apart)


def _body(decoder: Decoder) -> str:
    """What the names of the decoder's own parameters begin with."""
    name = next((name for name, module in decoder.model.named_modules() if module is decoder.body), "")
    return f"{name}." if name else ""


def _noted(value: nn.Parameter | None, entry: _Entry) -> Tensor:
    """A few values, so that no copy of all is made; zeros where they cannot be had."""
    if value is None or value.shape != entry.shape or not value.is_floating_point() or value.itemsize < 2:
        return torch.zeros(entry.count, dtype=torch.float32)
    return value.detach().flatten()[:: max(1, value.numel() // _VALUES)][:_VALUES].float().cpu()


def _layout(decoder: Decoder) -> tuple[_Entry, ...]:
    """The parameters that are noted: vectors, then matrices, in the order of the architecture."""
    model = decoder.model
    if model not in _LAYOUTS:
        listed: list[_Entry] = []
        for dims in (1, 2):
            named = [_Entry(_unwrapped(name), value.shape) for name, value in _empty(model).named_parameters()]
            listed += spread([entry for entry in named if len(entry.shape) == dims], _NAMES)
        _LAYOUTS[model] = tuple(listed)
    return _LAYOUTS[model]


def _empty(model: Any) -> nn.Module:
    """The architecture without weights; the model itself where its class does not build from its config."""
    try:
        with torch.device("meta"), quiet():
            made: nn.Module = type(model)(copy.deepcopy(model.config))
    except Exception:  # noqa: BLE001 - code from outside of transformers may do anything
        return model  # type: ignore[no-any-return]
    return made


def _unwrapped(name: str) -> str:
    """A parameter's name without the wrappers of adapters."""
    for wrapper in _WRAPPED:
        name = name.replace(wrapper, "")
    return name
