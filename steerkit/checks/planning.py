"""`plan`: what a steering would do, before it is done. Nothing is attached but for the time that is measured.

For every vector and site: the module, the tensor's shape, device and dtype, the scope and the strength in both units.
What the model lacks is reported with the reason instead of raised, so that one run shows every mistake. Memory is
counted from the config, time is measured on a few passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from steerkit.checks.memory_forecast import Memory, forecast_memory
from steerkit.checks.planned_edits import PlannedEdit, edits_of, shape_of
from steerkit.checks.time_forecast import Time, forecast_time
from steerkit.errors import DataError, SteerError
from steerkit.network.decoder import find_decoder
from steerkit.steering.strengths import Strength, vectors_of
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["SteeringPlan", "plan"]


@dataclass(frozen=True)
class SteeringPlan:
    """What a steering would do.

    Attributes:
        model: the model's class.
        batch_size: rows.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens of each answer.
        edits: every vector at every site, in order.
        problems: why it cannot be done.
        warnings: what may make it do something else than it did where it was fitted.
        memory: a forecast.
        time: a forecast; None where it was not measured.
    """

    model: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    edits: tuple[PlannedEdit, ...]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    memory: Memory
    time: Time | None

    @property
    def ok(self) -> bool:
        """Whether `steer` would take it."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON can hold it, with `ok` and the memory's total."""
        found = asdict(self)
        found["memory"]["total"] = self.memory.total
        return {"ok": self.ok, **found}


def plan(
    model: nn.Module,
    vectors: SteeringVector | Sequence[SteeringVector],
    *,
    strength: Strength | None = None,
    scope: str | None = None,
    unit: Literal["paper", "norm"] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 128,
    measure: bool = True,
) -> SteeringPlan:
    """Find out what `steer` would do with these arguments, and what it would cost.

    Args:
        model: any decoder-only transformers model, wrapped or not.
        vectors: one vector or several.
        strength: as for `steer`.
        scope: as for `steer`.
        unit: as for `steer`.
        tokenizer: the model's, to compare chat templates and for scopes by role.
        batch_size: rows of the forecast.
        prompt_tokens: tokens of each prompt in the forecast.
        new_tokens: tokens of each answer in the forecast.
        measure: measure the time, where there is no problem; runs a few short passes.

    Returns:
        The plan; its `ok` says whether `steer` would take it.

    Raises:
        DataError: a size below 1.
        SiteError: no decoder whose blocks can be found.
        VectorFileError: something else than vectors, or none.
    """
    for name, size in {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}.items():
        if size < 1:
            raise DataError(f"{name} is at least 1, got {size}")
    listed, decoder = vectors_of(vectors), find_decoder(model)
    options: dict[str, Any] = {"strength": strength, "scope": scope, "unit": unit, "tokenizer": tokenizer}
    edits: list[PlannedEdit] = []
    problems: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, vector in enumerate(listed, start=1):
            own, found = edits_of(model, decoder, vector, number, options, tokenizer)
            edits += [replace(edit, shape=shape_of(edit, batch_size, prompt_tokens)) for edit in own]
            problems += found
    timed = None
    if measure and not problems:
        try:
            timed = forecast_time(model, decoder, listed, options, batch_size, prompt_tokens, new_tokens)
        except SteerError as error:  # what only a pass can tell, such as the number of rows
            problems.append(str(error))
    return SteeringPlan(
        model=type(decoder.model).__name__,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        edits=tuple(edits),
        problems=tuple(dict.fromkeys(problems)),
        warnings=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
        memory=forecast_memory(model, decoder, listed, batch_size, prompt_tokens, new_tokens),
        time=timed,
    )
