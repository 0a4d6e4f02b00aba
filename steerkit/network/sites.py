"""`Site`: a place in the network by kind and layer, such as `resid_post.12`; and the text forms of sets of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from steerkit.errors import SiteError, near_miss

__all__ = ["KINDS", "KIND_HELP", "Site", "layers_text", "parse_layers", "sites_text"]

KIND_HELP: Mapping[str, str] = MappingProxyType(
    {
        "resid_pre": "the residual stream as the block reads it",
        "resid_post": "the residual stream as the block leaves it",
        "attn_in": "the output of the norm that only attention reads",
        "attn_out": "what attention adds to the residual stream, after a post-norm where there is one",
        "attn_raw": "attention's output before its post-norm or its spread over several streams; else attn_out",
        "mlp_in": "the output of the norm that only the MLP reads",
        "mlp_out": "what the MLP adds to the residual stream, after a post-norm where there is one",
        "mlp_raw": "the MLP's output before its post-norm or its spread over several streams; else mlp_out",
        "block_in": "the output of the one norm that feeds the whole block",
        "z": "the input of attention's output projection: the heads side by side",
        "mlp_post": "the input of the MLP's down projection: its neurons",
        "mixer_out": "what a state-space or linear-attention module adds to the residual stream",
        "router": "the weights of the MLP's routed experts, all of them side by side, zero where not chosen",
    }
)
KINDS: tuple[str, ...] = tuple(KIND_HELP)


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network, such as `resid_post.12`.

    Attributes:
        layer: index of the block, from 0.
        kind: one of `KINDS`.

    Raises:
        SiteError: an unknown kind, or a layer that is not a whole number from 0.

    Example:
        >>> str(Site(12)), Site.parse("mlp_out.3")
        ('resid_post.12', Site(layer=3, kind='mlp_out'))
    """

    layer: int
    kind: str = "resid_post"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(f"unknown kind of site {self.kind!r}; {near_miss(self.kind, KINDS)}")
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 0:
            raise SiteError(f"{self.kind}.{self.layer}: a layer is a whole number from 0, not {self.layer!r}")

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read the text form, `<kind>.<layer>`.

        Args:
            text: such as ``"resid_post.12"``.

        Raises:
            SiteError: the text has another form, or names an unknown kind.
        """
        kind, dot, layer = text.strip().partition(".")
        if not dot or re.fullmatch("[0-9]+", layer) is None:
            raise SiteError(f"{text!r} is not a site; write <kind>.<layer>, such as resid_post.12")
        return cls(int(layer), kind)

    @classmethod
    def of(cls, given: Site | str | int) -> Site:
        """A site from what people write for one.

        Args:
            given: a site, its text form, or a layer's number, which stands for the output of that block.

        Raises:
            SiteError: it is none of these.
        """
        if isinstance(given, Site):
            return given
        if isinstance(given, str):
            return cls.parse(given)
        if isinstance(given, bool) or not isinstance(given, int):
            raise SiteError(f"{given!r} is not a site; write a layer such as 12, or <kind>.<layer>, such as mlp_out.12")
        return cls(given)

    def __str__(self) -> str:
        return f"{self.kind}.{self.layer}"


def layers_text(layers: Sequence[int]) -> str:
    """A rising set of layers in little room: ``8+12-20``.

    Args:
        layers: blocks counted from 0.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "+".join(map(str, run)) for run in runs)


def sites_text(sites: Iterable[str]) -> str:
    """Sites in little room, kinds at the same layers together: ``attn_in, mlp_in 15+17-24``.

    Args:
        sites: their text forms, in any order.
    """
    layers: dict[str, list[int]] = {}
    for site in map(Site.parse, sites):
        layers.setdefault(site.kind, []).append(site.layer)
    kinds: dict[str, list[str]] = {}
    for kind, found in layers.items():
        kinds.setdefault(layers_text(sorted(found)), []).append(kind)
    return "; ".join(f"{', '.join(names)} {where}" for where, names in kinds.items())


def parse_layers(layers: str | Sequence[int], num_layers: int | None) -> list[int]:
    """Read a choice of layers.

    Args:
        layers: ``"10-14"`` (both ends included), ``"11,13"``, ``"0-2,7"`` or a list of indices.
        num_layers: how many blocks the model has; None where that is not known yet.

    Returns:
        The indices, in the order given, each once.

    Raises:
        SiteError: a value that is not such a choice, or outside the model.

    Example:
        >>> parse_layers("10-12,3", 30)
        [10, 11, 12, 3]
    """
    allowed = "layers are counted from 0" if num_layers is None else f"layers go from 0 to {num_layers - 1}"
    chosen: list[int] = []
    for part in layers.split(",") if isinstance(layers, str) else layers:
        if isinstance(part, int) and not isinstance(part, bool):
            first = last = part
        else:
            match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part) if isinstance(part, str) else None
            if match is None:
                raise SiteError(f"{part!r} is no layer; {allowed}; write 10-14 or 11,13")
            first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise SiteError(f"layers {first}-{last} run backwards; write {last}-{first}")
        if first < 0 or (num_layers is not None and last >= num_layers):
            outside = first if first < 0 else last
            raise SiteError(f"layer {outside} is outside the model; {allowed}")
        chosen.extend(range(first, last + 1))
    if not chosen:
        raise SiteError(f"no layers were given; {allowed}")
    return list(dict.fromkeys(chosen))
