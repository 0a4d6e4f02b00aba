"""`steerkit chat`: talk to a steered model in the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerkit._support.progress import status
from steerkit.cli._chat_commands import Leave, run_command, steering_line
from steerkit.cli._chat_view import print_turn, show
from steerkit.cli._model import DEFAULT, ModelChoice, loads_model
from steerkit.cli._program import say
from steerkit.cli._shared import Json
from steerkit.cli._steering import SteeringOption, check_chosen, chosen
from steerkit.cli.generate import StrengthOption, VectorOption
from steerkit.errors import SteerError

if TYPE_CHECKING:
    from steerkit.cli._chat_session import Answering, Chat, Turn

__all__ = ["run"]

_PROMPT = "> "
_ROWS = 3  # the plain answer, the steered one, and the plain model that reads along with it


@loads_model
def run(
    vector: VectorOption = None,
    strength: StrengthOption = None,
    steering: SteeringOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the plain model's answers too.")] = False,
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Fixes what is drawn.")] = None,
    model: ModelChoice = DEFAULT,
    as_json: Json = False,
) -> None:
    """Talk to a model, steered where a vector is given; /help tells how to change the steering meanwhile.

    Ctrl-C stops an answer, a second one leaves. Without a terminal each line of stdin is answered, and --json gives a
    line of JSON for each.
    """
    check_chosen(vector, strength, steering)
    used = chosen(vector, strength, steering, model.name)
    begun = used.composition if used.vectors else None

    from steerkit.cli._chat_session import Chat, Sampling
    from steerkit.serve import Engine

    loaded, tokenizer = model.load()
    with status("starting"):
        engine = Engine(loaded, tokenizer, max_batch=_ROWS, max_queue=_ROWS, max_tokens=max_new_tokens)
    with engine:
        sampling = Sampling(float(temperature), seed)
        chat = Chat(engine, model.name, sampling, system=system, compares=compare)
        chat.steer(begun)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is no text in this encoding is no reason to leave
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
        if at_terminal:
            _talk(chat)
        elif not _answer_lines(chat, as_json=as_json):
            raise typer.Exit(1)


def _talk(chat: Chat) -> None:
    """Questions and answers at a terminal, until the user leaves."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and keys to edit with

    typer.echo(f"{steering_line(chat)}; /help tells what may be typed, Ctrl-D leaves")

    with contextlib.suppress(EOFError, Leave):
        while True:
            line = input(_PROMPT)
            try:
                _answer(chat, line, show)
            except SteerError as error:
                say("error", error)


def _answer_lines(chat: Chat, *, as_json: bool) -> bool:
    """Answer stdin line by line; whether all could be.

    What commands say goes to stderr, so that stdout has the answers alone.
    """
    is_fine = True
    with contextlib.suppress(Leave):
        for line in sys.stdin:
            try:
                turn = _answer(chat, line, list, is_error=True)
            except SteerError as error:
                say("error", error)
                is_fine = False
                continue
            if turn is not None and as_json:
                typer.echo(json.dumps(turn.as_json()))
            elif turn is not None:
                print_turn(turn)
    return is_fine


def _answer(chat: Chat, line: str, show: Callable[[Answering], Any], *, is_error: bool = False) -> Turn | None:
    """Do what a line says: a command, or a question, which two slashes begin where it begins with one.

    Returns:
        The turn where it was answered.

    Raises:
        SteerError: it cannot be done; the conversation stays as it is.
    """
    line = line.strip()
    if line.startswith("/") and not line.startswith("//"):
        typer.echo(run_command(chat, line), err=is_error)
        return None
    if not line:
        return None
    question = line.removeprefix("/")
    answering = chat.ask(question)
    with _stopped_by_interrupt(answering):
        show(answering)
    return chat.keep(question, answering.answers)


@contextlib.contextmanager
def _stopped_by_interrupt(answering: Answering) -> Iterator[None]:
    """Let Ctrl-C stop the answer, once; what has come by then is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears of it
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        answering.stop()

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
