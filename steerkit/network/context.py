"""How long a text may be for a model: a table of positions ends, rotary positions only leave what was trained on.

Told by what the model is made of, not by its name: a learned table of positions is an embedding beside that of the
tokens, a computed one a matrix with a row for each position; a model with rotary positions keeps their frequencies.
Without any of these (linear biases, recurrent states) nothing limits a text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from steerkit.errors import DataError
from steerkit.network.decoder import Decoder
from steerkit.prompts.rendering import Rendered

__all__ = ["Context", "check_lengths", "context_of", "name_of", "named"]

_SIZES = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_SHOWN = 40


class Context(NamedTuple):
    """How many tokens a model takes.

    Attributes:
        tokens: the most.
        ends: whether the model cannot run beyond; else it was only not made for more.
    """

    tokens: int
    ends: bool


def context_of(decoder: Decoder) -> Context | None:
    """How many tokens a model takes; None where nothing limits them.

    Args:
        decoder: the model's decoder.
    """
    config = _text_config(decoder)
    size = next((found for name in _SIZES if isinstance(found := getattr(config, name, None), int)), None)
    tables = list(_tables(decoder.body, size))
    if tables:
        return Context(min(tables), True)
    is_rotary = any(name.rpartition(".")[2].endswith("inv_freq") for name, _ in decoder.body.named_buffers())
    written = getattr(config, "max_seq_len", None)
    if isinstance(written, int) and not is_rotary:  # MPT writes out its biases for so many
        return Context(written, True)
    if size is None or not is_rotary or getattr(config, "alibi", False):
        return None
    return Context(max(size, *_stretched(config)), False)


def check_lengths(
    decoder: Decoder,
    texts: Sequence[Rendered],
    name: Callable[[int], str],
    *,
    new_tokens: int = 0,
    warns: bool = True,
) -> None:
    """Refuse texts that the model cannot read to their end, before anything runs.

    Args:
        decoder: the model's decoder.
        texts: in the order that people know.
        name: what to call a text, by its place.
        new_tokens: how many will be generated behind each.
        warns: False where the same texts are looked at again.

    Raises:
        DataError: a text is longer than the model's table of positions, with the tokens to be generated.

    Warns:
        UserWarning: once, where texts are longer than what rotary positions were trained for.
    """
    context = context_of(decoder)
    if context is None:
        return
    more = max(new_tokens - 1, 0)  # the last token that is generated is never read
    long = [place for place, text in enumerate(texts) if len(text.ids) + more > context.tokens]
    if not long:
        return
    size = len(texts[long[0]].ids)
    length = f"{size} tokens" + (f" and {new_tokens} new ones" if new_tokens else "")
    if context.ends:
        room = context.tokens - size + 1
        way = f", or give max_new_tokens={room} or less" if new_tokens and room > 0 else ""
        raise DataError(
            f"{name(long[0])}: {length}, and the model has positions for {context.tokens}; shorten the text{way}"
        )
    if not warns:
        return
    count = f"; so are {len(long) - 1} more" if len(long) > 1 else ""
    warnings.warn(
        f"{name(long[0])}: {length} are more than the {context.tokens} positions the model was made for{count}; "
        "what it makes of them may be worthless",
        stacklevel=1,  # the same place for all, so that what many passes meet is said once
    )


def named(kind: str, texts: Sequence[Rendered]) -> Callable[[int], str]:
    """Names of texts for messages: ``prompt 3 of 8 ('How was ...')``.

    Args:
        kind: what each of them is.
        texts: all of them.
    """
    return lambda place: name_of(kind, place, len(texts), texts[place])


def name_of(kind: str, place: int, count: int, text: Rendered) -> str:
    """A text's name in messages, with its beginning.

    Args:
        kind: what it is.
        place: which of them, from 0.
        count: how many there are.
        text: the text.
    """
    words = " ".join(text.text[: 4 * _SHOWN].split())
    shown = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
    return f"{kind} {place + 1} of {count}" + (f" ({shown!r})" if words else "")


def _text_config(decoder: Decoder) -> Any:
    config: Any = getattr(decoder.model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _tables(body: Any, size: int | None) -> Iterator[int]:
    """How many positions each table of the decoder body has."""
    tokens = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    for path, module in body.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not tokens and _is_of_positions(name):
            # Some tables begin with rows that stand for no position: OPT's with two, Roberta's with those of pads.
            unused = module.padding_idx + 1 if module.padding_idx is not None else 0
            yield module.num_embeddings - int(getattr(module, "offset", unused))
        for own, table in (*module.named_buffers(recurse=False), *vars(module).items()):
            if isinstance(table, Tensor) and table.dim() == 2 and _is_of_positions(own) and len(table) == size:
                yield len(table)


def _is_of_positions(name: str) -> bool:
    return ("pos" in name or name == "wpe") and "relative" not in name


def _stretched(config: Any) -> list[int]:
    """Lengths that rotary positions are stretched to, which some configs do not count in."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = [given, *(one for one in given.values() if isinstance(one, dict))] if isinstance(given, dict) else []
    lengths = [0]
    for one in found:
        before, factor = one.get("original_max_position_embeddings"), one.get("factor")
        if isinstance(before, int) and isinstance(factor, int | float):
            lengths.append(int(before * factor))
    return lengths
