"""Latents of a sparse autoencoder: add, clamp, scale or ablate some of them, without ever reconstructing anything.

    f_k = what latent k reads in h,    D_k = its decoder row,    all latents read from the same h, then summed

    add       h' = h + strength * sum_k a_k D_k
    clamp     h' = h + sum_k (strength * a_k - f_k) D_k
    scale     h' = h + (strength - 1) * sum_k f_k D_k
    ablate    h' = h - strength * sum_k f_k D_k

Bricken et al. (2023), "Towards Monosemanticity", and Templeton et al. (2024), "Scaling Monosemanticity"
(https://transformer-circuits.pub), clamp; Arad, Mueller, Belinkov (2025), "SAEs Are Good for Steering - If You Select
the Right Features", arXiv 2505.20063, add.

The published code encodes, changes latents, decodes and adds the error back: equal to the forms above but for rounding,
which changes every token a little, at every strength. Here a token that nothing is changed in stays as it is, bit for
bit.

What `a_k` counts in is `unit`. Arad et al. use the strongest latent of the token that is written (`token`), which needs
the whole dictionary at every token; their code takes it over the batch, so that rows steer each other, and here each
token has its own. `peak`, the default, is the median of that number over tokens of neutral texts, measured when the
vector is fitted: then the file holds all that is needed. Usable raw amounts (`raw`) differ between dictionaries by a
factor of hundreds.

A latent of a TopK dictionary fires where it is among the K largest, which no row can tell alone: clamp, scale and
ablate then need the whole dictionary too, whose path and digest the vector keeps. `add` never does, and is an addition
like any other, with a form as weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations import Activations
from steerkit.dictionary import Dictionary, load_dictionary
from steerkit.dictionary.selecting import activation_gap
from steerkit.errors import FitError, StrengthError, VectorMismatchError
from steerkit.maths.directions import coordinates, random_direction
from steerkit.maths.rank_two import RankTwo
from steerkit.methods._addition import AddDirection
from steerkit.methods._latent_reading import (
    digest_of,
    latents_of,
    placed_rows,
    placed_whole,
    rows_tensors,
)
from steerkit.methods._protocols import Params, PartsTable, Prepared, WeightUpdate
from steerkit.methods._subject import Subject
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.neutral import neutral_texts
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Latent"]

_TEXTS, _TOKENS = 24, 128


@dataclass(frozen=True)
class Latent(AddDirection):
    """Add, clamp, scale or ablate latents of a sparse autoencoder, read and written at the place it was trained on.

    Strength 1 adds, or clamps to, `amounts` in the unit (1 unless given); it multiplies latents where they are scaled,
    and is the share that is taken out where they are ablated.
    """

    name: ClassVar[str] = "latent"
    title: ClassVar[str] = "Latents of a sparse autoencoder"
    paper: ClassVar[str] = "Arad et al. 2025, arXiv 2505.20063"
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "response"
    params: ClassVar[Mapping[str, str]] = {
        "direction": "d",
        "latents": "int64 k",
        "amounts": "k",
        "peak": "",
        "decoder": "k d",
        "encoder": "k d",
        "bias": "k",
        "threshold": "k",
    }
    also: ClassVar[Mapping[str, str]] = {"gate_bias": "k", "gate_scale": "k", "digest": "int64 w"}

    dictionary: str = ""
    """Where the dictionary is: anything that `steerkit.dictionary.load_dictionary` reads."""
    site: str = ""
    """Where it belongs, such as ``"resid_post.12"``, where its files do not say."""
    latents: tuple[int, ...] = ()
    """Which latents; without any, the `count` that fire most on the positive side and least on the negative one."""
    amounts: tuple[float, ...] = ()
    """What strength 1 adds or clamps to, one for each latent, in the unit; without any, 1 for each."""
    op: Literal["add", "clamp", "scale", "ablate"] = "add"
    """What is done with them."""
    unit: Literal["peak", "token", "raw"] = "peak"
    """What amounts count in: the usual strongest latent, the strongest one of each token, or the latents themselves."""
    count: int = 1
    """How many latents are chosen where none is named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latents", "amounts"):
            kept = getattr(self, name)
            object.__setattr__(self, name, tuple(kept) if isinstance(kept, list | tuple) else (kept,))
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in self.latents):
            raise FitError(f"latent: latents = {self.latents!r}; give whole numbers from 0, such as [12, 40]")
        if len(set(self.latents)) < len(self.latents):
            raise FitError(f"latent: latents = {self.latents!r} names one twice; name each once")
        if any(isinstance(one, bool) or not isinstance(one, int | float) for one in self.amounts) or not all(
            map(math.isfinite, self.amounts)
        ):
            raise FitError(f"latent: amounts = {self.amounts!r}; give finite numbers, such as [1.0, 0.5]")
        if self.amounts and len(self.amounts) != (len(self.latents) or self.count):
            raise FitError(
                f"latent: {len(self.amounts)} amounts for {len(self.latents) or self.count} latents; give one for each"
            )
        if self.count < 1:
            raise FitError(f"latent: count = {self.count}; give 1 or more")

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name; a plain addition where it is one."""
        return "add" if self._is_plain else f"latent_{self.op}"

    @property
    def _is_plain(self) -> bool:
        return self.op == "add" and self.unit != "token"

    @property
    def takes_rows(self) -> bool:
        """Each row can have a direction of its own where it is an addition."""
        return self._is_plain

    @property
    def neutral_strength(self) -> float | None:
        """The strength that leaves everything as it is: 0, of `scale` 1; none where latents are clamped."""
        return {"add": 0.0, "clamp": None, "scale": 1.0, "ablate": 0.0}[self.op]

    @property
    def natural_strength(self) -> float | None:
        """1 where latents are clamped or ablated; where they are added or scaled, how much depends on the model."""
        return 1.0 if self.op in ("clamp", "ablate") else None

    def sites(self, decoder: Decoder) -> list[Site]:
        """Where the dictionary was trained."""
        return [self._read().site] if self.dictionary else super().sites(decoder)

    def sites_at(self, decoder: Decoder, layers: Sequence[int]) -> list[Site]:
        """The kind of site of the dictionary at chosen layers; `fit` takes its own layer alone."""
        return [Site(layer, site.kind) for site in self.sites(decoder) for layer in layers]

    def _read(self) -> Dictionary:
        """The dictionary.

        Raises:
            FitError: none is named.
        """
        if not self.dictionary:
            raise FitError("latent: dictionary = '' names none; give its path, such as settings={'dictionary': 'D'}")
        return load_dictionary(self.dictionary, site=self.site or None)

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Take the rows of the latents out of the dictionary, and measure the unit on neutral texts.

        Args:
            acts: activations of both sides at the dictionary's site, which tell the latents where none are named.
            subject: the model.
            sites: that site.

        Raises:
            FitError: another site, a dictionary of another width, no such latent, or no latent fires more on the
                positive side.
        """
        assert acts is not None
        one = self._read()
        (site,) = locate(subject.decoder.model, [one.site])  # mlp_raw is mlp_out where nothing lies between
        if sites != [site]:
            given = ", ".join(map(str, sites))
            raise FitError(f"latent: the dictionary reads {one.site}, not {given}; fit at sites=['{one.site}']")
        width = acts.positive[site].shape[-1]
        if width != one.width:
            raise FitError(
                f"latent: activations at {one.site} are {width} wide, the dictionary reads {one.width}; take one that "
                "was trained on this model"
            )
        chosen = list(self.latents) or self._chosen(one, acts, site)
        try:
            rows = one.rows(chosen)
        except VectorMismatchError as error:
            raise FitError(f"latent: {error}") from None
        peak = self._peak(one, subject, site)
        weights = torch.tensor(self.amounts or (1.0,) * len(chosen), dtype=torch.float32)
        amounts = weights * peak if self.unit == "peak" else weights
        found = {
            "direction": coordinates(amounts, rows.decoder),
            "latents": torch.tensor(chosen, dtype=torch.int64),
            "amounts": amounts,
            "peak": peak,
            "decoder": rows.decoder,
            **rows_tensors(rows),
        }
        if self.unit == "token" or (one.needs_all and self.op != "add"):
            found["digest"] = digest_of(one)
        return {f"{site}/{name}": value for name, value in found.items()}

    def _chosen(self, one: Dictionary, acts: Activations, site: Site) -> list[int]:
        """The latents whose share of firing texts is larger on the positive side by most.

        Raises:
            FitError: there are fewer than wanted.
        """
        sides = (one.encode(side[site]) for side in (acts.positive, acts.negative))
        gaps = activation_gap(*sides)
        ranked = [latent for latent in gaps.order() if gaps.mean_gap[latent] > 0]
        if len(ranked) < self.count:
            raise FitError(
                f"latent: {len(ranked)} latents fire more on the positive side, {self.count} are wanted; name them "
                "with latents=[...], or take other texts or another readout"
            )
        return ranked[: self.count]

    def _peak(self, one: Dictionary, subject: Subject, site: Site) -> Tensor:
        """The median over tokens of neutral texts, each text's first left out, of a token's strongest latent: [].

        Raises:
            FitError: no latent fires.
        """
        texts = [text.ids[:_TOKENS] for text in subject.rendered(neutral_texts()[:_TEXTS])]
        read = subject.record_ids([ids for ids in texts if len(ids) > 1], [site])[site]
        strongest = torch.cat([one.encode(rows[1:].float()).amax(dim=-1) for rows in read])
        peak = strongest.median()
        if not float(peak) > 0:
            raise FitError("latent: no latent fires on most tokens of neutral texts, so there is no unit 'peak'")
        return peak

    def check(self, site: Site, params: Params) -> None:
        """Rows of at least one latent, and what tells the dictionary where all of it is needed.

        Raises:
            VectorMismatchError: a tensor is missing or of another shape.
        """
        super().check(site, params)
        if self.unit == "token" and "digest" not in params:
            raise VectorMismatchError(f"{site}: unit 'token' needs 'digest' [32], the vector has none; fit it again")
        if ("gate_bias" in params) != ("gate_scale" in params):
            raise VectorMismatchError(f"{site}: 'gate_bias' and 'gate_scale' belong together; fit the vector again")

    def length(self, params: Params) -> float | None:
        """How far strength 1 moves a token: the length of what is added; None where that depends on the token."""
        return super().length(params) if self._is_plain else None

    def read_direction(self, params: Params) -> Tensor:
        """What the latents read, [d]: their encoder rows, weighted by their amounts."""
        return coordinates(params["amounts"].float(), params["encoder"].float())

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """What is added; or the rows in float32 at least, beside the strength, and all of the dictionary if needed.

        Raises:
            VectorMismatchError: the whole dictionary is needed, and it is missing or another one.
        """
        if self._is_plain:
            return super().prepare(params, strength, dtype, device)
        wide = torch.promote_types(dtype, torch.float32)
        found = {
            "strength": strength.to(wide),
            "amounts": params["amounts"].to(device, wide),
            "decoder": params["decoder"].to(device, wide),
            **placed_rows(params, wide, device),
        }
        if "digest" in params:
            found |= placed_whole(self.dictionary, self.site, params["digest"], wide, device)
            found["latents"] = params["latents"].to(device)
        return found

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """Move every token along the decoder's rows; a token whose latents all stay as they are is not touched.

        Args:
            h: [b, t, d] activations.
            prepared: what `prepare` gave.
            tokens: unused; the caller keeps what is written to the tokens of the scope.

        Returns:
            [b, t, d], of float32 at least unless it is a plain addition.
        """
        if self._is_plain:
            return super().edit(h, prepared, tokens)
        wide = h.to(prepared["decoder"].dtype)
        strength, amounts = prepared["strength"], prepared["amounts"]
        if "all_encoder" in prepared:
            every = latents_of(wide, prepared, "all_", prepared["top_k"].shape[0] or None)
            own = every.index_select(-1, prepared["latents"])
            if self.unit == "token":
                amounts = amounts * every.amax(dim=-1, keepdim=True)
        else:
            own = latents_of(wide, prepared)
        if self.op == "add":
            moves = (strength * amounts).expand_as(own)
        elif self.op == "clamp":
            moves = strength * amounts - own
        else:
            moves = (strength - 1.0) * own if self.op == "scale" else -strength * own
        edited = wide + coordinates(moves, prepared["decoder"])
        return torch.where((moves != 0).any(dim=-1, keepdim=True), edited, wide)

    def control(self, vector: SteeringVector, generator: torch.Generator) -> SteeringVector:
        """The same latents, each writing a random direction as long as its own.

        Args:
            vector: what this method fitted.
            generator: what draws.
        """
        tensors = dict(vector.tensors)
        for site in vector.sites:
            params = vector.params(site)
            drawn = torch.stack([random_direction(row, generator) for row in params["decoder"]])
            tensors |= {f"{site}/decoder": drawn, f"{site}/direction": coordinates(params["amounts"], drawn)}
        return replace(vector, tensors=tensors)

    def rank_two(self, params: Params) -> RankTwo:
        """The addition as numbers.

        Raises:
            StrengthError: it is no addition.
        """
        self._refuse_unless_plain("has no form in a plane of two directions")
        return super().rank_two(params)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """The addition as a bias.

        Raises:
            StrengthError: it is no addition.
            SiteError: the model has no place for it.
        """
        self._refuse_unless_plain("has no exact weight form")
        return super().weight_updates(model, vector, strength)

    def _refuse_unless_plain(self, what: str) -> None:
        if not self._is_plain:
            which = "unit 'token'" if self.op == "add" else f"op {self.op!r}"
            raise StrengthError(f"latent: {which} reads every token, so it {what}; steer with hooks, or use op 'add'")

    def table(self, vector: SteeringVector) -> PartsTable:
        """The latents with what strength 1 does to each."""
        rows: list[tuple[str | int | float, ...]] = []
        for site in vector.sites:
            params = vector.params(site)
            norms = params["decoder"].float().norm(dim=-1).tolist()
            listed = zip(params["latents"].tolist(), params["amounts"].tolist(), norms, strict=True)
            rows += [(str(site), latent, amount, norm) for latent, amount, norm in listed]
        peak = float(vector.params(vector.sites[0])["peak"])
        unit = {"peak": f"peak, {peak:.4g} here", "token": "the strongest latent of the token", "raw": "raw"}[self.unit]
        return PartsTable(
            f"{len(rows)} latents, op {self.op}",
            ("site", "latent", "amount", "length of its row"),
            rows,
            f"amounts of strength 1 in {'latents' if self.unit != 'token' else unit}; unit: {unit}",
        )
