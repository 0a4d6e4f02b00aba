"""`steerkit find-strength`: a table of tries, an interval, a file with the strength, and every mistake one can make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from steerkit.vector.steering_vector import SteeringVector
from tests.program import WIDTH, Cli, plain, strict_json, width

FIND = ("find-strength", "--vector", "v.safetensors", "--max-new-tokens", 4, "--tries", 3, "--each", 2)


@pytest.fixture
def words(here: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The command, on a model whose steered texts lose a word where the strength grows."""
    from steerkit.evaluate.trial import Trial

    def texts(self: Trial) -> tuple[str, ...]:
        keeps = (self.strength or 0.0) < 0.7
        return tuple("a b" if keeps or n else "b" for n in range(len(self.setup.asked)))

    monkeypatch.setattr(Trial, "texts", property(texts))
    return (*FIND, "--model", tiny)


def test_every_try_and_the_interval(cli: Cli, words: tuple[object, ...]) -> None:
    given = (*words, "--high", 2, "--target", 0.8, "--scorer", "markers", "--markers", "a")
    ended = cli(*given, "--json", "--out", "found.safetensors")
    found = strict_json(ended.out)
    assert (ended.code, found["column"], found["file"]) == (0, "marker_rate", "found.safetensors")
    assert found["tries"][0]["strength"] == 1.0
    assert [one["score"] for one in found["tries"]] == [
        0.5 if one["strength"] >= 0.7 else 1.0 for one in found["tries"]
    ]
    assert found["low"] <= found["strength"] <= found["high"]
    assert SteeringVector.load("found.safetensors").suggested_strength == found["strength"]
    shown = cli(*given)
    assert "marker_rate crosses 0.8 at strength" in plain(shown.out)
    assert "--vector v.safetensors --strength" in plain(shown.out)
    assert width(shown.out.split("\n")[:8]) <= WIDTH


def test_a_target_that_is_not_crossed_is_no_answer(cli: Cli, words: tuple[object, ...]) -> None:
    ended = cli(*words, "--high", 0.5, "--scorer", "markers", "--markers", "a", "--out", "found.safetensors")
    assert (ended.code, Path("found.safetensors").exists()) == (1, False)
    assert "it may not be crossed here" in plain(ended.out)


def test_prompts_of_ones_own_and_a_scale(cli: Cli, answer: Callable[..., Any], words: tuple[object, ...]) -> None:
    own = (*words, "--high", 2, "--prompts", "plus.txt", "--scorer", "markers", "--markers", "a")
    by_column = ("--column", "markers_per_100_words", "--scale", "0,100", "--target", 0.3)
    found = answer(*own, *by_column, "--about", "0.7,0.3")
    assert found["tries"][0]["score"] == 0.25
    assert all(abs(one["strength"] - 0.7) < 0.6 for one in found["tries"])
    ended = cli(*own, *by_column, "--tolerance", 3, "--json")  # one try is narrow enough, and on one side
    assert (ended.code, len(strict_json(ended.out)["tries"])) == (1, 1)
    refused = cli(*own, "--column", "markers_per_100_words")
    assert (refused.code, "beyond the scale from 0 to 1" in refused.err) == (1, True)
    for more in (("--column", "nothing"), ("--scale", "1"), ("--scale", "1,1"), ("--about", "x,1")):
        assert cli(*own, *more).code == 2, more


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--markers", "a"), "--scorer: compliance takes no --markers; say --scorer markers"),
        (("--scale", "1,0"), "--scale: '1,0'; give the lower end first"),
        (("--target", 3), "target 3"),
        (("--tolerance", -1), "tolerance -1"),
        (("--low", 5), "5"),
        (("--about", "2,-1"), "-1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_before_a_model_is_loaded(cli: Cli, here: Path, more: tuple[object, ...], said: str) -> None:
    ended = cli(*FIND, "--high", 4, *more, "--model", "./none")
    assert (ended.code > 0, ended.out) == (True, "")
    assert said in " ".join(plain(ended.err).replace("│", " ").split())
    assert "./none" not in ended.err


def test_a_judge_and_words_for_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from steerkit.cli._evidence import scorers_of
    from steerkit.evaluate.judges import judging

    class Mute:
        name = "mute"

        def score(self, prompts: Sequence[str], *, low: int = 0, high: int = 10) -> list[float | None]:
            return [None for _ in prompts]

    judge = Mute()
    monkeypatch.setattr(judging, "judge_of", lambda spec: judge if spec else None)
    (alone,) = scorers_of(["attempts"], None, None, None)
    assert (alone.judge, alone.markers) == ("", ())  # type: ignore[attr-defined]
    (by_words,) = scorers_of(["attempts"], ["sea", "ship"], None, None)
    assert by_words.markers == ("sea", "ship")  # type: ignore[attr-defined]
    (judged,) = scorers_of(["attempts"], None, None, "mute")
    assert judged.judge is judge  # type: ignore[attr-defined]
    with pytest.raises(typer.BadParameter, match="a judge rates a behaviour"):
        scorers_of(["repetition"], None, None, "mute")
