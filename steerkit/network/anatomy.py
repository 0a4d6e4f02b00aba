"""What stands where inside one block, read off a trace of one pass over three tokens.

No table of module names: in Llama `post_attention_layernorm` is the norm before the MLP, in Gemma the one after
attention, and Bloom adds the residual inside its sub-blocks. The roles follow from which module read what which other
module gave. A *half* is a part of the block that computes something to add to the residual stream (`halves`); a norm
belongs to the half that reads it; and what a half adds is found by adding up (`residual_sum`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from steerkit.errors import SiteError
from steerkit.network.block_trace import Call, Trace
from steerkit.network.halves import Half, halves_of, is_recurrent
from steerkit.network.residual_form import TOKENS, form_text, is_token_wise
from steerkit.network.residual_sum import added_by_halves, gives, is_scaled
from steerkit.network.router_search import Chosen, router_of
from steerkit.network.structure import is_norm, outermost

__all__ = ["Anatomy", "Place"]

# What may be had inside a block whatever passes between the blocks; `find` may not ask for their sum.
_INSIDE = ("attn_in", "attn_raw", "z", "mlp_in", "mlp_raw", "mlp_post")


@dataclass(frozen=True, eq=False)
class Place:
    """Where one tensor of a block is to be had.

    Attributes:
        kind: the canonical kind of site it is.
        name: the module's name inside the block.
        module: the module itself.
        side: whether the tensor is what the module reads or what it gives.
        flat: whether it is `[b*t, width]` instead of `[b, t, width]`.
        width: its last dimension.
        chosen: how a router's output is read; None at all other kinds.
        owner: the MLP that the router belongs to.
    """

    kind: str
    name: str
    module: nn.Module
    side: Literal["input", "output"]
    flat: bool
    width: int
    chosen: Chosen | None = None
    owner: nn.Module | None = None


class Anatomy:
    """The roles of the modules of one block.

    Args:
        trace: what the block did in the probe.
        layer: its index.
        owner: the name of the model's class, for messages.
        width: of the residual stream, by the config.
        layer_type: the config's word for this block, where it has one.

    Attributes:
        one_stream: whether what passes between the blocks is one vector for each token. Of several streams no kind is
            to be had that is the stream itself or is added to it, and what reads them all is no half.
    """

    def __init__(self, trace: Trace, layer: int, owner: str, width: int, layer_type: str | None = None) -> None:
        if trace.entered is None or trace.left is None:
            raise SiteError(f"block {layer} of {owner} did not run, or gave no tensor, in a pass over plain text")
        self.layer = layer
        self.owner = owner
        self.width = width
        self.entered = trace.entered
        self.left = trace.left
        calls = trace.calls
        parts = outermost(calls)
        while len(parts) == 1 and self.entered.same_as(parts[0].read) and self.left.same_as(parts[0].gave):
            calls = [call for call in calls if call.inside(parts[0])]  # a wrapper around the block (torch.compile)
            parts = outermost(calls)
        self.calls = calls
        self.parts = parts
        self.one_stream = all(is_token_wise(seen.tensor.shape, width) for seen in (self.entered, self.left))
        self.halves = [
            half
            for half in halves_of(parts, calls)
            if self.one_stream or half.first.read is None or half.first.read.values.numel() == TOKENS * width
        ]
        # Where no module takes a mask, the one that runs first moves information between tokens.
        self.mixers = [half for half in self.halves if half.mixes_tokens] or self.halves[: len(self.halves) > 1]
        self.mlps = [half for half in self.halves if half not in self.mixers]
        self.recurrent = bool(self.mixers) and is_recurrent(self.mixers[0], layer_type)
        self._runs = Counter(call.name for call in calls)

    def canonical(self, kind: str) -> str | None:
        """The name that this block's tensor of a kind is stored under; None where it has none.

        Args:
            kind: any kind but resid_pre and resid_post.
        """
        try:
            return self.find(kind).kind
        except SiteError:
            return None

    def find(self, kind: str) -> Place:
        """Say where the tensor of one kind is.

        Args:
            kind: any kind but resid_pre and resid_post.

        Returns:
            The place, under its canonical kind: attn_raw and mlp_raw are attn_out and mlp_out where no norm comes
            after the half.

        Raises:
            SiteError: this block has no such tensor; the message says what there is instead.
        """
        half = self._half(kind)
        if kind == "router":
            found = router_of(half, self.calls)
            if isinstance(found, str):
                raise self._refuse(kind, found)
            width, owner = found.chosen.experts, half.first.module
            return Place(kind, found.name, found.module, "output", True, width, found.chosen, owner)
        if kind.endswith("_in"):
            return self._place(kind, self._norm_before(kind, half), "output")
        if kind in ("z", "mlp_post"):
            return self._place(kind, self._last_linear(kind, half), "input")
        if kind.endswith("_raw") and not self.one_stream:
            return self._place(kind, half.last, "output")
        added, raw = self._added(kind)[self.halves.index(half)]
        if kind.endswith("_raw") and raw is not added:
            return self._place(kind, raw, "output")
        return self._place(kind.replace("_raw", "_out"), added, "output")

    def readers(self, kind: str) -> list[Call]:
        """The linear layers that read what a norm before a half gives, where nothing else uses it.

        Args:
            kind: attn_in, mlp_in or block_in.

        Raises:
            SiteError: another kind, or something else than plain linear layers uses the norm's output.
        """
        if kind not in ("attn_in", "mlp_in", "block_in"):
            raise self._refuse(kind, "it is no norm's output that linear layers alone read")
        source = self._norm_before(kind, self._half(kind))
        halves = [half for half in self.halves if gives(source, half.first.read)]
        self._added(kind)  # the stream goes past the norm, not through it
        for half in halves:
            if half.experts:
                raise self._refuse(kind, f"{half} routes tokens to `{half.experts}` by a router that reads them too")
            if self.recurrent and half in self.mixers:
                raise self._refuse(kind, f"{half} is a state-space, convolution or linear-attention module")
        found = [linear for half in halves for linear in half.linears if gives(source, linear.read)]
        leaves = [call for call in self.calls if gives(source, call.read) and not any(call.module.children())]
        others = [call.name for call in leaves if not any(call is one or call.inside(one) for one in found)]
        if others or not found:
            what = f"`{others[0]}` reads it too" if others else "no linear layer reads it as it is"
            raise self._refuse(kind, f"`{source.name}` gives what not only linear layers read: {what}")
        return found

    def writer(self, kind: str) -> tuple[Place, Place]:
        """The linear layer that gives the tensor of a kind, as it is or times a number.

        Args:
            kind: attn_out, attn_raw, mlp_out, mlp_raw or mixer_out.

        Returns:
            Where that layer reads (z or mlp_post), and where it writes, under its canonical kind.

        Raises:
            SiteError: another kind, a norm between the layer and the tensor, or no one layer that reads every token.
        """
        if kind not in ("attn_out", "attn_raw", "mlp_out", "mlp_raw", "mixer_out"):
            raise self._refuse(kind, "no linear layer of this block gives it; ask for attn_raw, mlp_raw or mixer_out")
        half = self._half(kind)
        read = self.find("mlp_post" if half in self.mlps else "z")
        added, raw = self._added(kind)[self.halves.index(half)]
        if raw is not added and not kind.endswith("_raw"):
            raw_kind = kind.replace("_out", "_raw")
            raise self._refuse(kind, f"`{added.name}` norms what `{read.name}` gives; ask for {raw_kind}.{self.layer}")
        own = kind if raw is not added else kind.replace("_raw", "_out")
        return read, replace(read, kind=own, side="output", width=self.left.values.shape[-1])

    def giver(self, kind: str) -> Call:
        """The linear layer whose output is the tensor of a kind, number for number.

        Args:
            kind: attn_out, attn_raw, mlp_out, mlp_raw or mixer_out.

        Raises:
            SiteError: another kind, a norm or a number between the layer and the tensor, or no one layer.
        """
        if kind not in ("attn_out", "attn_raw", "mlp_out", "mlp_raw", "mixer_out"):
            raise self._refuse(kind, "no linear layer of this block gives it")
        half = self._half(kind)
        if half.experts:
            raise self._refuse(kind, f"{half} routes tokens to `{half.experts}`, so no one layer gives it")
        added, raw = self._added(kind)[self.halves.index(half)]
        source = raw if kind.endswith("_raw") else added
        if source.gave is not None:
            values = source.gave.values.flatten()
            for linear in reversed(half.linears):
                if linear.gave is not None and torch.equal(linear.gave.values.flatten(), values):
                    return linear
        between = f"`{added.name}` norms what {half} gives" if source is not raw else "a number is multiplied to it"
        raise self._refuse(kind, f"no linear layer gives it as it is; {between}")

    def output_kind(self, half: Half) -> str:
        """The kind of site at which a half adds to the residual stream.

        Args:
            half: one of `halves`.
        """
        if half in self.mlps:
            return "mlp_out"
        return "mixer_out" if self.recurrent else "attn_out"

    def added_by(self, half: Half) -> Call:
        """The module that gives what a half adds to the stream, as the half made it.

        Args:
            half: one of `halves`.

        Raises:
            SiteError: a norm stands between the half and the stream, or on the stream.
        """
        kind = self.output_kind(half)
        added, raw = self._added(kind)[self.halves.index(half)]
        if self.norms_the_stream:
            raise self._refuse(kind, "norms stand on the residual stream itself, after each sum")
        if raw is not added:
            raise self._refuse(kind, f"`{added.name}` norms what {half} gives")
        return added

    def projection(self, half: Half) -> Call:
        """The linear layer whose output, at most times a number, is what a half adds to the stream.

        Args:
            half: one of `halves`, without routed experts.

        Raises:
            SiteError: there is none, or a norm comes after it.
        """
        added = self.added_by(half)
        found = next((linear for linear in reversed(half.linears) if is_scaled(linear.gave, added.gave)), None)
        if found is None:
            raise self._refuse(self.output_kind(half), f"{half} does not end in one linear layer")
        return found

    def check_one_stream(self) -> None:
        """Refuse a block between which and its neighbours several streams pass.

        Raises:
            SiteError: they do.
        """
        if not self.one_stream:
            raise self.several_streams("resid_pre")

    def several_streams(self, kind: str) -> SiteError:
        """The refusal of a kind that is the residual stream, or is added to it, where there are several.

        Args:
            kind: what was asked for.
        """
        shape = (self.entered if kind == "resid_pre" else self.left).tensor.shape
        streams, rest = divmod(shape.numel(), TOKENS * self.width)
        what = f"{streams} residual streams of width {self.width}" if streams > 1 and not rest else "no such stream"
        inside = " or ".join(f"{other}.{self.layer}" for other in _INSIDE if self.canonical(other) is not None)
        return self._refuse(
            kind,
            f"{form_text(shape)} passes between the blocks, {what}; steerkit steers one stream [b, t, {self.width}], "
            + (f"so ask for {inside} inside the block" if inside else "and no other site of this block is to be had"),
        )

    def _refuse(self, kind: str, reason: str) -> SiteError:
        return SiteError(f"{kind}.{self.layer}: {reason} (block {self.layer} of {self.owner})")

    def _half(self, kind: str) -> Half:
        """The half that a kind is about.

        Raises:
            SiteError: there is none or more than one, or it goes by another name here.
        """
        of_mlp = kind in ("mlp_in", "mlp_out", "mlp_raw", "mlp_post", "router")
        halves = self.halves[:1] if kind == "block_in" else self.mlps if of_mlp else self.mixers
        names = " and ".join(str(half) for half in halves)
        if len(halves) > 1:
            raise self._refuse(kind, f"{names} run in one block, so the name would mean several tensors")
        if not halves:
            there_is = "mixer_out" if self.recurrent else "attn_out" if self.mixers else "mlp_out"
            rest = " and ".join(str(half) for half in self.halves) or "no part that computes"
            missing = "MLP" if of_mlp else "attention"
            raise self._refuse(kind, f"the block has no {missing}, only {rest}; ask for {there_is}.{self.layer}")
        if kind in ("attn_out", "attn_raw") and self.recurrent:
            what = f"{names} is a state-space, convolution or linear-attention module, not attention"
            raise self._refuse(kind, f"{what}; ask for mixer_out.{self.layer}")
        if kind == "mixer_out" and not self.recurrent:
            raise self._refuse(kind, f"{names} is attention; ask for attn_out.{self.layer}")
        return halves[0]

    def _norm_before(self, kind: str, half: Half) -> Call:
        """The norm whose output is read by this half alone, or by all halves for block_in.

        Raises:
            SiteError: there is no such norm.
        """
        source = next((call for call in self.parts if gives(call, half.first.read)), None)
        if source is None:
            own = self.entered.same_as(half.first.read)
            what = f"resid_pre.{self.layer} itself" if own else "the residual stream, which no module gives out there"
            raise self._refuse(kind, f"{half} reads {what}; there is no norm before it")
        if not is_norm(source.module):
            raise self._refuse(kind, f"{half} reads the output of `{source.name}`, which is no norm")
        if self.norms_the_stream:
            what = f"`{source.name}`, which is the residual stream itself where norms come after the sum"
            raise self._refuse(kind, f"{half} reads the output of {what}")
        readers = [other for other in self.halves if gives(source, other.first.read)]
        shared = readers == self.halves and (len(readers) > 1 or self.recurrent)
        if shared and kind != "block_in":
            what = " and ".join(str(reader) for reader in readers)
            raise self._refuse(kind, f"`{source.name}` is all that {what} read; ask for block_in.{self.layer}")
        if kind == "block_in" and not shared:
            raise self._refuse(kind, "each half reads a norm of its own; ask for attn_in or mlp_in")
        return source

    def _last_linear(self, kind: str, half: Half) -> Call:
        """The output projection of a half.

        Raises:
            SiteError: the half has none, routes its tokens to experts, or has no heads.
        """
        if half.experts:
            raise self._refuse(kind, f"{half} routes tokens to `{half.experts}`, so no one layer reads all of them")
        call = next((linear for linear in reversed(half.linears) if is_scaled(linear.gave, half.last.made)), None)
        if call is None and self.one_stream and half.linears[-1:] == (self._added(kind)[self.halves.index(half)][0],):
            call = half.linears[-1]  # Bloom: the half gives the sum with the residual, not what this layer gives
        if call is None or call.read is None or call.read.values.shape[:-1].numel() != TOKENS:
            raise self._refuse(kind, f"{half} does not end in one linear layer that reads every token")
        if kind == "z" and self.recurrent and not any("head" in name for name in vars(half.first.module)):
            raise self._refuse(kind, f"{half} has no heads; ask for mixer_out.{self.layer}")
        return call

    @cached_property
    def norms_the_stream(self) -> bool:
        """Whether the block's output is a norm's: there the norms stand on the stream, after each sum."""
        return any(gives(call, self.left) and is_norm(call.module) for call in self.parts)

    def _added(self, kind: str) -> list[tuple[Call, Call]]:
        """For each half, the module that gives what it adds to the stream, and the one before a post-norm.

        Raises:
            SiteError: the block's output is not the sum of such parts, or is several streams.
        """
        if not self.one_stream:
            raise self.several_streams(kind)
        chosen = self._sum
        if chosen is None:
            parts = " and ".join(str(half) for half in self.halves)
            what = f"what comes out of the block is not its input plus the output of {parts}"
            raise self._refuse(kind, f"{what}, so what each adds is not to be had; use resid_post.{self.layer}")
        return chosen

    @cached_property
    def _sum(self) -> list[tuple[Call, Call]] | None:
        """What adds up to the block's output, see `added_by_halves`."""
        return added_by_halves(self.halves, self.parts, self._runs, self.entered, self.left)

    def _place(self, kind: str, call: Call, side: Literal["input", "output"]) -> Place:
        """Write down a place.

        Raises:
            SiteError: its module runs more than once in the block, so that an edit there would be made twice, or the
                tensor is not one vector for each token.
        """
        if self._runs[call.name] > 1:
            raise self._refuse(kind, f"`{call.name}` runs more than once in a pass")
        seen = call.read if side == "input" else call.gave
        assert seen is not None
        shape = seen.tensor.shape
        whole = getattr(call.module, "in_features", shape[-1]) if side == "input" else shape[-1]
        if shape[-1] != whole:
            raise self._refuse(
                kind,
                f"tensor parallelism splits what `{call.name}` reads, each rank has {shape[-1]} of {whole}; ask for a "
                "site of the residual stream or for what a half adds to it, or load the model without tp_plan",
            )
        if not is_token_wise(shape) and shape[:-1] != (TOKENS,):
            verb = "reads" if side == "input" else "gives"
            raise self._refuse(kind, f"`{call.name}` {verb} {form_text(shape)}, not one vector for each token")
        return Place(kind, call.name, call.module, side, seen.tensor.dim() == 2, shape[-1])
