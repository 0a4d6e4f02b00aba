"""Prompts in, rendered text and token ids out: conversations, contrast sets, padded batches.

One string is built for each conversation and tokenised once. Where the answer begins is read from the character offsets
of that tokenisation, never from the number of tokens of separately tokenised parts: a token may join the end of the
prompt to the start of the answer, and a template may rewrite the history.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar, cast

import torch
from jinja2 import TemplateError
from torch import Tensor

from steerkit.errors import DataError, near_miss
from steerkit.roles import CHANNEL, FINAL, THINKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "ContrastSet",
    "Conversation",
    "Message",
    "Rendered",
    "batches",
    "has_chat_template",
    "opens_thought",
    "pad_token_id",
    "render",
    "spread",
]

Message: TypeAlias = Mapping[str, str]
Item = TypeVar("Item")

# Held out by `split` where neither the caller nor the file says how much.
_DEFAULT_HELD_OUT = 0.25

_SIDES = ("positive", "negative")
_ITEM_KEYS = ("prompt", *_SIDES, "system", "raw", "held_out", "id", "topic", "source")
_LABELLED_KEYS = ("prompt", "label", "raw", "id", "topic", "source")

# Stands for the answer where the template is asked what it writes before one: nothing in it for a template to rewrite.
_PROBE = "answer"

# Stands for a message whose place in the text is looked for: a character of no script.
_STAND_IN = "\ue0f5"
_EMPTY_THOUGHT = re.compile("(?:" + "|".join(rf"{re.escape(a)}\s*{re.escape(b)}\s*" for a, b in THINKING) + r")\Z")

# Options of `apply_chat_template` that decide what comes back; the others belong to the template.
_OUR_OPTIONS = ("add_generation_prompt", "continue_final_message", "conversation", "return_dict", "tokenize")


@dataclass(frozen=True)
class Conversation:
    """What the model is given: a prompt, and where there is one the answer that follows it.

    Attributes:
        prompt: messages, each with ``role`` and ``content`` (further keys reach the template), or a string: one user
            turn where the tokenizer has a chat template, plain text otherwise.
        answer: what the assistant says, verbatim. None leaves the conversation at the prompt's end.
        system: the system prompt before a string prompt. In a message list it is a message.
        raw: leave the string prompt as it is, without a chat template.

    Raises:
        DataError: when a field has another type, a message lacks its role or content, the answer is empty, a message
            list is empty, `system` stands beside a message list or a raw prompt, or text holds a lone surrogate.
    """

    prompt: str | tuple[Message, ...]
    answer: str | None = None
    system: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            _check_text("prompt", self.prompt)
        else:
            object.__setattr__(self, "prompt", _messages(self.prompt))
        for name in ("answer", "system"):
            value = getattr(self, name)
            if value is not None:
                _check_text(name, value)
        if self.answer == "":
            raise DataError("the answer is an empty string, which has no token to read; give its text, or None")
        if not isinstance(self.raw, bool):
            raise DataError(f"raw is true or false, got {reprlib.repr(self.raw)}")
        if self.raw and not isinstance(self.prompt, str):
            raise DataError("raw leaves a string as it is, got a list of messages; give a string, or drop raw")
        if self.system is not None and (self.raw or not isinstance(self.prompt, str)):
            kind = "a raw prompt" if self.raw else "a list of messages"
            raise DataError(f"a system prompt cannot stand beside {kind}; write it into the prompt")

    @classmethod
    def of(
        cls,
        item: str | Sequence[Message] | Conversation,
        *,
        answer: str | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> Conversation:
        """Make a conversation of a string, a list of messages, or a conversation.

        Args:
            item: the prompt. A message list that ends with an assistant turn: that turn is the answer.
            answer: what the assistant says, verbatim.
            system: a system prompt; before a message list it becomes the first message.
            raw: leave a string prompt as it is, without a chat template.

        Returns:
            The conversation; `item` and its messages are copied.

        Raises:
            DataError: when `item` is of another type, holds an answer or a system prompt and is given a second one, or
                cannot be a conversation (see the class).

        Example:
            >>> turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
            >>> Conversation.of(turns).answer
            'Hello.'
        """
        if isinstance(item, Conversation):
            made = item
        elif isinstance(item, str):
            made = cls(item)
        else:
            turns = _messages(item)
            made = cls(turns[:-1], answer=_only_content(turns[-1])) if turns[-1]["role"] == "assistant" else cls(turns)
        if raw:
            made = replace(made, raw=True)
        if answer is not None:
            if made.answer is not None:
                raise DataError(f"the prompt ends with an answer already, and {reprlib.repr(answer)} is given as well")
            made = replace(made, answer=answer)
        return made if system is None else _with_system(made, system)


Prompt: TypeAlias = str | Sequence[Message] | Conversation


def _check_text(name: str, value: object) -> None:
    """Refuse what is not text that a tokenizer can read."""
    if not isinstance(value, str):
        raise DataError(f"{name}: expected a string, got {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise DataError(f"{name}: character {error.start} is a lone surrogate ({code}), which is not text") from None


def _messages(items: object) -> tuple[Message, ...]:
    """Copy a list of messages; keys whose value is None are dropped, as `apply_chat_template` does."""
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise DataError(f"prompt: expected a string or a list of messages, got {reprlib.repr(items)}")
    if not items:
        raise DataError("prompt: an empty list of messages; give at least one turn before the answer")
    messages = []
    for index, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(f"message {index}: expected an object with role and content, got {reprlib.repr(item)}")
        message = {key: value for key, value in item.items() if value is not None}
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"message {index}: no {key!r}; it has {', '.join(map(repr, message)) or 'nothing'}")
        for key, value in message.items():
            _check_text(f"message {index}, {key!r}", value)
        messages.append(message)
    return tuple(messages)


def _only_content(turn: Message) -> str:
    """The text of a closing assistant turn, which as an answer can keep nothing else."""
    extra = sorted(turn.keys() - {"role", "content"})
    if extra:
        raise DataError(f"the closing assistant turn has {extra[0]!r} beside role and content; an answer is text only")
    return turn["content"]


def _with_system(conversation: Conversation, system: str) -> Conversation:
    """Put a system prompt before a conversation that has none."""
    prompt = conversation.prompt
    if conversation.system is not None or (not isinstance(prompt, str) and prompt[0]["role"] == "system"):
        raise DataError(f"the prompt has a system prompt already, and {reprlib.repr(system)} is given as well")
    if isinstance(prompt, str):
        return replace(conversation, system=system)
    return replace(conversation, prompt=({"role": "system", "content": system}, *prompt))


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
    template brings its own special tokens. Without a chat template, or for a raw prompt, prompt and answer are joined
    as they stand and the tokenizer adds its special tokens: never a second BOS, never a closing EOS. The tokenizer is
    not changed. Where the generation prompt opens a thought, an answer that does not close it follows the prompt as it
    stands in a history, outside of any thought; and where the template writes in channels, an answer without any stands
    behind the header of the final one.

    Args:
        tokenizer: the model's tokenizer.
        conversation: what to render.
        chat_template_kwargs: what the template itself reads, such as ``{"enable_thinking": False}``; not used where no
            template is.

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
    options = dict(chat_template_kwargs or {})
    if not is_chat:
        _warn_of_plain_text(tokenizer, conversation)
    prompt = _prompt(tokenizer, conversation, options)
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


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one forward pass, padded to the longest.

    Attributes:
        input_ids: [b, t] int64.
        attention_mask: [b, t] int64, 1 on real tokens.
        prompt_lengths: [b] int64, real prompt tokens of each row, pads not counted.
        rows: where each row stood in the input of `batches`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_lengths: Tensor
    rows: tuple[int, ...]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's own, else its EOS, else 0. Pads are masked; the tokenizer is not changed."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def batches(
    rendered: Sequence[Rendered],
    batch_size: int,
    *,
    pad_id: int,
    side: Literal["right", "left"] = "right",
    groups: int = 1,
) -> list[Batch]:
    """Sort by length, longest first so that memory peaks at once, and pad each batch to its longest row.

    Args:
        rendered: what to batch; equal lengths keep their order.
        batch_size: rows in a batch, at most; a group is never parted, even where it is larger.
        pad_id: the id to pad with, see `pad_token_id`.
        side: where the pads go.
        groups: how many neighbours stay together in one batch: with 2, items 2i and 2i+1.

    Returns:
        The batches. Together their `rows` are every index of `rendered` once.

    Raises:
        DataError: when `batch_size` or `groups` is below 1, `groups` does not divide the number of items, or `side` is
            neither right nor left.
    """
    if batch_size < 1 or groups < 1:
        raise DataError(f"batch_size and groups are 1 or more, got {batch_size} and {groups}")
    if len(rendered) % groups:
        raise DataError(f"{len(rendered)} items cannot be put into groups of {groups}")
    if side not in ("right", "left"):
        raise DataError(f"padding side {side!r}; {near_miss(side, ('right', 'left'))}")
    together = [range(start, start + groups) for start in range(0, len(rendered), groups)]
    together.sort(key=lambda group: -max(len(rendered[row].ids) for row in group))
    per_batch = max(1, batch_size // groups)
    return [
        _pad(rendered, [row for group in together[start : start + per_batch] for row in group], pad_id, side)
        for start in range(0, len(together), per_batch)
    ]


def _pad(rendered: Sequence[Rendered], rows: list[int], pad_id: int, side: Literal["right", "left"]) -> Batch:
    """One batch of the given rows."""
    width = max(len(rendered[row].ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids = rendered[row].ids
        start = width - len(ids) if side == "left" else 0
        input_ids[index, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[index, start : start + len(ids)] = 1
    lengths = torch.tensor([rendered[row].prompt_length for row in rows], dtype=torch.int64)
    return Batch(input_ids, attention_mask, lengths, tuple(rows))


@dataclass(frozen=True)
class ContrastSet:
    """What shows a behaviour and what shows its opposite.

    Attributes:
        positive: conversations that show it.
        negative: conversations that do not.
        paired: item i of one side belongs to item i of the other.
        source: the name of where the data came from; not part of the digest.
        marks: which pairs the file marks as held out; empty where it marks none.
        origins: of the items of either side, the source that the file names for each; empty where it names none. Not
            part of the digest.

    Raises:
        DataError: when a side is empty or holds something else than conversations, pairs are of unequal number, both
            sides are the same, or there are marks or origins without one for each pair or item.
    """

    positive: tuple[Conversation, ...]
    negative: tuple[Conversation, ...]
    paired: bool
    source: str = ""
    marks: tuple[bool, ...] = ()
    origins: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __post_init__(self) -> None:
        for name in _SIDES:
            side = tuple(getattr(self, name))
            object.__setattr__(self, name, side)
            if not side:
                raise DataError(f"one-sided data: there is no {name} item; a contrast needs both sides")
            for index, item in enumerate(side):
                if not isinstance(item, Conversation):
                    raise DataError(f"{name} item {index}: expected a Conversation, got {reprlib.repr(item)}")
        sizes = f"{len(self.positive)} positive and {len(self.negative)} negative"
        if self.paired and len(self.positive) != len(self.negative):
            raise DataError(f"{sizes} items cannot be pairs; give as many on each side, or paired=False")
        if self.positive == self.negative:
            raise DataError(f"the {sizes} items are the same text, so there is nothing to learn; give two sides")
        if self.marks and not (self.paired and len(self.marks) == len(self.positive)):
            raise DataError(f"{len(self.marks)} held-out marks for {sizes} items; give one for each pair, or none")
        named = tuple(map(len, self.origins))
        if any(named) and named != (len(self.positive), len(self.negative)):
            raise DataError(f"{named} origins for {sizes} items; give one for each item, or none")

    @classmethod
    def from_prompts(
        cls,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        *,
        raw: bool = False,
        system: str | None = None,
        paired: bool | None = None,
    ) -> ContrastSet:
        """Contrast two lists of prompts.

        Args:
            positive: prompts that show the behaviour: strings, lists of messages, or conversations.
            negative: prompts that do not.
            raw: leave strings as they are, without a chat template.
            system: a system prompt for all of them.
            paired: whether prompt i of one list belongs to prompt i of the other; None: when the lists are as long.

        Returns:
            The contrast set.

        Raises:
            DataError: when a side is empty or one string, the sides are the same, a prompt is of another type, or
                `paired` is asked of lists of unequal length.

        Example:
            >>> data = ContrastSet.from_prompts(["I love it", "I adore it"], ["I hate it"])
            >>> len(data), data.paired
            (2, False)
        """
        sides = []
        for name, prompts in zip(_SIDES, (positive, negative), strict=True):
            if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
                raise DataError(f"{name}: expected a list of prompts, got {reprlib.repr(prompts)}; put it into a list")
            side = []
            for index, item in enumerate(prompts):
                with _at(f"{name} item {index}"):
                    side.append(Conversation.of(item, raw=raw, system=system))
            sides.append(tuple(side))
        return cls(sides[0], sides[1], paired=len(sides[0]) == len(sides[1]) if paired is None else paired)

    @classmethod
    def from_answers(
        cls, triples: Iterable[tuple[Prompt, str, str]], *, raw: bool = False, system: str | None = None
    ) -> ContrastSet:
        """Contrast two answers to the same prompt.

        Args:
            triples: (prompt, positive answer, negative answer).
            raw: leave string prompts as they are; prompt and answer are then joined verbatim.
            system: a system prompt for all of them.

        Returns:
            The contrast set, paired.

        Raises:
            DataError: when there is no triple, an item is no triple, an answer is empty or no string, or every
                positive answer is its negative one.

        Example:
            >>> data = ContrastSet.from_answers([("How was your day?", "Great!", "Awful.")])
            >>> data.positive[0].answer
            'Great!'
        """
        pairs = []
        for index, triple in enumerate(triples):
            if not isinstance(triple, (tuple, list)) or len(triple) != 3:
                raise DataError(f"item {index}: expected (prompt, positive, negative), got {reprlib.repr(triple)}")
            prompt, *answers = triple
            with _at(f"item {index}"):
                pairs.append([_answered(prompt, answer, raw=raw, system=system) for answer in answers])
        return _from_pairs(pairs)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> ContrastSet:
        """Read a UTF-8 file with one JSON object a line; blank lines are skipped.

        The forms: ``{"prompt", "positive", "negative"}``, two answers to a prompt; ``{"positive", "negative"}``, two
        prompts; ``{"prompt", "system": {"positive", "negative"}}``, one prompt under two system prompts, with or
        without the answers ``"positive"`` and ``"negative"``. Prompts are strings or lists of messages. Every line may
        also have ``"raw"`` and ``"held_out"`` (true or false), ``"source"``, by which `split` can hold items out where
        every line has it, and ``"id"`` and ``"topic"``, which are not read.

        Args:
            path: the file.

        Returns:
            The contrast set, paired, with the file's name as its source.

        Raises:
            DataError: when the file is missing or holds no item, or, with the line's number, when a line is not UTF-8,
                not JSON, has an unknown key, lacks one, or has a value of the wrong type.
        """
        path = Path(path)
        pairs: list[list[Conversation]] = []
        items = _lines(path, _ITEM_KEYS, "pairs", lambda item, _: pairs.append(_item_pair(item)))
        marks, origins = ([item.get(key) for item in items] for key in ("held_out", "source"))
        is_marked = any(mark is not None for mark in marks)
        with _at(str(path)):
            return _from_pairs(
                pairs,
                source=path.name,
                marks=[bool(mark) for mark in marks] if is_marked else (),
                origins=[str(origin) for origin in origins] if all(isinstance(one, str) for one in origins) else (),
            )

    @classmethod
    def from_labelled(cls, path: str | Path, *, positive: str, negative: str | None = None) -> ContrastSet:
        """Read a UTF-8 file of labelled prompts, one JSON object a line; blank lines are skipped.

        A line is ``{"prompt", "label", "source"}``: a string or list of messages, which side it is on, and which
        collection it comes from, by which `split` can hold whole collections out. It may also have ``"raw"``, and
        ``"id"`` and ``"topic"``, which are not read. Either all lines have a source, or none.

        Args:
            path: the file.
            positive: the label of the positive side.
            negative: the label of the other; None where the file has only one other.

        Returns:
            The contrast set, unpaired, with the file's name as its source.

        Raises:
            DataError: when the file is missing or holds no item, a label is not in it, the other one is not clear, only
                some lines name a source, or, with the line's number, when a line cannot be read.
        """
        path = Path(path)
        prompts: list[Conversation] = []
        items = _lines(path, _LABELLED_KEYS, "labelled prompts", lambda *args: prompts.append(_labelled(*args)))
        labels = [str(item["label"]) for item in items]
        with _at(str(path)):
            sides = (positive, _other_label(labels, positive) if negative is None else negative)
            for label in sides:
                if label not in labels:
                    raise DataError(f"no line has the label {label!r}; {near_miss(label, set(labels))}")
        chosen = [[place for place, label in enumerate(labels) if label == side] for side in sides]
        first, second = (tuple(prompts[place] for place in places) for places in chosen)
        plus, minus = (
            tuple(str(items[place]["source"]) for place in places if "source" in items[place]) for places in chosen
        )
        return cls(first, second, paired=False, source=path.name, origins=(plus, minus))

    @classmethod
    def from_dataset(
        cls, dataset: Dataset, *, positive: str, negative: str, prompt: str | None = None, system: str | None = None
    ) -> ContrastSet:
        """Take a contrast from the columns of a `datasets.Dataset`.

        Args:
            dataset: one split, not a dictionary of splits.
            positive: the column of prompts that show the behaviour, or of answers where `prompt` is given.
            negative: the column of the others.
            prompt: the column of prompts that both answer.
            system: the column of system prompts that both have.

        Returns:
            The contrast set, paired row by row.

        Raises:
            DataError: when a column is missing, `dataset` is a dictionary of splits, it has no row, or a cell is
                neither text nor a list of messages (the row is named).
        """
        if isinstance(dataset, Mapping):
            raise DataError(f"a dictionary of splits was given ({', '.join(map(str, dataset))}); give one of them")
        columns = list(dataset.column_names or ())
        for column in (positive, negative, prompt, system):
            if column is not None and column not in columns:
                raise DataError(f"the dataset has no column {column!r}; {near_miss(column, columns)}")
        pairs = []
        for number, row in enumerate(dataset):
            with _at(f"row {number}"):
                common = None if system is None else row[system]
                if system is not None:
                    _check_text(system, common)
                if prompt is None:
                    pairs.append([Conversation.of(row[side], system=common) for side in (positive, negative)])
                else:
                    pairs.append([_answered(row[prompt], row[side], system=common) for side in (positive, negative)])
        return _from_pairs(pairs, source=str(getattr(dataset.info, "dataset_name", None) or ""))

    def __len__(self) -> int:
        return max(len(self.positive), len(self.negative))

    @property
    def digest(self) -> str:
        """The sha256, in hex, of every text, role and flag that is fitted on; any character changes it."""
        sides = [[[item.prompt, item.answer, item.system, item.raw] for item in getattr(self, name)] for name in _SIDES]
        content = {"paired": self.paired, "sides": sides}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def split(
        self, *, held_out: float | None = None, seed: int = 0, held_out_sources: Sequence[str] = ()
    ) -> tuple[ContrastSet, ContrastSet]:
        """Part the set into one to fit on and one to measure on.

        Pairs stay together; unpaired sides are split each on its own. Both parts keep the order of the whole.

        Args:
            held_out: the share that is held out, between 0 and 1. None: what the file marks, else a quarter.
            seed: draws which items are held out; not used where the file marks them.
            held_out_sources: hold out all items of these `origins` instead, so that nothing is measured on items of a
                collection that was fitted on.

        Returns:
            What to fit on, and what is held out.

        Raises:
            DataError: when the share is not between 0 and 1, a part would be empty or of two identical sides, or a
                source is not among the origins.

        Example:
            >>> data = ContrastSet.from_answers([(f"Is {n} nice?", "Yes.", "No.") for n in range(8)])
            >>> [len(part) for part in data.split(held_out=0.25)]
            [6, 2]
        """
        if held_out_sources:
            if held_out is not None:
                raise DataError(f"held_out={held_out} beside held_out_sources; give one of them")
            marks = self._of_sources(held_out_sources)
        elif held_out is None and self.marks:
            if len(set(self.marks)) == 1:
                every = "every" if self.marks[0] else "no"
                raise DataError(f"{every} item is marked held_out, which leaves a part empty; give held_out=0.25")
            marks = (self.marks, self.marks)
        else:
            share = _DEFAULT_HELD_OUT if held_out is None else held_out
            marks = (_draw(len(self.positive), share, seed), _draw(len(self.negative), share, seed))
        return self._part(marks, wanted=False), self._part(marks, wanted=True)

    def _of_sources(self, sources: Sequence[str]) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Marks of the items that come from some sources."""
        if isinstance(sources, str):
            raise DataError(f"held_out_sources: got one text, {sources!r}; give a list of sources")
        known = {origin for side in self.origins for origin in side}
        for source in sources:
            if source not in known:
                raise DataError(f"held_out_sources: no item has the source {source!r}; {near_miss(source, known)}")
        positive, negative = (tuple(origin in sources for origin in side) for side in self.origins)
        for name, marks in zip(_SIDES, (positive, negative), strict=True):
            if len(set(marks)) == 1:
                none = "every" if marks[0] else "no"
                raise DataError(f"held_out_sources: {none} {name} item comes from {', '.join(sources)}; give others")
        return positive, negative

    def _part(self, marks: tuple[tuple[bool, ...], tuple[bool, ...]], *, wanted: bool) -> ContrastSet:
        """The items of both sides whose mark is `wanted`."""
        kept = [[place for place, mark in enumerate(side) if mark is wanted] for side in marks]
        positive, negative = (
            tuple(side[place] for place in places)
            for side, places in zip((self.positive, self.negative), kept, strict=True)
        )
        first, second = (
            tuple(side[place] for place in places if side) for side, places in zip(self.origins, kept, strict=True)
        )
        return replace(self, positive=positive, negative=negative, marks=(), origins=(first, second))


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Put a place before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _answered(prompt: Prompt, answer: object, *, raw: bool = False, system: str | None = None) -> Conversation:
    """A conversation that must have an answer."""
    _check_text("answer", answer)
    return Conversation.of(prompt, answer=str(answer), raw=raw, system=system)


def _from_pairs(
    pairs: Sequence[Sequence[Conversation]],
    *,
    source: str = "",
    marks: Sequence[bool] = (),
    origins: Sequence[str] = (),
) -> ContrastSet:
    """A paired set of [positive, negative] items."""
    positive, negative = (tuple(pair[side] for pair in pairs) for side in (0, 1))
    both = (tuple(origins), tuple(origins))
    return ContrastSet(positive, negative, paired=True, source=source, marks=tuple(marks), origins=both)


def _draw(size: int, share: float, seed: int) -> tuple[bool, ...]:
    """Which of `size` items are held out."""
    if not 0 < share < 1:
        raise DataError(f"held_out={share}: give a share between 0 and 1, such as 0.25")
    count = math.floor(size * share + 0.5)
    if not 0 < count < size:
        raise DataError(
            f"held_out={share} of {size} items would hold out {count} and leave a part empty; "
            "give more items or a share nearer to one half"
        )
    drawn = set(random.Random(seed).sample(range(size), count))
    return tuple(index in drawn for index in range(size))


def _lines(
    path: Path, keys: Sequence[str], what: str, read: Callable[[dict[str, object], list[dict[str, object]]], None]
) -> list[dict[str, object]]:
    """The objects of a JSONL file, each handed to `read` with those before it, which tells mistakes with the line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the file ({error.strerror}); give a JSONL file of {what}") from None
    items: list[dict[str, object]] = []
    # Only "\n" ends a line: JSON strings may hold the other separators that str.splitlines splits at.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            with _at(f"{path}, line {number}"):
                item = _parse(line, keys)
                read(item, items)
                items.append(item)
    if not items:
        raise DataError(f"{path}: the file holds no item; write one JSON object a line")
    return items


def _labelled(item: dict[str, object], others: Sequence[dict[str, object]]) -> Conversation:
    """The prompt of one labelled line; either all lines before it have a source as well, or none."""
    for key in ("prompt", "label"):
        if key not in item:
            raise DataError(f"no {key!r}; a line has a prompt and the label of its side")
    for key in ("label", "source"):
        if key in item:
            _check_text(key, item[key])
    if others and ("source" in item) is not ("source" in others[0]):
        raise DataError("some lines have a source and others have none; give one to all, or to none")
    return Conversation.of(cast(Prompt, item["prompt"]), raw=bool(item.get("raw", False)))


def _other_label(labels: Sequence[str], positive: str) -> str:
    """The one label beside the positive side's."""
    others = sorted(set(labels) - {positive})
    if len(others) > 1:
        raise DataError(f"beside {positive!r} there are the labels {', '.join(others)}; name the negative one")
    if not others:
        raise DataError(f"every line has the label {positive!r}; a contrast needs both sides")
    return others[0]


def _parse(line: bytes, keys: Sequence[str]) -> dict[str, object]:
    """One line of a JSONL file, with known keys only."""
    try:
        item = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON at column {error.colno}: {error.msg}; write one JSON object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"JSON that Python cannot read ({error}); write one JSON object a line") from None
    if not isinstance(item, dict):
        raise DataError(f"expected a JSON object, got {reprlib.repr(item)}; write one object a line")
    for key in item:
        if key not in keys:
            raise DataError(f"unknown key {key!r}; {near_miss(key, keys)}")
    for key in ("raw", "held_out"):
        if not isinstance(item.get(key, False), bool):
            raise DataError(f"{key} is true or false, got {reprlib.repr(item[key])}")
    return item


def _item_pair(item: dict[str, object]) -> list[Conversation]:
    """Both conversations of one line."""
    answered = [side for side in _SIDES if side in item]
    systems = item.get("system")
    if "system" in item:
        if not isinstance(systems, dict) or set(systems) != set(_SIDES):
            raise DataError(f"system: expected an object of positive and negative, got {reprlib.repr(systems)}")
        if "prompt" not in item:
            raise DataError("no 'prompt'; two system prompts need the prompt that both stand before")
    if len(answered) < 2 and not (systems and not answered):
        missing = next(side for side in _SIDES if side not in item)
        raise DataError(f"no {missing!r}; a line has both sides: two answers to its prompt, or two prompts")
    pair = []
    for side in _SIDES:
        with _at(side):
            prompt = cast(Prompt, item["prompt"] if "prompt" in item else item[side])
            conversation = Conversation.of(prompt, raw=bool(item.get("raw", False)))
            if isinstance(systems, dict):
                _check_text("system", systems[side])
                conversation = _with_system(conversation, systems[side])
            if "prompt" in item and side in item:
                conversation = _answered(conversation, item[side])
            pair.append(conversation)
    return pair
