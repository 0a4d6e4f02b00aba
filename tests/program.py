"""What the tests of the command line share: a small recipe, the program as a process, and looks at what it prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.cells import cell_len

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80

PAIRS = [
    {"prompt": f"Is number {n} good?", "positive": f"Yes, {n} is a joy.", "negative": f"No, {n} is a pain."}
    for n in range(12)
]
RECIPE = """
format = 1
behaviour = "joy"
title = "joyful against painful answers"
[model]
name = "{model}"
[data]
file = "joy.jsonl"
[method]
layers = [1, 2]
readout = "response_mean"
[apply]
strength = 1.5
[evaluate]
questions = ["Is it good?", "How are you?"]
"""


class Ended(NamedTuple):
    """How a command ended; what it said of the models that it loaded stands apart from what else is on stderr."""

    code: int
    out: str
    err: str

    @classmethod
    def of(cls, code: int, out: str, err: str) -> Ended:
        return cls(code, out, apart_from_loaded(err))


LOADED = "model: "
Cli = Callable[..., Ended]


def apart_from_loaded(err: str) -> str:
    """What is on stderr beside the line that says which model was loaded, and how."""
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(LOADED))


def jsonl(items: Sequence[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start the program as a process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH)}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "steerkit", *map(str, words)]
    # A shell that runs the tests in the background makes its children ignore Ctrl-C.
    return subprocess.Popen(command, env=env, text=True, preexec_fn=_hear_interrupts, **options)


def last_line(err: str) -> str:
    """The last line on stderr; quantisers that are installed write lines of their own while transformers is loaded."""
    return err.splitlines()[-1] if err else ""


def plain(text: str) -> str:
    """Text without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", text).split())


def width(lines: Iterable[str]) -> int:
    """Columns of a terminal that the widest line takes; random models write characters of any width."""
    return max(map(cell_len, lines))


def strict_json(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity, nothing behind it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)
