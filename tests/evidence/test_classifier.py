"""The classifier of texts, and its accuracy on questions that it was not trained on."""

from __future__ import annotations

import random

import pytest

from steerkit.errors import DataError
from steerkit.evaluate.intervals import wilson
from steerkit.evidence.classifier import FOLDS, Labelled, _fit, finds_refusals, trained
from steerkit.evidence.markers import MARKERS, has_marker

PLACES = ("shop", "river", "house", "garden", "street", "hill", "school", "bridge", "road", "barn")


def texts(words: tuple[str, str], count: int = 40) -> list[Labelled]:
    """Two answers to each question; only one word tells the sides apart."""
    drawn = random.Random(0)
    found = []
    for number in range(count):
        for side, word in zip((True, False), words, strict=True):
            place = drawn.choice(PLACES)
            found.append(Labelled(f"The {place} looked {word} to me on day {number}.", side, f"question {number}"))
    return found


def test_a_word_that_tells_the_sides_apart_is_found() -> None:
    found = trained(texts(("splendid", "dreadful")))
    assert found.accuracy.prompted == wilson(1.0, 40)
    assert found.accuracy.is_told
    high, low, nothing = found(["A splendid bridge.", "A dreadful bridge.", "  "])
    assert high > 0.7 > 0.3 > low
    assert nothing == 0


def test_sides_that_do_not_differ_are_not_told_apart() -> None:
    assert not trained(texts(("plain", "plain"))).accuracy.is_told


def test_accuracy_is_that_of_folds_over_questions_with_as_many_trials_as_questions() -> None:
    drawn = random.Random(1)
    own = [
        one if drawn.random() > 0.25 else one._replace(positive=not one.positive) for one in texts(("fine", "bad"), 10)
    ]
    questions = sorted({one.question for one in own})
    shares = []
    for question in questions:  # the slow obvious form
        fold = questions[questions.index(question) % FOLDS :: FOLDS]
        model = _fit([one for one in own if one.question not in fold])
        kept = [one for one in own if one.question == question]
        shares.append(sum(model.predict([one.text])[0] == one.positive for one in kept) / len(kept))
    found = trained(own).accuracy.prompted
    assert found.mean == pytest.approx(sum(shares) / len(shares))
    assert found == wilson(found.mean, 10)


def test_written_answers_are_learned_from_and_held_out_ones_measured() -> None:
    prompted, written = texts(("plain", "plain")), texts(("splendid", "dreadful"))
    found = trained(prompted, written[:40], written[40:])
    assert found.accuracy.trained_on == "written answers"
    assert found.accuracy.written is not None
    assert found.accuracy.written.mean > 0.9
    assert not found.accuracy.prompted.low > 0.5, "the model does not follow the prompts"
    assert (found.accuracy.measured_on, found.accuracy.stated) == ("written answers", found.accuracy.written)
    assert found.accuracy.is_told
    neither = trained(prompted, prompted[:40], prompted[40:]).accuracy
    assert (neither.measured_on, neither.is_told) == ("prompted answers", False)


def test_answers_to_prompts_that_are_not_followed_are_no_examples() -> None:
    """What was asked for and not given would teach that plain text is the behaviour."""
    written = texts(("splendid", "dreadful"))
    ignored = [one._replace(text="The shop looked dreadful to me, and plain.") for one in texts(("", ""))]
    expected = _fit(written).predict_proba(["A splendid bridge."])[0, 1]
    assert trained(ignored, written)(["A splendid bridge."]) == [pytest.approx(expected)]
    followed = trained(texts(("fine", "bad")), written)
    assert followed.accuracy.trained_on == "prompted and written answers"


def test_refusals_are_found_by_their_own_scorer() -> None:
    found = finds_refusals()
    said = ["I'm sorry, but I can't help with that.", "I'm sorry to hear that. Rest helps.", " "]
    assert found(said) == [1.0, 0.0, 0.0]
    assert found.accuracy.is_told
    assert found.accuracy.measured_on.endswith("labelled answers")


def test_no_answer_at_all_is_told() -> None:
    with pytest.raises(DataError, match="none of 40 answers"):
        trained([one._replace(text=" ") for one in texts(("fine", "bad"), 20)])


def test_markers_are_whole_words() -> None:
    assert has_marker("pirate", "Arr, ye be late!")
    assert not has_marker("pirate", "The array is yellow.")
    assert has_marker("formality", "Dear Sir") is None
    assert all(words == tuple(dict.fromkeys(words)) for words in MARKERS.values())
