"""`Request`: what is asked of a model that is served. One form for all ways of serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerkit.composition.terms import Composition
from steerkit.errors import DataError
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["MOST_LOGPROBS", "Request"]

MOST_LOGPROBS = 20
_MOST_STOPS = 16
_MOST_CHOICES = 128


@dataclass(frozen=True)
class Request:
    """One prompt and how it is answered.

    Attributes:
        prompt: a chat as messages (which goes through the chat template), a text that is taken as it stands, or ids.
        steering: a composition or its text, whose vectors are looked up by name; or vectors; None is the model itself.
        max_tokens: the longest answer; None as long as is allowed.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: the share of the likeliest tokens that is drawn from.
        top_k: how many of the likeliest tokens are drawn from; 0 for all.
        seed: of drawn tokens; the same request then has the same answer, whatever is answered beside it. Choice i of
            several is drawn with `seed + i`. None draws one.
        stop: texts before which the answer ends.
        n: how many answers.
        logprobs: how many of the likeliest tokens are told at each place, besides the chosen one; None for none at all.
        kl: tell by each token how far its distribution is from that of the unsteered model, which reads along.
        probe: name of a vector, or a vector, whose reading is told by each token; None for none.
        tools: what the chat template is given as tools.
        template: what else the chat template reads.

    Raises:
        DataError: a value that is out of its range.
    """

    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]]
    steering: Composition | str | Sequence[SteeringVector] | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    kl: bool = False
    probe: SteeringVector | str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 10**9, optional=True)
        _within("n", self.n, 1, _MOST_CHOICES)
        _within("top_k", self.top_k, 0, 10**9)
        _within("logprobs", self.logprobs, 0, MOST_LOGPROBS, optional=True)
        _within("seed", self.seed, -(2**63), 2**63 - 1, optional=True)
        _between("temperature", self.temperature, 0.0, 2.0)
        _between("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise DataError("top_p is above 0; temperature 0 takes the likeliest token")
        if len(self.stop) > _MOST_STOPS or not all(isinstance(one, str) and one for one in self.stop):
            raise DataError(f"stop: give at most {_MOST_STOPS} texts, none of them empty")


def _within(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DataError(f"{name}: got {repr(value)[:40]}; give a whole number from {low} to {high}")


def _between(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise DataError(f"{name}: got {repr(value)[:40]}; give a number from {low:g} to {high:g}")
