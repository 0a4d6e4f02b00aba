"""Prompts in, rendered text and token ids out: conversations, contrast sets, padded batches.

One string is built for each conversation and tokenised once. Where the answer begins is read from the character offsets
of that tokenisation, never from the number of tokens of separately tokenised parts: a token may join the end of the
prompt to the start of the answer, and a template may rewrite the history.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from jinja2 import TemplateError

from steerkit.errors import DataError
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.marks import CHANNEL, FINAL, THINKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerkit.prompts.conversation import Message

__all__ = [
    "ANSWER_SEPARATOR",
    "Rendered",
    "answer_separator",
    "has_chat_template",
    "opens_thought",
    "render",
    "spread",
    "warn_of_separator",
]

Item = TypeVar("Item")
# The option that says what stands between prompt and answer where there is no chat template, and its default.
ANSWER_SEPARATOR = "answer_separator"
_SEPARATOR = "\n"
# Stands for the answer where the template is asked what it writes before one: nothing in it for a template to rewrite.
_PROBE = "answer"
# Stands for a message whose place in the text is looked for: a character of no script.
_STAND_IN = "\ue0f5"
_EMPTY_THOUGHT = re.compile("(?:" + "|".join(rf"{re.escape(a)}\s*{re.escape(b)}\s*" for a, b in THINKING) + r")\Z")
# Options of `apply_chat_template` that decide what comes back; the others belong to the template.
_OUR_OPTIONS = ("add_generation_prompt", "continue_final_message", "conversation", "return_dict", "tokenize")


@dataclass(frozen=True)
class Rendered:
    """One conversation as the model reads it.

    Attributes:
        text: the whole text. With an answer it ends with that answer, never with an end-of-turn mark.
        ids: the token ids of `text`, with the special tokens the model expects before it.
        prompt_length: tokens before the first token of the answer; ``len(ids)`` where there is no answer. A token that
            holds characters of both belongs to the answer.
        offsets: characters of `text` that each token stands for, (start, end); empty where the tokenizer tells none.
        answer_start: the character of `text` at which the answer begins; ``len(text)`` where there is no answer.
        assistant: characters of `text` of each assistant message, (start, end), those of the history and the answer;
            None where the template does not tell which those of the history are.
    """

    text: str
    ids: tuple[int, ...]
    prompt_length: int
    offsets: tuple[tuple[int, int], ...]
    answer_start: int = 0
    assistant: tuple[tuple[int, int], ...] | None = ()


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many items, evenly over a list, so that none of the sources it goes through is left out.

    Args:
        items: any.
        count: how many at most.
    """
    return [items[place * len(items) // count] for place in range(count)] if count < len(items) else list(items)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def answer_separator(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, object] | None = None
) -> str | None:
    """What stands between a prompt and its answer; None where a chat template says it.

    Args:
        tokenizer: the model's tokenizer.
        chat_template_kwargs: may hold `answer_separator`; a line break by default.

    Raises:
        DataError: it is no text.
    """
    if has_chat_template(tokenizer):
        return None
    given = (chat_template_kwargs or {}).get(ANSWER_SEPARATOR, _SEPARATOR)
    if not isinstance(given, str):
        raise DataError(f"{ANSWER_SEPARATOR}: give a text, such as a line break or '', got {reprlib.repr(given)}")
    return given


def warn_of_separator(
    tokenizer: PreTrainedTokenizerBase,
    items: Iterable[Conversation],
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> None:
    """Say what stands between prompts and answers where no chat template does.

    Args:
        tokenizer: the model's tokenizer.
        items: what will be rendered.
        chat_template_kwargs: may hold `answer_separator`.

    Warns:
        UserWarning: some item has an answer, and is not raw.
    """
    separator = answer_separator(tokenizer, chat_template_kwargs)
    if separator is None or not any(item.answer is not None and not item.raw for item in items):
        return
    behind = f"behind {separator!r}" if separator else "with nothing between"
    warnings.warn(
        f"{_name(tokenizer)} has no chat template: answers follow their prompts {behind}; raw prompts and answers are "
        "joined as they stand",
        stacklevel=1,  # the same place for all, so that it is said once
    )


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> Rendered:
    """Build the text of one conversation, tokenise it once, and find where the answer begins.

    With a chat template the prompt's text is what the template writes with a generation prompt, and the answer follows
    verbatim. Whitespace that the template puts before every answer ("[/INST] answer") is kept, and so is the header of
    the assistant's turn where the template has no generation prompt and writes it only together with the turn. The
    template brings its own special tokens. Without a chat template a line break stands between prompt and answer, or
    what `chat_template_kwargs` holds as ``answer_separator``, unless the prompt ends in white space or the answer
    begins with it; a raw prompt and its answer are joined as they stand. There the tokenizer adds its special tokens:
    never a second BOS, never a closing EOS. The tokenizer is not changed. Where the generation prompt opens a thought,
    an answer that does not close it follows the prompt as it stands in a history, outside of any thought; and where the
    template writes in channels, an answer without any stands behind the header of the final one.

    Args:
        tokenizer: the model's tokenizer.
        conversation: what to render.
        chat_template_kwargs: what the template itself reads, such as ``{"enable_thinking": False}``; where no template
            is, only ``answer_separator`` is used.

    Returns:
        The text, its ids and offsets, and the length of the prompt in tokens.

    Raises:
        DataError: when the template refuses the conversation (many refuse a system role), when the text or the answer
            yields no token, when there is an answer and the tokenizer has no character offsets, or when
            `chat_template_kwargs` holds an option that is set here.

    Warns:
        UserWarning: when messages or a system prompt are given to a model without a chat template. They become plain
            text with blank lines between them.
    """
    is_chat = has_chat_template(tokenizer) and not conversation.raw
    separator = answer_separator(tokenizer, chat_template_kwargs)
    options = {name: value for name, value in (chat_template_kwargs or {}).items() if name != ANSWER_SEPARATOR}
    if not is_chat:
        _warn_of_plain_text(tokenizer, conversation)
    prompt = _prompt(tokenizer, conversation, options)
    if separator and not conversation.raw and conversation.answer is not None:
        touching = prompt[-1:] + conversation.answer[0]
        if prompt and not any(map(str.isspace, touching)):
            prompt += separator
    said = _assistant_spans(tokenizer, conversation, options, prompt)
    text = prompt + (conversation.answer or "")
    ids, offsets, added = _tokenise(tokenizer, text, is_chat=is_chat)
    if not ids:
        raise DataError(f"the prompt {reprlib.repr(text)} yields no token; give a prompt with text in it")
    if conversation.answer is None:
        return Rendered(text, ids, len(ids), offsets, len(text), said)
    if not offsets:
        raise DataError(
            f"{_name(tokenizer)} tells no character offsets, so where an answer begins cannot be known; "
            "load the fast tokenizer, or give prompts without answers"
        )
    # The end alone decides: byte-level tokenizers that trim offsets give a token of spaces the empty span at its end.
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt) and not added[i]), None)
    if first is None:
        raise DataError(
            f"the answer {reprlib.repr(conversation.answer)} yields no token; give an answer with text in it"
        )
    said = None if said is None else (*said, (len(prompt), len(text)))
    return Rendered(text, ids, first, offsets, len(prompt), said)


def _prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, options: dict[str, object]) -> str:
    """All text before the answer."""
    if has_chat_template(tokenizer) and not conversation.raw:
        return _chat_prompt(tokenizer, conversation, options)
    return _plain_prompt(conversation)


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, options: dict[str, object], prompt: str
) -> tuple[tuple[int, int], ...] | None:
    """Where the assistant's messages of the history stand in the prompt's text.

    Each is rendered once more as a single character that stands nowhere else; what is around it is the template's and
    the other messages', whatever the template makes of the message itself.
    """
    turns = () if isinstance(conversation.prompt, str) else conversation.prompt
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    found = []
    for place in places:
        replaced = (*turns[:place], {**turns[place], "content": _STAND_IN}, *turns[place + 1 :])
        around = _prompt(tokenizer, replace(conversation, prompt=replaced), options)
        before, stood, behind = around.partition(_STAND_IN)
        if not stood:
            continue  # a template that drops the message altogether
        if not prompt.startswith(before):  # it puts an empty thought before a message that holds none
            before = _EMPTY_THOUGHT.sub("", before)
        stop = len(prompt) - len(behind)
        if not (prompt.startswith(before) and prompt.endswith(behind) and len(before) <= stop):
            return None
        found.append((len(before), stop))
    return tuple(found)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to call a tokenizer in a message: the last part of where it came from, and its class."""
    origin = Path(str(getattr(tokenizer, "name_or_path", "") or "")).name
    return f"{type(tokenizer).__name__} of {origin}" if origin else type(tokenizer).__name__


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, text: str, *, is_chat: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], list[bool]]:
    """Ids and offsets of a text, and which ids the tokenizer added to it. Specials added after the text are dropped."""
    starts_with_bos = bool(tokenizer.bos_token) and text.startswith(str(tokenizer.bos_token))
    encoding = tokenizer(
        text,
        add_special_tokens=not is_chat and not starts_with_bos,
        return_offsets_mapping=tokenizer.is_fast,
        return_special_tokens_mask=True,
        verbose=False,  # the warning about long texts leaves a mark on the tokenizer
    )
    added = [bool(mark) for mark in encoding["special_tokens_mask"]]
    length = len(added)
    while length > 1 and added[length - 1]:
        length -= 1
    offsets = encoding["offset_mapping"][:length] if tokenizer.is_fast else ()
    return tuple(encoding["input_ids"][:length]), tuple((start, end) for start, end in offsets), added[:length]


def _chat_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, options: dict[str, object]) -> str:
    """Everything the template writes before the answer, or before the model's own words where there is none."""
    for option in options:
        if option in _OUR_OPTIONS:
            raise DataError(f"chat_template_kwargs: {option!r} is set by steerkit; pass what the template itself reads")
    messages: list[Message]
    if isinstance(conversation.prompt, str):
        system = [] if conversation.system is None else [{"role": "system", "content": conversation.system}]
        messages = [*system, {"role": "user", "content": conversation.prompt}]
    else:
        messages = list(conversation.prompt)
    prompt = _apply(tokenizer, messages, {**options, "add_generation_prompt": True})
    if conversation.answer is None:
        return prompt
    try:
        turn = {"role": "assistant", "content": _PROBE}
        continued = _apply(tokenizer, [*messages, turn], {**options, "continue_final_message": True})
    except DataError:
        return prompt  # a template that only knows histories: its generation prompt is all there is
    before = continued.removesuffix(_PROBE)
    more = before[len(prompt) :].strip() if before.startswith(prompt) else None
    if more == "" or (more == FINAL and CHANNEL not in conversation.answer):
        return before
    opened = _opened(prompt)
    if opened is not None and opened not in conversation.answer and prompt.startswith(before):
        return before  # as in a history: an answer without its thought does not stand inside of one
    has_generation_prompt = prompt != _apply(tokenizer, messages, {**options, "add_generation_prompt": False})
    return prompt if has_generation_prompt else before


def _opened(prompt: str) -> str | None:
    """What closes the thought that a prompt ends in; None where it ends in none."""
    return next((end for begin, end in THINKING if prompt.rstrip().endswith(begin)), None)


def opens_thought(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, object] | None = None) -> bool:
    """Whether the chat template's generation prompt opens a thought that the model then goes on with.

    Args:
        tokenizer: the model's tokenizer.
        chat_template_kwargs: passed on to the chat template.
    """
    if not has_chat_template(tokenizer):
        return False
    return _opened(render(tokenizer, Conversation("Hello"), chat_template_kwargs=chat_template_kwargs).text) is not None


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, object]) -> str:
    """Run the chat template."""
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **options))
    except (TemplateError, ValueError) as error:
        reason = " ".join(str(error).split())
        roles = ", ".join(message["role"] for message in messages)
        hint = "; write the system prompt into the first user turn" if messages[0]["role"] == "system" else ""
        raise DataError(
            f"the chat template of {_name(tokenizer)} refuses a conversation with the roles {roles}: {reason}{hint}"
        ) from None


def _warn_of_plain_text(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> None:
    """Say that messages become plain text where there is no chat template."""
    if isinstance(conversation.prompt, str) and conversation.system is None:
        return
    warnings.warn(
        f"{_name(tokenizer)} has no chat template: messages and system prompts become plain text, "
        "with blank lines between them",
        stacklevel=3,
    )


def _plain_prompt(conversation: Conversation) -> str:
    """The text before the answer where there is no chat template."""
    prompt, system = conversation.prompt, conversation.system
    if isinstance(prompt, str):
        return prompt if system is None else f"{system}\n\n{prompt}"
    text = "\n\n".join(message["content"] for message in prompt)
    return text if conversation.answer is None else f"{text}\n\n"
