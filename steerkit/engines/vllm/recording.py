"""Activations read off a model that vLLM runs: means over spans of tokens, at any places that it knows.

The steps that hold such tokens run as Python, so that reading costs other steps nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerkit.engines.vllm.requests import ASKED, READ
from steerkit.errors import DataError, ModelError
from steerkit.network.sites import Site

__all__ = ["TAKEN", "Reading", "record"]

TAKEN = "steerkit_take"


@dataclass
class Reading:
    """What is read of one request.

    Attributes:
        name: under which it is asked for.
        reads: where.
        start: position of the first token that counts.
        end: position behind the last one.
        sums: by site [d], over the tokens read so far.
    """

    name: str
    reads: tuple[Site, ...]
    start: int
    end: int
    sums: dict[Site, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, asked: Any) -> Reading:
        """What a request carries.

        Args:
            asked: under `READ` of its extra arguments.
        """
        start, end = asked["span"]
        return cls(asked["name"], tuple(map(Site.parse, asked["sites"])), start, end)

    def wants(self, first: int, count: int) -> bool:
        """Whether a step holds tokens that count.

        Args:
            first: position of the request's first token in the step.
            count: its tokens in the step.
        """
        return first < self.end and first + count > self.start

    def read(self, site: Site, stream: Tensor, first: int) -> None:
        """Add the tokens of a step.

        Args:
            site: where they are.
            stream: [t, d] float32, before the site is written.
            first: position of the first one.
        """
        new = stream[max(self.start - first, 0) : self.end - first].sum(dim=0)
        # What is begun anew after preemption is summed anew.
        self.sums[site] = new if first <= self.start else self.sums[site] + new

    def means(self) -> dict[str, list[float]]:
        """By site the mean, as plain data."""
        return {str(site): (one / (self.end - self.start)).tolist() for site, one in self.sums.items()}


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
        DataError: a span that is none of its text.
        ModelError: the engine gave no readings.
    """
    from vllm import SamplingParams

    wanted = [Site.of(site) for site in sites]
    params, names = [], [secrets.token_hex(8) for _ in ids]
    for name, text, (start, end) in zip(names, ids, spans, strict=True):
        if not 0 <= start < end <= len(text):
            raise DataError(f"span {start} to {end}: the text has {len(text)} tokens; give a part of it")
        asked = {"name": name, "sites": list(map(str, wanted)), "span": [start, end]}
        params.append(SamplingParams(temperature=0.0, max_tokens=1, extra_args={ASKED: steering or "", READ: asked}))
    llm.generate([{"prompt_token_ids": list(text)} for text in ids], params, use_tqdm=False)
    (found, *_) = llm.collective_rpc(TAKEN, args=(names,))
    if any(name not in found for name in names):
        raise ModelError("the engine gave no readings; see whether it loaded the plug-in of steerkit")
    rows = {site: [found[name][str(site)] for name in names] for site in wanted}
    return {site: torch.tensor(of_site, dtype=torch.float32) for site, of_site in rows.items()}
