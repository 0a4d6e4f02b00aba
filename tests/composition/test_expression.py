"""A composition is the same as text, as JSON and as a file, and what is none is refused with its place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import steerkit
from steerkit.composition import Composition, Term
from steerkit.errors import CompositionError, SteerError
from steerkit.maths.predicates import P, Predicate
from steerkit.tokens.fade import SHAPES, Fade
from steerkit.vector.hold import Hold
from steerkit.vector.when import Comparison, When
from tests.docs.pages import ROOT

SCHEMA = json.loads((ROOT / "steerkit/composition/schema.json").read_text("utf-8"))
CHECKER = jsonschema.Draft202012Validator(SCHEMA)
README = "optimism-caa*1.5 + formal-persona@answer*0.8 - pirate-persona[8:40]"

NAMES = st.one_of(
    st.sampled_from(
        ["optimism-caa", "a", "./x.safetensors", "two words", 'a "b" c', "C:\\x", "hub:u/n@v1", "7", "é-ß"]
    ),
    st.text(st.characters(blacklist_categories=("C", "Z")), min_size=1, max_size=8),
)
TOKENS = st.integers(0, 10**9 - 1)
WINDOWS = (
    st.tuples(TOKENS, st.none() | st.integers(1, 99))
    .map(lambda pair: (pair[0], None if pair[1] is None else min(pair[0] + pair[1], 10**9 - 1)))
    .filter(lambda pair: pair[1] is None or pair[1] > pair[0])
)
STRENGTHS = st.one_of(st.floats(-9, 9), st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(-5, 5))


FADES = st.builds(
    Fade, st.sampled_from(SHAPES), st.integers(1, 10**9 - 1), st.floats(-9, 9) | st.sampled_from([0, 1.5, -2])
)


NUMBERS = st.floats(-9, 9) | st.sampled_from([0, 1.5, -2, 1e-9, -3e38])


@st.composite
def comparisons(draw: Any, per_token: bool) -> Predicate:
    value, above = draw(NUMBERS), draw(st.booleans())
    off = value + (-1 if above else 1) * draw(st.floats(0.5, 3)) if per_token and abs(value) < 9 else None
    return P(str(Comparison(draw(NAMES), value, above, draw(st.none() | st.just(off)))))


@st.composite
def whens(draw: Any) -> When:
    per_token = draw(st.booleans())

    def joined(parts: Any) -> Any:
        both = st.tuples(st.sampled_from(["and", "or"]), parts, parts)
        return both.map(lambda one: Predicate(one[0], one[1:])) | parts.map(lambda one: ~one)

    return When(draw(st.recursive(comparisons(per_token), joined, max_leaves=5)), per_token)


HOLDS = st.builds(
    lambda reading, at, low, more: Hold(reading, at, (low, low + more)),
    NAMES,
    NUMBERS,
    st.floats(-9, 9),
    st.floats(0.001, 9),
)


@st.composite
def terms(draw: Any) -> Term:
    window = draw(st.none() | WINDOWS)
    scopes = ["response", "generated"] + ([] if window else ["all", "answer", "first(4)", "response(3)", "after(0)"])
    hold = draw(st.none() | HOLDS)
    strength = draw(st.none() | STRENGTHS) if hold is None else None
    return Term(
        draw(NAMES),
        strength=strength,
        unit=None if strength is None else draw(st.sampled_from([None, "norm", "paper"])),
        scope=draw(st.none() | st.sampled_from(scopes)),
        window=window,
        without=draw(st.none() | NAMES),
        minus=strength is None and hold is None and draw(st.booleans()),
        fade=draw(st.none() | FADES) if hold is None else None,
        when=draw(st.none() | whens()),
        hold=hold,
    )


def check_round_trip(drawn: Composition) -> None:
    text = str(drawn)
    read = Composition.parse(text)
    assert read == drawn
    again = Composition.from_json(json.loads(json.dumps(read.as_json())))
    assert again == read
    assert str(again) == text


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(st.lists(terms(), min_size=1, max_size=3).map(tuple))
def test_text_object_json_object_text(drawn: tuple[Term, ...]) -> None:
    check_round_trip(Composition(drawn))


LETTERS = "aZ09_./-~@[]:*+()\"'\\, é\u00df\u4e2d\U0001f600"


def random_rule(draw: random.Random, names: list[str], per_token: bool, depth: int = 3) -> Predicate:
    kind = draw.choice(["name", "name", "and", "or", "not"]) if depth else "name"
    if kind == "name":
        value, above = draw.choice([1.5, -2.0, draw.uniform(-3, 3), 1e-9]), draw.random() < 0.5
        off = value - 1 if above else value + 0.25
        return P(str(Comparison(draw.choice(names), value, above, off if per_token and draw.random() < 0.5 else None)))
    parts = [random_rule(draw, names, per_token, depth - 1) for _ in range(1 if kind == "not" else 2)]
    return Predicate(kind, tuple(parts))


def random_when(draw: random.Random, names: list[str]) -> When:
    per_token = draw.random() < 0.5
    return When(random_rule(draw, names, per_token), per_token)


def random_term(draw: random.Random) -> Term:
    strength = draw.choice([None, draw.uniform(-3, 3), float(draw.randint(-3, 3)), draw.random() ** 99, -7])
    start = draw.choice([0, draw.randrange(10**6)])
    window = draw.choice([None, (start, None), (start, start + draw.randint(1, 99))])
    names = ["optimism-caa", "two words", "./x.safetensors", "".join(draw.choices(LETTERS, k=draw.randint(1, 9))) + "x"]
    scopes = [None, "response", "generated"] + ([] if window else ["all", "first(4)", "response(2:5)"])
    if draw.random() < 0.2:
        low = draw.uniform(-3, 3)
        hold = Hold(draw.choice(names), draw.uniform(-3, 3), (low, low + draw.choice([1, 0.1, 1e-3])))
        return Term(draw.choice(names), scope=draw.choice(scopes), window=window, hold=hold)
    return Term(
        draw.choice(names),
        strength=strength,
        unit=draw.choice([None, "norm", "paper"]) if strength is not None else None,
        scope=draw.choice(scopes),
        window=window,
        without=draw.choice([None, *names]),
        minus=strength is None and draw.random() < 0.5,
        fade=draw.choice([None, Fade(draw.choice(SHAPES), draw.randint(1, 99), draw.choice([0, 0.5, -1e-9]))]),
        when=draw.choice([None, random_when(draw, names)]),
    )


def random_composition(draw: random.Random) -> Composition:
    return Composition(tuple(random_term(draw) for _ in range(draw.randint(1, 4))))


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_round_trips_of_random_compositions(count: int) -> None:
    draw = random.Random(0)
    for _ in range(count):
        check_round_trip(random_composition(draw))


def test_the_schema_says_what_from_json_says() -> None:
    """Random compositions fit the schema; altered in one place, both agree on whether it still is one."""
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        data = random_composition(draw).as_json()
        CHECKER.validate(data)
        entry = draw.choice([data, *data["terms"]])
        inner = ["when", "when", "hold", "fade", "strength", "minus", "window", "unit", "vector", "terms", "nonsense"]
        key = draw.choice([*entry, *inner])
        value = draw.choice(
            [
                None,
                True,
                1,
                1.5,
                "x",
                [],
                {},
                [1, 2],
                [2, None],
                {"shape": "linear", "over": 2},
                {"over": 2},
                {"rule": {"reading": "a", "above": 1}, "per_token": True},
                {"rule": {"reading": "a", "above": 1, "below": 2}},
                {"rule": {"reading": "a", "below": "1"}},
                {"rule": {"all": [{"reading": "a", "below": 1}]}},
                {"rule": {"any": [{"not": {"reading": "a", "below": 1}}, {"reading": "b", "above": 0}]}},
                {"rule": {"reading": "a", "above": 1}, "per_token": 1},
                {"reading": "a", "at": 1, "within": [0, 3]},
                {"reading": "a", "at": 1, "within": [0]},
                "norm",
                -1,
                "response",
            ]
        )
        if draw.random() < 0.2 and key in entry:
            del entry[key]
        else:
            entry[key] = value
        try:
            Composition.from_json(data)
        except CompositionError as error:
            refused += 1
            assert "\n" not in str(error)
            # A schema cannot say what a scope is, which scopes have windows, and on which side a number lies.
            if not any(word in str(error) for word in ("scope", "window", "off ", "per token")):
                assert not CHECKER.is_valid(data), data
        else:
            lenient = any(term.get(name, 0) is None for term in data["terms"] for name in term)
            assert CHECKER.is_valid(data) or lenient, data  # None and nothing are one to Python
    assert refused > 50


def test_the_schema_in_the_docs_is_that_of_the_package() -> None:
    CHECKER.check_schema(SCHEMA)
    assert json.loads((ROOT / "docs/reference/composition.schema.json").read_text("utf-8")) == SCHEMA


@pytest.mark.parametrize(
    ("loose", "tidy"),
    [
        (README, README),
        ("  a*+1.50 +b @ answer * .5norm\n - c [ :4 ]", "a*1.5 + b@answer*0.5 norm - c[:4]"),
        ("a*-2-b*-3", "- a*2 + b*3"),
        ("+ a-b - c", "a-b - c"),
        ("a*1*1"[:3] + "e-3 norm ~ b", "a~b*0.001 norm"),
        ("a*0 - b*0", "a*0 + b*0"),
        ('"a"[:] + "a b"', 'a[:] + "a b"'),
        ("a fade( cosine  over 40 to 0.50 )*2", "a*2 fade(cosine over 40 to 0.5)"),
        ("fade*2 - fade fade(linear over 4 to 1)", "fade*2 - fade fade(linear over 4 to 1)"),
        ("a@response( 2 : 5 )", "a@response(2:5)"),
        ("a@response(0:3)", "a@response(3)"),
        ("a when( refusal-caa>1.50 )*2", "a*2 when(refusal-caa > 1.5)"),
        ("a when(b<-1 off 0 per  token) - when*2", "a when(b < -1 off 0 per token) - when*2"),
        ("a when(((b > 1) & c > 2) | ~d > 3)", "a when(b > 1 & c > 2 | ~(d > 3))"),
        ("a when(b > 1 & (c > 2 | d > 3))", "a when(b > 1 & (c > 2 | d > 3))"),
        ('a when("b c" > 1e3)', 'a when("b c" > 1000)'),
        ("a when(b > 1) hold( a at 2.0 within 0 to 3 )", "a hold(a at 2 within 0 to 3) when(b > 1)"),
        ("hold hold(at  at 1 within -1 to +1)", "hold hold(at at 1 within -1 to 1)"),
    ],
)
def test_what_is_read_is_printed_in_one_way(loose: str, tidy: str) -> None:
    assert str(Composition.parse(loose)) == tidy
    assert str(Composition.parse(tidy)) == tidy


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("", 1, "empty"),
        ("  ", 3, "empty"),
        ("a + ", 5, "name of a vector"),
        ("a + - b", 5, "got '-'"),
        ("a*x", 3, "got 'x' where a strength"),
        ("a*1.5 + b@anser", 10, "did you mean 'answer'"),
        ("a*1.5 nrom", 7, "did you mean 'norm'"),
        ("a[3:1]", 2, "ends before it begins"),
        ("a[3:3]", 2, "ends before it begins"),
        ("a[3]", 3, "such as [8:40]"),
        ("a[1:9999999999]", 3, "window"),
        ("1.5*a", 1, "behind the vector, as in optimism-caa*1.5"),
        ("a b", 3, "got 'b'"),
        ("a when p > 0", 3, "got 'when'"),
        ("a when()", 8, "got ')' where the name of a vector"),
        ("a when(p)", 9, "got ')' where > or < stands"),
        ("a when(p = 1)", 10, "got '=' where > or <"),
        ("a when(p >= 1)", 10, "got '>' where > or <"),
        ("a when(p > x)", 12, "got 'x' where a number stands"),
        ("a when(p > 1e99)", 12, "finite"),
        ("a when(p > 1 off 2 per token)", 12, "off 2 is not below 1"),
        ("a when(p < 1 off 0 per token)", 12, "off 0 is not above 1"),
        ("a when(p > 1 off 0)", 8, "write per token"),
        ("a when(p > 1 of 0)", 14, "got 'of'"),
        ("a when(p > 1 per toke)", 14, "got 'per'"),
        ("a when(p > 1", 13, "got 'the end'"),
        ("a when(p > 1 & )", 16, "got ')' where the name"),
        ("a when((p > 1 | q > 2)", 23, "got 'the end'"),
        ("a when(" + "(" * 17 + "p > 1", 24, "deeper than 16"),
        ("a when(" + "p > 1 & " * 17 + "p > 1)", 136, "more than 16 comparisons"),
        ("a when(p > 1) when(p > 1)", 15, "a second when"),
        ("a hold(a at 2)", 14, "got ')' where within 0 to 3"),
        ("a hold(a within 0 to 3)", 10, "got 'within' where at 2"),
        ("a hold(a at 2 within 3 to 0)", 8, "within 3 to 0 ends before it begins"),
        ("a hold(a at 2 within 0 to 3 5)", 29, "got '5' where ) closes"),
        ("a*2 hold(a at 2 within 0 to 3)", 5, "hold finds the strength itself"),
        ("a hold(a at 2 within 0 to 3)*2", 29, "hold finds the strength itself"),
        ("a - b hold(a at 2 within 0 to 3)", 5, "hold finds the strength itself"),
        ("a*1*2", 4, "a second strength"),
        ("a~b~c", 4, "a second ~other"),
        ("a*1e99", 2, "finite"),
        ("a \u2212 b", 3, "write a minus as -"),
        ('a + "b', 5, "never closed"),
        ("a@answer[1:2]", 9, "a window counts generated tokens"),
        ("a@first(0)", 2, "at least 1"),
        ("a norm", 3, "got 'norm'"),
        ("a fade", 3, "got 'fade'"),
        ("a fade(40)", 7, "write it as 'linear over 40'"),
        ("a fade (lineal over 40)", 8, "did you mean 'linear'"),
        ("a fade(linear over 0)", 7, "give 1 to"),
        ("a fade(linear over 4", 7, "a fade is written as"),
        ("a fade(linear over 4) fade(linear over 4)", 23, "a second fade"),
    ],
)
def test_mistakes_are_pointed_at(text: str, column: int, says: str) -> None:
    with pytest.raises(CompositionError) as caught:
        Composition.parse(text)
    assert f"column {column}: " in str(caught.value)
    assert says in str(caught.value)


def test_hostile_text_gives_one_line() -> None:
    draw = random.Random(0)
    pieces = [
        "a",
        "-",
        "+",
        "*",
        "~",
        "@",
        "[",
        "]",
        ":",
        "(",
        ")",
        '"',
        "\\",
        "1",
        "e9",
        ".",
        "/",
        " ",
        "\n",
        "\0",
        "\ud800",
    ]
    pieces += ["when(", "hold(", " > ", " < 1", "&", "|", " off ", " per token", " at ", " within 0 to "]
    pieces += ["\u202e", "norm", "first(", "9" * 400, "response", "\U0001f600", "٣", "{}", "%s", "'"]
    texts = ["".join(draw.choices(pieces, k=draw.randint(0, 12))) for _ in range(2000)]
    texts += [
        "a" * 200_000,
        "a+" * 40_000,
        "(" * 90_000,
        '"' * 90_000,
        "a*1+" * 300 + "a",
        "~" * 90_000,
        "a" + " " * 90_000,
    ]
    fine = 0
    for text in texts:
        try:
            Composition.parse(text)
            fine += 1
        except SteerError as error:
            assert isinstance(error, CompositionError)
            assert len(str(error).splitlines()) == 1
            assert len(str(error)) < 1200
    assert fine > 20


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (
            "optimism-cab*2",
            steerkit.UnknownNameError,
            "column 1: unknown vector 'optimism-cab'; did you mean 'optimism-caa'",
        ),
        (
            "optimism-caa + missing.safetensors",
            steerkit.VectorFileError,
            "column 16: missing.safetensors: no such file",
        ),
        ("x" * 400, steerkit.UnknownNameError, "column 1: unknown vector"),
        ('"' + "x/" * 300 + '"', SteerError, "column 1"),
        ("optimism-caa~optimism-caa", steerkit.FitError, "nothing is left"),
        ("optimism-caa~refusal-caa", steerkit.FitError, "same sites"),
    ],
)
def test_a_vector_that_cannot_be_had_is_named_with_its_place(text: str, error: type[SteerError], says: str) -> None:
    with pytest.raises(error) as caught:
        Composition.parse(text).vectors()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mix.json", "mix.txt"])
def test_files_give_back_what_was_saved(tmp_path: Path, name: str) -> None:
    mixed = Composition.parse(README)
    path = mixed.save(tmp_path / "deep" / name)
    assert Composition.load(path) == mixed
    for broken in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 2, "terms": []}', b"a" * 2_000_000):
        path.write_bytes(broken)
        with pytest.raises(CompositionError) as caught:
            Composition.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(CompositionError, match="No such file"):
        Composition.load(tmp_path / "none.json")
    with pytest.raises(CompositionError, match="cannot be written"):
        mixed.save(path / "inside.json")


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {"terms": []},
        {"format": 1},
        {"format": 1, "terms": []},
        {"format": 1, "terms": [{}]},
        {"format": 1, "terms": ["a"]},
        {"format": 1, "terms": [{"vector": "a", "strenght": 1}]},
        {"format": 1, "terms": [{"vector": "a", "strength": float("nan")}]},
        {"format": 1, "terms": [{"vector": "a", "strength": 10**400}]},
        {"format": 1, "terms": [{"vector": "a", "column": 3}]},
        {"format": 1, "terms": [{"vector": "a", "minus": True, "strength": 1}]},
        {"format": 1, "terms": [{"vector": "a\nb"}]},
        {"format": 1, "terms": [{"vector": "a"}] * 257},
    ],
)
def test_json_that_is_no_composition(data: Any) -> None:
    with pytest.raises(CompositionError) as caught:
        Composition.from_json(data)
    assert "\n" not in str(caught.value)
