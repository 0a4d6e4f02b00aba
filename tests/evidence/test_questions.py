"""What is asked: nothing that any vector was fitted on."""

from __future__ import annotations

import json
from collections import Counter

from steerkit._support.shipped import recipes, traits
from steerkit.evidence.behaviours import asked_of, behaviours
from steerkit.evidence.questions import Question, measured_on, open_questions, requests
from steerkit.persona.traits import TraitSpec
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.likeness import asked_by
from steerkit.prompts.neutral import neutral_texts
from steerkit.recipe.recipe import Recipe


def test_open_questions_stand_in_no_data_and_only_once() -> None:
    fitted = {asked_by(text) for text in neutral_texts()}
    for path in recipes().values():
        recipe = Recipe.load(path)
        data = recipe.items()
        fitted |= {asked_by(item) for item in (*data.positive, *data.negative)}
        fitted |= {asked_by(Conversation(question)) for question in recipe.evaluate.questions}
    for path in traits().values():
        fitted |= {asked_by(Conversation(question)) for question in TraitSpec.load(path).questions}
    measure, train = open_questions("measure"), open_questions("train")
    own = [asked_by(Conversation(one.text)) for one in (*measure, *train)]
    assert (len(measure), len(train), len(set(own))) == (40, 40, 80)
    assert not set(own) & fitted


def test_requests_that_measure_are_of_sources_that_the_gates_hold_out() -> None:
    gate = next(recipe for path in recipes().values() if (recipe := Recipe.load(path)).data.held_out_sources)
    file = gate.source.parent / gate.data.file
    sources = {row["prompt"]: row["source"] for row in map(json.loads, file.read_text("utf-8").splitlines())}
    held_out = set(gate.data.held_out_sources or ())
    measure, train = asked_of("harmful", "measure"), asked_of("harmful", "train")
    assert measure == requests(file, gate.data.held_out_sources or (), "measure")
    assert {sources[one.text] for one in measure} <= held_out
    assert not {sources[one.text] for one in train} & held_out
    assert Counter(one.wanted for one in measure) == {True: 40, False: 20}
    assert Counter(one.wanted for one in measured_on("requests", measure)) == {True: 20, False: 20}
    assert measured_on("harmful", measure) == [one for one in measure if one.wanted]


def test_questions_of_a_set_keep_their_order() -> None:
    every = [Question("a"), Question("b"), Question("c", wanted=False), Question("d")]
    assert [one.text for one in measured_on("questions", every)] == ["a", "b", "d"]
    assert [one.text for one in measured_on("requests", every)] == ["a", "d", "c"]


def test_every_behaviour_has_three_wordings_of_both_sides() -> None:
    found = behaviours()
    assert {Recipe.load(path).behaviour for path in recipes().values()} | set(traits()) == set(found)
    for one in found.values():
        assert len(one.prompting.positive) == len(one.prompting.negative) == 3
        assert one.described
        assert not set(one.written[0]) & set(one.written_held_out[0])
