"""Marks of a chat template as token ids, and from them which tokens of a text are whose; and texts without thinking."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CHANNEL", "FINAL", "FRAME", "THINKING", "Mark", "Marks", "outside_thinking", "spoken"]

# What models put around their thinking; the first pair that a template writes, or that the vocabulary has, is the one.
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))
# Other models write in channels (GPT-OSS): what is said stands in messages with one header, all others are thought, or
# are calls of tools.
CHANNEL = "<|channel|>"
FINAL = "<|channel|>final<|message|>"
FRAME = ("<|start|>", CHANNEL, "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_CHANNELLED = re.compile("|".join(map(re.escape, FRAME)))


def spoken(text: str, *, in_thought: bool = False) -> str:
    """A text without what was thought, and without blanks around it; nothing where the thought has no end.

    Of a text in channels, what its last final message says.

    Args:
        text: what the model wrote.
        in_thought: the prompt has opened a thought.

    Example:
        >>> spoken("<think>Hm.</think> Yes."), spoken("<think>Hm, let"), spoken("Hm.</think>Yes.", in_thought=True)
        ('Yes.', '', 'Yes.')
    """
    if CHANNEL in text:
        parts = _final(text, 0, len(text))
        return text[slice(*parts[-1])].strip() if parts else ""
    ends = {text.rfind(end) + len(end) for _, end in THINKING if end in text}
    if ends:
        return spoken(text[max(ends) :])
    if in_thought:
        return ""
    begins = [(text.find(begin), len(begin)) for begin, _ in THINKING if begin in text]
    if not begins:
        return text.strip()
    head, _ = min(begins)
    return text[:head].strip()


def outside_thinking(text: str, start: int, stop: int) -> list[tuple[int, int]]:
    """The parts of an assistant's message that are no thinking.

    Args:
        text: the whole text.
        start: where the message begins in it. Text before it that ends with an opening mark leaves thinking open.
        stop: where it ends.

    Returns:
        (start, stop) of each part, without marks and the white space behind a closing one; empty parts left out.
    """
    if CHANNEL in text[start:stop]:
        return _final(text, start, stop)
    found, place = [], start
    closing = next((pair[1] for pair in THINKING if text[:start].rstrip().endswith(pair[0])), None)
    while place < stop:
        if closing is None:
            begins = [(text.find(pair[0], place, stop), pair) for pair in THINKING]
            end, pair = min(((at, pair) for at, pair in begins if at >= 0), default=(stop, ("", "")))
            found.append((place, end))
            place, closing = end + len(pair[0]), pair[1]
        else:
            end = text.find(closing, place, stop)
            place, closing = stop if end < 0 else end + len(closing), None
            while place < stop and text[place].isspace():
                place += 1
    return [part for part in found if part[1] > part[0]]


def _final(text: str, start: int, stop: int) -> list[tuple[int, int]]:
    """The final messages of a text in channels, (start, stop) each; empty ones left out."""
    begins = [match.end() for match in re.finditer(re.escape(FINAL), text[:stop]) if match.start() >= start]
    ends = [match.start() for match in _CHANNELLED.finditer(text[:stop])]
    spans = [(begin, next((end for end in ends if end >= begin), stop)) for begin in begins]
    return [span for span in spans if span[1] > span[0]]


@dataclass(frozen=True)
class Mark:
    """A run of tokens that means something.

    Attributes:
        core: ids that are always the same.
        tail: ids that follow where what comes next does not join them; they belong to the mark.
    """

    core: tuple[int, ...]
    tail: tuple[int, ...] = ()

    def ends(self, ids: Tensor) -> Tensor:
        """[b, t] True where the core ends.

        Args:
            ids: [b, t].
        """
        return _found(ids, self.core)

    def goes_on(self, ids: Tensor) -> Tensor | None:
        """[b, t] True where the core has ended and its tail has not; None where there is no tail.

        Args:
            ids: [b, t].
        """
        parts = [_found(ids, self.core + self.tail[:length]) for length in range(len(self.tail))]
        return torch.stack(parts).any(dim=0) if parts else None


@dataclass(frozen=True)
class Marks:
    """The marks of one chat template.

    Attributes:
        assistant: opens the assistant's turn.
        others: open any turn, or any but the assistant's.
        closes: special tokens that end a turn.
        think: opens thinking; None where the template knows none.
        answer: closes thinking, or, where `headed`, opens an answer.
        headed: the assistant's messages have channels: only what follows `answer` is one, not all but thoughts.
        counts: whether every message has marks, so that messages can be counted.
    """

    assistant: Mark
    others: tuple[Mark, ...]
    closes: tuple[int, ...]
    think: Mark | None = None
    answer: Mark | None = None
    headed: bool = False
    counts: bool = True

    def written(self, kind: str, count: int, ids: Tensor) -> Tensor:
        """Which positions a scope means.

        Args:
            kind: `assistant`, `answer` or `after`.
            count: of `after`: the message behind which it begins.
            ids: [b, t] from the beginning of the text.

        Returns:
            [b, t] bool.
        """
        if kind == "after":
            return self.ended(ids) > count
        assistant, others, closes = self._events(ids)
        inside = _last(assistant | others | closes, assistant)
        header = self.assistant.goes_on(ids)
        inside = inside if header is None else inside & ~header
        if kind == "assistant" or self.answer is None:
            return inside
        answers = self.answer.ends(ids)
        if self.headed:
            return inside & _last(answers | assistant | others | closes, answers)
        if self.think is None:
            return inside
        thinks = self.think.ends(ids)
        thinking = _last(thinks | answers | assistant | others | closes, thinks)
        rest = self.answer.goes_on(ids)
        return inside & ~thinking if rest is None else inside & ~thinking & ~rest

    def _events(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, t] each: where the assistant's turn is opened, another one, and where a turn is closed."""
        none = torch.zeros_like(ids, dtype=torch.bool)
        others, closes = none, none
        for mark in self.others:
            others = others | mark.ends(ids)
        for token in self.closes:
            closes = closes | (ids == token)
        return self.assistant.ends(ids), others, closes

    def ended(self, ids: Tensor) -> Tensor:
        """[b, t] messages that have ended, up to each token and with it.

        Args:
            ids: [b, t] from the beginning of the text.
        """
        assistant, others, closes = self._events(ids)
        shared = any(mark.core == self.assistant.core[: len(mark.core)] for mark in self.others)
        opens = others if shared else others | assistant
        is_open = _last(opens | closes, opens)
        before = torch.nn.functional.pad(is_open, (1, 0))[:, : is_open.shape[1]]
        ends = (opens | closes) & before
        header = None if shared else self.assistant.goes_on(ids)
        if header is None:
            return ends.cumsum(dim=1)
        # What opens the assistant's turn ends the user's, when its tail is through.
        return ends.cumsum(dim=1) - (header & _last(opens | closes, assistant & before)).long()


def _found(ids: Tensor, run: tuple[int, ...]) -> Tensor:
    """[b, t] True where a run of ids ends."""
    width = ids.shape[1]
    found = ids == run[-1]
    for back, token in enumerate(reversed(run[:-1]), start=1):
        found = found & torch.nn.functional.pad(ids == token, (back, 0))[:, :width]
    return found


def _last(events: Tensor, opening: Tensor) -> Tensor:
    """[b, t] whether the last event up to each token, and with it, was an opening one."""
    place = torch.arange(events.shape[1], device=events.device)
    coded = torch.where(events, 2 * place + opening, -1)
    latest = coded.cummax(dim=1).values
    return (latest >= 0) & (latest % 2 == 1)
