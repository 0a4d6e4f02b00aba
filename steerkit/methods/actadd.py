"""Activation Addition: one pair of short prompts, subtracted position by position, added to the prompt's first tokens.

    D = resid_pre_l(plus) - resid_pre_l(minus)           [w, d], the shorter prompt filled up at its right
    resid_pre_l[s : s + w] += strength * D               s = 0 (front), S//2 - w//2 (mid) or S - w (back)

Turner, Thiergart, Leech, Udell, Vazquez, Mini, MacDiarmid (2023), "Steering Language Models With Activation
Engineering", arXiv 2308.10248. No data set, no training.

Only the prompt is edited: with a cache that is the prefill, whose keys and values carry the effect on; without one the
same positions are edited in every pass. Positions count from each row's first real token, so a left-padded batch gets
what each row gets alone (the released code handles unpadded input only). The filler defaults to the token of a single
space, as in the published examples; it is an ordinary token, never masked. Row 0 (the shared BOS) is exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.maths import edits
from steerkit.methods._base import ONE_PAIR, FittedOn, Method
from steerkit.methods._protocols import Params, Prepared
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Tokens

__all__ = ["ActivationAddition"]


@dataclass(frozen=True)
class ActivationAddition(Method):
    """Add the per-position difference of one pair of prompts. Strength 1 is the paper's coefficient 1."""

    name: ClassVar[str] = "actadd"
    title: ClassVar[str] = "Activation Addition"
    paper: ClassVar[str] = "Turner et al. 2023, arXiv 2308.10248"
    data: ClassVar[FittedOn] = ONE_PAIR
    params: ClassVar[Mapping[str, str]] = {"direction": "w d"}
    readout: ClassVar[str | None] = None
    scopes: ClassVar[tuple[str, ...]] = ("front", "mid", "back")
    ladder: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)

    position: Literal["front", "mid", "back"] = "front"
    """Where in the prompt the rows are added when no scope says otherwise."""
    filler: str = " "
    """What fills the shorter prompt; it must be one token."""

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add_window"

    @property
    def default_scope(self) -> str:
        """Tokens written where nobody says otherwise."""
        return self.position

    def sites(self, decoder: Decoder) -> list[Site]:
        """The input of the block at an eighth of the depth (the paper's best are early: 6 of 48).

        Args:
            decoder: the model's decoder.
        """
        return [Site(max(round(decoder.num_layers / 8), 0), "resid_pre")]

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Run both prompts and subtract them row by row.

        Args:
            acts: unused; the method records for itself.
            subject: gives the pair's token ids and their activations.
            sites: where to read (and write).

        Returns:
            ``"<site>/direction"`` to [w, d], w tokens of the longer prompt with its BOS.

        Raises:
            DataError: the data is not exactly one pair of prompts, or the filler is not one token.
            FitError: both prompts are the same tokens.
        """
        plus, minus = subject.pair_ids()
        width = max(len(plus), len(minus))
        filler = subject.filler_id(self.filler)
        filled = [ids + (filler,) * (width - len(ids)) for ids in (plus, minus)]
        if filled[0] == filled[1]:
            raise FitError("actadd: both prompts are the same tokens, so their difference is zero; change one of them")
        rows = subject.record_ids(filled, sites)
        return {f"{site}/direction": rows[site][0] - rows[site][1] for site in sites}

    def length(self, params: Params) -> float | None:
        """Median norm of the rows (the BOS row, which is zero, left out)."""
        norms = torch.linalg.vector_norm(params["direction"].float(), dim=-1)
        norms = norms[norms > 0]
        return float(norms.median()) if len(norms) else None

    def minimum_prompt(self, params: Params) -> int:
        """A prompt must be at least as long as the vector."""
        return params["direction"].shape[0]

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """`strength * D`, multiplied in float32 and rounded once: [w, d], or [b, w, d] for one strength per row."""
        return {"direction": (strength * params["direction"].to(device).float()).to(dtype)}

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """Add row `i` of D to the `i`-th token of the window."""
        window = prepared["direction"].shape[-2]
        offset = tokens.position
        if tokens.scope.kind == "mid":
            offset = offset - (tokens.prompt_length // 2 - window // 2)
        elif tokens.scope.kind == "back":
            offset = offset - (tokens.prompt_length - window)
        return edits.add_window(h, prepared["direction"], offset)
