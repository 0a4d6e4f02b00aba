"""Monitor: how far a model's activations lie along a vector's direction, for prompts, answers, and while it generates.

    proj(text) = a . u          cos(text) = a . u / |a|          u = v / |v|, at the vector's site
    calibrated = (proj(text) - mean over neutral texts) / standard deviation over neutral texts

with `a` the activation of the prompt's last token (read without any answer: what the model is about to be like) or the
mean over the answer's tokens. Of a vector with several sites the number is the mean over sites of the calibrated
numbers, brought to standard deviation 1 over the neutral texts again; uncalibrated, the mean of the projections.

Chen, Arditi, Sleight, Evans, Lindsey (2025), "Persona Vectors: Monitoring and Controlling Character Traits in Language
Models", arXiv 2507.21509.

Where this file departs. The paper shows raw projections; here they count in standard deviations of shipped neutral
texts unless asked otherwise, so that vectors and layers can be compared. As the paper finds, the number tells
conditions (system prompts, many-shot prompts) apart better than single answers under one condition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerkit.activations.neutral_scale import NeutralScale
from steerkit.activations.recording import record_ids
from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup
from steerkit.maths.directions import coordinates
from steerkit.methods._read_directions import directions_of, site_of
from steerkit.monitor.items import KINDS, READS, Item, Kind, Read, conversation_of
from steerkit.monitor.token_heat import TokenScores, token_projections
from steerkit.monitor.watched import Watched, watching
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import Rendered
from steerkit.steering.readings import projections, rendered_to_read
from steerkit.tokens.clock import PassClock
from steerkit.vector.fitted_rendering import as_fitted
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.monitor.watched_call import Step

__all__ = ["Monitor"]


class Monitor:
    """Projects a model's activations on a vector's direction.

    The neutral texts are read once, when they are first needed, and without any steering.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer; never changed.
        vector: whose direction; its sites that have one are read.
        read: `prompt_last` (the prompt's last token) or `response_mean` (mean over the answer's tokens).
        kind: `proj` (projection) or `cos` (cosine).
        calibrated: count in standard deviations of neutral texts, from their mean; else raw numbers.
        sites: some of the vector's sites; None takes all that have a direction.
        neutral: answered prompts to calibrate on; None takes the shipped ones.
        batch_size: rows per pass.
        chat_template_kwargs: passed on to the chat template.

    Raises:
        DataError: no site has a direction, or an unknown `read` or `kind`.
        VectorMismatchError: the vector was fitted on a model of another width or depth.
        SiteError: the model lacks a site.

    Example:
        monitor = steerkit.Monitor(model, tokenizer, vector)
        monitor.score(["How are you?"])  # tensor([0.4]), in standard deviations of neutral prompts
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        vector: SteeringVector,
        *,
        read: Read = "prompt_last",
        kind: Kind = "proj",
        calibrated: bool = True,
        sites: Sequence[Site | str] | None = None,
        neutral: Sequence[Conversation] | None = None,
        batch_size: int = 16,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, allowed in (("read", read, READS), ("kind", kind, KINDS)):
            if value not in allowed:
                raise DataError(f"{name} {value!r}: give {' or '.join(allowed)}")
        vector.check(model)
        self.model, self.tokenizer, self.vector = model, tokenizer, vector
        self.read, self.kind, self.calibrated = read, kind, calibrated
        self._setup = Setup(
            model,
            tokenizer,
            neutral=neutral,
            batch_size=batch_size,
            chat_template_kwargs=as_fitted([vector], tokenizer, chat_template_kwargs),
        )
        self._directions = directions_of(vector, sites)
        self.decoder: Decoder = find_decoder(model)
        self.taps = locate(model, self._directions)
        # Under the names that reading uses (a raw output is the plain one where no post-norm follows).
        self.units = dict(zip(self.taps, self._directions.values(), strict=True))
        # What reading while generating needs, by device: nothing may wait for a copy there.
        self._placed: dict[tuple[str, torch.device], Tensor] = {}
        self._scales: dict[Read, NeutralScale] = {}
        self._middles: dict[Site, float] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that are read."""
        return tuple(self._directions)

    def score(self, items: Sequence[Item], *, raw: bool = False) -> Tensor:
        """Score every item: how far it lies along the direction.

        Inside a `steer` context the steered model is read, after the edit where a site is written; scopes that depend
        on the prompt's end then need `prompt_lengths`. The calibration stays that of the unsteered model.

        Args:
            items: prompts, chats, conversations, or objects with `prompt` and perhaps `response`, or `messages`.
            raw: leave string prompts as they are, without the chat template.

        Returns:
            [n] float32; nan for an item without an answer where answers are read.

        Raises:
            DataError: an item is none of these, or there is none.
        """
        rendered = self.rendered(items, raw=raw, read=self.read)
        return self.scaled(self.project(rendered, self.read), differences=False)

    def rendered(self, items: Sequence[Item], *, raw: bool = False, read: Read | None = None) -> list[Rendered]:
        """The items as the model reads them.

        Args:
            items: see `score`.
            raw: leave string prompts as they are.
            read: which tokens will be read; `prompt_last` leaves the answers out, before which some templates write
                another prompt's end than the one that the model answers (no thought is opened). None keeps them.

        Raises:
            DataError: one string instead of a list, no item, or one that is none or longer than the model has
                positions for.
        """
        if isinstance(items, str):
            raise DataError("monitor: got one string; give a list of prompts")
        listed = [conversation_of(item, raw=raw) for item in items]
        if not listed:
            raise DataError("monitor: got no prompts; give at least one")
        return rendered_to_read(self.decoder, self.tokenizer, listed, read, self._setup.chat_template_kwargs)

    def project(self, rendered: Sequence[Rendered], read: Read) -> Tensor:
        """Project activations on the directions, before any calibration.

        Args:
            rendered: what is read.
            read: which tokens.

        Returns:
            [n, s], one column per site; nan where there is no token to read.
        """
        return projections(
            self.model,
            self.tokenizer,
            rendered,
            self.units,
            read,
            along=self._along,
            batch_size=self._setup.batch_size,
        )

    def scaled(self, values: Tensor, *, differences: bool, read: Read | None = None) -> Tensor:
        """Combine the projections at all sites into one number, calibrated where that was asked for.

        Args:
            values: [..., s].
            differences: they are differences of two projections, from which no mean is taken.
            read: in whose scale; None takes the monitor's own.

        Returns:
            [...]
        """
        if not self.calibrated:
            return values.mean(dim=-1)
        chosen = read or self.read
        scale = self.scale(chosen)
        mean, deviation = (
            self._on(values.device, f"{chosen} {name}", one).to(values.dtype)
            for name, one in (("mean", scale.mean), ("deviation", scale.deviation))
        )
        moved = values if differences else values - mean
        return (moved / deviation).mean(dim=-1) / scale.joint

    def heat(self, item: Item, *, site: Site | str | None = None, raw: bool = False) -> TokenScores:
        """Project every token of a text, in activation units.

        Args:
            item: see `score`.
            site: where; None takes the first that is read. At a site that is not read, its direction is taken.
            raw: leave a string prompt as it is.

        Returns:
            The tokens and their values, read at each token itself.
        """
        (rendered,) = self.rendered([item], raw=raw)
        place = site_of(site) or self.sites[0]
        direction = self._directions.get(place, self._directions[self.sites[0]])
        return token_projections(self._setup.baseline, rendered, self.vector, site=place, direction=direction)

    def middle(self, site: Site | str | None = None) -> float:
        """Find the mean projection of the tokens of neutral texts, answers included, each text's first token left out.

        It is raw and counts tokens as `heat` shows them, whatever the monitor reads.

        Args:
            site: one of `sites`; None takes the first.

        Raises:
            DataError: nothing is read at the site.
        """
        place = site_of(site) or self.sites[0]
        if place not in self._directions:
            raise DataError(f"{place} is not read; give one of {', '.join(map(str, self.sites))}")
        if place not in self._middles:
            with self._unsteered():
                rows = [record_ids(self.model, [text.ids], [place]) for text in self.rendered(self._neutral())]
                values = [coordinates(next(iter(row.values()))[0][1:], self._directions[place]) for row in rows]
            self._middles[place] = float(torch.cat(values).mean())
        return self._middles[place]

    @contextlib.contextmanager
    def watch(self, callback: Callable[[Step], object] | None = None) -> Iterator[Watched]:
        """Read the model while its `generate` runs, whoever calls it.

        At a steered site the value after the edit is read, whichever context was entered first. The prompt's last
        token counts in the scale of `prompt_last`, response tokens in that of `response_mean`, whatever `read` is. The
        running mean of the response is the `response_mean` score of the text so far; the last token is never fed to the
        model, so nothing is read of it. With `kind="cos"` it is the cosine of the mean activation, not the mean of
        cosines. Tokens that end or pad a row do not count. Under guidance (`guidance_scale`) only the passes of the
        prompt itself are read, not those of the negative prompt. A gated vector may write into the prompt's pass before
        its gate has decided; the number at the prompt's end then includes what was written, also in rows whose gate
        stays closed.

        Args:
            callback: called after every pass with a `Step`, whose tensors are on the model's device: nothing waits for
                the accelerator unless the callback looks at them.

        Yields:
            What has been read, one entry per call of `generate`.

        Raises:
            ModelError: the model is compiled, or is being steered from another thread.
            DataError: the neutral texts have no answers to calibrate the response on.
        """
        with watching(self, callback) as watched:
            yield watched

    def along(self, site: Site, h: Tensor) -> Tensor:
        """Project activations at one site.

        Args:
            site: where, under the name that `record` uses.
            h: [..., d].

        Returns:
            [...] float32.
        """
        return self._along(h.detach().float(), self._on(h.device, str(site), self.units[site]))

    def _along(self, h: Tensor, direction: Tensor) -> Tensor:
        found = coordinates(h, direction)
        return found / torch.linalg.vector_norm(h, dim=-1) if self.kind == "cos" else found

    def _on(self, device: torch.device, name: str, one: Tensor) -> Tensor:
        """A tensor on a device, copied there once."""
        if (name, device) not in self._placed:
            with torch.inference_mode(mode=False):
                self._placed[name, device] = one.to(device)
        return self._placed[name, device]

    def _neutral(self) -> list[Conversation]:
        return neutral_texts() if self._setup.neutral is None else list(self._setup.neutral)

    def _unsteered(self) -> contextlib.AbstractContextManager[None]:
        clock = PassClock.of(self.decoder.model)
        return contextlib.nullcontext() if clock is None else clock.suspended()

    def scale(self, read: Read) -> NeutralScale:
        """Find mean and standard deviation over neutral texts, once for each way to read.

        Args:
            read: which tokens.

        Raises:
            DataError: too few neutral texts can be read, or they are all alike.
        """
        if read not in self._scales:
            with self._unsteered():
                values = self.project(self.rendered(self._neutral(), read=read), read)
            self._scales[read] = NeutralScale.of(values)
        return self._scales[read]
