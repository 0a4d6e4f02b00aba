"""Refits on rearranged rows, where the truth is known; and plain features that tell two sides apart."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import steerkit
from steerkit.activations.recording import Activations, record
from steerkit.errors import DataError
from steerkit.evaluate.confounding import Confound, confounds, warn_of_confounds
from steerkit.evaluate.controls import refits, refits_of
from steerkit.evaluate.refit_results import Refits
from steerkit.evaluate.setup import Setup
from steerkit.network.sites import Site
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.recipe import find_recipe
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

SITE, WIDTH, PAIRS = Site(1), 64, 60
TRUTH = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)), dim=0)
ITEMS = [(f"Question {n}?", f"A fine answer {n * n}.", f"No {n}, a bad one.") for n in range(7)]
NOUNS = ["river", "stone", "garden", "window", "letter", "candle", "engine", "harbour", "meadow", "bridge"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer(CHATML)


def planted(size: float, *, paired: bool = True, count: int = PAIRS, seed: int = 0) -> Activations:
    """Noise of unit variance, with `size` times the truth between the sides."""
    generator = torch.Generator().manual_seed(seed)
    negative = torch.randn(count, WIDTH, generator=generator)
    positive = torch.randn(count if paired else count + 5, WIDTH, generator=generator) + size * TRUTH
    return Activations({SITE: positive}, {SITE: negative}, {SITE: 8.0}, "last", paired)


def fitted(acts: Activations, method: str = "caa") -> SteeringVector:
    direction = acts.positive[SITE].mean(dim=0) - acts.negative[SITE].mean(dim=0)
    return SteeringVector(
        method=method,
        tensors={f"{SITE}/direction": direction},
        sites=(SITE,),
        edit="add",
        scope="all",
        unit="paper",
        model_type="llama",
        hidden_size=WIDTH,
        num_layers=4,
        held_out={"items": 3},
        suggested_strength=2.0,
    )


def run(acts: Activations, method: str = "caa", **options: Any) -> Refits:
    return refits_of(acts, None, fitted(acts, method), **options)  # type: ignore[arg-type]


def norm(vector: SteeringVector) -> float:
    return float(vector.params(SITE)["direction"].double().norm())


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


@pytest.mark.parametrize("method", ["caa", "repe"])
@pytest.mark.parametrize("paired", [True, False])
def test_a_planted_direction_is_found_again(method: str, paired: bool) -> None:
    found = run(planted(5.0, paired=paired), method)
    # Each half's direction is the truth of length 5 with noise of variance 2 / (n / 2) in each of d places.
    assert found.split_half[SITE].mean == pytest.approx(25 / (25 + WIDTH * 4 / PAIRS), abs=0.03)
    assert found.split_half[SITE].low < found.split_half[SITE].mean < found.split_half[SITE].high
    assert run(planted(20.0, paired=paired), method).split_half[SITE].low > 0.98
    spread = found.bootstrap[SITE]
    assert 0.9 < spread.cosine_low < spread.cosine < 1
    assert spread.length.low < norm(found.vector) < spread.length.high
    assert spread.cosine_low <= cosine(found.vector.params(SITE)["direction"], TRUTH), "truth inside the spread"
    assert len(found.shuffled) == 5 and max(map(norm, found.shuffled)) < 0.45 * norm(found.vector)
    assert found.skipped == {"shuffled": 0, "split_half": 0, "bootstrap": 0}


@pytest.mark.parametrize("paired", [True, False])
def test_pure_noise_has_no_direction_to_find_again(paired: bool) -> None:
    found = run(planted(0.0, paired=paired), halves=40)
    assert abs(found.split_half[SITE].mean) < 0.15
    lengths = [norm(one) / norm(found.vector) for one in found.shuffled]
    assert 0.7 < sum(lengths) / len(lengths) < 1.4, "no shorter than what there was"


def test_half_of_the_pairs_swap_sides() -> None:
    """With pair i differing along axis i alone, the signs of the shuffled direction show who swapped."""
    for count in (8, 9):
        rows = torch.eye(WIDTH)[:count]
        acts = Activations({SITE: rows}, {SITE: torch.zeros_like(rows)}, {}, "last", True)
        shuffled = run(acts, shuffled=20, halves=0, resamples=0).shuffled
        signs = torch.stack([one.params(SITE)["direction"][:count] * count for one in shuffled])
        assert torch.equal(signs.abs().round(decimals=4), torch.ones(20, count))
        sums = set(signs.sum(dim=1).round().int().tolist())
        assert sums == ({0} if count == 8 else {-1, 1})
        assert len({tuple(row.tolist()) for row in signs}) > 10, "other pairs each time"


def test_unpaired_labels_are_permuted() -> None:
    rows = torch.eye(WIDTH)
    acts = Activations({SITE: rows[:9]}, {SITE: rows[9:15]}, {}, "last", False)
    for one in run(acts, shuffled=10, halves=0, resamples=0).shuffled:
        direction = one.params(SITE)["direction"][:15]
        positive = int((direction > 0).sum())
        assert positive == 9 and torch.allclose(direction[direction > 0], torch.tensor(1 / 9))
        assert not bool((direction[:9] > 0).all()), "the labels were moved"


def test_halves_and_resamples_are_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit's rows are written down, and every figure is worked out again from them."""
    from steerkit.methods.repe import RepresentationControl

    acts, seen = planted(1.0, count=11), []
    own = RepresentationControl.fit

    def noted(self: Any, given: Activations, subject: Any, sites: Any) -> Any:
        seen.append((given.positive[SITE], given.negative[SITE], given.paired))
        return own(self, given, subject, sites)

    monkeypatch.setattr(RepresentationControl, "fit", noted)
    found = run(acts, "repe", shuffled=0, halves=6, resamples=9)
    assert len(seen) == 1 + 2 * 6 + 9
    place = {tuple(row.tolist()): n for n, row in enumerate(acts.positive[SITE])}
    mates = {tuple(row.tolist()): n for n, row in enumerate(acts.negative[SITE])}
    members = [[place[tuple(row.tolist())] for row in positive] for positive, _, _ in seen]
    assert members == [[mates[tuple(row.tolist())] for row in negative] for _, negative, _ in seen], "pairs stay"
    assert all(paired for _, _, paired in seen)
    for draw in range(6):
        first, second = members[1 + 2 * draw : 3 + 2 * draw]
        assert sorted(first + second) == list(range(11)) and len(first) == 5
    assert all(len(drawn) == 11 for drawn in members[13:]) and any(len(set(drawn)) < 11 for drawn in members[13:])

    def direction(drawn: list[int]) -> Tensor:
        rows = (acts.positive[SITE] - acts.negative[SITE])[drawn].double()
        axis = torch.linalg.svd(rows, full_matrices=False).Vh[0]
        return axis * torch.sign(axis @ rows.mean(dim=0)) * rows.mean(dim=0).norm()

    halves = sorted(cosine(direction(members[1 + 2 * n]), direction(members[2 + 2 * n])) for n in range(6))
    assert found.split_half[SITE].mean == pytest.approx(sum(halves) / 6, abs=1e-5)
    assert found.split_half[SITE].low == pytest.approx(halves[0] + 0.125 * (halves[1] - halves[0]), abs=1e-5)
    full = fitted(acts).params(SITE)["direction"]
    again = sorted(cosine(direction(drawn), full) for drawn in members[13:])
    assert found.bootstrap[SITE].cosine == pytest.approx(again[4], abs=1e-5)
    assert found.bootstrap[SITE].cosine_low == pytest.approx(again[0] + 0.2 * (again[1] - again[0]), abs=1e-5)
    lengths = [float(direction(drawn).norm()) for drawn in members[13:]]
    assert found.bootstrap[SITE].length.mean == pytest.approx(sum(lengths) / 9, rel=1e-5)


def test_matched_controls_are_as_long_as_the_vector() -> None:
    found = run(planted(5.0))
    for short, long in zip(found.shuffled, found.matched(), strict=True):
        assert norm(long) == pytest.approx(norm(found.vector), rel=1e-5)
        assert cosine(short.params(SITE)["direction"], long.params(SITE)["direction"]) == pytest.approx(1)
        assert norm(short) < norm(long)
    shown = found.as_json()
    json.dumps(shown, allow_nan=False)
    entry = shown["sites"][str(SITE)]
    assert entry["length"] == pytest.approx(norm(found.vector))
    assert entry["shuffled"][0]["relative_length"] == pytest.approx(norm(found.shuffled[0]) / norm(found.vector))


def test_draws_are_fixed_by_the_seed_and_by_nothing_else() -> None:
    acts = planted(2.0)
    one, same, other = run(acts), run(acts, shuffled=2, resamples=7), run(acts, seed=1)
    assert one.split_half == same.split_half != other.split_half
    assert one.shuffled[:2] == same.shuffled and one.shuffled[0] != other.shuffled[0]
    assert not one.shuffled[0].held_out and one.shuffled[0].suggested_strength == 2.0


def test_draws_without_a_direction_are_counted() -> None:
    """All pairs differ alike: with half of them swapped nothing is left."""
    base = torch.zeros(6, WIDTH)
    acts = Activations({SITE: base + TRUTH}, {SITE: base}, {}, "last", True)
    found = run(acts, shuffled=4)
    assert found.shuffled == () and found.skipped["shuffled"] == 4 and found.skipped["split_half"] == 0
    assert found.split_half[SITE].mean == pytest.approx(1)
    assert run(acts, shuffled=0, halves=0, resamples=0).bootstrap == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_refits_read_the_model_once(family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(family), ContrastSet.from_answers(ITEMS)
    vector = steerkit.fit(model, tokenizer, data, layers=[0, 2], readout="response_mean")
    passes = []

    def counted(*given: Any, **options: Any) -> Activations:
        passes.append(given)
        return record(*given, **options)

    monkeypatch.setattr("steerkit.evaluate.controls.record", counted)
    found = refits(model, tokenizer, data, vector, resamples=5)
    assert len(passes) == 1 and found.items == 7
    assert all(value == pytest.approx(1, abs=1e-6) for value in found.reproduced.values())
    assert set(found.reproduced) == set(found.split_half) == set(found.bootstrap) == set(vector.sites)
    acts = record(model, tokenizer, data, vector.sites, readout="response_mean")
    positive, negative = acts.positive[vector.sites[1]].double(), acts.negative[vector.sites[1]].double()
    signs = torch.linalg.lstsq(
        (positive - negative).T / 7, found.shuffled[0].params(vector.sites[1])["direction"].double()
    )
    assert torch.allclose(signs.solution.abs(), torch.ones(7, dtype=torch.double), atol=1e-2), "the same pairs, swapped"
    prompt = Setup(model, tokenizer).trial(found.shuffled[0], 1.0)
    assert prompt.answer([Conversation("Well?")], max_new_tokens=3), "a complete vector"


def test_refits_want_the_data_of_the_vector(tokenizer: Any) -> None:
    model, data = build("llama"), ContrastSet.from_answers(ITEMS)
    vector = steerkit.fit(model, tokenizer, data, layers=[1])
    other = ContrastSet.from_answers(ITEMS[:6])
    with pytest.raises(DataError, match=f"{data.digest[:12]}, got {other.digest[:12]}; give the training"):
        refits(model, tokenizer, other, vector)
    assert refits(model, tokenizer, other, replace(vector, data_digest=None), resamples=0).reproduced[Site(1)] < 0.9999
    few = ContrastSet.from_answers(ITEMS[:3])
    with pytest.raises(DataError, match="3 positive and 3 negative items cannot be rearranged"):
        refits(model, tokenizer, few, replace(vector, data_digest=few.digest))
    with pytest.raises(DataError, match="halves=-1"):
        refits(model, tokenizer, data, vector, halves=-1)


def test_a_method_without_contrast_set_has_no_refits(tokenizer: Any) -> None:
    model, data = build("llama"), ContrastSet.from_prompts(["Love this"], ["Hate this"])
    vector = steerkit.fit(model, tokenizer, data, method="actadd", layers=[1])
    found = refits(model, tokenizer, data, vector)
    assert found.reason is not None and found.shuffled == () and not found.split_half and not found.skipped
    assert found.as_json() == {"reason": found.reason}


def pick(found: list[Confound], feature: str) -> Confound:
    return next(one for one in found if one.feature == feature)


def sentence(draw: random.Random, length: int = 8) -> str:
    return " ".join(draw.choices(NOUNS, k=length)).capitalize() + draw.choice([".", "!", "?"])


def balanced(seed: int, pairs: int = 40, *, paired: bool = True) -> ContrastSet:
    """Both sides from one urn, so that nothing can tell them apart."""
    draw = random.Random(seed)

    def text() -> str:
        opening = draw.choice(["Well, ", "So ", "", "- ", '"Yes" '])
        return opening + sentence(draw, draw.randint(3, 12)) + draw.choice(["", " 42", "\nMore."])

    data = ContrastSet.from_answers([(f"Question {n}?", text(), text()) for n in range(pairs)])
    return data if paired else replace(data, paired=False)


def test_longer_positive_answers_are_warned_of(tokenizer: Any) -> None:
    draw = random.Random(0)
    items = [(f"Q {n}?", sentence(draw, 12 if n else 5), sentence(draw, 8)) for n in range(30)]
    data = ContrastSet.from_answers(items)
    found = pick(confounds(tokenizer, data), "tokens")
    lengths = [
        [len(text.ids) - text.prompt_length for text in (render(tokenizer, item) for item in side)]
        for side in (data.positive, data.negative)
    ]
    wins = sum(plus > minus for plus, minus in zip(*lengths, strict=True))
    assert wins == 29 and found.auc == pytest.approx(29 / 30)
    assert found.p == pytest.approx(2 * sum(math.comb(30, k) for k in (29, 30)) / 2**30)
    assert found.means == pytest.approx([sum(side) / 30 for side in lengths])
    assert found.warns and found.kind == "length"
    assert found.message.startswith(
        "length alone predicts the label: positive answers have more tokens in 97 % of the pairs"
    )
    assert "\n" not in found.message and found.message.endswith("match both sides' length")
    with pytest.warns(UserWarning) as caught:
        warned = warn_of_confounds(tokenizer, data)
    assert [str(one.message) for one in caught] == [one.message for one in warned]
    assert {one.feature for one in warned} == {"tokens", "characters"}


def test_a_token_more_in_every_pair_is_no_matter(tokenizer: Any) -> None:
    data = ContrastSet.from_answers([(f"Q {n}?", "x" * (30 + n) + "y", "x" * (30 + n)) for n in range(30)])
    found = pick(confounds(tokenizer, data), "characters")
    assert found.auc == 1 and found.p < 1e-6 and not found.warns


def test_option_letters_are_caught_by_the_first_word(tokenizer: Any) -> None:
    draw = random.Random(1)
    for share, expected in ((36, True), (20, False)):
        items = []
        for n in range(40):
            letters = ("(A)", "(B)") if n < share else ("(B)", "(A)")
            items.append((f"Q {n}?", f"{letters[0]} {sentence(draw)}", f"{letters[1]} {sentence(draw)}"))
        found = pick(confounds(tokenizer, ContrastSet.from_answers(items)), "first word")
        assert found.warns is expected, found.message
        if expected:
            assert found.auc == pytest.approx(0.9)
            assert "'a' starts 90 % of the positive and 10 % of the others" in found.message


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(
    ("feature", "more", "less"),
    [
        ("exclamation marks", "So good!", "So good."),
        ("question marks", "Is it? Yes it is", "It is. Yes it is"),
        ("commas", "One, two, three", "One two threes!"),
        ("digits", "It is 12", "It is so"),
        ("quotation marks", 'He "says" it', "He -says- it"),
        ("line breaks", "One\ntwo", "One two"),
        ("list lines", "1. one\n2) two\n- three\n", "1 one\n2 two\n3 three\n\n"),
        ("share of capitals", "It is ALL fine", "It is all fine"),
        ("full stop at the end", "It is.", "It is!"),
        ("other end mark", "It is:", "It is"),
        ("first character", "Ok then", "ok then"),
        ("last character", "It is fineZ", "It is fineQ"),
    ],
)
def test_each_form_is_counted(tokenizer: Any, feature: str, more: str, less: str, paired: bool) -> None:
    for sides, expected in (((more, less), 1.0), ((less, more), 0.0)):
        items = [(f"Q {n}?", f"{sides[0]}", f"{sides[1]}") for n in range(20)]
        data = replace(ContrastSet.from_answers(items), paired=paired)
        found = pick(confounds(tokenizer, data), feature)
        is_category = found.means is None
        assert found.auc == (1.0 if is_category else expected) and found.warns and found.kind == "format"


def test_unpaired_sides_are_compared_over_all_couples(tokenizer: Any) -> None:
    draw = random.Random(3)
    positive, negative = (
        [sentence(draw, draw.randint(*ends)) for _ in range(n)] for ends, n in (((6, 12), 30), ((4, 9), 17))
    )
    found = pick(confounds(tokenizer, ContrastSet.from_prompts(positive, negative)), "characters")
    wins = [(len(one) > len(other)) + 0.5 * (len(one) == len(other)) for one in positive for other in negative]
    assert found.auc == pytest.approx(sum(wins) / len(wins))
    counts = [list(map(len, side)) for side in (positive, negative)]
    assert found.p == pytest.approx(stats.mannwhitneyu(*counts, alternative="two-sided").pvalue)
    assert "couples" in found.message and "positive prompts have more" in found.message


def predicted(pairs: list[tuple[str, str]]) -> float:
    """The definition, one pair at a time; words that occur once predict nothing."""
    score = 0.0
    for n, pair in enumerate(pairs):
        others = pairs[:n] + pairs[n + 1 :]
        signs = []
        for word in pair:
            gap = sum(one == word for one, _ in others) - sum(other == word for _, other in others)
            signs.append((gap > 0) - (gap < 0))
        score += 1.0 if signs[0] > signs[1] else 0.5 if signs[0] == signs[1] else 0.0
    return score / len(pairs)


def predicted_apart(positive: list[str], negative: list[str]) -> float:
    """The same for sides without pairs: what the others say of each item, compared over all couples."""

    def say(word: str, own: list[str], other: list[str], sign: int) -> int:
        gap = sign * (own.count(word) - 1) / (len(own) - 1) - sign * other.count(word) / len(other)
        return (gap > 1e-9) - (gap < -1e-9)

    plus = [say(word, positive, negative, 1) for word in positive]
    minus = [say(word, negative, positive, -1) for word in negative]
    return sum((one > other) + 0.5 * (one == other) for one in plus for other in minus) / len(plus) / len(minus)


def first_word(tokenizer: Any, positive: list[str], negative: list[str], *, paired: bool) -> Confound:
    sides = [[f"{word} x{n}" for n, word in enumerate(side)] for side in (positive, negative)]
    return pick(confounds(tokenizer, ContrastSet.from_prompts(*sides, paired=paired)), "first word")


def test_words_are_predicted_by_the_other_pairs(tokenizer: Any) -> None:
    draw = random.Random(4)
    many = [(draw.choice("aab") if n % 3 else f"w{n}", draw.choice("abb")) for n in range(25)]
    found = first_word(tokenizer, [one for one, _ in many], [other for _, other in many], paired=True)
    assert found.auc == pytest.approx(predicted(many))
    few = [("a", "b"), ("a", "c"), ("a", "b"), ("b", "a"), ("c", "d"), ("a", "a"), ("a", "e"), ("d", "b")]
    every = [
        predicted([pair if keep else pair[::-1] for pair, keep in zip(few, kept, strict=True)])
        for kept in itertools.product([True, False], repeat=8)
    ]
    found = first_word(tokenizer, [one for one, _ in few], [other for _, other in few], paired=True)
    assert found.auc == pytest.approx(every[0])
    assert found.p == pytest.approx(sum(auc >= every[0] for auc in every) / 256, abs=0.012)


def test_words_of_unpaired_sides_are_predicted_by_the_other_items(tokenizer: Any) -> None:
    positive, negative = list("aaabc"), list("abb")
    found = first_word(tokenizer, positive, negative, paired=False)
    observed = predicted_apart(positive, negative)
    assert found.auc == pytest.approx(observed)
    pool = positive + negative
    every = []
    for chosen in itertools.combinations(range(8), 5):
        sides = [pool[n] for n in chosen], [pool[n] for n in range(8) if n not in chosen]
        every.append(predicted_apart(*sides))
    assert found.p == pytest.approx(sum(auc > observed - 1e-9 for auc in every) / len(every), abs=0.012)


def test_the_place_that_is_read_is_compared(tokenizer: Any) -> None:
    items = [Conversation(f"Say {n}", system="Be very kind to all people", answer="Fine.") for n in range(20)]
    others = [replace(item, system="Be rude") for item in items]
    data = ContrastSet(tuple(items), tuple(others), paired=True)
    plain, read = confounds(tokenizer, data), confounds(tokenizer, data, readout="last")
    assert [one.feature for one in plain if one.warns] == ["answer start"]
    assert {one.feature for one in read if one.warns} == {"answer start", "token read"}
    assert pick(read, "token read").kind == "position"
    assert {one.feature for one in plain} == {"answer start"}, "what is the same on both sides is left out"


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 10), marks=pytest.mark.slow)])
def test_balanced_sets_draw_no_warning(tokenizer: Any, seeds: range) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in seeds:
            assert warn_of_confounds(tokenizer, balanced(seed), readout="response_mean") == []
            assert warn_of_confounds(tokenizer, balanced(100 + seed, paired=False)) == []
    assert len(confounds(tokenizer, balanced(0))) > 10, "there was something to compare"


# What the shipped sets are told apart by. Formal answers are as many tokens, of longer words; refusals say "I".
KNOWN = {"formality-caa": {"characters"}, "refusal-caa": {"first word"}}


@pytest.mark.parametrize(
    "name", ["enthusiasm-caa", "formality-caa", "imagery-caa", "optimism-caa", "refusal-caa", "warmth-caa"]
)
@pytest.mark.embedded
def test_shipped_sets(name: str, embedded: tuple[Any, Any]) -> None:
    recipe = find_recipe(name)
    found = confounds(embedded[1], recipe.split()[0], readout=recipe.method.readout)
    assert {one.feature for one in found if one.warns} == KNOWN.get(name, set())
    assert not pick(found, "tokens").warns


def test_fits_that_find_the_same_axis_without_labels_are_no_controls() -> None:
    """RepE's axis does not depend on which side of a pair is which; CAA's does."""
    from steerkit.fitting.fitting import fit
    from steerkit.prompts.contrast_set import ContrastSet

    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    data = ContrastSet.from_answers(
        [(f"Number {n}?", f"It is a joy, {n} says.", f"It is a pain, {n} says.") for n in range(16)]
    )
    for method, same in (("repe", 4), ("caa", 0)):
        vector = fit(model, tokenizer, data, method=method, layers=[1], readout="response_mean")
        found = refits(model, tokenizer, data, vector, shuffled=4, halves=0, resamples=0)
        assert found.same_axis == same, method
        assert len(found.matched()) == 4 - same
        assert found.as_json()["shuffled_on_the_same_axis"] == same
