"""What may be typed in a chat besides questions: `/strength 1.2`, `/save FILE` and the like, a function for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from steerkit.cli._chat_session import Chat
from steerkit.errors import CompositionError, SteerError, StrengthError, unknown_name

__all__ = ["COMMANDS", "Leave", "run_command"]

OFF = "off"


class Leave(Exception):
    """The chat is over."""


class Command(NamedTuple):
    """One command.

    Attributes:
        argument: what stands behind its name.
        what: it does.
        run: gets the conversation and what stands behind the name, and gives what is said to the user.
    """

    argument: str
    what: str
    run: Callable[[Chat, str], str]


def run_command(chat: Chat, line: str) -> str:
    """Do what a line says.

    Args:
        chat: the conversation.
        line: begins with a slash.

    Returns:
        What is said to the user.

    Raises:
        SteerError: there is no such command, or it cannot be done; nothing has changed.
        Leave: the user wants to go.
    """
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        raise unknown_name("command", f"/{name}"[:40], [f"/{one}" for one in COMMANDS])
    return COMMANDS[name].run(chat, rest.strip())


def steering_line(chat: Chat) -> str:
    """How the next answer is steered, in words.

    Args:
        chat: the conversation.
    """
    return "no steering" if chat.steering is None else f"steering: {chat.steering}"


def _strength(chat: Chat, rest: str) -> str:
    """A number for the only vector, or a name and a number."""
    if chat.steering is None:
        raise StrengthError("nothing is steered; name a vector with /vector first")
    terms = chat.steering.terms
    name, _, value = rest.rpartition(" ")
    names = [term.vector for term in terms]
    if name and name.strip() not in names:
        raise unknown_name("vector of this steering", name.strip(), names)
    if not name and len(terms) > 1:
        raise StrengthError(f"several vectors steer; say which: /strength {names[0]} {rest or '1.2'}")
    try:
        strength = float(value)
    except ValueError:
        raise StrengthError(f"/strength: got {value[:40]!r}; give a number, such as /strength 1.2") from None
    changed = [replace(one, strength=strength) if name.strip() in ("", one.vector) else one for one in terms]
    chat.steer(replace(chat.steering, terms=tuple(changed)))
    return steering_line(chat)


def _vector(chat: Chat, rest: str) -> str:
    from steerkit._support.shipped import shipped_vectors
    from steerkit.composition.terms import Composition, Term

    if not rest:
        shipped = [name.rpartition("/")[2] for name in shipped_vectors(chat.model)]
        return "vectors: " + (", ".join(shipped) or "none is shipped for this model; give a file")
    chat.steer(Composition((Term(rest),)))
    return steering_line(chat)


def _steering(chat: Chat, rest: str) -> str:
    from steerkit.cli._steering import composition_of

    if rest:
        chat.steer(None if rest == OFF else composition_of(rest))
    return steering_line(chat)


def _compare(chat: Chat, rest: str) -> str:
    if rest not in ("", "on", OFF):
        raise CompositionError(f"/compare: got {rest[:40]!r}; give on or {OFF}, or nothing to change it")
    chat.compares = not chat.compares if not rest else rest == "on"
    return "answers are shown beside the plain model's" if chat.compares else "answers are shown alone"


def _system(chat: Chat, rest: str) -> str:
    if rest:
        chat.system = "" if rest == OFF else rest
    return f"system prompt: {chat.system}" if chat.system else "no system prompt"


def _save(chat: Chat, rest: str) -> str:
    if not rest:
        raise SteerError("/save: give a file, such as /save chat.jsonl")
    chat.save(Path(rest).expanduser())
    return f"saved {len(chat.turns)} turns in {rest}"


def _reset(chat: Chat, _rest: str) -> str:
    chat.turns.clear()
    return "a new conversation"


def _help(_chat: Chat, _rest: str) -> str:
    words = {f"/{name} {one.argument}".strip(): one.what for name, one in COMMANDS.items()}
    width = max(map(len, words))
    return "\n".join(f"{word:<{width}}  {what}" for word, what in words.items())


def _quit(_chat: Chat, _rest: str) -> str:
    raise Leave


COMMANDS = {
    "strength": Command("[NAME] X", "how strongly the vector acts; NAME where there are several", _strength),
    "vector": Command("[NAME]", "steer by this vector alone; without a name, list them", _vector),
    "steering": Command("[LINE]", f"steer by a composition; {OFF} for none", _steering),
    "compare": Command("", "the plain model's answer beside the steered one, or not", _compare),
    "system": Command("[TEXT]", f"the system prompt; {OFF} for none", _system),
    "save": Command("FILE", "write the conversation as JSONL, with its steering", _save),
    "reset": Command("", "begin a new conversation", _reset),
    "help": Command("", "this list", _help),
    "quit": Command("", "leave; Ctrl-D does too", _quit),
}
