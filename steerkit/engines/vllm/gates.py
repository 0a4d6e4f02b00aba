"""Gates on prompts: what they read of a step, what they decide, and the edits of a gate that has opened."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerkit.engines.vllm.plan import TermPlan
from steerkit.maths.rank_two import TURNS, RankTwo
from steerkit.network.sites import Site

__all__ = ["Prompt", "opened"]

_LOG = logging.getLogger(__name__)


@dataclass
class Prompt:
    """What one gate has read of its request's prompt.

    Attributes:
        plan: the gated vector.
        tokens: of the prompt.
        sums: by read site [d], over the tokens read so far.
        seen: position behind the last token read.
        decided: whether it has been decided; that stays, through preemption too.
        strengths: by written site how strongly the vector is added; empty while the gate is closed.
    """

    plan: TermPlan
    tokens: int
    sums: dict[Site, Tensor] = field(default_factory=dict)
    seen: int = 0
    decided: bool = False
    strengths: dict[Site, float] = field(default_factory=dict)

    @property
    def reads(self) -> tuple[Site, ...]:
        """Where it reads."""
        return () if self.plan.gate is None else self.plan.gate.reads

    def wants(self, first: int, count: int) -> bool:
        """Whether a step holds what the gate reads.

        Args:
            first: position of the request's first token in the step.
            count: its tokens in the step.
        """
        if self.decided or self.plan.gate is None or first >= self.tokens:
            return False
        return self.plan.gate.readout == "mean" or first + count >= self.tokens

    def read(self, site: Site, stream: Tensor, first: int) -> None:
        """Take what the gate needs of the request's tokens in a step.

        Args:
            site: where they are.
            stream: [t, d] float32, before the site is written.
            first: position of the first one.
        """
        assert self.plan.gate is not None
        of_prompt = stream[: max(self.tokens - first, 0)]
        if self.plan.gate.readout == "last":
            self.sums[site] = of_prompt[-1]
            return
        # A prompt that is begun anew after preemption is summed anew; its first token never counts.
        new = of_prompt[max(1 - first, 0) :].sum(dim=0)
        self.sums[site] = new if first == 0 or site not in self.sums else self.sums[site] + new

    def decide(self) -> None:
        """Decide, once the prompt has been read."""
        gate, self.decided = self.plan.gate, True
        assert gate is not None
        count = max(self.tokens - 1, 1) if gate.readout == "mean" else 1
        found = {site: (self.sums[site] / count)[None].cpu() for site in gate.reads}
        self.sums.clear()
        if not all(bool(torch.isfinite(rows).all()) for rows in found.values()):
            _LOG.warning("a gate read activations that are not finite, and stays closed")
            return
        decision = gate.decide(found)
        if not bool(decision.is_open[0]):
            return
        limit = torch.inf if gate.limit is None else gate.limit
        strengths = {site: self.plan.strength * factor for site, factor in self.plan.factors.items()}
        for site, gain in decision.gains.items():
            strengths[site] *= float(gain[0])
        self.strengths = {site: min(max(strength, -limit), limit) for site, strength in strengths.items()}


def opened(edit: RankTwo, strength: float) -> RankTwo:
    """An edit whose strength is settled.

    Args:
        edit: proportional to a strength.
        strength: to be settled.
    """
    weights = edit.weights.clone()
    weights[..., 0] += weights[..., TURNS.index("strength")] * strength
    weights[..., TURNS.index("strength")] = 0.0
    return edit._replace(weights=weights)
