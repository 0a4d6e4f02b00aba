"""Readings: how far activations lie along a vector's direction, in standard deviations of neutral texts.

It is the number that a monitor shows. Of neutral texts mean and deviation are kept twice: at the prompt's last token,
where an answer begins, and as means over answers, in whose scale generated tokens count. A vector file may hold them;
else they are read off the model, once for each model object, which needs its tokenizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steerkit.activations.neutral_scale import NeutralScale
from steerkit.activations.recording import record
from steerkit.errors import StrengthError, VectorFileError
from steerkit.maths.directions import coordinates
from steerkit.methods._read_directions import directions_of
from steerkit.network.context import check_lengths, named
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import Rendered, render
from steerkit.tokens.clock import PassClock
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["READS", "Read", "SiteReading", "VectorReading", "projections", "rendered_to_read", "with_neutral"]

Read = Literal["prompt_last", "response_mean"]
READS: tuple[Read, ...] = ("prompt_last", "response_mean")
Neutral = Mapping[str, Any]

# By model object and vector, because `steer` is entered again for every batch.
_MEASURED: WeakKeyDictionary[nn.Module, dict[str, dict[str, Neutral]]] = WeakKeyDictionary()


class SiteReading:
    """A reading at one site, token by token.

    Args:
        unit: [d] direction of length 1.
        scale: [2, 2] mean and deviation of neutral texts, at the prompt's end and in answers.
    """

    def __init__(self, unit: Tensor, scale: Tensor) -> None:
        self.unit = unit
        self._scale = scale
        self._placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def place(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Direction [d] and scale [2, 2] on a device, brought there once.

        Args:
            device: of the activations.
        """
        if device not in self._placed:
            with torch.inference_mode(mode=False):
                self._placed[device] = self.unit.to(device), self._scale.to(device)
        return self._placed[device]

    def of(self, h: Tensor, chosen: Tensor | None) -> Tensor:
        """The reading of every token of a pass.

        Args:
            h: [b, t, d] activations.
            chosen: of the pass, see `Tokens.chosen`.

        Returns:
            [b, t] float32.
        """
        along, mean, deviation = self._parts(h, chosen)
        return (along - mean) / deviation

    def missing(self, h: Tensor, chosen: Tensor | None, target: float) -> Tensor:
        """How far along the direction every token has to be moved until its reading is a target.

        Args:
            h: [b, t, d] activations.
            chosen: of the pass, see `Tokens.chosen`.
            target: in standard deviations.

        Returns:
            [b, t] float32, in activation units.
        """
        along, mean, deviation = self._parts(h, chosen)
        return target * deviation + mean - along

    def _parts(self, h: Tensor, chosen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates along the direction, and the neutral mean and deviation that they count from."""
        unit, scale = self.place(h.device)
        along = coordinates(h.float(), unit)
        mean, deviation = (scale[1] if chosen is None else scale[(chosen > 0).long().to(h.device)]).unbind(-1)
        return along, mean, deviation


class VectorReading:
    """How far activations lie along one vector, on one model.

    Args:
        model: the model.
        name: what the vector is called.
        vector: what is read along.
        tokenizer: the model's, where it is known; needed where the vector's file holds no neutral scale.

    Raises:
        DataError: the vector has no direction to be read along.
        VectorMismatchError: the vector was fitted on a model of another width or depth.
        SiteError: the model lacks a site.
    """

    def __init__(self, model: nn.Module, name: str, vector: SteeringVector, tokenizer: Any = None) -> None:
        vector.check(model)
        self.name = name
        self._units = _units(model, vector)
        self._model, self._vector, self._tokenizer = model, vector, tokenizer
        self._scales: dict[Read, NeutralScale] = {}
        self._placed: dict[tuple[Read, torch.device], list[Tensor]] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the vector is read, under the names that the model's sites have."""
        return tuple(self._units)

    def at(self, site: Site) -> SiteReading:
        """The reading at one of the sites, token by token.

        Args:
            site: one of `sites`.
        """
        place = self.sites.index(site)
        known = [self.scale(read) for read in READS]
        scale = torch.stack([torch.stack([one.mean[place], one.deviation[place]]) for one in known])
        return SiteReading(self._units[site], scale)

    def scale(self, read: Read) -> NeutralScale:
        """What the reading counts in, of the vector's file or read off the model.

        Args:
            read: which tokens.

        Raises:
            StrengthError: the file holds none, and there is no tokenizer to find it.
            VectorFileError: the file's is none, or of other sites.
        """
        if read not in self._scales:
            facts = self._vector.neutral or _known(self._model, self.name, self._vector, read, self._tokenizer)
            try:
                self._scales[read] = _scale(facts[read], self.sites)
            except (KeyError, TypeError, ValueError):
                raise VectorFileError(
                    f"{self.name}: its readings of neutral texts lack a site of this model, or a deviation; read them "
                    "anew with steerkit.with_neutral(model, tokenizer, vector)"
                ) from None
        return self._scales[read]

    def of_prompts(self, found: Mapping[Site, Tensor]) -> Tensor:
        """The reading of prompts: the mean over sites, brought to standard deviation 1 over neutral texts.

        Args:
            found: per site [b, d] float32, activations of the prompts' last tokens, on one device.

        Returns:
            [b] float32.
        """
        return self._mean(found, "prompt_last")

    def of_answers(self, found: Mapping[Site, Tensor]) -> Tensor:
        """The reading of tokens of answers: the same, in the scale of answers to neutral prompts.

        Args:
            found: per site [b, d] float32, activations of one token of each answer, on one device.

        Returns:
            [b] float32.
        """
        return self._mean(found, "response_mean")

    def _mean(self, found: Mapping[Site, Tensor], read: Read) -> Tensor:
        """The reading [b] of all sites together, in neutral deviations."""
        scale = self.scale(read)
        mean, deviation, *units = self._on(read, next(iter(found.values())).device)
        along = [coordinates(found[site], unit) for site, unit in zip(self._units, units, strict=True)]
        return ((torch.stack(along, dim=-1) - mean) / deviation).mean(dim=-1) / scale.joint

    def _on(self, read: Read, device: torch.device) -> list[Tensor]:
        """Mean and deviation [s], then the directions [d], on a device, brought there once."""
        if (read, device) not in self._placed:
            scale = self.scale(read)
            with torch.inference_mode(mode=False):
                self._placed[read, device] = [
                    one.to(device) for one in (scale.mean, scale.deviation, *self._units.values())
                ]
        return self._placed[read, device]


def _units(model: nn.Module, vector: SteeringVector) -> dict[Site, Tensor]:
    """Directions [d] of length 1 under the names that the model's sites have."""
    directions = directions_of(vector, None)
    return dict(zip(locate(model, directions), directions.values(), strict=True))


def _known(model: nn.Module, name: str, vector: SteeringVector, read: Read, tokenizer: Any) -> Neutral:
    """What has been read off this model for a vector whose file holds nothing."""
    known = _MEASURED.setdefault(find_decoder(model).model, {}).setdefault(vector.digest, {})
    if read not in known:
        if tokenizer is None:
            raise StrengthError(
                f"{name}: the vector file holds no readings of neutral texts, in whose standard deviations this "
                "counts; pass tokenizer= to steer(), or store them: steerkit.with_neutral(model, tokenizer, vector)"
            )
        known[read] = _measured(model, tokenizer, vector, neutral_texts(), read)
    return known


def _scale(facts: Mapping[str, Any], sites: Sequence[Site]) -> NeutralScale:
    """A scale as files hold it, at some sites."""
    each = [facts["sites"][str(site)] for site in sites]
    mean, deviation = (
        torch.tensor([float(one[key]) for one in each], dtype=torch.float32) for key in ("mean", "deviation")
    )
    if not bool((deviation > 0).all()) or not facts["joint"] > 0:
        raise ValueError("nothing deviates")
    return NeutralScale(mean, deviation, float(facts["joint"]))


def with_neutral(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    *,
    neutral: Sequence[Conversation] | None = None,
    batch_size: int = 16,
) -> SteeringVector:
    """The same vector with the scale that its readings count in: mean and deviation over neutral texts.

    Args:
        model: any decoder-only transformers model; it is read without any steering.
        tokenizer: its tokenizer.
        vector: whose directions are read along.
        neutral: answered prompts; None takes the shipped ones.
        batch_size: rows per pass.

    Raises:
        DataError: no site has a direction, or too few neutral texts can be read.
        VectorMismatchError: the vector was fitted on a model of another width or depth.
        SiteError: the model lacks a site.
    """
    vector.check(model)
    texts = neutral_texts() if neutral is None else list(neutral)
    found: dict[str, Any] = {read: _measured(model, tokenizer, vector, texts, read, batch_size) for read in READS}
    return replace(vector, neutral=found)


def _measured(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    texts: Sequence[Conversation],
    read: Read,
    batch_size: int = 16,
) -> Neutral:
    """The scale of a vector's readings, read off a model without any steering."""
    decoder, units = find_decoder(model), _units(model, vector)
    rendered = rendered_to_read(decoder, tokenizer, texts, read, as_fitted([vector], tokenizer, None))
    clock = PassClock.of(decoder.model)
    with contextlib.nullcontext() if clock is None else clock.suspended():
        values = projections(model, tokenizer, rendered, units, read, along=coordinates, batch_size=batch_size)
    scale = NeutralScale.of(values)
    each = zip(units, scale.mean.tolist(), scale.deviation.tolist(), strict=True)
    return {
        "sites": {str(site): {"mean": mean, "deviation": deviation} for site, mean, deviation in each},
        "joint": scale.joint,
    }


def rendered_to_read(
    decoder: Decoder,
    tokenizer: Any,
    texts: Sequence[Conversation],
    read: Read | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> list[Rendered]:
    """Texts as a model reads them.

    Args:
        decoder: the model's decoder.
        tokenizer: its tokenizer.
        texts: what is rendered.
        read: which tokens will be read; `prompt_last` leaves the answers out, before which some templates write another
            prompt's end than the one that the model answers (no thought is opened). None keeps them.
        chat_template_kwargs: passed on to the chat template.

    Raises:
        DataError: a text is longer than the model has positions for.
    """
    if read == "prompt_last":
        texts = [replace(one, answer=None) for one in texts]
    found = [render(tokenizer, one, chat_template_kwargs=chat_template_kwargs) for one in texts]
    check_lengths(decoder, found, named("item", found), warns=False)
    return found


def projections(
    model: nn.Module,
    tokenizer: Any,
    rendered: Sequence[Rendered],
    units: Mapping[Site, Tensor],
    read: Read,
    *,
    along: Callable[[Tensor, Tensor], Tensor],
    batch_size: int,
) -> Tensor:
    """Project activations on directions, before any calibration.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        rendered: what is read.
        units: site to direction [d] of length 1.
        read: which tokens.
        along: from activations [n, d] and a direction to [n].
        batch_size: rows per pass.

    Returns:
        [n, s] float32, one column per site; nan where there is no token to read.
    """
    kept = [row for row, text in enumerate(rendered) if read == "prompt_last" or len(text.ids) > text.prompt_length]
    values = torch.full((len(rendered), len(units)), torch.nan, dtype=torch.float32)
    if kept:
        chosen = [rendered[row] for row in kept]
        acts = record(model, tokenizer, chosen, units, readout=read, batch_size=batch_size)
        columns = [along(acts.positive[site], direction) for site, direction in units.items()]
        values[kept] = torch.stack(columns, dim=1)
    return values
