"""Whose words a token is: the turns of a chat and its thinking, told from token ids.

A chat template writes marks around the turns. `Marks` are those of one tokenizer as token ids, found by rendering a few
probe conversations: what stands before every assistant message and nowhere else opens the assistant's turn, the first
special token behind it closes the turn. They are checked on the same probes before they are used.

What a token is follows from the ids up to it and from nothing else, so a text gives the same in one pass, in chunks and
token by token. A position counts where, as far as the text goes, the next token is one of the span: from the last token
of the mark that opens the span (its output is the span's first token) to the span's last token. `response` begins at
the prompt's last token for the same reason. Of a mark of several tokens that closes something, those before its last
count still; a special token has none.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from steerkit.errors import ScopeError

__all__ = ["CHANNEL", "FINAL", "FRAME", "THINKING", "Mark", "Marks", "Roles", "outside_thinking", "spoken"]

# What models put around their thinking; the first pair that a template writes, or that the vocabulary has, is the one.
THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))

# Other models write in channels (GPT-OSS): what is said stands in messages with one header, all others are thought, or
# are calls of tools.
CHANNEL = "<|channel|>"
FINAL = "<|channel|>final<|message|>"
FRAME = ("<|start|>", CHANNEL, "<|message|>", "<|end|>", "<|return|>", "<|call|>")
_CHANNELLED = re.compile("|".join(map(re.escape, FRAME)))

# Messages of probes: plain words with what may join their first and last characters to the template's own.
_EDGES = (("", ""), ("\n", "\n"), (" ", " "), ("(", ")"), ("\n\n", "."), ("I ", "?"), ("0", "!"), ('"', '"'))
_WORDS = ("alpha", "bravo", "delta", "kilo", "lima", "tango")


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


class Roles:
    """The marks of a tokenizer, found when first asked for.

    Args:
        tokenizer: with a chat template; never changed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, tokenizer: Any) -> Roles:
        """The roles of a tokenizer; roles themselves come back as they are.

        Args:
            tokenizer: a transformers tokenizer, or its roles.
        """
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    @cached_property
    def marks(self) -> Marks:
        """The marks.

        Raises:
            ScopeError: there is no chat template, or its marks cannot be told from ids.
        """
        probes = _Probes(self._tokenizer)
        assistant = probes.assistant()
        close = probes.close()
        special = self._tokenizer.eos_token_id
        closes = tuple(dict.fromkeys([close, *([] if special is None else [int(special)])]))
        others = probes.others(assistant, close)
        marks = Marks(assistant, others, closes, *probes.thinking())
        return probes.checked(marks)

    def check(self, kind: str) -> Marks:
        """The marks, if they tell what a scope needs.

        Args:
            kind: `assistant`, `answer` or `after`.

        Raises:
            ScopeError: they do not.
        """
        channels = CHANNEL in str(getattr(self._tokenizer, "chat_template", None) or "")
        if kind == "answer" and channels and not self.marks.headed:
            raise ScopeError(
                f"scope 'answer': this chat template writes in channels, none of them {FINAL}; use scope='assistant'"
            )
        if kind == "after" and not self.marks.counts:
            raise ScopeError("scope 'after(n)': this chat template does not mark every message; use scope='assistant'")
        return self.marks


class _Token(NamedTuple):
    """A token of a probe and the characters it stands for."""

    id: int
    text: str


class _Turn(NamedTuple):
    """One message of a probe and where its word stands."""

    role: str
    start: int
    end: int


class _Probe:
    """One conversation as the model would read it."""

    def __init__(
        self, text: str, turns: Sequence[_Turn], ids: Sequence[int], offsets: Sequence[tuple[int, int]]
    ) -> None:
        self.text, self.turns, self.ids, self.offsets = text, turns, ids, offsets

    def gaps(self) -> Iterator[tuple[str, str, tuple[_Token, ...]]]:
        """The template's own tokens between two messages, with their roles; "" is the text's beginning or end."""
        bounds = [_Turn("", 0, 0), *self.turns, _Turn("", len(self.text), len(self.text))]
        for left, right in itertools.pairwise(bounds):
            inside = [
                _Token(token, self.text[start:end])
                for token, (start, end) in zip(self.ids, self.offsets, strict=True)
                if start >= left.end and end <= right.start and (start, end) != (0, 0)
            ]
            yield left.role, right.role, tuple(inside)

    def of(self, turn: _Turn) -> list[int]:
        """The tokens that hold a part of a message's word."""
        return [place for place, (start, end) in enumerate(self.offsets) if start < turn.end and end > turn.start]


class _Probes:
    """Probe conversations of one tokenizer, and what can be read off them."""

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise _unmarked("there is no chat template")
        if not getattr(tokenizer, "is_fast", False):
            raise _unmarked("the tokenizer tells no character offsets; load the fast tokenizer")
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values())
        plain = ("user", "assistant", "user", "assistant", "user")
        self._ends = [self._probe(plain[:4], edges, prompted=False) for edges in _EDGES]
        self._plain = [self._probe(plain, edges) for edges in _EDGES]
        self._systems: list[_Probe] = []
        with contextlib.suppress(ScopeError):  # many templates refuse a system turn
            self._systems = [self._probe(("system", *plain), edges) for edges in _EDGES]
        self.merged = False  # whether the template writes the system prompt into the first user turn

    def _probe(self, roles: Sequence[str], edges: tuple[str, str], *, prompted: bool = True) -> _Probe:
        messages = [
            {"role": role, "content": f"{edges[0]}{word}{edges[1]}"} for role, word in zip(roles, _WORDS, strict=False)
        ]
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted))
        except (TemplateError, ValueError, TypeError) as error:
            raise _unmarked(f"it refuses a plain chat ({' '.join(str(error).split())})") from None
        turns, place = [], 0
        for role, word in zip(roles, _WORDS, strict=False):
            start = text.find(word, place)
            if start < 0:
                raise _unmarked("it does not write every message as it is")
            place = start + len(word)
            turns.append(_Turn(role, start, place))
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return _Probe(text, turns, encoding["input_ids"], encoding["offset_mapping"])

    def _gaps(self, left: str, right: str) -> list[tuple[_Token, ...]]:
        """All gaps between messages of two roles, cut before thinking."""
        cut = [opening for pair in THINKING for opening in pair]
        found = []
        for probe in (*self._plain, *self._systems):
            for before, after, tokens in probe.gaps():
                if (before, after) == (left, right):
                    places = [place for place, token in enumerate(tokens) if token.text in cut]
                    found.append(tokens[: places[0]] if places else tokens)
        return found

    def _elsewhere(self, *kinds: tuple[str, str]) -> list[tuple[int, ...]]:
        return [_ids(gap) for left, right in kinds for gap in self._gaps(left, right)]

    _OTHER = (("", "user"), ("", "system"), ("assistant", "user"), ("system", "user"))
    _ASSISTANT = (("user", "assistant"), ("user", ""))

    def assistant(self) -> Mark:
        """What opens the assistant's turn: in each gap before an assistant's message, and in no other."""
        history, prompt = self._gaps("user", "assistant"), self._gaps("user", "")
        elsewhere = self._elsewhere(*self._OTHER)
        core = self._core(_common([*history, *prompt]), elsewhere) or self._core(_common(history), elsewhere)
        if not core:
            raise _unmarked("nothing stands before the assistant's messages alone")
        for gap in (*prompt, *history):  # a generation prompt has the tail that nothing is joined to
            ids = _ids(gap)
            places = [place for place in range(len(ids)) if ids[place : place + len(core)] == core]
            if places:
                return Mark(core, ids[places[-1] + len(core) :])
        return Mark(core)

    def close(self) -> int:
        """The special token that ends the assistant's turn."""
        run = _common(self._gaps("assistant", "user"))
        special = next((token.id for token in run if token.id in self._added), None)
        if special is None:
            raise _unmarked("no special token ends the assistant's turn")
        return special

    def others(self, assistant: Mark, close: int) -> tuple[Mark, ...]:
        """What opens other turns: the special token that begins all openings, else one mark for each role."""
        elsewhere = self._elsewhere(*self._ASSISTANT)
        found: list[Mark] = []
        for left, right in (("assistant", "user"), ("", "user")):
            run = _common(self._gaps(left, right))
            after = max((place + 1 for place, token in enumerate(run) if token.id == close), default=0)
            core = self._core(run[after:], elsewhere)
            if core and core[0] == assistant.core[0] and core[0] in self._added:
                return (Mark(core[:1]),)
            found += [Mark(core)] if core else []
        self.merged = not any(_within(mark.core, self._elsewhere(("system", "user"))) for mark in found)
        if not self.merged:
            core = self._core(_common(self._gaps("", "system")), [*elsewhere, *self._elsewhere(("", "user"))])
            found += [Mark(core)] if core else []
        return tuple(dict.fromkeys(found))

    def _core(self, run: Sequence[_Token], elsewhere: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The last part of a run that is found nowhere else, from a special token on where there is one."""
        ids = _ids(run)
        start = next((i for i in reversed(range(len(ids))) if not _within(ids[i:], elsewhere)), None)
        if start is None:
            return ()
        start = next((i for i in reversed(range(start + 1)) if ids[i] in self._added), 0)
        end = next(end for end in range(start + 1, len(ids) + 1) if not _within(ids[start:end], elsewhere))
        while end < len(ids) and ids[end] not in self._added and run[end].text.strip():
            end += 1
        return ids[start:end]

    def thinking(self) -> tuple[Mark | None, Mark | None, bool]:
        """What opens and closes thinking, where tokenizer or template know any, and whether there are channels."""
        template, known = str(self._tokenizer.chat_template), self._tokenizer.get_added_vocab()
        if FINAL in template:
            return None, self._thought(FINAL, known), True
        written = [pair for pair in THINKING if all(text in template for text in pair)]
        added = [pair for pair in THINKING if all(text in known for text in pair)]
        for opening, closing in (*written, *added):
            return self._thought(opening, known), self._thought(closing, known), False
        return None, None, False

    def _thought(self, text: str, known: Mapping[str, int]) -> Mark:
        return Mark((known[text],)) if text in known else self._written_out(text)

    def _written_out(self, text: str) -> Mark:
        """The mark that a text without a token of its own is."""
        inside = []
        for left, right in (("\n", "\n"), ("\n", "\n\n"), ("\n", "It"), (".\n", " so"), ("\n\n", "")):
            encoding = self._tokenizer(f"{left}{text}{right}", add_special_tokens=False, return_offsets_mapping=True)
            found = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            bounds = len(left), len(left) + len(text)
            inside.append(
                tuple(_Token(token, "") for token, (start, end) in found if start >= bounds[0] and end <= bounds[1])
            )
        core = _ids(_common(inside))
        if len(core) < 2:
            raise _unmarked(f"{text!r} has no token of its own")
        whole = _ids(inside[-1])
        place = next(place for place in range(len(whole)) if whole[place : place + len(core)] == core)
        return Mark(core, whole[place + len(core) :])

    def checked(self, marks: Marks) -> Marks:
        """The marks, if they find the assistant's messages of all probes and no others.

        Raises:
            ScopeError: they do not.
        """
        counts = True
        for probe in (*self._plain, *self._systems, *self._ends):
            ids = torch.tensor([list(probe.ids)])
            inside, ended = marks.written("assistant", 0, ids)[0].tolist(), marks.ended(ids)[0].tolist()
            hidden = self.merged and probe.turns[0].role == "system"
            # Some templates write a system prompt of their own where none is given.
            own = ended[probe.of(probe.turns[0])[0]]
            for number, turn in enumerate(probe.turns):
                mine = probe.of(turn)
                if any(inside[place] is not (turn.role == "assistant") for place in mine):
                    raise _unmarked("its marks do not tell the assistant's messages from the others")
                counts &= all(ended[place] == own + max(number - hidden, 0) for place in mine)
        return replace(marks, counts=counts)


def _unmarked(reason: str) -> ScopeError:
    return ScopeError(
        f"scopes by role need a chat template whose marks token ids can tell: {reason}; use scope='response' or 'all'"
    )


def _ids(tokens: Sequence[_Token]) -> tuple[int, ...]:
    return tuple(token.id for token in tokens)


def _within(run: tuple[int, ...], others: Sequence[tuple[int, ...]]) -> bool:
    """Whether a run of ids stands in any of some lists."""
    size = len(run)
    return any(other[place : place + size] == run for other in others for place in range(len(other) - size + 1))


def _common(lists: Sequence[tuple[_Token, ...]]) -> tuple[_Token, ...]:
    """The longest run of ids that all lists hold, the last of several."""
    if not lists:
        return ()
    shortest = min(lists, key=len)
    others = [_ids(one) for one in lists]
    for size in range(len(shortest), 0, -1):
        for start in range(len(shortest) - size, -1, -1):
            run = shortest[start : start + size]
            if all(_within(_ids(run), [other]) for other in others):
                return run
    return ()
