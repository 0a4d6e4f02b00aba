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

from functools import cached_property
from typing import Any

from steerkit.errors import ScopeError
from steerkit.prompts.marks import CHANNEL, FINAL, Marks
from steerkit.prompts.template_probes import Probes

__all__ = ["Roles"]


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
        probes = Probes(self._tokenizer)
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
