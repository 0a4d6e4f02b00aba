"""`Readout`: which tokens of a text are read, from the names that a caller writes to token indices."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

from steerkit.errors import DataError
from steerkit.prompts.marks import outside_thinking
from steerkit.prompts.rendering import Rendered

__all__ = ["Pool", "Readout", "chosen_columns", "cut_to"]

NO_MASSIVE = ",no_massive_tokens"
"""Written behind a readout that is a mean: tokens whose activations are massive do not enter it."""
_COUNTED = re.compile(r"index\((-?\d+)\)|span\((\d+),(\d+)\)")
_POOLED = re.compile(r"(|.+_)(max|min|share)")
Pool = Literal["mean", "max", "min", "share"]
_NAMES = (
    "last",
    "mean",
    "prompt_last",
    "prompt_mean",
    "response_mean",
    "predicting_mean",
    "assistant_mean",
    "answer_mean",
)
_ONE_TOKEN = ("last", "prompt_last", "index")
_NEEDS_ANSWERS = ("response_mean", "predicting_mean", "span", "assistant_mean", "answer_mean")


@dataclass(frozen=True)
class Readout:
    """Which tokens of a text are read.

    `last` (of the rendered text: the generation prompt's last token, or the answer's), `mean` (all but the first),
    `prompt_last`, `prompt_mean`, `response_mean` (the answer's tokens), `predicting_mean` (the tokens from which the
    answer's are predicted: the prompt's last, and the answer's without its last), `assistant_mean` (the tokens of all
    assistant messages, those of the history too), `answer_mean` (the same without thinking and its marks), an index
    (negative ones count from the end), or a character span of the answer (`span(0,3)`, the end excluded).

    With `max` or `min` for `mean`, such as `max` or `response_min`: of the same tokens the largest or smallest value of
    each dimension on its own. Such a row is no activation of any token. With `share`, such as `response_share`, the
    share of the tokens at which a dimension is not zero: at a `router`, how often each expert was chosen.

    Behind one of several tokens, such as `response_mean,no_massive_tokens`: tokens whose activation is more than ten
    times as long as the median one of their text are left out, site by site.
    """

    kind: str
    start: int = 0
    stop: int = 0
    no_massive: bool = False
    pool: Pool = "mean"

    @classmethod
    def parse(cls, readout: str | int | tuple[int, int] | Readout) -> Readout:
        """Read a readout from what a caller writes.

        Args:
            readout: a name, a token index, a (start, stop) character span of the answer, or the text of either.

        Raises:
            DataError: it means nothing.
        """
        if isinstance(readout, Readout):
            return readout
        if isinstance(readout, str) and (text := readout.replace(" ", "")).endswith(NO_MASSIVE):
            plain = cls.parse(text.removesuffix(NO_MASSIVE))
            if plain.kind in _ONE_TOKEN:
                raise DataError(f"readout {readout!r}: '{plain}' is one token and no mean that it could leave")
            return replace(plain, no_massive=True)
        if isinstance(readout, int) and not isinstance(readout, bool):
            return cls("index", readout)
        if isinstance(readout, tuple):
            if len(readout) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in readout):
                raise DataError(
                    f"readout {readout!r}: a span is two whole numbers, start and stop, of the answer's characters"
                )
            return cls("span", *readout)
        counted = _COUNTED.fullmatch(str(readout).replace(" ", ""))
        if counted:
            return cls("index", int(counted[1])) if counted[1] else cls("span", int(counted[2]), int(counted[3]))
        named = _POOLED.fullmatch(str(readout))
        if named and f"{named[1]}mean" in _NAMES:
            return cls(f"{named[1]}mean").pooled(cast("Pool", named[2]))
        if readout not in _NAMES:
            raise DataError(
                f"unknown readout {readout!r}; allowed: {', '.join(_NAMES)}, a token index, or span(a,b); "
                f"for mean also max, min and share, and means also with {NO_MASSIVE} behind"
            )
        return cls(str(readout))

    def pooled(self, how: Pool) -> Readout:
        """The same tokens, of which the mean, the largest or smallest values, or the share that is not zero, is taken.

        Args:
            how: which.

        Raises:
            DataError: it is one token, or a span, of which only the mean is taken.
        """
        if self.kind in (*_ONE_TOKEN, "span") and how != "mean":
            raise DataError(f"readout '{self}' has no {how}; give one such as mean or response_mean")
        return replace(self, pool=how)

    def __str__(self) -> str:
        more = NO_MASSIVE if self.no_massive else ""
        if self.kind == "index":
            return f"index({self.start})"
        named = self.kind.removesuffix("mean") + self.pool if self.kind.endswith("mean") else self.kind
        return (f"span({self.start},{self.stop})" if self.kind == "span" else named) + more

    def tokens(self, rendered: Rendered) -> Sequence[int]:
        """The token indices read in one text.

        Args:
            rendered: the text as the model gets it.

        Raises:
            DataError: there is no such token in this text.
        """
        length, prompt = len(rendered.ids), rendered.prompt_length
        chosen: Sequence[int]
        if self.kind == "last":
            chosen = range(length - 1, length)
        elif self.kind == "mean":
            chosen = range(1, length)
        elif self.kind == "prompt_last":
            chosen = range(prompt - 1, prompt)
        elif self.kind == "prompt_mean":
            chosen = range(1, prompt)
        elif self.kind == "response_mean":
            chosen = range(max(prompt, 1), length)
        elif self.kind == "predicting_mean":
            chosen = range(max(prompt - 1, 0), length - 1)
        elif self.kind == "index":
            index = self.start if self.start >= 0 else length + self.start
            chosen = range(index, index + 1) if 0 <= index < length else range(0)
        elif self.kind == "span":
            chosen = self._span(rendered)
        else:
            chosen = self._said(rendered)
        if len(chosen) == 0:
            hint = "; give answers" if self.kind in _NEEDS_ANSWERS else ""
            raise DataError(f"readout '{self}' finds no token in {_short(rendered.text)} ({length} tokens){hint}")
        return chosen

    def _said(self, rendered: Rendered) -> list[int]:
        """Tokens of the assistant's messages; one that also holds a character of the template belongs to them."""
        spans = rendered.assistant
        if spans is None or not rendered.offsets:
            why = "the tokenizer tells no character offsets" if spans else "the chat template rewrites the history"
            raise DataError(f"readout '{self}': where assistant messages stand is not known ({why}); use response_mean")
        if self.kind == "answer_mean":
            spans = tuple(part for span in spans for part in outside_thinking(rendered.text, *span))
        return [
            index
            for index, (first, last) in enumerate(rendered.offsets)
            if index > 0 and any(last > start and first < stop for start, stop in spans)
        ]

    def _span(self, rendered: Rendered) -> range:
        """The tokens of the answer that touch the characters from `start` to `stop`."""
        answer = rendered.ids[rendered.prompt_length :]
        if not answer or not rendered.offsets:
            return range(0)
        origin = rendered.answer_start
        first, last = origin + self.start, origin + self.stop
        inside = [
            index
            for index in range(rendered.prompt_length, len(rendered.ids))
            if rendered.offsets[index][1] > first and rendered.offsets[index][0] < last
        ]
        return range(inside[0], inside[-1] + 1) if inside else range(0)


def chosen_columns(plan: Readout, rendered: Sequence[Rendered], name: Callable[[int], str]) -> list[Sequence[int]]:
    """The tokens read in each text.

    Args:
        plan: which tokens.
        rendered: the texts.
        name: what to call a text in messages, by its place.

    Raises:
        DataError: a text has no such token; it is named.
    """
    found = []
    for row, text in enumerate(rendered):
        try:
            found.append(plan.tokens(text))
        except DataError as error:
            raise DataError(f"{name(row)}: {error}") from None
    return found


def cut_to(text: Rendered, max_tokens: int | None) -> Rendered:
    """A text without what follows its first tokens.

    Args:
        text: the text.
        max_tokens: how many stay; None leaves it whole.

    Raises:
        DataError: `max_tokens` is below 1.
    """
    if max_tokens is None or len(text.ids) <= max_tokens:
        return text
    if max_tokens < 1:
        raise DataError(f"max_tokens = {max_tokens}; give at least 1, or None to read all")
    kept = min(text.prompt_length, max_tokens)
    return replace(text, ids=text.ids[:max_tokens], offsets=text.offsets[:max_tokens], prompt_length=kept)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
