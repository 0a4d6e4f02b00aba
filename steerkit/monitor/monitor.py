"""TODO monitor.monitor."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.activations.recording import record, record_ids
from steerkit.errors import DataError, ModelError
from steerkit.evaluate.setup import Setup, neutral_texts
from steerkit.maths.directions import unit
from steerkit.methods._protocols import read_direction
from steerkit.methods._registry import method_of
from steerkit.monitor.token_heat import TokenScores, token_projections
from steerkit.monitor.watched import Opening, Reading, Watched
from steerkit.network.decoder import Decoder, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.conversation import Conversation, Message
from steerkit.prompts.rendering import Rendered, render
from steerkit.tokens.clock import PassClock
from steerkit.vector.steering_vector import SteeringVector

if TYPE_CHECKING:
    from steerkit.monitor.watched import Step

__all__ = ["Item", "Monitor", "Read", "conversation_of"]

Item = str | Sequence[Message] | Conversation | Mapping[str, Any]
Read = Literal["prompt_last", "response_mean"]
Kind = Literal["proj", "cos"]
READS: tuple[Read, ...] = ("prompt_last", "response_mean")
KINDS: tuple[Kind, ...] = ("proj", "cos")


def conversation_of(item: Item, *, raw: bool = False) -> Conversation:
    """What is read, from the ways to write it.

    Args:
        item: a prompt, a chat (which may end with its answer), a conversation, or an object with `prompt` (perhaps
            `system` and `response`) or `messages`. Other keys of an object are left alone; an empty response is none.
        raw: leave string prompts as they are, without the chat template.

    Raises:
        DataError: it is none of these.
    """
    if not isinstance(item, Mapping):
        return Conversation.of(item, raw=raw and isinstance(item, str))
    if ("prompt" in item) == ("messages" in item):
        raise DataError(f"give 'prompt' or 'messages'; the object has {', '.join(map(repr, item)) or 'nothing'}")
    if "messages" in item:
        turns = item["messages"]
        empty = isinstance(turns, list) and turns[1:] and turns[-1] == {"role": "assistant", "content": ""}
        return Conversation.of(turns[:-1] if empty else turns)
    prompt = item["prompt"]
    return Conversation.of(
        prompt, answer=item.get("response") or None, system=item.get("system"), raw=raw and isinstance(prompt, str)
    )


class _Scale(NamedTuple):
    """Mean [s] and standard deviation [s] over neutral texts at each site, and that of the mean over sites."""

    mean: Tensor
    deviation: Tensor
    joint: float


class Monitor:
    """Reads one vector's direction in one model.

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
            model, tokenizer, neutral=neutral, batch_size=batch_size, chat_template_kwargs=chat_template_kwargs
        )
        self._directions = _directions(vector, sites)
        self._decoder: Decoder = find_decoder(model)
        self._taps = locate(model, self._directions)
        # Under the names that reading uses (a raw output is the plain one where no post-norm follows).
        self._units = dict(zip(self._taps, self._directions.values(), strict=True))
        # What reading while generating needs, by device: nothing may wait for a copy there.
        self._placed: dict[tuple[str, torch.device], Tensor] = {}
        self._scales: dict[Read, _Scale] = {}
        self._middles: dict[Site, float] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where is read."""
        return tuple(self._directions)

    def score(self, items: Sequence[Item], *, raw: bool = False) -> Tensor:
        """One number per item.

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
            DataError: one string instead of a list, no item, or one that is none.
        """
        if isinstance(items, str):
            raise DataError("monitor: got one string; give a list of prompts")
        kwargs = self._setup.chat_template_kwargs
        listed = [conversation_of(item, raw=raw) for item in items]
        if read == "prompt_last":
            listed = [replace(one, answer=None) for one in listed]
        found = [render(self.tokenizer, one, chat_template_kwargs=kwargs) for one in listed]
        if not found:
            raise DataError("monitor: got no prompts; give at least one")
        return found

    def project(self, rendered: Sequence[Rendered], read: Read) -> Tensor:
        """Raw numbers, before calibration.

        Args:
            rendered: what is read.
            read: which tokens.

        Returns:
            [n, s], one column per site; nan where there is no token to read.
        """
        kept = [row for row, text in enumerate(rendered) if read == "prompt_last" or len(text.ids) > text.prompt_length]
        values = torch.full((len(rendered), len(self._units)), torch.nan)
        if kept:
            acts = record(
                self.model,
                self.tokenizer,
                [rendered[row] for row in kept],
                self._units,
                readout=read if read == "response_mean" else "prompt_last",
                batch_size=self._setup.batch_size,
            )
            columns = [self._along(acts.positive[site], direction) for site, direction in self._units.items()]
            values[kept] = torch.stack(columns, dim=1)
        return values

    def scaled(self, values: Tensor, *, differences: bool, read: Read | None = None) -> Tensor:
        """One number of the raw ones of all sites, calibrated where that was asked for.

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
        scale = self._scale(chosen)
        mean, deviation = (
            self._on(values.device, f"{chosen} {name}", one).to(values.dtype)
            for name, one in (("mean", scale.mean), ("deviation", scale.deviation))
        )
        moved = values if differences else values - mean
        return (moved / deviation).mean(dim=-1) / scale.joint

    def heat(self, item: Item, *, site: Site | str | None = None, raw: bool = False) -> TokenScores:
        """Every token of a text with its own projection, raw.

        Args:
            item: see `score`.
            site: where; None takes the first that is read. At a site that is not read, its direction is taken.
            raw: leave a string prompt as it is.

        Returns:
            The tokens and their values, read at each token itself.
        """
        (rendered,) = self.rendered([item], raw=raw)
        place = _place(site) or self.sites[0]
        direction = self._directions.get(place, self._directions[self.sites[0]])
        return token_projections(self._setup.baseline, rendered, self.vector, site=place, direction=direction)

    def middle(self, site: Site | str | None = None) -> float:
        """Where the tokens of neutral texts lie: the mean projection of all but each text's first, answers included.

        It is raw and counts tokens as `heat` shows them, whatever the monitor reads.

        Args:
            site: one of `sites`; None takes the first.

        Raises:
            DataError: nothing is read at the site.
        """
        place = _place(site) or self.sites[0]
        if place not in self._directions:
            raise DataError(f"{place} is not read; give one of {', '.join(map(str, self.sites))}")
        if place not in self._middles:
            with self._unsteered():
                rows = [record_ids(self.model, [text.ids], [place]) for text in self.rendered(self._neutral())]
                values = [next(iter(row.values()))[0][1:] @ self._directions[place] for row in rows]
            self._middles[place] = float(torch.cat(values).mean())
        return self._middles[place]

    @contextlib.contextmanager
    def watch(self, callback: Callable[[Step], object] | None = None) -> Iterator[Watched]:
        """Read while `model.generate` runs, whoever calls it.

        What is read is the value as it flows on: at a site that is being steered, the one after the edit, whichever
        context was entered first. Whatever `read` is, the prompt's end counts in the scale of `prompt_last` and the
        response in that of `response_mean`: its running mean ends as the `response_mean` score of the text, but for the
        last token, which is never fed to the model, so that nothing is read of it. With `kind="cos"` that mean is, as
        there, the cosine of the mean activation, not the mean of the tokens' cosines. End and pad tokens do not count.
        Of guidance (`guidance_scale`) the prompt's own passes are read, not those of the negative prompt. Under a gated
        vector that writes before it has decided, the number at the prompt's end is that of the pass with writes, in
        rows too whose gate stayed closed.

        Args:
            callback: called after every pass with a `Step`, whose tensors are on the model's device: nothing waits for
                the accelerator unless the callback looks at them.

        Yields:
            What has been read, one entry per call of `generate`.

        Raises:
            ModelError: the model is compiled, or is being steered from another thread.
            DataError: the neutral texts have no answers to calibrate the response on.
        """
        model, decoder = self._decoder.model, self._decoder
        modules = [self.model, model, decoder.body, *decoder.blocks]
        if any(hasattr(one, "_orig_mod") or getattr(one, "_compiled_call_impl", None) is not None for one in modules):
            raise ModelError("watch: compiled code does not call what reads it; load the model without torch.compile")
        if self.calibrated:
            for read in READS:  # before, not in the middle of somebody's generate
                self._scale(read)
        clock = PassClock.of(model) or PassClock(model, decoder.body)
        if clock.users and clock.owner != threading.get_ident():
            raise ModelError("watch: this model object is being steered from another thread; leave that context first")
        watched = Watched(self, clock, callback)
        with contextlib.ExitStack() as stack:
            clock.attach()
            stack.callback(clock.detach)
            # Appended: the clock's own hook comes first, and steering's dispatchers are prepended.
            stack.callback(model.register_forward_pre_hook(Opening(watched), with_kwargs=True).remove)
            for site, tap in self._taps.items():
                hook, module = Reading(watched, site, tap), tap.module
                if tap.side == "input":
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                else:
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield watched

    def along(self, site: Site, h: Tensor) -> Tensor:
        """Raw numbers of activations at one site.

        Args:
            site: where, under the name that `record` uses.
            h: [..., d].

        Returns:
            [...] float32.
        """
        return self._along(h.detach().float(), self._on(h.device, str(site), self._units[site]))

    def _along(self, h: Tensor, direction: Tensor) -> Tensor:
        found = h @ direction
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
        clock = PassClock.of(self._decoder.model)
        return contextlib.nullcontext() if clock is None else clock.suspended()

    def _scale(self, read: Read) -> _Scale:
        """The scale of one way to read, found when it is first asked for.

        Raises:
            DataError: too few neutral texts can be read, or they are all alike.
        """
        if read not in self._scales:
            with self._unsteered():
                values = self.project(self.rendered(self._neutral(), read=read), read)
            values = values[~values.isnan().any(dim=1)]
            if len(values) < 3:
                raise DataError(f"monitor: {len(values)} neutral texts can be read; give at least 3, with answers")
            mean, deviation = values.mean(dim=0), values.std(dim=0)
            if not bool((deviation > 0).all()):
                raise DataError("monitor: all neutral texts have the same projection; give different ones")
            joint = float(((values - mean) / deviation).mean(dim=1).std())
            self._scales[read] = _Scale(mean, deviation, joint)
        return self._scales[read]


def _place(site: Site | str | None) -> Site | None:
    return Site.parse(site) if isinstance(site, str) else site


def _directions(vector: SteeringVector, sites: Sequence[Site | str] | None) -> dict[Site, Tensor]:
    """Directions [d] of length 1 at the sites that are read.

    Raises:
        DataError: none of the sites has a direction.
    """
    method = method_of(vector)
    wanted = vector.reads if sites is None else [Site.parse(one) if isinstance(one, str) else one for one in sites]
    found = {site: read_direction(method, vector.params(site)) for site in wanted}
    kept = {site: unit(direction.float()) for site, direction in found.items() if direction is not None}
    if not kept or (sites is not None and len(kept) < len(found)):
        raise DataError(f"{vector.method} has no single direction to project on at {', '.join(map(str, found))}")
    return kept
