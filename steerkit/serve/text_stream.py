"""`TextStream`: the text of one answer, token by token, up to a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character yet
_LONGEST = 8  # tokens that one character may have; what is no character behind so many never becomes one


class TextStream:
    """Makes text of tokens as they come.

    A token's text may depend on those before it (blanks, characters of several tokens), so each piece is what a few
    tokens give together less what those before it give alone.

    Args:
        decode: from ids to their text.
        stops: texts before which the answer ends.

    Attributes:
        is_stopped: whether one of these has come.

    Example:
        >>> stream = TextStream(lambda ids: "".join(map(chr, ids)), ["end"])
        >>> [stream.add(ord(one)) for one in "an end"], stream.is_stopped
        (['a', 'n', ' ', '', '', ''], True)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._start = self._read = 0  # where the tokens begin that are decoded together, and those not yet given
        self._held = ""  # text that may be the beginning of a stop text
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that one more token completes; empty where it completes none.

        Args:
            token: its id.
        """
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        is_whole = not text.endswith(_UNFINISHED) or len(self._ids) - self._read > _LONGEST
        if len(text) <= len(known) or not is_whole:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._give(text[len(known) :])

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        known = self._decode(self._ids[self._start : self._read])
        rest = self._give(self._decode(self._ids[self._start :])[len(known) :])
        held, self._held = self._held, ""
        return rest if self.is_stopped else rest + held

    def _give(self, text: str) -> str:
        """What of the next text is given: nothing from a stop text on, and not yet what may become one."""
        if self.is_stopped:
            return ""
        whole = self._held + text
        places = [place for place in map(whole.find, self._stops) if place >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return whole[: min(places)]
        longest = max(map(len, self._stops), default=1) - 1
        held = next((size for size in range(min(longest, len(whole)), 0, -1) if _begins(whole[-size:], self._stops)), 0)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]


def _begins(text: str, stops: Sequence[str]) -> bool:
    """Whether a stop text may begin with this."""
    return any(stop.startswith(text) for stop in stops)
