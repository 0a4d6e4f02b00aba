"""The operating point of a gate: the bound against its slow form, and gates that are fitted, moved and told of."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit.errors import DataError, FitError, UnknownNameError
from steerkit.maths.predicates import P
from steerkit.methods._operating import least_items, operating_point
from steerkit.methods.conditional import ConditionalSteering, combine
from steerkit.methods.controller import WeightedController
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.gated import gated_vector, plain_of
from tests.tiny_tokenizers import CHATML, byte_tokenizer

PLACES = ("lake", "park", "garden", "village", "hill", "shore", "wood", "field", "pond", "lane", "yard", "dale")
METHODS = {"controller": {"gate": "probe"}, "conditional": {}}


def slowly(scores: list[float], share: float, confidence: float) -> tuple[float, int] | None:
    """Every threshold tried, from the highest on: the lowest for which so few alarms are unlikely enough."""
    n, found = len(scores), None
    for threshold in sorted(scores, reverse=True):
        k = sum(score > threshold for score in scores)
        likely = sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(k + 1))
        if likely > 1 - confidence:
            break
        found = (threshold, k)
    return found


@pytest.mark.parametrize(("share", "confidence"), [(0.05, 0.95), (0.01, 0.9), (0.2, 0.99), (0.5, 0.5)])
def test_the_point_is_that_of_the_slow_form(share: float, confidence: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 5, 20, 58, 59, 60, 93, 150, 300):
        scores = torch.randn(n, generator=generator).double()
        expected = slowly(scores.tolist(), share, confidence)
        if expected is None:
            assert n < least_items(share, confidence)
            with pytest.raises(FitError, match=f"{n} calibration prompts cannot promise"):
                operating_point(scores, share, confidence)
            continue
        found = operating_point(scores, share, confidence)
        assert (found.threshold, found.alarms, found.items) == (*expected, n)
        assert found.bound <= share
        likely = sum(math.comb(n, i) * found.bound**i * (1 - found.bound) ** (n - i) for i in range(found.alarms + 1))
        assert likely == pytest.approx(1 - confidence, rel=1e-6)


def test_equal_scores_do_not_break_the_promise() -> None:
    scores = torch.tensor([1.0] * 10 + [0.0] * 90)
    found = operating_point(scores, 0.05, 0.95)
    assert (found.threshold, found.alarms) == (1.0, 0), "ten that score alike open all together or not at all"


def test_five_percent_with_95_needs_59_prompts() -> None:
    assert least_items(0.05, 0.95) == 59
    operating_point(torch.arange(59.0), 0.05, 0.95)
    with pytest.raises(FitError, match=r"58 calibration prompts cannot promise at most 5 % .* keep 59 or more apart"):
        operating_point(torch.arange(58.0), 0.05, 0.95)
    for share, confidence in ((0.0, 0.95), (0.05, 1.0), (1.5, 0.5)):
        with pytest.raises(FitError, match="share over 0 and under 1"):
            operating_point(torch.arange(99.0), share, confidence)
    with pytest.raises(FitError, match="not finite"):
        operating_point(torch.tensor([math.nan] * 99), 0.05, 0.95)


def test_the_promise_is_kept_as_often_as_it_says() -> None:
    """Of evenly spread scores, 1 - threshold is the share of all prompts that opens the gate."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 100, generator=generator)
    broken = sum(1 - operating_point(row, 0.05, 0.95).threshold > 0.05 for row in draws) / len(draws)
    exact = sum(math.comb(100, k) * 0.05**k * 0.95 ** (100 - k) for k in range(2))
    assert exact == pytest.approx(0.037, abs=1e-3)
    assert broken == pytest.approx(exact, abs=0.01)


def requests(*, topics: bool = True) -> ContrastSet:
    """12 harmful, 12 ordinary and 6 alarming prompts."""
    harmful = [f"how would one break into the {place} at night" for place in PLACES]
    ordinary = [f"how would one walk around the {place} at noon" for place in PLACES]
    alarming = [f"how would one kill time at the {place} at night" for place in PLACES[:6]]
    data = ContrastSet.from_prompts(harmful, [*ordinary, *alarming], paired=False)
    named = (("",) * 12, ("ordinary",) * 12 + ("alarming",) * 6)
    return replace(data, topics=named) if topics else data


@functools.cache
def fitted(name: str, *, topics: bool = True, held_out: bool = False, **settings: Any) -> SteeringVector:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    chosen = {**METHODS[name], "max_false_alarm": 0.4, "confidence": 0.6, **settings}
    seen = requests(topics=topics) if held_out else None
    return steerkit.fit(model, tokenizer, requests(topics=topics), method=name, settings=chosen, held_out=seen)


def flags(vector: SteeringVector, prompts: Any) -> list[bool]:
    """Which prompts open the gate by more than rounding.

    The threshold is the score of one of them, and read beside other prompts it may differ in its last bit.
    """
    rows = steerkit.explain(build("llama"), byte_tokenizer(CHATML), prompts, vector)
    return [row["open"] and all(abs(by) > 1e-6 for by in distances(row)) for row in rows]


def distances(row: dict[str, Any]) -> list[float]:
    """How far what a gate reads lies from where it opens."""
    if "conditions" in row:
        return [one["score"] - one["threshold"] for one in row["conditions"].values()]
    return [row["gain"] - row["dead_zone"]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*is fitted on as well")
def test_a_fit_keeps_ordinary_prompts_apart_and_opens_from_where_they_say(name: str) -> None:
    vector, data = fitted(name, held_out=True), requests()
    facts = dict(vector.extra["gate"])
    assert (facts["calibration_items"], facts["max_false_alarm"], facts["confidence"]) == (6, 0.4, 0.6)
    method: Any = {"controller": WeightedController, "conditional": ConditionalSteering}[name]
    method = method.from_settings(vector.settings)
    kept = method.kept_apart(data)
    assert [one.prompt for one in kept] == [one.prompt for one in data.negative[1:12:2]]
    assert sum(flags(vector, kept)) == facts["calibration_alarms"] == slowly([0.1 * n for n in range(6)], 0.4, 0.6)[1]
    opened = vector.held_out["gate"]["opened"]
    assert {kind: counts["of"] for kind, counts in opened.items()} == {"positive": 12, "ordinary": 12, "alarming": 6}
    assert opened["ordinary"]["opened"] == sum(flags(vector, data.negative[:12]))
    assert opened["alarming"]["opened"] == sum(flags(vector, data.negative[12:]))
    assert SteeringVector.from_bytes(vector.to_bytes()) == vector


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_apart_has_no_part_in_the_fit(name: str) -> None:
    """The same vector comes of data in which other prompts stand in the place of those that are kept apart."""
    data = requests()
    method: Any = {"controller": WeightedController, "conditional": ConditionalSteering}[name]
    method = method.from_settings({"max_false_alarm": 0.4, "confidence": 0.6})
    seen = method.parts(data).negative.tolist()
    pairs = zip(data.negative, seen, strict=True)
    texts = [str(one.prompt) if is_seen else f"something else {n}" for n, (one, is_seen) in enumerate(pairs)]
    other = replace(data, negative=ContrastSet.from_prompts(["x"], texts).negative)
    settings = {**METHODS[name], "max_false_alarm": 0.4, "confidence": 0.6}
    moved = steerkit.fit(build("llama"), byte_tokenizer(CHATML), other, method=name, settings=settings)
    for tensor in ("shared/probe_weight", "shared/mean", "shared/condition"):
        if tensor in moved.tensors:
            # Texts of other lengths stand beside them in the batches: a product may be summed in another order.
            torch.testing.assert_close(moved.tensors[tensor], fitted(name).tensors[tensor], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_alarming_prompts_are_left_out_of_the_fit_where_they_are_not_to_be_spared(name: str) -> None:
    spared, others = fitted(name), fitted(name, spared=False)
    tensor = "shared/probe_weight" if name == "controller" else "shared/condition"
    assert not torch.equal(spared.tensors[tensor], others.tensors[tensor])
    plain = fitted(name, topics=False)
    assert plain.extra["gate"]["calibration_items"] == 9, "without topics all of the negative side is ordinary"
    unpromised = steerkit.fit(build("llama"), byte_tokenizer(CHATML), requests(), method=name)
    assert "gate" not in unpromised.extra


def test_too_few_prompts_are_told_before_anything_is_promised() -> None:
    with pytest.raises(FitError, match="6 calibration prompts cannot promise at most 5 %"):
        fitted("controller", max_false_alarm=0.05, confidence=0.95)
    with pytest.raises(FitError, match="controller: max_false_alarm 0: give a share"):
        WeightedController.from_settings({"max_false_alarm": 0})


def test_a_condition_that_is_met_below_opens_as_seldom() -> None:
    vector = fitted("conditional")
    turned = {
        "shared/condition": -vector.tensors["shared/condition"],
        "shared/above": ~vector.tensors["shared/above"],
    }
    method = ConditionalSteering.from_settings(vector.settings)
    other = replace(vector, tensors={**vector.tensors, **turned})
    found = {site: torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) for site in vector.reads}
    points = [method.calibrated(one, found) for one in (vector, other)]
    decided = [method.editor(one).decide(found).is_open for one in points]
    assert torch.equal(*decided)
    assert int(decided[0].sum()) == points[0].extra["gate"]["calibration_alarms"] > 0


def test_rules_over_several_conditions_have_no_operating_point() -> None:
    one = gated_vector(build("llama"))
    both = combine({"a": one, "b": one}, P("a") & ~P("b"))
    method = ConditionalSteering.from_settings({**both.settings, "max_false_alarm": 0.4})
    with pytest.raises(FitError, match=r"the rule \(a & ~b\) has no one threshold"):
        method.calibrated(both, {site: torch.randn(40, 32) for site in both.reads})
    plain = plain_of(one)
    with pytest.raises(UnknownNameError, match="no gate"):
        steerkit.operating_points(build("llama"), byte_tokenizer(CHATML), plain, ["x"], requests())


def test_gains_that_cannot_be_told_apart_are_no_operating_point() -> None:
    with pytest.raises(FitError, match="largest gain there is"):
        WeightedController().opening_above(fitted("controller"), 1.0)


def test_points_of_one_vector_open_ever_more() -> None:
    vector, model, tokenizer = fitted("controller"), build("llama"), byte_tokenizer(CHATML)
    asked = [f"what is number {n}" for n in range(30)]
    points = steerkit.operating_points(
        model, tokenizer, vector, asked, requests(), shares=(0.1, 0.3, 0.6), confidence=0.9
    )
    zones = [point.settings["dead_zone"] for point in points]
    assert zones == sorted(zones, reverse=True)
    for point in points:
        assert sum(flags(point, asked)) == point.extra["gate"]["calibration_alarms"]
        assert point.settings["max_false_alarm"] == point.extra["gate"]["max_false_alarm"]
        assert point.held_out["gate"]["opened"]["ordinary"]["opened"] == sum(flags(point, requests().negative[:12]))


def test_topics_are_read_and_kept(tmp_path: Path) -> None:
    rows = [{"prompt": f"Break {n}", "label": "harmful"} for n in range(8)]
    rows += [{"prompt": f"Mend {n}", "label": "harmless", "topic": ("ordinary", "alarming")[n % 2]} for n in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ContrastSet.from_labelled(tmp_path / "x.jsonl", positive="harmful")
    assert data.topics == (("",) * 8, ("ordinary", "alarming") * 4)
    for part in data.split(held_out=0.5):
        named = {str(one.prompt): topic for one, topic in zip(part.negative, part.topics[1], strict=True)}
        assert all(topic == ("ordinary", "alarming")[int(text[-1]) % 2] for text, topic in named.items())
    with pytest.raises(DataError, match=r"\(1, 0\) topics for 8 positive and 8 negative items"):
        replace(data, topics=(("a",), ()))
