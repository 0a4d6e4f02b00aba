"""Bytes that steered generation needs, counted from the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerkit.network.decoder import Decoder
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Memory", "forecast_memory"]


@dataclass(frozen=True)
class Memory:
    """A forecast in bytes.

    Attributes:
        parameters: the model's weights.
        vectors: the vectors' tensors.
        cache: keys and values of all rows for prompt and answer.
        activations: what a pass over the prompt holds at once, roughly.
        note: what is not counted; None where nothing is left out.
    """

    parameters: int
    vectors: int
    cache: int
    activations: int
    note: str | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.vectors + self.cache + self.activations


def forecast_memory(
    model: nn.Module, decoder: Decoder, vectors: Sequence[SteeringVector], rows: int, prompt: int, new: int
) -> Memory:
    """Count bytes.

    Activations, roughly: for each token of the prompt six tensors of the model's width (stream, norm, query, key,
    value, output) and three of the MLP's, and for each row float32 logits of one token. Attention is taken to need no
    matrix of all pairs of tokens.
    """
    config: Any = decoder.model.config.get_text_config()
    size = decoder.model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * decoder.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner  # Gemma 3n has one for each block
    tokens = rows * prompt * (6 * decoder.hidden_size + 3 * inner) * size
    cache, note = _cache(decoder, config, rows, prompt + new, size)
    return Memory(
        parameters=sum(entry.numel() * entry.element_size() for entry in model.parameters()),
        vectors=sum(tensor.numel() * tensor.element_size() for one in vectors for tensor in one.tensors.values()),
        cache=cache,
        activations=tokens + rows * config.vocab_size * 4,
        note=note,
    )


def _cache(decoder: Decoder, config: Any, rows: int, tokens: int, size: int) -> tuple[int, str | None]:
    """Bytes of keys and values, a sliding window counted as far as it reaches; and what is not counted."""
    queries = getattr(config, "num_attention_heads", None)
    if not queries:
        return 0, "recurrent layers keep a state of fixed size, which is not counted"
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or queries
    if hasattr(config, "new_decoder_architecture"):  # Falcon; its grouped heads are repeated before they are cached
        heads = 1 if config.multi_query and not config.new_decoder_architecture else queries
    width = getattr(config, "head_dim", None) or decoder.hidden_size // queries
    window = getattr(config, "sliding_window", None)
    default = "sliding_attention" if window else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers  # blocks, or their cache slots
    kept = {"full_attention": tokens, "sliding_attention": min(tokens, window or tokens)}
    counted = sum(kept.get(kind, 0) for kind in types)
    others = sorted({kind for kind in types if kind not in kept})
    note = f"the cache of {', '.join(others)} layers is not counted" if others else None
    return 2 * rows * heads * width * size * counted, note
