"""Finding a chat template's marks: a few conversations are rendered, and what stands between messages compared."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jinja2 import TemplateError

from steerkit.errors import ScopeError
from steerkit.prompts.marks import FINAL, THINKING, Mark

if TYPE_CHECKING:
    from steerkit.prompts.marks import Marks

__all__ = ["Probes"]

# Messages of probes: plain words with what may join their first and last characters to the template's own.
_EDGES = (("", ""), ("\n", "\n"), (" ", " "), ("(", ")"), ("\n\n", "."), ("I ", "?"), ("0", "!"), ('"', '"'))
_WORDS = ("alpha", "bravo", "delta", "kilo", "lima", "tango")


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


class Probes:
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
        """Render a chat of known words in the given roles, and note what stands around each."""
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
            ids = torch.tensor([list(probe.ids)], dtype=torch.long)
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
