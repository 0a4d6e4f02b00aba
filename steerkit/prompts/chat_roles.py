"""`Roles`: who speaks each token of a chat, told from token ids alone.

A chat template puts special tokens around every message. `Marks` are those of one tokenizer as token ids, found by
rendering a few short conversations (`template_probes`): what stands before every assistant message and nowhere else
opens the assistant's turn, and the first special token behind it closes the turn. They are tried on the same
conversations before they are used.

Whether a token belongs to the assistant follows from the ids up to it and from nothing after it. So a text gives the
same tokens whether it runs in one pass, in chunks, or token by token.

A scope writes the positions whose *output* is a token of the message: it begins one position early, at the last token
of the mark that opens the message (the model predicts the message's first token there), and it ends with the message's
last token. The scope `response` begins at the prompt's last token for the same reason. Where the mark that closes a
message has several tokens, those before its last still count, because only the last one tells that it is the mark.
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
        self.tokenizer = tokenizer

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
        probes = Probes(self.tokenizer)
        assistant = probes.assistant()
        close = probes.close()
        special = self.tokenizer.eos_token_id
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
        channels = CHANNEL in str(getattr(self.tokenizer, "chat_template", None) or "")
        if kind == "answer" and channels and not self.marks.headed:
            raise ScopeError(
                f"scope 'answer': this chat template writes in channels, none of them {FINAL}; use scope='assistant'"
            )
        if kind == "after" and not self.marks.counts:
            raise ScopeError("scope 'after(n)': this chat template does not mark every message; use scope='assistant'")
        return self.marks
