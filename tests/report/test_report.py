"""The report: what is measured, what the page says, and that it stands by itself."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from typer.testing import CliRunner

import steerkit
from steerkit.cli import report as command
from steerkit.errors import DataError, SteerError
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.suggesting import suggest_strength
from steerkit.fitting.fitting import fit
from steerkit.fitting.held_out import separation
from steerkit.monitor.token_heat import readable, token_projections
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.report import gather as report_file
from steerkit.report import plots
from steerkit.report.comparison import comparison_html
from steerkit.report.evidence import Evidence
from steerkit.report.evidence_parts import EvidencePlan, Heat
from steerkit.report.gather import gather
from steerkit.report.html import report_html
from steerkit.report.sections import costs_part
from steerkit.report.tables import control_rows, costs_words
from steerkit.report.verdict import is_clear
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.families import BLOCKS, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

HOSTILE = "<script>alert(1)</script>"
ITEMS = [
    (f"How was day {number}?" if number else HOSTILE, f"It was fine, {word}.", f"It was bad, {word}.")
    for number, word in enumerate(("sun", "rain", "snow", "wind", "fog", "hail", "heat", "cold"))
]
PLAN = EvidencePlan(
    strengths=(-1.0, 1.0),
    questions=(f"Hi {HOSTILE}?", "And now?"),
    controls=2,
    shuffled=1,
    texts=2,
    neutral=4,
    new_tokens=8,
)
RECIPE = {"name": "days", "evaluate": {"questions": ["Is it?"], "strengths": [-1.0, 1.0]}}
SECTIONS = ("warnings", "layers", "projections", "strength", "costs", "pareto", "controls", "heat", "texts", "repeat")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Fitted(NamedTuple):
    model: Any
    tokenizer: Any
    train: ContrastSet
    held_out: ContrastSet
    vector: SteeringVector


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    train, held_out = ContrastSet.from_answers(ITEMS).split(held_out=0.4)
    vector = fit(model, tokenizer, train, layers=[1, 2], readout="response_mean")
    vector = replace(vector, suggested_strength=1.5, extra={"recipe": RECIPE}, seed=7)
    return Fitted(model, tokenizer, train, held_out, vector)


@pytest.fixture(scope="module")
def evidence(fitted: Fitted) -> Evidence:
    return gather(
        fitted.model,
        fitted.tokenizer,
        fitted.vector,
        name=f"days {HOSTILE}",
        held_out=fitted.held_out,
        train=fitted.train,
        plan=PLAN,
        command="steerkit report --vector days.safetensors",
    )


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty pictures: drawing is what takes the time."""
    for name in ("separation_svg", "histogram_svg", "curve_svg", "costs_svg", "spots_svg", "forest_svg"):
        monkeypatch.setattr(plots, name, lambda *_, **__: "<svg/>")


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        assert not any(name.startswith("on") for name in found), "no handlers"
        if tag == "span":
            self.spans.append((found, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self.open and self.open[-1] == "span":
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)

    @property
    def lit(self) -> list[tuple[str, str, str]]:
        """Of each token of the heat maps its text, title and style."""
        return [(text, str(span["title"]), str(span["style"])) for span, text in self.spans if "title" in span]


def stands_alone(text: str) -> Page:
    page = Page(text)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links), page.links
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    assert HOSTILE not in text
    return page


def test_a_report_has_every_section_and_stands_alone(evidence: Evidence) -> None:
    text = report_html(evidence)
    page = stands_alone(text)
    assert tuple(page.ids) == SECTIONS
    assert len(set(page.ids)) == len(page.ids)
    assert page.tags.count("img") == 5
    assert HOSTILE in page.words, "shown as text"
    assert page.words.count("Left out") == 0
    for part in (
        "caa: ",
        "arXiv 2312.06681",
        "resid_post.1, resid_post.2",
        "1.5 (paper unit)",
        "steerkit report --vector",
    ):
        assert part in page.words, part
    for digest in evidence.digests.values():
        assert str(digest) in page.words
    assert '"questions": [' in page.words, "the recipe"


def test_the_same_evidence_gives_the_same_page(fitted: Fitted, evidence: Evidence) -> None:
    again = gather(
        fitted.model,
        fitted.tokenizer,
        fitted.vector,
        name=evidence.name,
        held_out=fitted.held_out,
        train=fitted.train,
        plan=PLAN,
        command=evidence.command,
    )
    assert report_html(again) == report_html(evidence)
    assert json.dumps(again.as_json()) == json.dumps(evidence.as_json())


def test_the_figures_are_those_of_the_measurements(fitted: Fitted, evidence: Evidence) -> None:
    assert evidence.curve.strengths == (-1.0, 0.0, 1.0, 1.5), "with the neutral and the suggested one"
    setup = Setup(fitted.model, fitted.tokenizer, fitted.held_out)
    measured = measure(setup.trial(fitted.vector, 1.5))["preference_margin"]
    assert evidence.suggested["preference_margin"] == measured
    assert f"{abs(measured.effect.mean):.3g} nats per token" in evidence.verdict[1]
    assert all(set(control) == {-1.0, 1.5} for control in evidence.curve.controls), "the suggested one and the far end"
    own = separation(fitted.model, fitted.tokenizer, fitted.held_out, fitted.vector)["sites"]
    by_block = {one.layer: one for one in evidence.layers}
    assert sorted(by_block) == list(range(BLOCKS))
    for block in (1, 2):
        assert by_block[block].auc == pytest.approx(own[f"resid_post.{block}"]["auc"], abs=1e-4)
        assert by_block[block].cohens_d == pytest.approx(own[f"resid_post.{block}"]["cohens_d"], abs=2e-3)
    assert evidence.projections is not None
    assert evidence.projections.auc == by_block[1].auc
    assert evidence.refits is not None
    assert len(evidence.shuffled) == 1
    told = {name: value for name, value, _ in control_rows(evidence)}
    assert told["moved the wrong way, at strength 1.5"] == f"{measured.wrong_way:.0%} of {measured.items} items"


def test_json_holds_everything_and_no_number_that_json_lacks(evidence: Evidence) -> None:
    found = json.loads(json.dumps(evidence.as_json(), allow_nan=False))
    assert [spot["label"] for spot in found["pareto"]] == ["-1", "+0", "+1", "+1.5"]
    assert [row["strength"] for row in found["curve"]] == [-1.0, 0.0, 1.0, 1.5]
    assert found["pareto"][1]["effect"] == 0.0, "the unsteered model changes nothing"
    assert found["heat"]["site"] == "resid_post.1"
    assert found["texts"][0]["prompt"] == PLAN.questions[0]


@pytest.mark.parametrize(
    ("low", "controls", "items", "words"),
    [
        (0.5, (0.2, 0.3), 3, "It steers: the effect is clear of zero and of 2 random directions."),
        (0.5, (0.2,), 3, "It steers: the effect is clear of zero and of one random direction, the only one measured."),
        (0.5, (), 3, "It steers: the effect is clear of zero; no random direction was measured."),
        (0.5, (0.2, 0.9), 400, "In doubt"),
        (0.5, (0.2, 0.9), 3, "Too few items to tell: on 3 the interval of the change reaches from what a random"),
        (-0.1, (0.0, 0.0), 400, "No effect shown"),
        (-0.1, (0.0, 0.0), 3, "Too few items to tell: on 3 the interval of the change reaches from zero to"),
    ],
)
def test_the_verdict(evidence: Evidence, low: float, controls: tuple[float, ...], items: int, words: str) -> None:
    found = Estimate(1.0, low, 1.5)
    measured = replace(evidence.suggested["preference_margin"], estimate=found, change=found, items=items)
    points = [*evidence.curve.points[:-1], {**evidence.curve.points[-1], "preference_margin": measured}]
    curve = replace(evidence.curve, points=tuple(points), controls=tuple({1.5: one} for one in controls))
    found = replace(evidence, curve=curve).verdict
    assert found[0].startswith(words)
    for most in controls[-1:]:
        assert f"changes it by {most:+.3g}" in found[1]


def test_a_negative_suggestion_is_judged_on_its_own_side(evidence: Evidence) -> None:
    fell = replace(
        evidence.suggested["preference_margin"], estimate=Estimate(-1.0, -1.5, -0.5), change=Estimate(-1.0, -1.5, -0.5)
    )
    curve = replace(
        evidence.curve,
        strengths=(-1.5,),
        points=({**evidence.curve.points[-1], "preference_margin": fell},),
        controls=({-1.5: -0.2}, {-1.5: 0.9}),
    )
    found = replace(evidence, curve=curve, strength=-1.5).verdict
    assert found[0].startswith("It steers")
    assert "falls by 1" in found[1]
    assert "changes it by -0.2" in found[1]


def test_controls_are_compared_by_changes_on_the_same_items(evidence: Evidence) -> None:
    measured = evidence.suggested["preference_margin"]
    wide = replace(measured, estimate=Estimate(3.0, -5.0, 11.0), change=Estimate(1.0, 0.5, 1.5))  # 2 unsteered
    assert is_clear(wide, [2.4, 1.0], 1), "0.4 and -1 against 0.5"
    assert not is_clear(wide, [2.6], 1)
    assert is_clear(wide, [3.6], -1)
    assert not is_clear(wide, [3.4], -1)


def test_each_cost_is_named_where_it_is_largest(evidence: Evidence) -> None:
    """One sentence called -2 the strength of the largest cost, beside a picture that showed another cost at +2."""
    means = {
        "kl": (0.4, 0.0, 0.1, 0.2),
        "perplexity_ratio": (1.1, 1.0, 1.2, 1.7),
        "repetition": (0.1, 0.1, 0.6, 0.2),
        "words": (30.0, 40.0, 20.0, 9.0),
    }
    points = [
        {
            **point,
            **{
                name: replace(point[name], estimate=Estimate(values[place], values[place], values[place]))
                for name, values in means.items()
            },
        }
        for place, point in enumerate(evidence.curve.points)
    ]
    words = costs_part(replace(evidence, curve=replace(evidence.curve, points=tuple(points)))).words
    assert "The KL divergence is largest at strength -1, with 0.4 nats per token" in words
    assert "the perplexity ratio at strength 1.5, with 1.7" in words
    assert "the share of repeated 4-grams at strength 1, with 60 %" in words
    assert "Texts are shortest at strength 1.5, with 9 words" in words


def test_a_share_and_its_change_are_told_apart(evidence: Evidence) -> None:
    found = evidence.suggested["repetition"]
    measured = replace(found, estimate=Estimate(0.25, 0.2, 0.3), change=Estimate(0.05, 0.01, 0.09))
    points = [*evidence.curve.points[:-1], {**evidence.curve.points[-1], "repetition": measured}]
    words = costs_words(replace(evidence, curve=replace(evidence.curve, points=tuple(points))))
    assert "the share of repeated 4-grams is 25 %, a change of +5.0 (+1.0 to +9.0) points" in words


@pytest.mark.usefixtures("plain")
def test_points_of_a_calibration_join_the_front(evidence: Evidence) -> None:
    rows = [
        {"layers": [1], "strength": 0.5, "scores": {"preference_margin": {"change": 9.0}, "kl": {"mean": 0.0}}},
        {"layers": [1, 2], "strength": 2.0, "scores": {"preference_margin": {"change": 1.0}, "kl": {"mean": 5.0}}},
        {"layers": [], "strength": None, "scores": {"preference_margin": {"mean": 1.0}, "kl": {"mean": 0.0}}},
    ]
    found = replace(evidence, calibration={"validation": rows})
    assert [spot.label for spot in found.spots if spot.kind == 1] == ["1 at 0.5", "1+2 at 2"]
    page = stands_alone(report_html(found))
    assert "1 of 6 points are on the front" in page.words, "one beats all others"
    assert "2 points come from the calibration" in page.words


def indicator(fitted: Fitted, ids: tuple[int, ...], place: int) -> SteeringVector:
    """A direction at the first block's input that only the embedding of one token has a component along."""
    embedded = fitted.model.get_input_embeddings().weight.detach().double()
    others = embedded[sorted(set(ids) - {ids[place]})]
    own = embedded[ids[place]]
    direction = own - others.T @ torch.linalg.lstsq(others.T, own).solution
    return SteeringVector(
        suggested_strength=1.0,
        method="caa",
        tensors={"resid_pre.0/direction": direction.float()},
        sites=(Site(0, "resid_pre"),),
        edit="add",
        scope="response",
        unit="paper",
        model_type="llama",
        hidden_size=32,
        num_layers=BLOCKS,
    )


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("which", ["first", "middle", "last of the prompt", "first of the answer", "last"])
def test_bug_10_the_heat_map_lights_the_token_itself(fitted: Fitted, evidence: Evidence, which: str) -> None:
    rendered = render(fitted.tokenizer, Conversation("abcdefg", answer="hjkl", raw=True))
    ids, prompt = rendered.ids, rendered.prompt_length
    assert len(set(ids)) == len(ids) < 32
    place = {
        "first": 0,
        "middle": 3,
        "last of the prompt": prompt - 1,
        "first of the answer": prompt,
        "last": len(ids) - 1,
    }[which]
    vector = indicator(fitted, ids, place)
    baseline = Setup(fitted.model, fitted.tokenizer, fitted.held_out).baseline
    scores = token_projections(baseline, rendered, vector)
    assert "".join(scores.tokens) == fitted.tokenizer.decode(list(ids))
    assert scores.prompt == prompt
    assert scores.values.abs().argmax() == place
    others = torch.cat([scores.values[:place], scores.values[place + 1 :]])
    assert float(others.abs().max()) < 1e-4 * float(scores.values[place])
    # And on the page. The answer alone sets the scale, so a lit token of the prompt saturates.
    page = Page(report_html(replace(evidence, heat=Heat(scores, scores, 0.0, 0.0))))
    lit = page.lit
    assert len(lit) == prompt + 2 * (len(ids) - prompt)
    once = lit[: len(ids)]
    assert [text for text, _, _ in once] == list(scores.tokens)
    bright = [index for index, (_, title, _) in enumerate(once) if abs(float(title)) > 1e-3]
    assert bright == [place]
    if place >= prompt:
        assert [index for index, (_, _, style) in enumerate(once) if style != "background:#ffffff"] == [place]


def test_a_steered_heat_map_reads_after_the_edit(fitted: Fitted) -> None:
    setup = Setup(fitted.model, fitted.tokenizer, fitted.held_out)
    vector = modes.vector_for(fitted.model, scope="response", size=0.5)
    rendered = render(fitted.tokenizer, Conversation("Well?", answer="So and so."))
    baseline, steered = (
        token_projections(trial, rendered, vector) for trial in (setup.baseline, setup.trial(vector, strength=2.0))
    )
    length = float(vector.tensors["resid_post.1/direction"].norm())
    moved = steered.values - baseline.values
    # From the last token of the prompt on, which is what predicts the first of the answer.
    written = baseline.prompt - 1
    assert torch.allclose(moved[:written], torch.zeros(written), atol=1e-4)
    assert torch.allclose(moved[written:], torch.full_like(moved[written:], 2 * length), rtol=1e-4)
    later = token_projections(setup.trial(vector, strength=2.0), rendered, vector, site="resid_post.3")
    assert later.site == Site(3)
    assert not torch.allclose(later.values, steered.values)
    front = modes.vector_for(fitted.model, scope="front")
    with pytest.raises(DataError, match="actadd has no single direction"):
        token_projections(setup.baseline, rendered, front)


def test_tokens_that_are_parts_of_a_character_stand_together() -> None:
    tokenizer = byte_tokenizer(None, merges=False)
    text = "a é 🙂b\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert readable(tokenizer, ids) == [("a", 1), (" ", 1), ("é", 2), (" ", 1), ("🙂", 4), ("b", 1), ("\n", 1)]
    broken = readable(tokenizer, ids[:6])  # ends inside the smiley
    assert "".join(part for part, _ in broken) == tokenizer.decode(ids[:6])
    assert sum(count for _, count in broken) == 6
    endless = readable(tokenizer, [ids[6]] * 20)
    assert sum(count for _, count in endless) == 20
    assert max(count for _, count in endless) <= 8


@pytest.mark.usefixtures("plain")
def test_what_is_not_known_is_left_out_with_the_reason(fitted: Fitted) -> None:
    vector = replace(fitted.vector, suggested_strength=None, extra={})
    plan = replace(PLAN, strengths=None, questions=(), controls=0)
    found = gather(fitted.model, fitted.tokenizer, vector, name="days", held_out=fitted.held_out, plan=plan)
    assert set(found.missing) == {"layers", "refits"}
    shown = found.strength
    assert found.curve.strengths == (-shown, -shown / 2, 0.0, shown / 2, shown)
    assert shown == suggest_strength(fitted.model, fitted.tokenizer, vector).suggested_strength
    page = stands_alone(report_html(found))
    assert tuple(page.ids) == SECTIONS
    for words in (
        "Left out: the items the vector was fitted on are not known here.",
        "Fits on rearranged items are left out",
        f"none in the file; {shown:g} (paper unit) is shown",
        "no question was given",
        "holds no recipe",
    ):
        assert words in page.words, words


@pytest.mark.usefixtures("plain")
def test_a_method_without_a_direction(fitted: Fitted) -> None:
    pair = ContrastSet.from_prompts(["Fine and sunny"], ["Bad and foggy!"])
    vector = fit(fitted.model, fitted.tokenizer, pair, method="actadd", layers=[1])
    found = gather(fitted.model, fitted.tokenizer, vector, name="days", held_out=fitted.held_out, train=pair, plan=PLAN)
    assert set(found.missing) == {"layers", "projections", "heat", "refits"}
    page = stands_alone(report_html(found))
    assert page.words.count("actadd has no single direction to project on") == 3
    assert "actadd reads no contrast set" in page.words
    assert json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.usefixtures("plain")
def test_items_without_answers_show_costs_only(fitted: Fitted) -> None:
    prompts = ContrastSet.from_prompts([f"Fine {n}!" for n in range(4)], [f"Bad {n}, sad." for n in range(4)])
    vector = fit(fitted.model, fitted.tokenizer, prompts, layers=[1])
    found = gather(fitted.model, fitted.tokenizer, vector, name="days", held_out=prompts, plan=PLAN)
    assert not found.has_effect
    assert found.spots == []
    page = stands_alone(report_html(found))
    assert page.words.count("Left out: no effect is measured: item 0 has no two answers") == 2
    assert "Costs at strength" in page.words


@pytest.mark.usefixtures("plain")
def test_warnings_tell_of_confounds_and_of_another_model(fitted: Fitted) -> None:
    long = [(f"Day {n}?", "It was a very fine and long day, and more than that.", "Bad.") for n in range(12)]
    data = ContrastSet.from_answers(long)
    vector = replace(fit(fitted.model, fitted.tokenizer, data, layers=[1]), model_id="someone/else")
    model = build("llama")
    model.config._name_or_path = "another/model"
    found = gather(
        model, fitted.tokenizer, vector, name="days", held_out=data, train=data, plan=replace(PLAN, controls=0)
    )
    assert sum("someone/else" in one for one in found.warnings) == 1, "once, and nothing is warned of beside the report"
    assert any("length alone predicts the label" in one for one in found.warnings)
    page = stands_alone(report_html(found))
    assert page.tags.count("li") == len(found.warnings)


def test_without_matplotlib_the_extra_is_named(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SteerError, match=r"pip install 'steerkit-hf\[plots\]'"):
        report_html(evidence)


# ---- the command


@pytest.fixture
def ask(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steerkit, "load_model", lambda name: (fitted.model, fitted.tokenizer))
    fitted.vector.save("days.safetensors")
    lines = [{"prompt": prompt, "positive": positive, "negative": negative} for prompt, positive, negative in ITEMS[:4]]
    Path("held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    app = typer.Typer()
    app.command()(command.run)
    few = ["--controls", "1", "--texts", "1", "--neutral", "2", "--max-new-tokens", "4"]

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["--vector", "days.safetensors", *few, *words])

    return run


def test_the_command_writes_one_page(ask: Callable[..., Any]) -> None:
    ended = ask("--data", "held.jsonl", "--strength", "0.5", "--out", "deep/days.html")
    assert ended.exit_code == 0, ended.output
    assert [path.name for path in Path("deep").iterdir()] == ["days.html"]
    text = Path("deep/days.html").read_text(encoding="utf-8")
    page = stands_alone(text)
    assert "Is it?" in page.words, "the recipe's question"
    (repeated,) = re.findall(r"steerkit report --vector .*", page.words)
    assert "--data held.jsonl --strength=0.5 --controls 1" in repeated
    assert "wrote deep/days.html" in ended.output
    assert "left out, layers" in ended.output
    again = ask(*repeated.split()[4:], "--out", "again.html")
    assert again.exit_code == 0, again.output
    assert Path("again.html").read_text(encoding="utf-8") == text, "the command given repeats the page"


@pytest.mark.usefixtures("plain")
def test_the_command_prints_json(ask: Callable[..., Any]) -> None:
    ended = ask("--data", "held.jsonl", "--json")
    found = json.loads(ended.stdout)
    assert found["report"] == "report.html"
    assert [row["strength"] for row in found["curve"]] == [-1.0, 0.0, 1.0, 1.5], "the recipe's"
    assert found["vector"]["method"] == "caa"


def test_what_the_command_refuses(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def not_reached(*_: Any, **__: Any) -> None:
        raise AssertionError("measured before refusing")

    monkeypatch.setattr(report_file, "gather", not_reached)
    assert "give --data" in str(ask().exception)
    (tmp_path / "folder").mkdir()
    assert "is a folder" in str(ask("--data", "held.jsonl", "--out", "folder").exception)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "steerkit-hf[plots]" in str(ask("--data", "held.jsonl").exception)
    assert not Path("report.html").exists()


# ---- several methods


def comparison() -> dict[str, Any]:
    def one(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    found = {
        "method": "caa",
        "title": f"Means {HOSTILE}",
        "recipe": "days",
        "sites": ["resid_post.1"],
        "strength": 1.5,
        "works": True,
        "verdict": "clear",
        "effect": one(0.8),
        "random": [-0.2, 0.3],
        "kl": one(0.2),
        "perplexity_ratio": one(1.1),
        "repetition": {"mean": 0.0, "low": None, "high": None},
        "overhead": one(1.02),
        "texts": [{"prompt": HOSTILE, "baseline": "before", "steered": "after"}],
    }
    nothing = {
        **dict.fromkeys(("effect", "random", "kl", "perplexity_ratio", "repetition", "overhead", "strength")),
        "method": "repe",
        "title": "Components",
        "recipe": "days",
        "sites": [],
        "works": False,
        "verdict": "nothing works",
        "texts": [],
    }
    return {
        "behaviour": "days",
        "model": "tiny",
        "budget": {"max_kl": 0.3, "max_ppl_ratio": 1.3},
        "rows": [found, nothing],
        "environment": {"torch": "2"},
        "command": "steerkit compare days",
        "digests": {"weights": "ab", "data": None},
    }


def test_a_comparison_stands_alone() -> None:
    text = comparison_html(comparison())
    page = stands_alone(text)
    assert page.ids == ["table", "effects", "costs", "texts", "repeat"]
    assert page.tags.count("img") == 2
    assert comparison_html(comparison()) == text
    words = " ".join(page.words.split())
    for part in (
        "1 of 2 methods has an effect",
        "max kl 0.3, max ppl ratio 1.3.",
        "+0.80+0.70 to +0.90",
        "+0.30from -0.20",
        "resid_post 1 at 1.5",
        "repe (Components; recipe days): nothing works",
        "steerkit compare days",
        "not known",
        HOSTILE,
    ):
        assert part in words, part


def test_a_comparison_in_which_nothing_works() -> None:
    content = comparison()
    page = stands_alone(comparison_html({**content, "rows": content["rows"][1:]}))
    assert "0 of 1 methods" in page.words
    assert page.words.count("Left out: no method") == 2


def test_a_quick_report_fits_nothing_again_and_says_so(fitted: Fitted, ask: Callable[..., Any]) -> None:
    plan = replace(PLAN, refitted=False, strengths=None)
    sides = {"held_out": fitted.held_out, "train": fitted.train}
    found = gather(fitted.model, fitted.tokenizer, fitted.vector, name="days", plan=plan, **sides)
    assert found.missing["layers"] == found.missing["refits"] == "a quick report fits nothing again"
    assert found.curve.strengths == (-1.5, 0.0, 1.5)
    assert found.curve.controls
    ended = ask("--data", "held.jsonl", "--quick", "--out", "quick.html")
    assert ended.exit_code == 0, ended.output
    page = stands_alone(Path("quick.html").read_text(encoding="utf-8"))
    assert "--data held.jsonl --quick --controls 1" in page.words
    assert '"refitted": false' in page.words


def test_every_table_of_a_report_fits_a_phone() -> None:
    """Below 40 rem rows become cards whose cells name their columns; tables of facts become lines."""
    templates = sorted(Path(plots.__file__).parents[1].glob("*.j2"))
    tables = [table for path in templates for table in re.findall(r"<table.*?</table>", path.read_text("utf-8"), re.S)]
    assert len(tables) > 4
    for table in tables:
        if 'class="facts"' not in table:
            assert table.startswith('<table class="rows">')
            assert re.findall(r"<td(?![^>]*data-label)", table) == []
