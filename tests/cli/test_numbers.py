"""No option of any command takes nan or infinity: the first lies in every range, and neither means anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from typer import BadParameter

from tests.cli.words import commands


def parts(annotation: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield annotation
    for one in get_args(annotation):
        yield from parts(one)


def needed(command: Any) -> Iterator[str]:
    """Words for what a command cannot do without."""
    for param in command.params:
        if param.required:
            word = "gguf" if param.name == "to" else "1"
            yield from [param.opts[0], word] if param.opts[0].startswith("-") else [word]


NUMBERS = [
    pytest.param(command, param, id=f"{name} {param.opts[0]}")
    for name, command in commands()
    for param in command.params
    if float in parts(param.type_descriptor.annotation)
]


def test_there_are_such_options() -> None:
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(("command", "param"), NUMBERS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_wrong_usage(command: Any, param: Any, value: str) -> None:
    words = [*needed(command), f"{param.opts[0]}={value}"]
    with pytest.raises(BadParameter) as raised:
        command.make_context(command.name, words)
    assert raised.value.param is param
    said = {f"{value} is no finite number; give one", f"got {value}; it should be"}
    assert any(raised.value.message.startswith(one) for one in said), raised.value.message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("calibrate", "joy", "--max-kl", "-1"), "got -1; it should be greater than or equal to 0"),
        (("calibrate", "joy", "--controls=0"), "got 0; it should be greater than or equal to 1"),
        (("calibrate", "joy", "--controls", "few"), "got few; it should be a valid integer"),
        (("export", "--vector", "v", "--to", "onnx"), "'onnx' is not one of 'gguf'"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(words: tuple[str, ...], said: str) -> None:
    name, *rest = words
    with pytest.raises(BadParameter) as raised:
        dict(commands())[name].make_context(name, rest)
    assert raised.value.message.startswith(said)
