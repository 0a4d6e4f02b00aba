"""Marks of a chat template as token ids, and from them which tokens of a text are whose; and texts without thinking."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CHANNEL", "FINAL", "FRAME", "THINKING", "Mark", "Marks", "ReadSoFar", "outside_thinking", "spoken"]

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
        """Which positions of a whole text a scope means.

        Args:
            kind: `assistant`, `answer` or `after`.
            count: of `after`: the message behind which it begins.
            ids: [b, t] from the beginning of the text.

        Returns:
            [b, t] bool.
        """
        return self.read_on(kind, count, ids)[0]

    def read_on(self, kind: str, count: int, ids: Tensor, before: ReadSoFar | None = None) -> tuple[Tensor, ReadSoFar]:
        """Which positions of the next tokens of a text a scope means.

        Args:
            kind: `assistant`, `answer` or `after`.
            count: of `after`: the message behind which it begins.
            ids: [b, t] the next ids.
            before: what is known of the text up to them, of the same scope; None at its beginning.

        Returns:
            [b, t] bool, and what is known then.
        """
        marks = (self.assistant, *self.others, *filter(None, (self.think, self.answer)))
        reading = Reading(ids, max(len(mark.core) + len(mark.tail) for mark in marks) - 1, before)
        found = self._ended(reading) > count if kind == "after" else self._inside(reading, kind)
        return found, reading.so_far()

    def _inside(self, reading: Reading, kind: str) -> Tensor:
        """[b, t] positions inside of the assistant's messages, or of its answers."""
        assistant, others, closes = self._events(reading)
        opens_or_closes = assistant | others | closes
        inside = reading.last(opens_or_closes, assistant)
        header = reading.goes_on(self.assistant)
        inside = inside if header is None else inside & ~header
        if kind == "assistant" or self.answer is None:
            return inside
        answers = reading.ends(self.answer.core)
        if self.headed:
            return inside & reading.last(answers | opens_or_closes, answers)
        if self.think is None:
            return inside
        thinks = reading.ends(self.think.core)
        thinking = reading.last(thinks | answers | opens_or_closes, thinks)
        rest = reading.goes_on(self.answer)
        return inside & ~thinking if rest is None else inside & ~thinking & ~rest

    def _events(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """[b, t] each: where the assistant's turn is opened, another one, and where a turn is closed."""
        others = reading.any_of(reading.ends(mark.core) for mark in self.others)
        closes = reading.any_of(reading.ends((token,)) for token in self.closes)
        return reading.ends(self.assistant.core), others, closes

    def ended(self, ids: Tensor) -> Tensor:
        """[b, t] messages that have ended, up to each token and with it.

        Args:
            ids: [b, t] from the beginning of the text.
        """
        return self._ended(Reading(ids, max(len(m.core) + len(m.tail) for m in (self.assistant, *self.others)) - 1))

    def _ended(self, reading: Reading) -> Tensor:
        """How many turns have ended up to each token [b, t]."""
        assistant, others, closes = self._events(reading)
        shared = any(mark.core == self.assistant.core[: len(mark.core)] for mark in self.others)
        opens = others if shared else others | assistant
        before = reading.one_later(reading.last(opens | closes, opens))
        ended = reading.total((opens | closes) & before)
        header = None if shared else reading.goes_on(self.assistant)
        if header is None:
            return ended
        # What opens the assistant's turn ends the user's, when its tail is through.
        return ended - (header & reading.last(opens | closes, assistant & before)).long()


class ReadSoFar(NamedTuple):
    """What has to be known of a text to go on reading it; it is as large for a long text as for a short one.

    Attributes:
        tail: [b, n] its last ids; -1 before its beginning.
        carried: [b] each: what each question about it came to at its last token.
    """

    tail: Tensor
    carried: tuple[Tensor, ...]


class Reading:
    """The next tokens of a text, and questions about them whose answers depend on what came before.

    Args:
        ids: [b, t] the next ids.
        reach: how many ids before them a mark may begin.
        before: what is known of the text up to them, from a reading that was asked the same; None at its beginning.
    """

    def __init__(self, ids: Tensor, reach: int, before: ReadSoFar | None = None) -> None:
        self._tail = ids.new_full((ids.shape[0], reach), -1) if before is None else before.tail
        self._ids, self._width, self._reach = torch.cat([self._tail, ids], dim=1), ids.shape[1], reach
        self._before = () if before is None else before.carried
        self._carried: list[Tensor] = []

    def so_far(self) -> ReadSoFar:
        """What is known behind these tokens."""
        return ReadSoFar(self._ids[:, self._width :], tuple(self._carried))

    def ends(self, run: tuple[int, ...]) -> Tensor:
        """[b, t] True where a run of ids ends.

        Args:
            run: at least one id.
        """
        found: Tensor | None = None
        for back, token in enumerate(reversed(run)):
            start = self._reach - back
            here = self._ids[:, start : start + self._width] == token
            found = here if found is None else found & here
        assert found is not None
        return found

    def goes_on(self, mark: Mark) -> Tensor | None:
        """[b, t] True where the core of a mark has ended and its tail has not; None where there is no tail.

        Args:
            mark: the mark.
        """
        parts = [self.ends(mark.core + mark.tail[:length]) for length in range(len(mark.tail))]
        return self.any_of(parts) if parts else None

    def any_of(self, parts: Iterable[Tensor]) -> Tensor:
        """[b, t] True where one of several is; nowhere where there is none.

        Args:
            parts: [b, t] each.
        """
        found: Tensor | None = None
        for part in parts:
            found = part if found is None else found | part
        return torch.zeros_like(self._ids[:, self._reach :], dtype=torch.bool) if found is None else found

    def last(self, events: Tensor, opening: Tensor) -> Tensor:
        """[b, t] whether the last event up to each token, and with it, was an opening one.

        Args:
            events: [b, t].
            opening: [b, t].
        """
        before = self._carry(events)
        if self._width == 1:
            found = torch.where(events, opening, before)
        else:
            place = torch.arange(self._width, device=events.device)
            latest = torch.where(events, 2 * place + opening, -1).cummax(dim=1).values
            found = torch.where(latest < 0, before, latest % 2 == 1)
        self._carried.append(found[:, -1:])
        return found

    def one_later(self, values: Tensor) -> Tensor:
        """[b, t] the value of the token before each.

        Args:
            values: [b, t] bool.
        """
        found = torch.cat([self._carry(values), values[:, :-1]], dim=1)
        self._carried.append(values[:, -1:])
        return found

    def total(self, events: Tensor) -> Tensor:
        """[b, t] how many events there were up to each token and with it.

        Args:
            events: [b, t].
        """
        found = events.cumsum(dim=1) + self._carry(events)
        self._carried.append(found[:, -1:])
        return found

    def _carry(self, like: Tensor) -> Tensor:
        """[b, 1] what the next question came to before these tokens: nothing at the beginning of a text."""
        place = len(self._carried)
        return self._before[place] if self._before else torch.zeros_like(like[:, :1])
