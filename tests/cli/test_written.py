"""A value that means nothing is told before a model is loaded, at every command that takes it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from steerkit.cli import app
from steerkit.cli._model import ModelChoice
from steerkit.cli._written import check_written
from tests.cli.words import WORDS, commands

OPTIONS = (
    *("--layers", "--readout", "--scope", "--kinds", "--site", "--method", "--scorer", "--effect", "--include-path"),
    *("--strengths", "--try", "--columns", "--recipe", "--data", "--vector", "--steering", "--dictionary"),
)
CASES = [
    pytest.param(name, option, id=f"{name} {option}")
    for name, command in commands()
    if name in WORDS
    for option in OPTIONS
    if any(option in param.opts for param in command.params)
]

_MAY_BE_EMPTY = ("--data", "--strengths", "--include-path")


@pytest.mark.parametrize(
    "values",
    [
        *({"readout": text} for text in ("0", "-1", "3", "last", "mean,no_massive_tokens", "span(0,4)")),
        *({"layers": text} for text in ("0", "10-12,3", "999")),
        *({"layer_sets": text} for text in ("8-12", "12+14,3")),
        *({"scope": "response(1:3)"}, {"site": "mlp_out.3"}, {"kinds": "z, mlp_out"}, {"layers": None}),
        *({"method": "caa"}, {"slopes_of": "preference_margin"}),
    ],
    ids=str,
)
def test_what_is_written_as_it_should_be_passes(values: dict[str, str | None]) -> None:
    check_written(**values)


def never(_choice: ModelChoice) -> Any:
    raise AssertionError("loaded")


@pytest.mark.parametrize(("name", "option"), CASES)
@pytest.mark.parametrize("value", ["###", ""])
def test_it_is_told_before_a_model_is_loaded(
    name: str,
    option: str,
    value: str,
    furnished: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not value and option in _MAY_BE_EMPTY:
        pytest.skip("as if it were not given, or this folder")
    monkeypatch.setattr(ModelChoice, "load", never)
    words = [*name.split(), *map(str, WORDS[name]), f"{option}={value}", "--model", str(tiny)]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("ignore")
        app(words, prog_name="steerkit")
    err = capsys.readouterr().err
    assert left.value.code in (1, 2), err
    assert "Traceback" not in err
    # Wrong usage stands in a box, below two lines; an error is one line, which a narrow terminal may wrap.
    assert left.value.code == 2 or err.count("\n") <= 3, err
