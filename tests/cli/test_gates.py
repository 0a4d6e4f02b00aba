"""`steerkit gates`: a table of operating points, and the vector at the chosen one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerkit.vector.steering_vector import SteeringVector
from tests.program import width

ASKED = ("gates", "gated.safetensors", "--data", "asked.jsonl")


def test_the_command_shows_points_and_writes_the_chosen_one(furnished: Path, tiny: Path, answer: Any, cli: Any) -> None:
    words = (*ASKED, "--model", tiny, "--confidence", 0.5, "--max-false-alarm", 0.5)
    told = answer(*words, "--out", "new.safetensors")
    assert [(row["max_false_alarm"], row["chosen"]) for row in told["points"]] == [(0.2, False), (0.5, True)]
    written = SteeringVector.load("new.safetensors")
    chosen = told["points"][1]
    assert written.extra["gate"]["max_false_alarm"] == 0.5
    assert chosen["opens_above"] == float(written.tensors["shared/threshold"][0])
    assert written.held_out["gate"]["opened"] == chosen["opened"]
    assert {kind: counts["of"] for kind, counts in chosen["opened"].items()} == {"positive": 4, "ordinary": 4}
    shown = cli(*words)
    assert shown.code == 0
    assert all(word in shown.out for word in ("->", "harmful", "ordinary", "50 %", "Bound"))
    assert width(shown.out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (ASKED, "4 calibration prompts cannot promise at most 5 % false alarms"),
        (("gates", "gated.safetensors"), "comes from no recipe"),
        (("gates", "v.safetensors"), "has no gate"),
        ((*ASKED, "--max-false-alarm", "5"), "max_false_alarm 5.0: give a share"),
    ],
)
def test_the_command_refuses_what_it_cannot_promise(
    furnished: Path, tiny: Path, cli: Any, words: tuple[str, ...], message: str
) -> None:
    ended = cli(*words, "--model", tiny)
    assert ended.code == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1
