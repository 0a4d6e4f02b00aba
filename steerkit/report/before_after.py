"""Questions answered without and with steering, and one answer token by token."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from steerkit.monitor.token_heat import token_projections
from steerkit.prompts.conversation import Conversation
from steerkit.report.evidence_parts import Heat, Projections, Texts
from steerkit.report.workbench import Workbench

__all__ = ["BeforeAndAfter"]


class BeforeAndAfter:
    """What the model says below, without and above the vector's direction.

    Args:
        bench: model, vector and items.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench

    @cached_property
    def answered(self) -> tuple[list[str], list[str], list[str]]:
        """The questions and one held-out prompt answered below, without and above."""
        prompts = [*map(Conversation.of, self._bench.plan.questions), self._bench.setup.asked[0]]
        bench = self._bench
        bench.step("answering")
        mirrored = 2 * bench.centre - bench.strength
        below, above = bench.setup.trials((bench.vector, strength) for strength in (mirrored, bench.strength))
        trials = (below, above, bench.setup.baseline)
        first, last, baseline = (list(trial.answered(prompts)) for trial in trials)
        return first, baseline, last

    def texts(self) -> list[Texts]:
        """Before and after."""
        return [Texts(*row) for row in zip(self._bench.plan.questions, *self.answered, strict=False)]

    def heat(self, projections: Projections | None) -> Heat | None:
        """One held-out prompt, token by token.

        Args:
            projections: of the held-out items, whose middle counts as zero; None where there is no direction.

        Returns:
            Both answers; None where there is no direction or an answer is empty.
        """
        if self._bench.own is None or projections is None:
            self._bench.missing["heat"] = self._bench.missing["projections"]
            return None
        prompt, (_, baseline, steered) = self._bench.setup.asked[0], self.answered
        if not baseline[-1] or not steered[-1]:
            self._bench.missing["heat"] = "the model gave an empty answer"
            return None
        self._bench.step("token by token")
        before, after = (self._bench.setup.render(replace(prompt, answer=text)) for text in (baseline[-1], steered[-1]))
        trial = self._bench.setup.trial(self._bench.vector, self._bench.strength)
        found = [token_projections(self._bench.setup.baseline, text, self._bench.vector) for text in (before, after)]
        under = token_projections(trial, after, self._bench.vector)
        shift = (under.values - found[1].values)[under.prompt :]
        return Heat(found[0], found[1], projections.middle, float(shift.mean()) if len(shift) else 0.0)
