"""A run on a tiny model: its parts, what they hold, and that it goes on where it was killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import steerkit
from steerkit.errors import DataError
from steerkit.evaluate.setup import Setup
from steerkit.evidence import judged, measuring
from steerkit.evidence.answering import Bench, Row
from steerkit.evidence.behaviours import Behaviour
from steerkit.evidence.folder import Folder, texts_of
from steerkit.evidence.measuring import Run
from steerkit.evidence.questions import Question
from steerkit.evidence.subjects import Subject
from steerkit.evidence.summary import summary
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.prompts.system_prompts import SystemPrompts
from steerkit.vector.steering_vector import SteeringVector

TEXTS = ("How is tea?", "Why rain?", "Tell me more.", "Is it far?", "What now?", "Any news?")
JOY = Behaviour("joy", "joyful", SystemPrompts(("Be glad.", "Smile.", "Laugh."), ("Be sad.", "Weep.", "Sob.")))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    return steerkit.load_model(tiny)


@pytest.fixture
def run(tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    def asked(_kind: str, use: str) -> list[Question]:
        return [Question(f"{use[0]}: {text}") for text in TEXTS]

    monkeypatch.setattr(measuring, "asked_of", asked)
    monkeypatch.setattr(measuring, "NEUTRAL", 0)
    monkeypatch.setattr(Run, "_costs", lambda *_: {"kl": {"mean": 0.1}, "perplexity_ratio": {"mean": 1.1}})
    return Run(Bench(*loaded, max_new_tokens=6), Folder(tmp_path), monkeypatch_begun(tmp_path))


def monkeypatch_begun(_folder: Path) -> Any:
    begun: list[str] = []

    def step(name: str) -> None:
        begun.append(name)

    step.begun = begun  # type: ignore[attr-defined]
    return step


def begun(run: Run) -> list[str]:
    found: list[str] = run.step.begun  # type: ignore[attr-defined]
    return found


def subject_of(vector: SteeringVector, *, two_way: bool = True) -> Subject:
    return Subject("joy-caa", "joy", vector, 2.0, two_way, "questions")


def measure(run: Run, vector: SteeringVector) -> None:
    run.unsteered("questions")
    run.prompted(JOY)
    run.steered(subject_of(vector), JOY.prompting)


def test_all_of_a_vector_s_answers_come_from_one_batch_and_are_what_each_strength_gives_alone(
    run: Run, vector: SteeringVector
) -> None:
    measure(run, vector)
    texts = texts_of(run.folder, run.folder.read("joy-caa"))
    model, tokenizer = run.bench.model, run.bench.tokenizer
    assert list(texts) == ["-", "0", "+", "prompt", "prompt and steering"]
    for condition, strength in {"-": -2.0, "0": 0.0, "+": 2.0, "prompt": 0.0, "prompt and steering": 2.0}.items():
        systems = JOY.prompting.positive * 2 if "prompt" in condition else [None] * len(TEXTS)
        asked = [Conversation(f"m: {text}", system=said) for text, said in zip(TEXTS, systems, strict=True)]
        alone = steerkit.generate(model, tokenizer, asked, vector=vector, strength=strength, max_new_tokens=6)
        assert [row.text for row in texts[condition]] == alone, condition
    prompted = run.folder.read("prompted-joy")
    assert len(prompted.of("positive")) == len(prompted.of("negative")) == measuring.WORDINGS_EACH * len(TEXTS)
    assert {row.question for row in prompted.of("positive")} == {f"t: {text}" for text in TEXTS}


def test_what_the_unsteered_model_says_of_an_answer(run: Run, vector: SteeringVector) -> None:
    measure(run, vector)
    rows = texts_of(run.folder, run.folder.read("joy-caa"))["+"]
    setup = Setup(run.bench.model, run.bench.tokenizer)

    def log_prob(prompt: str, answer: str, *, raw: bool = False) -> Any:
        return setup.baseline.log_probs([render(setup.tokenizer, Conversation(prompt, answer=answer, raw=raw))])[0]

    for place, row in enumerate(rows):
        assert row.nll == pytest.approx(-float(log_prob(row.question, row.text).mean()), abs=2e-3)
        other = rows[(place + 13) % len(rows)].text
        own, shuffled = (
            float(log_prob(f"{one.strip()}\n\nThis is the answer to the question:", f" {row.question}", raw=True).sum())
            for one in (row.text, other)
        )
        assert row.z == pytest.approx(own - shuffled, abs=2e-2)


def test_a_run_goes_on_where_it_was_killed(run: Run, vector: SteeringVector, monkeypatch: pytest.MonkeyPatch) -> None:
    run.unsteered("questions")
    with monkeypatch.context() as broken:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        broken.setattr(Bench, "scored", killed)
        with pytest.raises(KeyboardInterrupt):
            run.prompted(JOY)
    assert run.folder.names() == ["unsteered-questions"]
    measure(run, vector)
    measure(run, vector)
    assert begun(run) == ["unsteered-questions", "prompted-joy", "prompted-joy", "joy-caa"]


def test_what_depends_on_something_else_is_measured_anew(run: Run, vector: SteeringVector) -> None:
    measure(run, vector)
    run.steered(subject_of(vector, two_way=False), JOY.prompting)
    assert begun(run)[-2:] == ["joy-caa", "joy-caa"]
    assert "-" not in texts_of(run.folder, run.folder.read("joy-caa"))


def test_an_empty_answer_counts_nothing(run: Run) -> None:
    rows = [Row("m: How is tea?", "+", text="Fine."), Row("m: Why rain?", "+", text="  ")]
    found = run.bench.scored(rows)
    assert found[0].nll is not None
    assert (found[1].nll, found[1].z) == (None, None)


class Odd:
    """A judge that gives the highest mark, and none to every seventh text."""

    name = "odd"

    def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
        return [None if number % 7 == 3 else float(high) for number in range(len(prompts))]


def test_a_judge_takes_over_and_a_failed_call_never_improves_a_score(run: Run, vector: SteeringVector) -> None:
    measure(run, vector)
    every = {"joy": JOY}
    plain = summary(run.folder, every, ["joy-caa"])["vectors"]["joy-caa"]
    assert "judge" not in plain["judged_by"]
    judged.judge_all(run.folder, every, ["joy-caa"], Odd())
    found = summary(run.folder, every, ["joy-caa"])["vectors"]["joy-caa"]
    assert found["judged_by"]["judge"] == "odd"
    part = run.folder.read("judged-joy-caa")
    for condition, told in found["texts"].items():
        rows = part.of(condition)
        whole = [float(bool(row.text.strip()) and len(row.ratings or {}) == 3) for row in rows]
        assert told["concept"]["mean"] == pytest.approx(sum(whole) / len(whole), abs=1e-4), condition
        assert told["failed"] == whole.count(0.0)
    assert any(told["failed"] for told in found["texts"].values())


def test_a_damaged_file_is_told(run: Run, vector: SteeringVector) -> None:
    measure(run, vector)
    file = run.folder.file("joy-caa")
    file.write_text(file.read_text("utf-8")[:-20], "utf-8")
    with pytest.raises(DataError, match="delete it to measure anew"):
        run.steered(subject_of(vector), JOY.prompting)
