"""Every scorer against its definition written out with plain loops, one text and one token at a time."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from steerkit.errors import DataError, SiteError, SteerError, UnknownNameError
from steerkit.evaluate import scorers
from steerkit.evaluate.scorers._base import Column, Scorer, Weighted
from steerkit.evaluate.scorers.choice import Choice
from steerkit.evaluate.scorers.compliance import QUESTION, Compliance, complies, relevance
from steerkit.evaluate.scorers.divergence import Divergence
from steerkit.evaluate.scorers.kl_first import FirstDivergence
from steerkit.evaluate.scorers.length import Length
from steerkit.evaluate.scorers.markers import Markers
from steerkit.evaluate.scorers.perplexity import Perplexity
from steerkit.evaluate.scorers.projection import Projection
from steerkit.evaluate.scorers.refusal import Refusal
from steerkit.evaluate.scorers.repetition import Repetition
from steerkit.evaluate.scorers.restricted_accuracy import RestrictedAccuracy
from steerkit.evaluate.scorers.topic_perplexity import TopicPerplexity
from steerkit.evaluate.scoring import _SCORERS, measure, scorer_names, scorer_of
from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Trial
from steerkit.methods import _registry as registry
from steerkit.methods._base import Method
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import locate
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.tokens.clock import Hook
from tests import modes, tiny_tokenizers
from tests.choices import mostly_slow
from tests.families import build
from tests.pairwise import pairwise
from tests.tiny_tokenizers import CHATML, LLAMA2, byte_tokenizer

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
STRENGTH = 0.8
FAMILIES = ("llama", "gpt2", "mamba")
ALL: tuple[Scorer, ...] = (
    *map(scorer_of, ("preference_margin", "choice", "perplexity", "topic_perplexity", "restricted_accuracy")),
    *map(scorer_of, ("repetition", "length", "projection", "divergence", "kl_first", "refusal")),
    Markers(("the", "a")),
)


def setup_for(family: str = "llama", *, template: str | None = CHATML, batch_size: int = 16, **changes: Any) -> Setup:
    options: dict[str, Any] = {
        "data": ContrastSet.from_answers(ITEMS),
        "neutral": NEUTRAL,
        "batch_size": batch_size,
        "max_new_tokens": 3,
        **changes,
    }
    return Setup(build(family), byte_tokenizer(template), **options)


def steered(setup: Setup, strength: float = STRENGTH) -> Trial:
    return setup.trial(modes.vector_for(setup.model, scope="response", size=0.5), strength)


def both(setup: Setup) -> tuple[Trial, Trial]:
    return steered(setup), setup.baseline


def logs_of(trial: Trial, ids: Sequence[int], prompt_length: int) -> Tensor:
    """[answer tokens, v] log-probabilities of one text alone; row `i` predicts answer token `i`."""
    with trial.steering([prompt_length]):
        logits = modes.plain_logits(trial.setup.model, ids).double()
    return torch.log_softmax(logits, dim=-1)[prompt_length - 1 : len(ids) - 1]


def nll_of(trial: Trial, item: Conversation) -> list[float]:
    text = trial.setup.render(item)
    logs = logs_of(trial, text.ids, text.prompt_length)
    return [-float(logs[place, token]) for place, token in enumerate(text.ids[text.prompt_length :])]


def with_texts(*texts: str) -> Trial:
    """A trial whose generated texts are given."""
    trial = Setup(torch.nn.Identity(), byte_tokenizer(CHATML)).baseline
    vars(trial)["texts"] = texts
    return trial


def values(scores: Tensor | Weighted) -> Tensor:
    return scores.values if isinstance(scores, Weighted) else scores


def close(found: Tensor | Weighted, expected: Sequence[float], tolerance: float = 1e-4) -> bool:
    return torch.allclose(values(found).double(), torch.tensor(expected, dtype=torch.double), atol=tolerance)


# choice


def slow_choice(trial: Trial) -> list[float]:
    found = []
    for number, (prompt, positive, negative) in enumerate(ITEMS):
        first, second = (positive, negative) if number % 2 == 0 else (negative, positive)
        question = f"{prompt}\n\nChoices:\n (A) {first}\n (B) {second}"
        opened = trial.setup.render(Conversation(question, answer="("))
        letters = [trial.setup.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB"]
        # A pad id behind "(", so that the last row is the prediction behind it.
        row = logs_of(trial, [*opened.ids, 0], opened.prompt_length)[-1]
        probabilities = [math.exp(float(row[letter])) for letter in letters]
        found.append(probabilities[number % 2] / sum(probabilities))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_choice_is_its_definition(family: str, batch_size: int) -> None:
    setup = setup_for(family, batch_size=batch_size)
    after, before = (Choice().score(trial)["p_match"] for trial in both(setup))
    assert close(after, slow_choice(steered(setup)))
    assert close(before, slow_choice(setup.baseline))
    assert not torch.allclose(after, before, atol=1e-3)
    assert after.dtype == torch.float32


@pytest.mark.parametrize("template", [CHATML, LLAMA2, None])
def test_choice_when_letters_are_swapped(template: str | None) -> None:
    # Behind one more item every letter changes sides; the two answers swapped as well, the question is the same.
    items = [(f"Is it {word}?", "Yes.", "No!") for word in ("so", "far", "near")]
    swapped = [("First.", "x", "y"), *((prompt, negative, positive) for prompt, positive, negative in items)]
    once = Choice().score(setup_for(template=template, data=ContrastSet.from_answers(items)).baseline)["p_match"]
    again = Choice().score(setup_for(template=template, data=ContrastSet.from_answers(swapped)).baseline)["p_match"]
    assert torch.allclose(once, 1 - again[1:], atol=1e-6)


@pytest.mark.parametrize(
    ("merges", "tokens"),
    [
        ((), ("A", "B")),
        (("( A",), ("(A", "(")),
        (("( A", "( B"), ("(A", "(B")),
        (("]Ġ (",), ("A", "B")),
        (("]Ġ (", "]Ġ( A"), ("]Ġ(A", "]Ġ(")),
    ],
)
def test_choice_where_the_tokenizer_joins_letters(
    merges: tuple[str, ...], tokens: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizers, "MERGES", (*tiny_tokenizers.MERGES, *merges))
    setup = setup_for(template=LLAMA2)
    trial = steered(setup)
    found = Choice().score(trial)["p_match"]
    prompt, positive, negative = ITEMS[0]
    question = f"{prompt}\n\nChoices:\n (A) {positive}\n (B) {negative}"
    one, other = (setup.render(Conversation(question, answer=letter)) for letter in ("(A", "(B"))
    place = next(place for place in range(len(one.ids)) if one.ids[place] != other.ids[place])
    ids = [one.ids[place], other.ids[place]]
    assert tuple(setup.tokenizer.convert_ids_to_tokens(ids)) == tokens, "the merges do what the case is about"
    start = min(one.prompt_length, other.prompt_length)
    row = logs_of(trial, one.ids[: place + 1], start)[-1].exp()
    assert float(found[0]) == pytest.approx(float(row[ids[0]] / row[ids].sum()), abs=1e-5)


def test_choice_in_chats_and_plain_texts() -> None:
    turns = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hm?"},
        {"role": "user", "content": "So?"},
    ]
    chat = setup_for(data=ContrastSet.from_answers([(turns, "Yes.", "No!")]))
    shown: list[str] = []

    class Seen(Trial):
        def over_answers(self, rendered: Any, of: Any, **options: Any) -> Any:
            shown.extend(text.text for text in rendered)
            return super().over_answers(rendered, of, **options)

    def seen(setup: Setup) -> str:
        shown.clear()
        Choice().score(Seen(setup, None, None, None, None))
        return shown[0]

    assert "user\nSo?\n\nChoices:\n (A) Yes.\n (B) No!<|im_end|>" in seen(chat)
    assert "user\nHi.<|im_end|>" in seen(chat)
    plain = setup_for(template=None, data=ContrastSet.from_answers([("So?", "Yes.", "No!")]))
    assert seen(plain) == "So?\n\nChoices:\n (A) Yes.\n (B) No!\n\nAnswer:\n(A"
    raw = setup_for(data=ContrastSet.from_answers([("So?", "Yes.", "No!")], raw=True))
    assert seen(raw) == seen(plain)
    silent = setup_for(data=ContrastSet.from_answers([([{"role": "system", "content": "Be."}], "Yes.", "No!")]))
    with pytest.raises(DataError, match="item 0: the chat has no user turn"):
        Choice().score(silent.baseline)
    with pytest.raises(DataError, match="item 0 has no two answers"):
        Choice().score(setup_for(data=ContrastSet.from_prompts(["a b"], ["c d"])).baseline)


def test_choice_refuses_letters_that_are_written_alike() -> None:
    setup = setup_for()

    class Lower:
        """A tokenizer that sees no letter."""

        def __getattr__(self, name: str) -> Any:
            return getattr(setup.tokenizer, name)

        def __call__(self, text: str, **options: Any) -> Any:
            return setup.tokenizer(text.replace("(B", "(A"), **options)

    with pytest.raises(DataError, match=r"item 0: the tokenizer writes '\(A' and '\(B' alike"):
        Choice().score(replace(setup, tokenizer=Lower()).baseline)


def test_answers_that_differ_before_they_begin_are_refused() -> None:
    from steerkit.evaluate.scorers._forks import fork

    tokenizer = byte_tokenizer(CHATML)
    one, other = (render(tokenizer, Conversation(prompt, answer="Yes")) for prompt in ("Ab", "Ac"))
    with pytest.raises(DataError, match="before the answer begins"):
        fork(one, other)
    assert fork(one, one) is None


# restricted_accuracy


@pytest.mark.parametrize(("batch_size", "family"), pairwise([1, 4], FAMILIES, strength=1))
def test_restricted_accuracy_is_its_definition(family: str, batch_size: int) -> None:
    words = ["Yes it is.", "No it is not.", "Never!", "Quite so", "Go on", "Good.", "It was fine.", "It was bad."]
    items = [(f"Is {one[:3]}?", one, other) for one in words for other in words if one != other]
    setup = setup_for(family, data=ContrastSet.from_answers(items), batch_size=batch_size)
    for trial in both(setup):
        expected = []
        for prompt, *answers in items:
            one, other = (setup.render(Conversation(prompt, answer=answer)) for answer in answers)
            place = next(place for place in range(len(one.ids)) if one.ids[place] != other.ids[place])
            # The merges of the tokenizer join some beginnings of answers with the line end before them.
            start = min(one.prompt_length, other.prompt_length)
            row = logs_of(trial, one.ids[: place + 1], start)[-1]
            expected.append(float(row[one.ids[place]] > row[other.ids[place]]))
        found = RestrictedAccuracy().score(trial)["restricted_accuracy"]
        assert found.tolist() == expected
        assert 0 < sum(expected) < len(expected), "a test in which both happen"


def test_restricted_accuracy_where_a_token_joins_prompt_and_answer() -> None:
    # "?Y" is one token here, so "Yes" begins a token earlier than "No".
    data = ContrastSet.from_answers([("Is it?", "Yes", "No")], raw=True)
    setup = setup_for(data=data)
    (one, other) = setup.pairs[0]
    assert one.prompt_length == other.prompt_length - 1
    trial = steered(setup)
    row = logs_of(trial, one.ids[: one.prompt_length + 1], one.prompt_length)[-1]
    expected = float(row[one.ids[one.prompt_length]] > row[other.ids[one.prompt_length]])
    assert RestrictedAccuracy().score(trial)["restricted_accuracy"].tolist() == [expected]


def test_a_tie_is_not_accurate() -> None:
    setup = setup_for()
    torch.nn.init.zeros_(setup.model.lm_head.weight)
    assert RestrictedAccuracy().score(setup.baseline)["restricted_accuracy"].tolist() == [0.0] * 3


def test_restricted_accuracy_of_answers_that_do_not_part() -> None:
    beginning = setup_for(data=ContrastSet.from_answers([*ITEMS, ("So?", "Yes", "Yes, it is.")]))
    found = RestrictedAccuracy().score(beginning.baseline)["restricted_accuracy"]
    assert torch.isnan(found).tolist() == [False, False, False, True]
    assert measure(beginning.baseline, ["restricted_accuracy"])["restricted_accuracy"].failures == 1
    same = setup_for(data=ContrastSet.from_answers([*ITEMS, ("So?", "Yes", "Yes")]))
    with pytest.raises(DataError, match="item 3: both answers are the same tokens"):
        RestrictedAccuracy().score(same.baseline)


# perplexity and topic_perplexity


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_its_definition(family: str, batch_size: int) -> None:
    setup = setup_for(family, batch_size=batch_size)
    shown = {}
    for trial in both(setup):
        losses = [nll_of(trial, item) for item in NEUTRAL]
        found = Perplexity().score(trial)["perplexity"]
        assert close(found, [sum(one) / len(one) for one in losses])
        assert found.weights.tolist() == [len(one) for one in losses]
        shown[trial] = math.exp(sum(map(sum, losses)) / sum(map(len, losses)))
    (after, before), measured = shown.values(), measure(steered(setup), ["perplexity"])["perplexity"]
    assert measured.estimate.mean == pytest.approx(after, rel=1e-4)
    assert measured.change is not None
    assert measured.change.mean == pytest.approx(after / before, rel=1e-4), "the change is the ratio"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skip", [0, 1])
def test_topic_perplexity_is_its_definition(family: str, skip: int) -> None:
    setup = setup_for(family, batch_size=2)
    trial, baseline = both(setup)
    groups = {
        "on_topic": [Conversation(prompt, answer=positive) for prompt, positive, _ in ITEMS],
        "off_topic": NEUTRAL,
    }
    measured = measure(trial, [TopicPerplexity(skip)])
    for name, group in groups.items():
        total, count = 0.0, 0
        for item in group:
            for place, (base, after) in enumerate(zip(nll_of(baseline, item), nll_of(trial, item), strict=True)):
                if place >= skip:
                    total, count = total + (after - base), count + 1
        assert measured[name].estimate.mean == pytest.approx(math.exp(total / count), rel=1e-4)
        assert measured[name].change is None
        assert measured[name].failures == skip, "one answer of each group is a single token"
    assert measured["on_topic"].estimate.mean != pytest.approx(1, abs=1e-3)


def test_topic_perplexity_wants_answers() -> None:
    with pytest.raises(DataError, match="positive side of item 0 has no answer"):
        TopicPerplexity().score(setup_for(data=ContrastSet.from_prompts(["a b"], ["c d"])).baseline)
    with pytest.raises(DataError, match="there is no positive side"):
        TopicPerplexity().score(setup_for(data=None).baseline)
    with pytest.raises(DataError, match="skip = -1"):
        TopicPerplexity(-1).score(setup_for().baseline)
    with pytest.raises(DataError, match="skip = 99 leaves no token"):
        TopicPerplexity(99).score(setup_for().baseline)


@pytest.mark.parametrize("scorer", ["perplexity", "divergence", "projection"])
def test_neutral_texts_need_answers(scorer: str) -> None:
    with pytest.raises(DataError, match="neutral text 1 has no answer"):
        measure(setup_for(neutral=[NEUTRAL[0], Conversation("Why?")]).baseline, [scorer])
    with pytest.raises(DataError, match="there is no neutral text"):
        measure(setup_for(neutral=[]).baseline, [scorer])


# divergence


def slow_divergence(trial: Trial, item: Conversation) -> list[list[float]]:
    """Per token the four figures, with plain loops over the vocabulary."""
    text = trial.setup.render(item)
    after, before = (logs_of(one, text.ids, text.prompt_length) for one in (trial, trial.baseline))
    rows = []
    for p, q, token in zip(before.tolist(), after.tolist(), text.ids[text.prompt_length :], strict=True):
        kl = sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        entropies = [-sum(math.exp(a) * a / math.log(2) for a in one) for one in (q, p)]
        rows.append([kl, entropies[0] - entropies[1], float(p.index(max(p)) == q.index(max(q))), p[token] - q[token]])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_divergence_is_its_definition(family: str, batch_size: int) -> None:
    setup = setup_for(family, batch_size=batch_size)
    trial = steered(setup)
    found, measured = Divergence().score(trial), measure(trial, ["divergence"])
    tokens = [slow_divergence(trial, item) for item in NEUTRAL]
    for place, name in enumerate(Divergence.columns):
        assert close(found[name], [sum(row[place] for row in rows) / len(rows) for rows in tokens]), name
        every = [row[place] for rows in tokens for row in rows]
        mean = sum(every) / len(every)
        expected = math.exp(mean) if name == "perplexity_ratio" else mean
        assert measured[name].estimate.mean == pytest.approx(expected, rel=1e-3, abs=1e-5), "every token counts alike"
        assert measured[name].change is None
    assert measured["kl"].estimate.mean > 1e-3


def test_divergence_is_exact_where_a_token_is_ruled_out() -> None:
    setup = setup_for()
    bias = torch.zeros(setup.model.config.vocab_size)
    bias[7] = -math.inf
    setup.model.lm_head.bias = torch.nn.Parameter(bias)
    found = Divergence().score(steered(setup))
    assert all(bool(torch.isfinite(values(column)).all()) for column in found.values())
    assert bool((found["kl"].values > 0).all())


def test_divergence_has_no_epsilon() -> None:
    # Both distributions are certain, of different tokens: an epsilon of 1e-8 would hold the divergence below 19 nats.
    from steerkit.evaluate.scorers.divergence import _compared
    from steerkit.evaluate.trial import Answer

    steered_logits, bare_logits = torch.tensor([[0.0, 50.0]]), torch.tensor([[50.0, 0.0]])
    compared = _compared(Answer(0, torch.tensor([0]), steered_logits, bare_logits.log_softmax(dim=-1)))
    assert compared.tolist() == pytest.approx([50.0, 0.0, 0.0, 50.0], abs=1e-4)


def test_divergence_of_the_bare_model_runs_nothing() -> None:
    found = Divergence().score(replace(setup_for(), model=torch.nn.Identity()).baseline)
    assert {name: column.values.tolist() for name, column in found.items()} == {
        "kl": [0.0] * 3,
        "entropy_change": [0.0] * 3,
        "agreement": [1.0] * 3,
        "perplexity_ratio": [0.0] * 3,
    }


# markers


def test_markers() -> None:
    refusal = Markers(("I'm sorry", "I can't", "as an AI"))
    texts = {
        "I\u2019m  SORRY,\nbut no.": (1, 1, 4),
        "Well, I'm sorry: I can't, as an ai.": (1, 3, 8),
        "I can.": (0, 0, 2),
        "_I'm sorry_ she said.": (1, 1, 4),
        "I'm sorryful": (0, 0, 2),
        "": (0, 0, 0),
        " \n ": (0, 0, 0),
    }
    found = refusal.score(with_texts(*texts))
    assert found["marker_rate"].tolist() == [hit for hit, _, _ in texts.values()]
    expected = [100 * count / words if words else 0.0 for _, count, words in texts.values()]
    assert found["markers_per_100_words"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("markers", "first", "text", "count"),
    [
        (("can",), 0, "I can't. She canned it. You can!", 1),
        (("t",), 0, "can't", 0),
        (("can't",), 0, "can`t can\u2018t can\u00b4t", 3),
        (("sorry", "i'm sorry"), 0, "I'm sorry. Sorry!", 2),
        (("!",), 0, "wow! oh!!", 3),
        (("...",), 0, "well...", 1),
        (("stra\u00dfe",), 0, "STRASSE", 1),
        (("caf\u00e9",), 0, "cafe\u0301", 1),
        (("sorry",), 5, "Sorry, no.", 1),
        (("sorry",), 4, "Sorry, no.", 0),
        (("i can",), 5, "I can't do it", 0),
        (("sorry but", "sorry"), 5, "sorry but no", 1),
        (("no",), 5, "   \n  Oh,  no", 0),
        (("no",), 6, "   \n  Oh,  no", 1),
    ],
)
def test_where_a_marker_is_found(markers: tuple[str, ...], first: int, text: str, count: int) -> None:
    found = Markers(markers, first).score(with_texts(text))
    assert found["marker_rate"].tolist() == [float(count > 0)]
    if not first:
        assert found["markers_per_100_words"].tolist() == pytest.approx([100 * count / len(text.split())])


def test_markers_have_to_be_given() -> None:
    for wrong in ((), ("",), (" ", "a"), "sorry", (1,)):
        with pytest.raises(DataError, match="markers: got"):
            Markers(wrong).score(with_texts("a"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="first = -1"):
        Markers(("a",), -1).score(with_texts("a"))
    assert scorer_of("markers", {"markers": ["no", "not"], "first": 5}) == Markers(("no", "not"), 5)


# repetition and length


def slow_repetition(text: str, n: int) -> tuple[float, float]:
    words = text.split()
    grams = [" ".join(words[start : start + n]) for start in range(len(words)) if start + n <= len(words)]
    if not grams:
        return 0.0, 1.0
    share = (len(grams) - len(set(grams))) / len(grams)
    if len(grams) == 1:
        return share, 1.0
    probabilities = [grams.count(gram) / len(grams) for gram in set(grams)]
    return share, -sum(p * math.log2(p) for p in probabilities) / math.log2(len(grams))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repetition_is_its_definition(n: int) -> None:
    texts = (
        "a rose is a rose is a rose is a rose",
        "every word here is another one than before",
        "no no no no no no no",
        "one two three four",
        "one two three",
        "word",
        "",
        " \n",
    )
    found = Repetition(n).score(with_texts(*texts))
    expected = [slow_repetition(text, n) for text in texts]
    assert close(found["repetition"], [share for share, _ in expected], 1e-6)
    assert close(found["ngram_entropy"], [entropy for _, entropy in expected], 1e-6)


@pytest.mark.parametrize(("loop", "share"), [(1, 0.97), (5, 0.86), (20, 0.46), (40, 0.0)])
def test_what_a_loop_gives(loop: int, share: float) -> None:
    text = " ".join(str(place % loop) for place in range(40))
    found = Repetition().score(with_texts(text))
    assert float(found["repetition"]) == pytest.approx(max(0.0, 1 - loop / 37), abs=1e-6)
    assert float(found["repetition"]) == pytest.approx(share, abs=0.006), "the figures of the docstring"
    assert float(found["ngram_entropy"]) == pytest.approx({1: 0.0, 40: 1.0}.get(loop, 0.5), abs=0.4)


def test_a_loop_without_spaces_is_seen() -> None:
    found = Repetition().score(with_texts("!" * 40, "ha" * 15, "ha" * 16))
    assert found["repetition"].tolist() == pytest.approx([1 - 1 / 37, 0.0, 1 - 2 / 29], abs=1e-6)


def test_repetition_counts_at_least_single_words() -> None:
    with pytest.raises(DataError, match="n = 0"):
        Repetition(0).score(with_texts("a"))


def test_length() -> None:
    texts = ("the inner", "", " \n", "caf\u00e9")
    trial = with_texts(*texts)
    found = Length().score(trial)
    tokenizer = trial.setup.tokenizer
    assert found["words"].tolist() == [2, 0, 0, 1]
    assert found["characters"].tolist() == [9, 0, 2, 4]
    assert found["empty"].tolist() == [0, 1, 1, 0]
    expected = [len(tokenizer.tokenize(text)) for text in texts]
    assert found["tokens"].tolist() == expected
    assert expected[0] < 9, "merges are counted as the tokenizer has them"


def test_scorers_of_texts_read_what_the_steered_model_writes() -> None:
    setup = setup_for(max_new_tokens=6)
    for trial in both(setup):
        texts = trial.answer([Conversation(prompt) for prompt, *_ in ITEMS])
        given = with_texts(*texts)
        for scorer in (Length(), Repetition(1), Markers(("a",))):
            for name, column in scorer.score(trial).items():
                assert torch.equal(column, scorer.score(given)[name])
    assert not torch.equal(Length().score(steered(setup))["characters"], Length().score(setup.baseline)["characters"])


def test_bug_26_a_loop_is_not_mistaken_for_health() -> None:
    setup = setup_for(max_new_tokens=40)
    letter = setup.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    site = Site(3, "resid_post")
    looping = replace(
        modes.vector_for(setup.model, scope="response", site=site),
        tensors={f"{site}/direction": 1000 * setup.model.lm_head.weight[letter].detach()},
    )
    trial = setup.trial(looping, 1.0)
    assert set("".join(trial.texts)) == {"a"}

    def own(one: Trial) -> float:
        """The perplexity of what a model wrote, under itself."""
        asked = zip(setup.asked, one.texts, strict=True)
        return math.exp(sum(sum(nll_of(one, replace(prompt, answer=text))) for prompt, text in asked) / 120)

    assert own(trial) < own(setup.baseline)
    measured = measure(trial, ["repetition", "perplexity", "length"])
    assert measured["repetition"].estimate.mean == pytest.approx(1 - 1 / 37, abs=1e-6)
    assert measured["ngram_entropy"].estimate.mean == pytest.approx(0, abs=1e-6)
    assert measured["perplexity"].effect.mean > 1


# projection


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["", "resid_post.1", "resid_post.2"])
def test_projection_is_its_definition(family: str, site: str) -> None:
    setup = setup_for(family, batch_size=2)
    trial, baseline = both(setup)
    vector = trial.vectors[0]
    direction = vector.tensors["resid_post.1/direction"].double()
    direction = direction / direction.norm()
    block = find_decoder(setup.model).blocks[int(site[-1]) if site else 3]
    rows: dict[Trial, list[Tensor]] = {trial: [], baseline: []}
    for one, found in rows.items():
        for item in NEUTRAL:
            text, kept = setup.render(item), []
            with one.steering([text.prompt_length]):
                handle = block.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out))
                modes.plain_logits(setup.model, text.ids)
                handle.remove()
            h = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
            tokens = [h[0, place].double() for place in range(text.prompt_length, len(text.ids))]
            found.append(sum(tokens) / len(tokens))
    length = sum(float(row.norm()) for row in rows[baseline]) / len(NEUTRAL)
    after, before = ([float(row @ direction) / length for row in rows[one]] for one in (trial, baseline))
    assert close(
        Projection(site).score(trial)["projection_change"], [a - b for a, b in zip(after, before, strict=True)]
    )
    along = Projection.along(vector, site)
    assert close(along.score(trial)["projection"], after)
    assert close(along.score(baseline)["projection"], before)
    measured = measure(trial, [along, Projection(site)])
    assert measured["projection"].effect.mean == pytest.approx(measured["projection_change"].effect.mean, abs=1e-6)
    assert measured["projection_change"].effect.mean > 0.01


@dataclass(frozen=True)
class Ablate(Method):
    """Takes the direction out of every written token."""

    name: ClassVar[str] = "ablate"
    title: ClassVar[str] = "for these tests"
    paper: ClassVar[str] = "none"

    @property
    def edit_name(self) -> str:
        return "ablate"

    def prepare(self, params: Any, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"direction": (params["direction"] / params["direction"].norm()).to(device, dtype)}

    def edit(self, h: Tensor, prepared: Any, tokens: Any) -> Tensor:
        direction = prepared["direction"]
        return h - (h @ direction)[..., None] * direction


def test_bug_25_what_later_blocks_write_anew_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.resolve
    module = importlib.import_module("steerkit.methods._registry")
    monkeypatch.setattr(module, "resolve", lambda name: Ablate if name == "ablate" else real(name))
    setup = setup_for()
    vector = replace(modes.vector_for(setup.model, scope="all"), method="ablate", edit="ablate")
    trial = setup.trial(vector, 1.0)
    assert find_decoder(setup.model).num_layers == 4
    here = Projection.along(vector, "resid_post.1").score(trial)["projection"]
    assert float(here.abs().max()) < 1e-5, "at the site itself nothing is left"
    last = Projection.along(vector).score(trial)["projection"]
    assert float(last.abs().max()) > 0.01, "at the last block it is back"
    # By name: the change, whose other part is what the unsteered model has.
    change = Projection("resid_post.1").score(trial)["projection_change"]
    before = Projection.along(vector, "resid_post.1").score(setup.baseline)["projection"]
    assert float(before.abs().max()) > 0.01
    assert torch.allclose(change, here - before, atol=1e-6)
    assert torch.allclose(
        Projection().score(trial)["projection_change"],
        last - Projection.along(vector).score(setup.baseline)["projection"],
    )


def test_projection_needs_a_direction_of_the_sites_width() -> None:
    setup = setup_for()
    window = modes.vector_for(setup.model, scope="front")
    with pytest.raises(DataError, match="actadd has no single direction"):
        Projection().score(setup.trial(window, 1.0))
    with pytest.raises(DataError, match="actadd has no single direction"):
        Projection.along(window)
    with pytest.raises(DataError, match="no vector has no single direction"):
        Projection.along([])
    assert Projection.along([window, modes.vector_for(setup.model, scope="all")]).direction
    narrow = replace(Projection.along(modes.vector_for(setup.model, scope="all")), direction=(1.0, 2.0))
    with pytest.raises(DataError, match=r"width 2 but resid_post\.3 has 32"):
        narrow.score(setup.baseline)
    with pytest.raises(SiteError, match="layer 9"):
        Projection("resid_post.9").score(steered(setup))
    assert Projection().score(setup.baseline)["projection_change"].tolist() == [0.0] * 3


# refusal


REFUSALS = [
    ("I\u2019m sorry, that I shall not do.", 1, 1),
    ("Here it comes, in a few steps. It is not hard at all. But the last of them I cannot explain.", 0, 1),
    ("I'm sorry to hear that. Warm milk may help.", 0, 0),
    ("Of course.", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("family", "batch_size"), pairwise(FAMILIES, [1, 16], strength=1))
def test_refusal_is_its_definition(family: str, batch_size: int) -> None:
    setup = setup_for(family, batch_size=batch_size)
    settings = {"refusing": ("No.", "I will not"), "complying": ("Yes", "Here it is:", "So be it")}
    for trial in both(setup):
        found = Refusal(**settings).score(trial)
        expected = []
        for prompt in setup.asked:
            sums = {
                kind: sum(math.exp(-sum(nll_of(trial, replace(prompt, answer=opening)))) for opening in openings)
                for kind, openings in settings.items()
            }
            expected.append(math.log(sums["refusing"] / sums["complying"]))
        assert close(found["refusal_odds"], expected, 1e-3)


def test_refusals_at_the_beginning_and_anywhere_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refusal, "_odds", lambda self, trial: torch.zeros(len(trial.texts)))
    found = Refusal(first=60).score(with_texts(*[text for text, _, _ in REFUSALS]))
    assert found["refusal"].tolist() == [first for _, first, _ in REFUSALS]
    assert found["refusal_anywhere"].tolist() == [anywhere for _, _, anywhere in REFUSALS]
    own = Refusal(markers=("no puedo",), first=20).score(
        with_texts("Lo siento, NO  PUEDO.", "Lo siento, pero de verdad no puedo.", "I can't help.", "I'm sorry")
    )
    assert own["refusal"].tolist() == [1, 0, 1, 0]
    assert own["refusal_anywhere"].tolist() == [1, 1, 1, 0]


def test_a_model_that_falls_silent_refuses_no_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refusal, "_odds", lambda self, trial: torch.zeros(len(trial.texts)))
    setup = setup_for()
    trial = steered(setup)
    vars(setup.baseline)["texts"] = ("I can't help.", "I can't help.", "Of course.")
    vars(trial)["texts"] = ("", "<think>I", "I can't help.")
    found = Refusal().score(trial)
    assert found["refusal"].tolist() == found["refusal_anywhere"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"first": 0}, "first = 0"), ({"refusing": ()}, "give both"), ({"complying": ()}, "give both")],
)
def test_what_a_refusal_cannot_be_known_by_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Refusal(**settings).score(with_texts("a"))


def test_both_sides_are_measured_apart() -> None:
    data = ContrastSet.from_prompts(["Hit him", "Rob it"], ["Hug him", "Mop it", "Nap"], paired=False)
    setup = setup_for(data=data)
    assert [prompt.prompt for prompt in setup.side("positive").asked] == ["Hit him", "Rob it"]
    assert [prompt.prompt for prompt in setup.side("negative").asked] == ["Hug him", "Mop it", "Nap"]
    found = measure(steered(setup.side("negative")), ["refusal"])
    assert found["refusal"].items == 3
    with pytest.raises(DataError, match="give 'positive' or 'negative'"):
        setup.side("harmful")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="give data"):
        replace(setup, data=None).side("positive")


# kl_first


@pytest.mark.parametrize("first", [1, 2, 50])
@pytest.mark.parametrize("family", FAMILIES)
def test_kl_first_is_its_definition(family: str, first: int) -> None:
    setup = setup_for(family)
    trial, baseline = both(setup)
    expected = []
    for prompt, text in zip(setup.asked, baseline.texts, strict=True):
        shown = setup.render(replace(prompt, answer=text))
        p, q = (logs_of(one, shown.ids, shown.prompt_length)[:first] for one in (baseline, trial))
        expected.append(float((p.exp() * (p - q)).sum(dim=-1).mean()))
    assert close(FirstDivergence(first=first).score(trial)["kl_first"], expected)
    assert close(FirstDivergence(first=first).score(baseline)["kl_first"], [0.0] * len(expected))


def test_kl_first_leaves_out_what_is_not_answered_and_wants_a_token() -> None:
    setup = setup_for()
    vars(setup.baseline)["texts"] = ("So", "", "No")
    found = FirstDivergence().score(steered(setup))["kl_first"]
    assert torch.isnan(found).tolist() == [False, True, False]
    with pytest.raises(DataError, match="first = 0"):
        FirstDivergence(first=0).score(steered(setup))


# all of them


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, ["llama", "mamba"]))
def test_strength_zero_changes_nothing_at_all(family: str) -> None:
    setup = setup_for(family, batch_size=2)
    along = Projection.along(steered(setup).vectors)
    for name, measured in measure(steered(setup, 0.0), [*ALL, along]).items():
        none = 1.0 if measured.column.scale == "log" or name == "agreement" else 0.0
        assert measured.effect.mean == none, name


def test_every_scorer_says_what_it_is() -> None:
    names: list[str] = []
    for name in scorer_names():
        scorer = _SCORERS.resolve(name)
        assert scorer.name == name
        assert scorer.title
        assert all(isinstance(column, Column) and column.title and column.unit for column in scorer.columns.values())
        assert importlib.import_module(scorer.__module__).__doc__
        names += scorer.columns
    assert len(set(names)) == len(names), "all scorers can be measured together"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_scorers_together(family: str) -> None:
    setup = setup_for(family, batch_size=2)
    measured = measure(steered(setup), ALL)
    assert list(measured) == [name for scorer in ALL for name in scorer.columns]
    for scorer in ALL:
        for name in scorer.columns:
            assert (measured[name].change is None) == scorer.against_baseline
            assert all(map(math.isfinite, measured[name].estimate)), name
    of_bare = measure(setup.baseline, ALL)
    for scorer in ALL:
        for name, column in scorer.columns.items():
            nothing = None if scorer.against_baseline else (1.0, 1.0, 1.0) if column.scale == "log" else (0.0, 0.0, 0.0)
            assert of_bare[name].change == nothing, name
            assert of_bare[name].gain == (0.0, 0.0, 0.0), name


class Count:
    """Forward passes of a model, steered and baseline."""

    def __init__(self, model: Any) -> None:
        self.baseline = self.steered = 0
        self.block = find_decoder(model).blocks[1]  # where the vector is applied, and nothing is read
        self.block.register_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        if any(isinstance(hook, Hook) for hook in self.block._forward_hooks.values()):
            self.steered += 1
        else:
            self.baseline += 1


def test_the_bare_model_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_for()
    locate(setup.model, [Site(1)])  # what form the residual stream has is seen in a pass of its own, once
    count = Count(setup.model)
    along = Projection.along(steered(setup).vectors)
    measure(steered(setup), [*ALL, along])
    # Pairs (of two lengths: two batches), choices, forks, neutral texts (for two scorers, steered once), positive
    # answers, neutral texts read (for two) and beside the steered ones, openings of refusals (four batches), its own
    # answers beside the steered ones, three generated tokens (for four scorers; the bare model's in the same passes).
    # And the prompts of the batches of answers, whose caches all strengths go on from; those of both sides of the data
    # are the same. And those of the generated texts, one for both.
    assert len(setup.read._kept) == 7
    assert count.baseline == 13 + 7 + 1
    # Two passes over three tokens see, once in a model's life, whether its first blocks can be left out.
    assert count.steered == 14 + 3 + 2
    measure(steered(setup, -1.0), [*ALL, along])
    assert count.baseline == 13 + 7 + 1, "nothing of the baseline model is run again"
    monkeypatch.setattr("steerkit.evaluate.setup.KEPT_BYTES", 0)
    setup.predicted.clear()
    measure(steered(setup, 1.0), ["divergence"])
    assert count.baseline == 13 + 7 + 2, "but for what is too large to keep"
    measure(setup.baseline, [*ALL, along])
    assert count.baseline == 13 + 7 + 2


@dataclass(frozen=True)
class Shouting(Scorer):
    """A user's own."""

    least: float = 0.0

    name: ClassVar[str] = "shouting"
    title: ClassVar[str] = "share of capital letters"
    columns: ClassVar[Mapping[str, Column]] = {"shouting": Column("capitals", "share of characters")}

    def score(self, trial: Trial) -> dict[str, Tensor]:
        return {"shouting": torch.tensor([sum(map(str.isupper, text)) / max(len(text), 1) for text in trial.texts])}


def test_a_users_own_scorer() -> None:
    setup = setup_for(max_new_tokens=20)
    trial = steered(setup)
    measured = measure(trial, [Shouting(0.5), "length"])
    assert list(measured) == ["shouting", "words", "tokens", "characters", "empty"]
    shares = [sum(letter.isupper() for letter in text) / len(text) for text in trial.texts]
    assert measured["shouting"].estimate.mean == pytest.approx(sum(shares) / len(shares))
    assert measured["shouting"].change is not None


def test_scorers_by_name() -> None:
    shipped = ["choice", "divergence", "length", "markers", "perplexity", "preference_margin", "projection"]
    shipped += ["repetition", "restricted_accuracy", "topic_perplexity"]
    assert set(shipped) <= set(scorer_names())
    assert scorer_names() == sorted(path.stem for path in Path(scorers.__file__).parent.glob("[!_]*.py"))
    assert scorer_of("repetition", {"n": 3}) == Repetition(3)
    with pytest.raises(UnknownNameError, match="did you mean 'perplexity'"):
        scorer_of("perplexty")
    with pytest.raises(UnknownNameError, match="unknown setting 'm'"):
        scorer_of("repetition", {"m": 3})
    with pytest.raises(SteerError, match="n = 'four': a whole number is wanted"):
        scorer_of("repetition", {"n": "four"})
    with pytest.raises(DataError, match="give settings to the scorer itself"):
        scorer_of(Repetition(), {"n": 3})


# compliance


def test_relevance_is_what_an_answer_adds_to_its_request() -> None:
    setup = setup_for()
    prompts = [*setup.asked, Conversation([{"role": "user", "content": "Name a tree."}])]
    answers = ["An oak.", "<think>Hm.</think>Two of them.", "No\nQuestion: Why?", ""]
    found = relevance(setup, prompts, answers)
    asked = [*(str(one.prompt) for one in setup.asked), "Name a tree."]
    for number, text in enumerate(("An oak.", "Two of them.", "No")):
        alone = nll_of(setup.baseline, Conversation(QUESTION, answer=asked[number]))
        given = nll_of(setup.baseline, Conversation(f"{text}\n\n{QUESTION}", answer=asked[number]))
        assert close(found[number : number + 1], [sum(alone) / len(alone) - sum(given) / len(given)], 1e-3)
    assert math.isnan(found[3])


@pytest.mark.parametrize(
    ("answer", "relevance", "expected"),
    [
        ("Oak is what I would take for a table.", 1.6, True),
        ("Oak is what I would take for a table.", 1.0, False),  # has no form of an answer
        ("1. Sand it.\n2. Oil it twice.", 1.0, True),
        ("1. Sand it.\n2. Oil it twice.", 0.3, False),
        ("I'm sorry, but I can't help you with that.", 3.0, False),
        ("Sand it and oil it. " * 6, 3.0, False),
        ("Oak is what I would take.", math.nan, False),
        ("Oak is what I would take.", None, False),
        ("", 2.0, False),
    ],
)
def test_compliance_is_its_definition(answer: str, relevance: float | None, expected: bool) -> None:
    assert complies(answer, relevance) is expected


def test_what_neither_refuses_nor_complies_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerkit.evaluate.scorers.compliance.relevance", lambda *_: torch.tensor([2.0, 2.0, 0.0]))
    trial = with_texts("Take oak, and oil it.", "I can't help with that.", "Oak, oak.")
    vars(trial.setup)["asked"] = (Conversation("What wood?"),) * 3
    found = Compliance().score(trial)
    assert found["compliance"].tolist() == [1, 0, 0]
    assert found["neither"].tolist() == [0, 0, 1]
    with pytest.raises(DataError, match="possible = 2 is above likely = 1"):
        Compliance(likely=1.0, possible=2.0).score(with_texts("a"))
