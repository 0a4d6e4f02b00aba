"""What has been read in one call of `generate`, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import ScopeError
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Pass
from steerkit.tokens.scope import Scope

if TYPE_CHECKING:
    from steerkit.monitor.items import Read
    from steerkit.monitor.monitor import Monitor

__all__ = ["Step", "WatchedCall"]

_RESPONSE = Scope("response")


class Step(NamedTuple):
    """What one pass of `generate` has shown.

    Attributes:
        number: generated tokens read so far, 0 at the prompt's end.
        values: [b] of the token just read: the prompt's last, or one of the response; nan for rows that have ended.
        mean: [b] of the response so far; nan where nothing of it has been read.
    """

    number: int
    values: Tensor
    mean: Tensor


class WatchedCall:
    """What has been read in one call of `generate`.

    Attributes:
        prompt: [b] of the prompt's last token; None where it has not been read.
        values: per response token [b]; nan for rows that have ended.
        mean: [b] of the response so far; nan where nothing of it has been read.
    """

    def __init__(self, monitor: Monitor, settings: Any, facts: Pass) -> None:
        if (getattr(settings, "num_beams", None) or 1) > 1:
            raise ScopeError("watch: beams change their rows from step to step; score the finished texts instead")
        ends = [getattr(settings, name, None) for name in ("eos_token_id", "pad_token_id")]
        self._ends, self._pads = (
            torch.tensor([] if end is None else end, dtype=torch.long, device=facts.device).flatten() for end in ends
        )
        self.prompt: Tensor | None = None
        self.values: list[Tensor] = []
        self.ids: Tensor | None = None
        self.read: dict[Site, Tensor] = {}
        self.mean = torch.full((facts.batch,), torch.nan, device=facts.device, dtype=torch.float32)
        self._monitor = monitor
        self._finished = torch.zeros(facts.batch, dtype=torch.bool, device=facts.device)
        self._sums: dict[Site, Tensor] = {}
        self._count = torch.zeros(facts.batch, device=facts.device, dtype=torch.float32)

    @property
    def tokens(self) -> Tensor:
        """[b, t] one number per response token that the model has read; nan for rows that have ended."""
        return torch.stack(self.values, dim=1) if self.values else self.mean.new_zeros(len(self.mean), 0)

    def place(self, facts: Pass) -> Tensor | None:
        """[b] which column of a pass is read; None where none is.

        Args:
            facts: the pass.

        Raises:
            ScopeError: the pass holds tokens that may be thrown away again (assisted decoding).
        """
        past = facts.past if isinstance(facts.past, int) else int(facts.past)
        assert facts.boundary is not None
        end = past + facts.width
        if end <= facts.boundary:
            return facts.tokens(_RESPONSE).last_prompt()
        if end != facts.boundary + len(self.values) + 1:
            raise ScopeError(
                "watch: this pass holds several tokens behind the prompt, which may be thrown away again (assisted "
                "decoding); score the finished texts instead"
            )
        return torch.full((facts.batch,), facts.width - 1, device=facts.device, dtype=torch.long)

    def add(self, facts: Pass) -> Step:
        """Keep what all sites have shown of one token per row.

        Args:
            facts: the pass.

        Returns:
            The step.
        """
        past = facts.past if isinstance(facts.past, int) else int(facts.past)
        assert facts.boundary is not None
        if past + facts.width <= facts.boundary:
            self.prompt = self._scaled(self.read, "prompt_last")
            return Step(0, self.prompt, self.mean)
        counted = ~self._finished
        if self.ids is not None:
            last = self.ids[:, -1].to(self._finished.device)
            self._finished = self._finished | torch.isin(last, self._ends)
            counted = ~self._finished & ~torch.isin(last, self._pads)
        self._count = self._count + counted
        # The activations themselves: a cosine of means is no mean of cosines.
        means: dict[Site, Tensor] = {}
        for site, h in self.read.items():
            kept = torch.where(counted.to(h.device)[:, None], h, 0.0)
            self._sums[site] = self._sums[site] + kept if site in self._sums else kept
            means[site] = self._sums[site] / self._count.to(h.device)[:, None]
        self.mean = self._scaled(means, "response_mean")
        self.values.append(torch.where(counted, self._scaled(self.read, "response_mean"), torch.nan))
        return Step(len(self.values), self.values[-1], self.mean)

    def _scaled(self, rows: Mapping[Site, Tensor], read: Read) -> Tensor:
        """[b] one number of the activations [b, d] at all sites."""
        columns = [self._monitor.along(site, rows[site]).to(self.mean.device) for site in self._monitor.units]
        return self._monitor.scaled(torch.stack(columns, dim=-1), differences=False, read=read)
