"""Activations read off a model that vLLM runs: means over tokens of each text, and how long its tokens are.

The steps that hold such tokens run as Python, so that reading costs other steps nothing. Of a text nothing is kept but
sums, whatever chunks its prompt comes in.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.activations.token_scale import Moments
from steerkit.engines.vllm import names
from steerkit.engines.vllm.requests import ADMISSION, ASKED, READ
from steerkit.errors import DataError, ModelError
from steerkit.network.sites import Site

__all__ = ["TAKEN", "Part", "Read", "Reading", "ask", "record", "spans_of"]

TAKEN = "steerkit_take"
Spans = tuple[tuple[int, int], ...]


class Part(NamedTuple):
    """What is read of one text at one site, in spans of its tokens, each from the first to behind the last.

    Attributes:
        tokens: whose mean is taken.
        counted: whose lengths are told.
    """

    tokens: Spans
    counted: Spans = ()

    def check(self, length: int) -> None:
        """Hold the spans to the text.

        Args:
            length: tokens of it.

        Raises:
            DataError: a span is none of the text.
        """
        for start, end in (*self.tokens, *self.counted):
            if not 0 <= start < end <= length:
                raise DataError(f"span {start} to {end}: the text has {length} tokens; give a part of it")


class Read(NamedTuple):
    """What was read of one text at one site, float32 on the CPU.

    Attributes:
        mean: [d] of the tokens asked for; empty where none were.
        norms: [n] of the tokens counted, in their order.
        middle: [d] their mean.
        power: [d] sum of their squared distances from it.
    """

    mean: Tensor
    norms: Tensor
    middle: Tensor
    power: Tensor


@dataclass
class _Sums:
    """What is known of a text at one site so far."""

    total: Tensor
    norms: list[Tensor] = field(default_factory=list)
    moments: Moments | None = None


@dataclass
class Reading:
    """What is read of one request.

    Attributes:
        name: under which it is asked for.
        parts: by site what is read there.
        sums: by site what is known so far.
    """

    name: str
    parts: Mapping[Site, Part]
    sums: dict[Site, _Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = [span for part in self.parts.values() for span in (*part.tokens, *part.counted)]
        self._start, self._end = min(start for start, _ in ends), max(end for _, end in ends)

    @classmethod
    def of(cls, asked: Any) -> Reading:
        """What a request carries.

        Args:
            asked: under `READ` of its extra arguments.
        """
        parts = {Site.parse(site): Part(*map(_spans, spans)) for site, spans in asked["sites"].items()}
        return cls(asked["name"], parts)

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where."""
        return tuple(self.parts)

    def wants(self, first: int, count: int) -> bool:
        """Whether a step holds tokens that count.

        Args:
            first: position of the request's first token in the step.
            count: its tokens in the step.
        """
        return first < self._end and first + count > self._start

    def read(self, site: Site, stream: Tensor, first: int) -> None:
        """Take the tokens of a step.

        Args:
            site: where they are.
            stream: [t, d] float32, before the site is written.
            first: position of the first one.
        """
        part = self.parts[site]
        if first <= self._start or site not in self.sums:  # what is begun anew after preemption is summed anew
            self.sums[site] = _Sums(torch.zeros(stream.shape[1:], dtype=torch.float32, device=stream.device))
        sums = self.sums[site]
        for rows in _within(part.tokens, stream, first):
            sums.total += rows.sum(dim=0)
        for rows in _within(part.counted, stream, first):
            middle = rows.mean(dim=0)
            new = Moments(len(rows), middle, (rows - middle).square().sum(dim=0))
            sums.moments = new if sums.moments is None else sums.moments.joined(new)
            sums.norms.append(torch.linalg.vector_norm(rows, dim=-1))

    def settle(self) -> Reading:
        """Bring what is known to the host; nothing more is read."""
        for site, sums in self.sums.items():
            moments = sums.moments and Moments(sums.moments.tokens, sums.moments.mean.cpu(), sums.moments.power.cpu())
            self.sums[site] = _Sums(sums.total.cpu(), [torch.cat(sums.norms).cpu()] if sums.norms else [], moments)
        return self

    def result(self) -> dict[str, list[bytes]]:
        """By site what `Read` holds, as bytes."""
        found = {}
        for site, sums in self.settle().sums.items():
            count, nothing = (
                sum(end - start for start, end in self.parts[site].tokens),
                torch.empty(0, dtype=torch.float32),
            )
            moments = sums.moments or Moments(0, nothing, nothing)
            mean, norms = sums.total / count if count else nothing, sums.norms[0] if sums.norms else nothing
            read = Read(mean, norms, moments.mean, moments.power)
            found[str(site)] = [one.float().numpy().tobytes() for one in read]
        return found


def _spans(given: Any) -> Spans:
    return tuple((int(start), int(end)) for start, end in given)


def _within(spans: Spans, stream: Tensor, first: int) -> Iterable[Tensor]:
    """The rows of a step that lie in spans, span by span."""
    for start, end in spans:
        rows = stream[max(start - first, 0) : max(end - first, 0)]
        if len(rows):
            yield rows


def spans_of(tokens: Iterable[int]) -> Spans:
    """Positions as spans.

    Args:
        tokens: positions, from the first one on.

    Example:
        >>> spans_of([1, 2, 3, 7, 9, 10])
        ((1, 4), (7, 8), (9, 11))
    """
    spans: list[tuple[int, int]] = []
    for token in tokens:
        if spans and spans[-1][1] == token:
            spans[-1] = spans[-1][0], token + 1
        else:
            spans.append((token, token + 1))
    return tuple(spans)


def ask(
    llm: Any, texts: Sequence[Sequence[int]], parts: Sequence[Mapping[Site, Part]], *, steering: str | None = None
) -> list[dict[Site, Read]]:
    """Run texts, and read parts of them.

    Args:
        llm: vLLM's `LLM`, which this plug-in has been loaded by.
        texts: token ids of each text.
        parts: for each text what is read, by site.
        steering: a composition under which the texts run.

    Returns:
        For each text what was read, by site.

    Raises:
        DataError: a span that is none of its text, or a text longer than the engine takes.
        SiteError: a site that the engine does not know.
        ModelError: the engine gave no readings.
    """
    from vllm import SamplingParams

    why = names.unread(llm)
    if why is not None:
        raise ModelError(why)
    longest, admission = names.longest(llm), getattr(llm.llm_engine.input_processor, ADMISSION)
    params, called = [], [secrets.token_hex(8) for _ in texts]
    for name, text, of_text in zip(called, texts, parts, strict=True):
        if len(text) >= longest:
            raise DataError(f"a text has {len(text)} tokens, and this vLLM was started for fewer than {longest}")
        for part in of_text.values():
            part.check(len(text))
        asked = {"name": name, "sites": {str(site): list(part) for site, part in of_text.items()}}
        admission.check_reading(asked, len(text))
        extra = {ASKED: steering or "", READ: asked}
        params.append(SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=extra))
    prompts: Any = [{"prompt_token_ids": list(text)} for text in texts]
    llm.generate(prompts, params, use_tqdm=False)
    (found, *_) = llm.collective_rpc(TAKEN, args=(called,))
    if any(name not in found for name in called):
        raise ModelError("the engine gave no readings; see whether it loaded the plug-in of steerkit")
    return [
        {site: Read(*map(_tensor, found[name][str(site)])) for site in of_text}
        for name, of_text in zip(called, parts, strict=True)
    ]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.empty(0, dtype=torch.float32)


def record(
    llm: Any,
    ids: Sequence[Sequence[int]],
    sites: Sequence[Site | str],
    spans: Sequence[tuple[int, int]],
    *,
    steering: str | None = None,
) -> dict[Site, Tensor]:
    """Read activations of texts, each as the mean over a span of its tokens.

    Args:
        llm: vLLM's `LLM`, which this plug-in has been loaded by.
        ids: token ids of each text.
        sites: where, of the kinds that the engine was started with.
        spans: for each text the first token that counts and the one behind the last, from 0.
        steering: a composition under which the texts run.

    Returns:
        site to [n, d] float32, one row per text.

    Raises:
        SteerError: see `ask`.
    """
    wanted = [Site.of(site) for site in sites]
    parts = [dict.fromkeys(wanted, Part((span,))) for span in spans]
    found = ask(llm, ids, parts, steering=steering)
    return {site: torch.stack([of_text[site].mean for of_text in found]) for site in wanted}
