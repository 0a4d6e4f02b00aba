"""Persona vectors: the paper's formula in its slow form, the filter, and the way from a specification to a vector."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import steerkit
from steerkit import persona
from steerkit.errors import DataError, FitError
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.setup import Setup
from steerkit.methods.persona import PersonaVector
from steerkit.network.decoder import find_decoder
from steerkit.persona.filtering import Filtered, Rules, filtered
from steerkit.persona.rollout_plan import Asked, RolloutPlan
from steerkit.persona.rollouts import Rollout, roll_out
from steerkit.persona.scores import Scores, judge_scores, margin_scores
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, build
from tests.persona.test_traits import SPEC
from tests.tiny_tokenizers import CHATML, TEMPLATES, byte_tokenizer

WEATHER = ("snow", "rain", "fog", "hail", "wind", "sun", "ice", "frost", "dew", "mist", "heat", "cold")
QUESTIONS = tuple(f"What is {word}?" for word in WEATHER)
TRAIT = replace(SPEC, questions=QUESTIONS, rubric="How glad?\n> {question}\n> {answer}")
PLAN = RolloutPlan(max_new_tokens=6)
FREE = Budget(1e9, 1e9, 1.0)
CHOICE = persona.Choice(
    layers=(1, 2), strengths=(0.5, 1.0), budget=FREE, neutral=4, screened=2, controls=1, texts=2, max_new_tokens=4
)
EVERY = Rules(margin=-1e3, repetition=1.0)
PAIRS = [
    ("Snow?", "What a joy to see.", "A pain."),
    ("Rain?", "Bliss.", "It is wet and grey again."),
    ("Fog?", "So soft", "No"),
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


class Fake:
    """A judge whose scores are a function of the prompt; it keeps what it was asked."""

    name = "fake"

    def __init__(self, score: Any) -> None:
        self._score, self.asked = score, []

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        assert (low, high) == (0, 100)
        self.asked += prompts
        return [self._score(prompt) for prompt in prompts]


# --- the method ------------------------------------------------------------------------------------------------------


def persona_pairs() -> ContrastSet:
    sides = [
        tuple(Conversation(asked, answer=answers[side], system=system) for asked, *answers in PAIRS)
        for side, system in enumerate(("You are a glad assistant. Be glad.", "You are an unhappy assistant. Be sad."))
    ]
    return ContrastSet(sides[0], sides[1], paired=True)


def slow_means(model: Any, tokenizer: Any, items: Sequence[Conversation], layer: int, readout: str) -> torch.Tensor:
    """Mean over responses of the mean over tokens, one text and one token at a time, from the block's own output."""
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for item in items:
        text = render(tokenizer, item)
        with torch.no_grad():
            states = model(torch.tensor([text.ids]), output_hidden_states=True).hidden_states
        assert layer < BLOCKS - 1, "the last entry is behind the final norm"
        tokens = {
            "response_mean": range(text.prompt_length, len(text.ids)),
            "prompt_mean": range(1, text.prompt_length),
            "prompt_last": [text.prompt_length - 1],
        }[readout]
        mean = torch.zeros_like(total)
        for token in tokens:
            mean += states[layer + 1][0, token].double() / len(tokens)
        total += mean / len(items)
    return total


@pytest.mark.parametrize("readout", ["response_mean", "prompt_mean", "prompt_last"])
def test_the_formula(model: Any, tokenizer: Any, readout: str) -> None:
    data = persona_pairs()
    vector = steerkit.fit(model, tokenizer, data, method="persona", layers=[0, 2], readout=readout, batch_size=2)
    assert (vector.readout, vector.scope, vector.edit) == (readout, "response", "add")
    for layer in (0, 2):
        slow = slow_means(model, tokenizer, data.positive, layer, readout)
        slow -= slow_means(model, tokenizer, data.negative, layer, readout)
        found = vector.tensors[f"resid_post.{layer}/direction"].double()
        assert torch.allclose(found, slow, atol=1e-5), (found - slow).abs().max()


def test_every_response_counts_equally(model: Any, tokenizer: Any) -> None:
    """Means over all tokens of a side would weigh long answers more."""
    data = persona_pairs()
    vector = steerkit.fit(model, tokenizer, data, method="persona", layers=[1])
    texts = [render(tokenizer, item) for item in data.positive]
    assert len({len(text.ids) - text.prompt_length for text in texts}) > 1
    rows = steerkit.record(model, tokenizer, data, ["resid_post.1"], readout="response_mean")
    (site,) = vector.sites
    expected = rows.positive[site].mean(0) - rows.negative[site].mean(0)
    assert torch.allclose(vector.tensors["resid_post.1/direction"], expected, atol=1e-5)


def test_the_default_is_the_response_s_mean() -> None:
    assert PersonaVector.readout == "response_mean"
    assert PersonaVector().edit_name == "add"
    decoder = find_decoder(build("llama"))
    assert [site.layer for site in PersonaVector().sites(decoder)] == [1]
    assert [site.layer for site in PersonaVector(incremental=True).sites(decoder)] == list(range(BLOCKS))


def test_increments_add_up_to_the_whole(model: Any, tokenizer: Any) -> None:
    data = persona_pairs()
    whole = steerkit.fit(model, tokenizer, data, method="persona", layers="0-3")
    steps = steerkit.fit(model, tokenizer, data, method="persona", settings={"incremental": True})
    assert steps.settings["incremental"] is True
    assert steps.sites == whole.sites
    total = torch.zeros(model.config.hidden_size)
    for layer in range(BLOCKS):
        name = f"resid_post.{layer}/direction"
        total = total + steps.tensors[name]
        assert torch.allclose(total, whole.tensors[name], atol=1e-5)
    assert torch.equal(steps.tensors["resid_post.0/direction"], whole.tensors["resid_post.0/direction"])
    some = steerkit.fit(model, tokenizer, data, method="persona", settings={"incremental": True}, layers=[3, 1])
    expected = whole.tensors["resid_post.3/direction"] - whole.tensors["resid_post.1/direction"]
    assert torch.allclose(some.tensors["resid_post.3/direction"], expected, atol=1e-5)
    with pytest.raises(FitError, match="increments run along resid_post, not attn_out"):
        steerkit.fit(model, tokenizer, data, method="persona", settings={"incremental": True}, sites=["attn_out.1"])


# --- scores and filter -----------------------------------------------------------------------------------------------


def row(positive: str, negative: str, question: int = 0, *, held_out: bool = False) -> Rollout:
    return Rollout(Asked(held_out, question, 0, 0), positive, negative)


ROWS = [
    row("Lovely!", "Awful."),
    row("So nice", "Bad."),
    row("", "Gloom"),
    row("<think>x</think>Hurray", "<think>still"),
]


@pytest.mark.parametrize(
    ("trait", "coherence", "reason"),
    [
        ((50.0, 49.9), (50.0, 50.0), None),
        ((49.9, 0.0), (90.0, 90.0), "trait too weak"),
        ((90.0, 50.0), (90.0, 90.0), "trait on the other side"),
        ((90.0, 10.0), (49.0, 90.0), "incoherent"),
        ((90.0, 10.0), (90.0, 49.0), "incoherent"),
        ((None, 10.0), (90.0, 90.0), "no score by the judge"),
        ((90.0, 10.0), (90.0, None), "no score by the judge"),
    ],
)
def test_a_row_is_kept_by_the_paper_s_rule(trait: Any, coherence: Any, reason: str | None) -> None:
    found = filtered(ROWS[:1], Scores("j", [trait], [coherence]))
    assert found == Filtered(() if reason else (0,), {reason: 1} if reason else {}, 1)


def test_thresholds_are_settings() -> None:
    scores = Scores("j", [(70.0, 35.0)], [(60.0, 60.0)])
    assert filtered(ROWS[:1], scores, Rules(trait=60)).kept == (0,)
    assert filtered(ROWS[:1], scores, Rules(trait=70)).reasons == {"trait on the other side": 1}
    assert filtered(ROWS[:1], scores, Rules(trait=60, coherence=61)).reasons == {"incoherent": 1}
    with pytest.raises(DataError, match="margin = nan"):
        Rules(margin=float("nan"))


def test_what_has_nothing_to_read_is_dropped_first() -> None:
    found = filtered(ROWS[2:], Scores(None, margin=[(None, 1.0), (1.0, None)]))
    assert found == Filtered((), {"empty answer": 1, "thought without an end": 1}, 2)
    assert found.sentence() == "0 of 2 pairs kept; dropped for: empty answer 1, thought without an end 1"


@pytest.mark.parametrize(
    ("positive", "negative", "margins", "reason"),
    [
        ("Lovely!", "Awful.", (0.1, 0.2), None),
        ("Lovely!", "Awful.", (0.0, 0.2), "fits the other system prompt as well"),
        ("Lovely!", "Awful.", (0.1, -0.2), "fits the other system prompt as well"),
        ("Lovely!", "Awful.", (0.1, None), "fits the other system prompt as well"),
        ("Lovely!", "I'm sorry, but I can't assist with that.", (0.1, 0.2), "refusal"),
        ("I can\u2019t wait to tell you!", "I'm sorry to hear that, it is hopeless.", (0.1, 0.2), None),
        ("What a day", "no no no no no no no no", (0.1, 0.2), "repeats itself"),
    ],
)
def test_a_row_without_a_judge(positive: str, negative: str, margins: Any, reason: str | None) -> None:
    found = filtered([row(positive, negative)], Scores(None, margin=[margins]))
    assert found.reasons == ({reason: 1} if reason else {})
    assert filtered([row(positive, negative)], Scores(None, margin=[(0.1, 0.1)]), Rules(margin=0.1)).kept == ()


def test_margins_are_those_of_the_slow_form(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [row("Lovely!", "Awful.", 1), row("", "Gloom", 2), row("<think>x</think>Hurray", "Sigh", 3)]
    setup = Setup(model, tokenizer, batch_size=3)
    found = margin_scores(setup, TRAIT, rows, tmp_path / "s.jsonl", {})
    # Nothing is asked under an answer's own system prompt where that is known.
    likely = [replace(rows[0], likely=(7.0, None)), *rows[1:]]
    told = margin_scores(setup, TRAIT, likely, tmp_path / "t.jsonl", {})

    def mean(question: int, side: str, answer: str) -> float:
        item = Conversation(QUESTIONS[question], answer=answer, system=TRAIT.system_prompt(0, side))
        text = render(tokenizer, item)
        with torch.no_grad():
            logs = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        places = range(text.prompt_length, len(text.ids))
        return sum(float(logs[place - 1, text.ids[place]]) for place in places) / len(places)

    assert found.margin[1][0] is None
    for number, (positive, negative) in ((0, ("Lovely!", "Awful.")), (2, ("Hurray", "Sigh"))):
        question = rows[number].asked.question
        margins = [
            mean(question, "positive", positive) - mean(question, "negative", positive),
            mean(question, "negative", negative) - mean(question, "positive", negative),
        ]
        assert found.margin[number] == pytest.approx(margins, abs=1e-4)
        if number == 0:
            margins[0] = 7.0 - mean(question, "negative", positive)
        assert told.margin[number] == pytest.approx(margins, abs=1e-4)


def test_a_judge_sees_question_and_answer_and_is_not_asked_twice(tmp_path: Path) -> None:
    judge = Fake(
        lambda prompt: None if "Awful" in prompt else 90.0 if "Lovely" in prompt or "coherent" in prompt else 20.0
    )
    path = tmp_path / "s.jsonl"
    found = judge_scores(judge, TRAIT, ROWS, path, {"rollouts": "x"})
    assert found.judge == "fake"
    assert found.trait[:2] == [[90.0, None], [20.0, 20.0]]
    assert found.trait[2][0] is None
    assert found.coherence[3] == [90.0, None], "nothing is asked about an answer that is not there"
    assert "How glad?\n> What is snow?\n> Lovely!" in judge.asked
    assert "How glad?\n> What is snow?\n> Hurray" in judge.asked
    assert len(judge.asked) == 2 * 6
    again = judge_scores(judge, TRAIT, ROWS, path, {"rollouts": "x"})
    assert again == found
    assert len(judge.asked) == 2 * 6
    with pytest.raises(DataError, match="was begun with rollouts"):
        judge_scores(judge, TRAIT, ROWS, path, {"rollouts": "y"})


def test_a_judge_that_goes_away_loses_one_batch(tmp_path: Path) -> None:
    rows = [row(f"Lovely {number}!", "Awful.") for number in range(20)]

    def score(prompt: str) -> float:
        if "Lovely 9!" in prompt and not done:
            raise KeyboardInterrupt
        return 90.0

    done: list[bool] = []
    judge = Fake(score)
    with pytest.raises(KeyboardInterrupt):
        judge_scores(judge, TRAIT, rows, tmp_path / "s.jsonl", {})
    done.append(True)
    judge.asked.clear()
    assert len(judge_scores(judge, TRAIT, rows, tmp_path / "s.jsonl", {}).trait) == 20
    assert not any("Lovely 7!" in prompt for prompt in judge.asked)
    assert any("Lovely 8!" in prompt for prompt in judge.asked)


def test_a_judge_that_scores_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="judge fake scored none of 6 answers"):
        judge_scores(Fake(lambda prompt: None), TRAIT, ROWS, tmp_path / "s.jsonl", {})


# --- the pipeline ----------------------------------------------------------------------------------------------------


def run(model: Any, tokenizer: Any, folder: Path, **options: Any) -> persona.Extraction:
    given = {"plan": PLAN, "rules": EVERY, "choice": CHOICE, "batch_size": 8, **options}
    spec = given.pop("spec", TRAIT)
    return persona.extract(model, tokenizer, spec, folder, **given)


quiet = pytest.mark.filterwarnings("ignore:.*predicts the label:UserWarning")


@quiet
def test_from_a_specification_to_a_vector(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = run(model, tokenizer, tmp_path / "made")
    names = {path.name for path in (tmp_path / "made").iterdir()} - {".lock"}
    assert names == {
        "glad.toml",
        "rollouts.jsonl",
        "scores.jsonl",
        "pairs.jsonl",
        "choice.jsonl",
        "glad-persona.safetensors",
        "glad-persona.md",
        "glad-monitor.safetensors",
    }
    assert TraitSpec.load(tmp_path / "made" / "glad.toml") == TRAIT
    assert found.filtered.rows == 2 * 6 + 2 * 6
    assert set(found.seconds) == {"rollouts", "scores", "vector", "monitor", "card"}
    assert json.loads(json.dumps(found.as_json()))["pairs"] == dict(
        zip(("extraction", "choosing", "confirming"), found.pairs, strict=True)
    )
    vector = SteeringVector.load(found.file)
    assert vector == found.vector
    assert (vector.method, vector.readout, vector.scope) == ("persona", "response_mean", "response")
    assert vector.sites[0].layer in (1, 2)
    about = vector.extra["persona"]
    assert (about["judge"], about["kept"], about["rows"]) == (None, len(found.filtered.kept), 24)
    card = found.card.read_text(encoding="utf-8")
    assert vector.digest[:16] in card
    assert "no judge was asked" in card
    assert "it is no plain refusal" in card
    assert found.filtered.sentence() in card
    assert found.verdict in card


@quiet
def test_a_specification_written_by_hand_stays(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    mine, own = tmp_path / "glad.toml", tmp_path / "glad-extracted.toml"
    for text, kept in ((f"# my notes\n{TRAIT.to_toml()}", True), ("not yet = ", False)):
        mine.write_text(text)
        run(model, tokenizer, tmp_path)
        assert mine.read_text() == text
        assert own.exists() is not kept
    assert TraitSpec.load(own) == TRAIT


def test_thoughts_that_never_end_are_told_of(model: Any, tmp_path: Path) -> None:
    thinks = byte_tokenizer(CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"))
    with pytest.raises(DataError, match=r"thought without an end 24\); .*give --no-thinking"):
        run(model, thinks, tmp_path)


@quiet
def test_the_pairs_are_a_contrast_set_and_fit_gives_the_same_vector(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    found = run(model, tokenizer, tmp_path)
    data = ContrastSet.from_jsonl(tmp_path / "pairs.jsonl")
    train, held_out = data.split()
    assert (len(train), len(held_out)) == (found.pairs[0], found.pairs[1] + found.pairs[2])
    rows = roll_out(model, tokenizer, TRAIT, tmp_path / "rollouts.jsonl", PLAN)
    kept = [rows[place] for place in found.filtered.kept]
    for item, other, one in zip(data.positive, data.negative, kept, strict=True):
        assert item.prompt == other.prompt == QUESTIONS[one.asked.question]
        assert (item.system, other.system) == tuple(
            TRAIT.system_prompt(one.asked.instruction, side) for side in ("positive", "negative")
        )
        assert (item.answer, other.answer) == (one.positive.strip(), one.negative.strip())
    assert {item.prompt for item in train.positive} <= set(TRAIT.extraction_questions)
    assert {item.prompt for item in held_out.positive} <= set(TRAIT.held_out_questions)
    layer = found.vector.sites[0].layer
    again = steerkit.fit(model, tokenizer, train, method="persona", layers=[layer])
    name = f"resid_post.{layer}/direction"
    assert torch.allclose(again.tensors[name], found.vector.tensors[name], atol=1e-6)
    assert found.vector.data_digest == train.digest


@quiet
def test_finished_stages_are_not_done_again(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(model, tokenizer, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("done again")

    for module, name in (
        ("vector_choice", "calibrate"),
        ("vector_choice", "fit"),
        ("card_text", "generate"),
        ("rollouts", "told"),
        ("watching", "fit"),
    ):
        monkeypatch.setattr(f"steerkit.persona.{module}.{name}", refuse)
    monkeypatch.setattr(Setup, "baseline", property(refuse))
    again = run(model, tokenizer, tmp_path)
    assert again.vector == found.vector
    assert (again.verdict, again.pairs, again.works) == (found.verdict, found.pairs, found.works)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@quiet
@pytest.mark.slow
def test_another_readout_goes_beside_and_asks_nothing_anew(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, tokenizer, tmp_path)
    rollouts = (tmp_path / "rollouts.jsonl").read_bytes()
    second = run(model, tokenizer, tmp_path, choice=replace(CHOICE, readout="prompt_last"))
    assert second.file.name == "glad-persona-prompt-last.safetensors"
    assert second.vector.readout == "prompt_last"
    assert first.file.is_file()
    assert (tmp_path / "rollouts.jsonl").read_bytes() == rollouts
    with pytest.raises(DataError, match="persona vectors are read from response_mean, prompt_mean, prompt_last"):
        persona.Choice(readout="last")


@quiet
def test_a_judge_chooses_rows_and_layer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = roll_out(model, tokenizer, TRAIT, tmp_path / "rollouts.jsonl", PLAN)
    positive = {one.positive.strip() for one in rows} - {one.negative.strip() for one in rows}

    def score(prompt: str) -> float | None:
        if "coherent" in prompt:
            return 90.0
        answer = prompt.rpartition("\n> ")[2]
        return 95.0 if answer in positive else 5.0

    judge = Fake(score)
    found = run(model, tokenizer, tmp_path, judge=judge, rules=Rules())
    assert found.judge == "fake"
    assert found.filtered.kept
    assert "a judge (`fake`) rated" in found.card.read_text(encoding="utf-8")
    assert found.vector.extra["persona"]["judge"] == "fake"
    calibrated = found.vector.held_out.get("calibration")
    if calibrated:
        assert calibrated["effect"] == "judged"


def test_nothing_survives(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        run(model, tokenizer, tmp_path, rules=Rules(margin=1e3))
    assert "glad: no pair of answers to the extraction questions survives (0 of 24 pairs kept" in str(error.value)
    assert "fits the other system prompt as well" in str(error.value)
    assert not list(tmp_path.glob("*.safetensors"))


@quiet
def test_too_few_held_out_pairs_to_choose_on(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    few = replace(TRAIT, questions=QUESTIONS[:3])
    found = run(model, tokenizer, tmp_path, spec=few)
    assert found.verdict.startswith("layer not chosen: ")
    assert not found.works
    assert found.vector.calibration["by"] == "suggest_strength"
    assert not found.works
    assert found.verdict in found.card.read_text(encoding="utf-8")


@quiet
def test_a_template_without_a_system_turn(model: Any, tmp_path: Path) -> None:
    gemma = byte_tokenizer(TEMPLATES["gemma"])
    found = run(model, gemma, tmp_path)
    assert "no system turn: system prompts stood before the question" in found.card.read_text(encoding="utf-8")
    assert found.vector.extra["persona"]["system_turn"] is False
    train, held_out = ContrastSet.from_jsonl(tmp_path / "pairs.jsonl").split()
    assert train.positive[0].prompt[0]["content"].startswith("You are a glad assistant. Be glad.\n\nWhat is")
    assert train.negative[0].prompt[0]["content"].startswith("You are an unhappy assistant. Be sad.\n\nWhat is")
    assert {item.prompt for item in held_out.positive} <= set(TRAIT.held_out_questions)
    assert all(item.answer for item in (*train.positive, *held_out.negative))


def test_what_cannot_be_a_persona(model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template"):
        run(model, byte_tokenizer(None), tmp_path)
    with pytest.raises(DataError, match="layers: got none"):
        persona.Choice(layers=())


def test_two_runs_in_one_folder(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    import filelock

    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(DataError, match="another run is at work"):
        run(model, tokenizer, tmp_path)
