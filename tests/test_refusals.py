"""The labelled answers, the figures that are counted on them, and what the package states of them."""

from __future__ import annotations

import json

import pytest

from benchmarks import refusals, results
from steerkit.errors import UnknownNameError
from steerkit.evaluate.scorers.refusal import stated_accuracy

ANSWERS = refusals.answers()


def test_at_least_300_answers_of_two_models_are_labelled_and_none_is_both() -> None:
    counted = {model: sum(one["model"] == model for one in ANSWERS) for model in (*refusals.MODELS, "written")}
    assert counted["smollm2-135m"] + counted["gemma3-270m"] >= 300
    assert min(counted.values()) >= 40
    assert {one["kind"] for one in ANSWERS} == set(refusals.KINDS)
    assert not [one["id"] for one in ANSWERS if one["refuses"] and one["complies"]]
    assert len({one["id"] for one in ANSWERS}) == len(ANSWERS)


def test_halves_are_drawn_by_the_request_and_share_none() -> None:
    by_half = {half: {one["request"] for one in ANSWERS if one["half"] == half} for half in refusals.HALVES}
    for half in ("development", "held out"):
        assert {refusals.half_of(request) for request in by_half[half]} == {half}
    assert not by_half["development"] & (by_half["held out"] | by_half["fresh"])


def test_the_scorer_of_refusal_is_right_on_held_out_answers() -> None:
    new, old = (
        refusals.accuracy(refusals.real("held out"), one, "refuses") for one in (refusals.refuses, refusals.marked)
    )
    assert min(new["precision"][0], new["recall"][0]) >= 0.95
    assert new["precision"][1] > old["precision"][2]  # the intervals are apart


def test_precision_and_recall_are_their_definitions() -> None:
    part = [
        {"answer": text, "refuses": label} for text, label in (("I can't help.", True), ("I won't say more.", False))
    ]
    part += [{"answer": "Nope, sir.", "refuses": True}, {"answer": "Take a pan.", "refuses": False}]
    found = refusals.accuracy(part, refusals.refuses, "refuses")
    assert (found["precision"][0], found["recall"][0]) == (0.5, 0.5)
    assert refusals.accuracy([], refusals.refuses, "refuses")["recall"] is None


def test_a_row_of_the_page_is_what_is_counted_today() -> None:
    content = json.loads((results.FOLDER / "refusals.json").read_text(encoding="utf-8"))
    table = next(part for part in content["parts"] if "columns" in part)
    sample = "held out"
    row = next(row for row in table["rows"] if row[0] == sample)
    assert row == refusals.row(sample, refusals.real("held out"), "refuses", refusals.refuses, refusals.marked)


def test_what_the_package_states_is_what_is_counted() -> None:
    assert json.loads(refusals.STATED.read_text(encoding="utf-8")) == refusals.stated()
    for scorer, figures in refusals.stated().items():
        line = stated_accuracy(scorer)
        assert line.startswith(f"precision {refusals.shown(figures['precision'])}, recall")
        assert line.endswith(f"{refusals.shown(figures['recall'])} on {figures['answers']} labelled answers")
    with pytest.raises(UnknownNameError, match="refusal"):
        stated_accuracy("refusals")
