"""System prompts as a condition to measure: against the definition, one text at a time, on every kind of template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.errors import DataError
from steerkit.evaluate import compare_prompting
from steerkit.evaluate.calibration.budget import Budget
from steerkit.evaluate.compare import COSTS, Row
from steerkit.evaluate.compare_prompting import Asking
from steerkit.evaluate.intervals import Estimate
from steerkit.evaluate.prompting import NEUTRAL as NOTHING
from steerkit.evaluate.prompting import Spread, measure_prompting, training_gains
from steerkit.evaluate.scorers.divergence import Divergence
from steerkit.evaluate.scorers.kl_first import FirstDivergence
from steerkit.evaluate.scorers.preference_margin import PreferenceMargin
from steerkit.evaluate.scorers.projection import Projection
from steerkit.evaluate.scoring import measure
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.store import Store
from steerkit.evaluate.store_identity import setup_identity
from steerkit.generation import generate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.prompts.system_prompts import instructed, takes_system
from tests import modes
from tests.families import build
from tests.looping import looping_model, trait_data
from tests.tiny_tokenizers import CHATML, LLAMA2, byte_tokenizer

ASKED = "Be glad, please."
ITEMS = [
    ("How was it?", "It was a fine day.", "It was a bad day."),
    ("And the food, tell me?", "Good.", "Not good at all, I fear."),
    ("Well?", "Y", "N"),
]
NEUTRAL = [
    Conversation("Two and two?", answer="4"),
    Conversation("Name a colour, please.", answer="Blue is one, and red."),
    Conversation("Why?", answer="Because it is so."),
]
# A template that knows no system turn: one refuses it, one drops it without a word.
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
DROPS = CHATML.replace("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "refuses": REFUSES, "drops": DROPS, "none": None}


def setup_for(template: str | None = CHATML, **changes: Any) -> Setup:
    options: dict[str, Any] = {"data": ContrastSet.from_answers(ITEMS), "neutral": NEUTRAL, "max_new_tokens": 3}
    return Setup(build("llama"), byte_tokenizer(template), **{**options, **changes})


def by_hand(name: str, item: Conversation) -> Conversation:
    """What the model is asked behind the system prompt, written out."""
    if name in ("chatml", "llama2"):
        return replace(item, system=ASKED)
    return replace(item, prompt=f"{ASKED}\n\n{item.prompt}")


def logs(setup: Setup, item: Conversation) -> tuple[Tensor, Tensor]:
    """[t] ids of an answer and [t, v] log-probabilities, from one plain pass."""
    text = render(setup.tokenizer, item)
    with torch.no_grad():
        logits = setup.model(torch.tensor([text.ids])).logits[0]
    return torch.tensor(text.ids[text.prompt_length :]), logits[text.prompt_length - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_system_prompt_is_measured_by_the_definition(name: str) -> None:
    plain = setup_for(TEMPLATES[name])
    trial = plain.prompted(ASKED).trial(None)
    found, kl, ratios, margins = measure(trial, ["divergence", "preference_margin"]), [], [], []
    for item in NEUTRAL:
        (ids, before), (again, after) = logs(plain, item), logs(plain, by_hand(name, item))
        assert torch.equal(ids, again)
        kl.append((before.exp() * (before - after)).sum(-1))
        ratios.append((before - after).gather(-1, ids[:, None])[:, 0])
    assert found["kl"].estimate.mean == pytest.approx(float(torch.cat(kl).mean()), abs=1e-5)
    assert found["kl"].estimate.mean > 1e-5, "a system prompt is no baseline, whose divergence is 0"
    assert found["perplexity_ratio"].estimate.mean == pytest.approx(float(torch.cat(ratios).mean().exp()), rel=1e-5)
    for prompt, *answers in ITEMS:
        values = []
        for one in (Conversation(prompt), by_hand(name, Conversation(prompt))):
            means = []
            for answer in answers:
                ids, predicted = logs(plain, replace(one, answer=answer))
                means.append(float(predicted.gather(-1, ids[:, None]).mean()))
            values.append(means[0] - means[1])
        margins.append(values)
    before, after = torch.tensor(margins).mean(dim=0).tolist()
    change = found["preference_margin"].change
    assert change is not None
    assert found["preference_margin"].estimate.mean == pytest.approx(after, abs=1e-5)
    assert change.mean == pytest.approx(after - before, abs=1e-5)
    asked = [by_hand(name, Conversation(prompt)) for prompt, *_ in ITEMS]
    assert list(trial.texts) == generate(plain.model, plain.tokenizer, asked, max_new_tokens=3)
    assert trial.baseline.texts == plain.baseline.texts


def test_steering_on_top_is_compared_with_the_plain_model() -> None:
    """What is steered behind the system prompt is what steering gives where the items bring it themselves."""
    plain = setup_for()
    vector = modes.vector_for(plain.model, scope="response", size=0.5)
    on_top = measure(plain.prompted(ASKED).trial(vector, 0.8))["preference_margin"]
    sides = [[replace(item, system=ASKED) for item in side] for side in plain.data.sides]  # type: ignore[union-attr]
    inside = replace(plain, data=ContrastSet(*map(tuple, sides), paired=True))
    assert on_top.estimate == measure(inside.trial(vector, 0.8))["preference_margin"].estimate
    margins = measure(plain.baseline)["preference_margin"].estimate
    assert on_top.change is not None
    assert on_top.change.mean == pytest.approx(on_top.estimate.mean - margins.mean, abs=1e-6)
    kl = measure(plain.prompted(ASKED).trial(vector, 0.0), ["divergence"])["kl"].estimate.mean
    assert kl == pytest.approx(measure(plain.prompted(ASKED).trial(None), ["divergence"])["kl"].estimate.mean, abs=1e-6)


def test_the_plain_model_is_asked_once_and_never_takes_the_prompted_one_s_figures() -> None:
    plain = setup_for()
    prompted = plain.prompted(ASKED)
    assert prompted.baseline is plain.baseline
    assert prompted.prompted("Be sad.").plain is plain
    assert replace(plain, system=ASKED).baseline.setup.system is None, "the option alone does the same"
    before = measure(plain.baseline, [PreferenceMargin()])["preference_margin"].estimate
    first = measure(prompted.trial(None), [PreferenceMargin(), FirstDivergence()])
    assert first["preference_margin"].estimate != before
    assert first["kl_first"].estimate.mean > 1e-6
    assert measure(plain.baseline, [PreferenceMargin()])["preference_margin"].estimate == before
    assert setup_identity(plain) != setup_identity(prompted)
    with pytest.raises(DataError, match="no vector has no single direction"):
        measure(prompted.trial(None), [Projection()])
    assert Divergence().score(prompted.baseline)["kl"].values.tolist() == [0.0, 0.0, 0.0]


def test_where_an_instruction_stands() -> None:
    def texts(item: Conversation, *, has_turn: bool) -> Any:
        made = instructed(item, "Do.", has_turn=has_turn)
        return (made.system, made.prompt if isinstance(made.prompt, str) else [turn["content"] for turn in made.prompt])

    assert texts(Conversation("Hi"), has_turn=True) == ("Do.", "Hi")
    assert texts(Conversation("Hi"), has_turn=False) == (None, "Do.\n\nHi")
    assert texts(Conversation("Hi", raw=True), has_turn=True) == (None, "Do.\n\nHi")
    assert texts(Conversation("Hi", system="You are it."), has_turn=True) == ("Do.\n\nYou are it.", "Hi")
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}
    own = {"role": "system", "content": "You are it."}
    for turns, has_turn, expected in (
        ([user], True, ["Do.", "Hi"]),
        ([user], False, ["Do.\n\nHi"]),
        ([said, user], False, ["Yes?", "Do.\n\nHi"]),
        ([own, user], True, ["Do.\n\nYou are it.", "Hi"]),
    ):
        assert texts(Conversation(tuple(turns)), has_turn=has_turn) == (None, expected)
    assert [takes_system(byte_tokenizer(one)) for one in TEMPLATES.values()] == [True, True, False, False, False]


def test_answers_that_become_other_tokens_are_told_and_never_scored() -> None:
    """Without a template the instruction's end could join the answer; here the texts are simply different ones."""
    setup = setup_for()
    first, second = (setup.render(NEUTRAL[row]) for row in (0, 1))
    with pytest.raises(DataError, match="other tokens behind the system prompt"):
        next(setup.baseline.answers([first], beside=[second]))


def test_rows_of_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wording chosen on training items, however it does on the held-out ones; the method at its KL and on top."""
    monkeypatch.setattr(compare_prompting, "decoding_overhead", lambda trial: Estimate(1.0, 0.9, 1.1))
    plain = setup_for(texts=1)
    train = ContrastSet.from_answers([("Is it?", "It is so.", "It is not."), ("And?", "A", "B")])
    systems = ["Be glad, please.", "Do it.", "Answer as a sailor would."]
    asking = Asking(plain, train, systems, "joy", ["Well?"], Budget(max_kl=0.0), Store())
    alone = asking.alone()
    gains = training_gains(plain, train, systems)
    chosen = systems[gains.index(max(gains))]
    assert [one["training_effect"] for one in alone.wordings] == gains
    expected = measure(plain.half(1).prompted(chosen).trial(None), ["preference_margin", "divergence", "repetition"])
    assert alone.effect == expected["preference_margin"].gain
    assert alone.costs is not None
    assert alone.costs["kl"] == expected["kl"].effect
    nothing = [measure(plain.prompted(one).trial(None))["preference_margin"].gain.mean for one in NOTHING]
    assert alone.controls == pytest.approx((min(nothing), max(nothing)), abs=1e-6)
    assert chosen in alone.verdict
    assert "own costs: KL" in alone.verdict
    assert alone.place == "best of 3"
    vector = modes.vector_for(plain.model, scope="response", size=0.5)
    found = measure(plain.half(1).trial(vector, 0.8), ["preference_margin", "divergence", "repetition"])
    costs = {name: found[name].effect for name in COSTS}
    effect = found["preference_margin"].gain
    method = Row("caa", "Means", "joy", ("resid_post.1",), 0.8, True, "", effect, None, costs)
    beside = asking.beside(alone, method, vector)
    assert beside is not None
    assert beside.strength == pytest.approx(0.8 * (alone.costs["kl"].mean / costs["kl"].mean) ** 0.5, rel=0.06)
    assert beside.costs is not None
    assert beside.costs["kl"].mean == pytest.approx(alone.costs["kl"].mean, rel=0.5)
    assert asking.beside(alone, replace(method, costs={}), vector) is None, "what was not measured is no cost of 0"
    on_top = asking.under(alone, method, vector)
    expected = measure(plain.half(1).prompted(chosen).trial(vector, 0.8), ["preference_margin"])
    assert on_top.effect == expected["preference_margin"].gain
    assert on_top.controls == tuple(sorted((alone.effect.mean, effect.mean)))  # type: ignore[union-attr]
    raw = ContrastSet.from_prompts(["So glad"], ["So sad"])
    failed = Asking(replace(plain, data=raw), train, systems, "joy", ["Well?"], Budget(), Store()).alone()
    assert (failed.works, failed.effect, failed.costs) == (False, None, None)
    assert failed.verdict.startswith("could not be measured")


def test_wordings_and_their_spread() -> None:
    """The looping model's every number is known: it does not attend, so no system prompt moves anything."""
    model, tokenizer = looping_model()
    data = trait_data(6)
    setup = Setup(model, tokenizer, data, neutral=NEUTRAL, texts=2, max_new_tokens=3)
    notes: list[None] = []
    found = measure_prompting(setup, ["Be A.", "Be B."], step=lambda: notes.append(None))
    assert len(notes) == 2
    assert found.spread("kl") == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert found.spread("preference_margin") == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    assert training_gains(setup, data, ["Be A.", "Be B."]) == pytest.approx([0.0, 0.0], abs=1e-6)
    random = setup_for()
    several = measure_prompting(random, ["Be A.", "Be B, and more."], ["preference_margin"], store=(kept := Store()))
    means = [one.scores["preference_margin"].effect.mean for one in several.wordings]
    assert means[0] != means[1]
    assert several.spread("preference_margin") == Spread(sum(means) / 2, min(means), max(means))
    assert several.as_json()["over_wordings"]["preference_margin"]["highest"] == max(means)
    assert len(kept) == 2
    again = measure_prompting(random, ["Be A.", "Be B, and more."], ["preference_margin"], store=kept)
    assert again == several
    with pytest.raises(DataError, match="got no system prompt"):
        measure_prompting(random, [])
