"""Checks of what the doctor was given besides a model: a vector, pairs of answers."""

from __future__ import annotations

from steerkit.checks.doctor.attention_sink import SINK, sink_weights
from steerkit.checks.doctor.case import Case
from steerkit.checks.doctor.judging import hold
from steerkit.errors import DataError, ModelError
from steerkit.evaluate.answer_likeness import ALIKE, answer_likeness
from steerkit.evaluate.setup import Setup
from steerkit.prompts.rendering import spread

__all__ = ["pairs", "sink"]

_LOOKED_AT, _NAMED = 128, 5


def sink(case: Case) -> str:
    """Under the vector that was given, at least half of the heads that park attention on the first token still do."""
    try:
        before = sink_weights(case, steered=False) > SINK
    except ModelError as error:
        return f"not looked at: {error}"
    after = sink_weights(case, steered=True) > SINK
    had, kept = int(before.sum()), int((before & after).sum())
    told = f"{had} of {len(before)} heads have a sink, steered {int(after.sum())}; {had - kept} lose it"
    hold(2 * kept >= had, f"steering breaks the attention sink: {told}")
    return told


def pairs(case: Case) -> str:
    """Tells which pairs have answers that are nearly one thing to the model. Never fails: data is no model's fault."""
    data = case.data
    if data is None or not data.paired:
        return "no pairs"
    places = spread(range(len(data)), _LOOKED_AT)
    try:
        found = answer_likeness(Setup(case.model, case.tokenizer, data.items_at(places)))
    except DataError as error:
        return f"not looked at: {error}"
    alike = [places[place] + 1 for place in found.alike()]
    if not alike:
        return f"the answers of all {len(places)} pairs looked at lie apart (over {ALIKE:g} of what others do)"
    more = "" if len(alike) <= _NAMED else f" and {len(alike) - _NAMED} more"
    listed = ", ".join(map(str, alike[:_NAMED])) + more
    return f"pairs {listed} of {len(places)} looked at: both answers are nearly one thing to the model"
