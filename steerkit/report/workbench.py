"""What all measurements of one report share: model, vector, items, and what is left out with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.suggesting import with_suggestion
from steerkit.methods._base import Method
from steerkit.methods._registry import example_strength, method_of
from steerkit.monitor.token_heat import direction_of
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.report.evidence_parts import EvidencePlan
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["LEFT_OUT", "Workbench"]

LEFT_OUT = "a quick report fits nothing again"


@dataclass(frozen=True, eq=False)
class Workbench:
    """One vector on one model, ready to be measured.

    Attributes:
        model: the model, unsteered.
        tokenizer: its tokenizer.
        vector: the vector.
        held_out: items the vector was not fitted on.
        train: what it was fitted on; None where that is not known.
        plan: how much is measured.
        step: called with a few words before each measurement.
        missing: section to the reason why it is left out; grows on the way.
    """

    model: nn.Module
    tokenizer: Any
    vector: SteeringVector
    held_out: ContrastSet
    train: ContrastSet | None
    plan: EvidencePlan
    step: Callable[[str], None]
    missing: dict[str, str] = field(default_factory=dict)

    @cached_property
    def method(self) -> Method:
        """The vector's method."""
        return method_of(self.vector)

    @cached_property
    def depth(self) -> int:
        """How many blocks the model has."""
        return find_decoder(self.model).num_layers

    @cached_property
    def setup(self) -> Setup:
        """The model with the held-out items."""
        return Setup(
            self.model,
            self.tokenizer,
            self.held_out,
            batch_size=self.plan.batch_size,
            texts=self.plan.texts,
            max_new_tokens=self.plan.new_tokens,
        ).first_neutral(self.plan.neutral)

    @property
    def neutral(self) -> float | None:
        """The strength that changes nothing; None where the method has none."""
        return self.method.neutral_strength

    @property
    def centre(self) -> float:
        """What strengths are mirrored at: the neutral one, else 0."""
        return 0.0 if self.neutral is None else self.neutral

    @cached_property
    def strength(self) -> float:
        """The suggested strength, else one that a budget of costs allows, else a weak one of the method's."""
        vector = self.vector
        if vector.suggested_strength is None and vector.unit == "paper":
            vector = with_suggestion(self.model, self.tokenizer, vector, batch_size=self.plan.batch_size)
        return example_strength(vector)

    @cached_property
    def own(self) -> tuple[Site, Tensor] | None:
        """The vector's first direction [d], with its site; None where it has none."""
        try:
            return direction_of(self.vector)
        except DataError:
            return None
