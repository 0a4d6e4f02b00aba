"""Whether a model written out is the model steered by hooks: their logits on a few texts.

The texts are some of the shipped neutral ones, half as a chat where the tokenizer has a template, half as plain text,
all cut to one length so that no row is padded. Differences are relative to the largest logit.

Weights that hold an edit round it elsewhere than hooks do, so the two agree only up to rounding, and what one rounding
does to the logits depends on the model, its precision and the processor. It is therefore measured where it is needed:
the hooked model runs again with its input embeddings moved by one unit in the last place, and a small multiple of what
that does is allowed. In float32 the largest logit difference of all is held against it; in bfloat16 and float16, where
rounding alone makes a router send single tokens elsewhere, the largest one of the median token. So too where layers
round their activations to int8 themselves (LLM.int8): one value on an edge between two codes moves its token far.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device, find_decoder, inner_model
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import render
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Expected", "Verification", "expected", "is_full", "logits_of", "probe_ids", "spread", "verify"]

ROUNDINGS = 4.0
"""How many times the effect of one rounding of the input embeddings is allowed.

The input is rounded once, and a pass with hooks and one with edited weights round in every block, each in its own way;
but early roundings grow on their way and late ones do not, so the sum is of the size of the first. The rest is room for
the luck of the draw.
"""
_DRAWS = 3
"""How often the input is rounded: of one draw the worst token can be lucky, of three hardly."""
_ROWS, _TOKENS = 6, 32


class Verification(NamedTuple):
    """How far the model written out is from the model steered by hooks.

    Attributes:
        absolute: the largest difference of a logit.
        relative: the same over the largest logit.
        typical: the largest difference of a logit at the median token, over the largest logit.
        rounding: what one rounding of the input embeddings does to the logits, as `difference`.
        agree: tokens whose likeliest successor is the same.
        tokens: tokens compared.
        rows: texts compared.
        effect: the largest difference that steering makes, as `relative`.
        dtype: the model's precision.
        is_full: whether that is float32 or higher, and no layer rounds activations to fewer values.
    """

    absolute: float
    relative: float
    typical: float
    rounding: float
    agree: int
    tokens: int
    rows: int
    effect: float
    dtype: str
    is_full: bool

    @property
    def difference(self) -> float:
        """What is held against rounding: `relative` in full precision, `typical` in low precision."""
        return self.relative if self.is_full else self.typical

    @property
    def allowed(self) -> float:
        """The largest `difference` that rounding explains."""
        return ROUNDINGS * self.rounding

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than rounding explains."""
        return self.difference <= self.allowed

    def sentence(self) -> str:
        """The result in words."""
        at = "" if self.is_full else f"{self.typical:.2g} at the median token, where "
        return (
            f"largest difference of a logit {self.absolute:.2g} ({self.relative:.2g} relative; {at}one rounding of the "
            f"input makes {self.rounding:.2g} and {ROUNDINGS:g} times that is allowed); the same likeliest token at "
            f"{self.agree} of {self.tokens} tokens"
        )


class Expected(NamedTuple):
    """What the model steered by hooks gives.

    Attributes:
        ids: the texts [b, t].
        hooked: logits [b, t, v], float32, on the CPU.
        effect: as in `Verification`.
        rounding: as in `Verification`.
        dtype: the model's precision.
        is_full: as in `Verification`.
    """

    ids: Tensor
    hooked: Tensor
    effect: float
    rounding: float
    dtype: torch.dtype
    is_full: bool


def probe_ids(model: nn.Module, tokenizer: Any = None) -> Tensor:
    """Token ids [b, t] of the texts to compare on; without a tokenizer, arbitrary ones.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.
    """
    vocabulary = find_decoder(model).model.config.get_text_config().vocab_size
    if tokenizer is None:
        return torch.arange(_ROWS * _TOKENS).mul(7919).remainder(vocabulary).reshape(_ROWS, _TOKENS)
    texts = neutral_texts()[:_ROWS]
    chats = [Conversation(text.prompt, answer=text.answer) for text in texts[: _ROWS // 2]]
    plain = [Conversation(f"{text.prompt} {text.answer}", raw=True) for text in texts[_ROWS // 2 :]]
    rows = [render(tokenizer, conversation).ids for conversation in (*chats, *plain)]
    length = min(_TOKENS, *map(len, rows))
    # The end of each row, not its start: templates often open with the same words.
    return torch.tensor([row[-length:] for row in rows], dtype=torch.long).clamp_max(vocabulary - 1)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """Logits [b, t, v] of one plain pass without dropout, float32, on the CPU.

    Args:
        model: the transformers model.
        ids: token ids [b, t], no row padded.
        noise: what the input embeddings are multiplied by, [b, t, d].
    """
    ids = ids.to(execution_device(find_decoder(model)))
    with evaluation_mode(model), _moved(model, noise):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


def expected(model: nn.Module, tokenizer: Any, vectors: Sequence[SteeringVector], strength: float | None) -> Expected:
    """Run the model on the texts with hooks and without.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer, or None.
        vectors: what it is steered by, at every token.
        strength: as for `steer`.
    """
    ids = probe_ids(model, tokenizer)
    with steer(model, vectors, strength):
        hooked = logits_of(model, ids)
        rounding = spread(model, ids, hooked)
    effect = _relative(logits_of(model, ids), hooked)
    return Expected(ids, hooked, effect, rounding, _dtype(model), is_full(model))


@torch.no_grad()
def spread(model: nn.Module, ids: Tensor, logits: Tensor) -> float:
    """How far one rounding of its input takes the logits of a model.

    Not less than what the products on the way round by themselves, which no rounding of the input shows. Processors sum
    in float32; the roundings of a sum are a random walk of as many steps as it has terms, the width, and those of two
    products in each block add up the same way.

    Args:
        model: the transformers model, with whatever hooks it is to be measured with.
        ids: token ids [b, t].
        logits: what it gives for them, [b, t, v].

    Returns:
        The largest of a few draws; relative to the largest logit, at the worst token in full precision and at the
        median token in low precision.
    """
    decoder = find_decoder(model)
    dtype = _dtype(model)
    apart = _relative if is_full(model) else _typical
    generator = torch.Generator().manual_seed(0)
    draws = [_noise(model, ids, dtype, generator) for _ in range(_DRAWS)]
    least = float(torch.finfo(torch.float32).eps) * math.sqrt(decoder.hidden_size * 2 * decoder.num_layers)
    return max(least, *(apart(logits_of(model, ids, noise=noise), logits) for noise in draws))


def is_full(model: nn.Module) -> bool:
    """Whether a model computes in float32 or higher throughout.

    Args:
        model: the transformers model. Layers of bitsandbytes' LLM.int8, and of quanto where activations are quantised
            too, round what they read to 256 values.
    """
    if torch.finfo(_dtype(model)).eps > torch.finfo(torch.float32).eps:
        return False
    return not any(
        type(layer).__name__ == "Linear8bitLt" or getattr(layer, "activation_qtype", None) is not None
        for layer in model.modules()
    )


def verify(found: Tensor, wanted: Expected) -> Verification:
    """Compare the logits of a model written out with those of the hooks.

    Args:
        found: [b, t, v] on the texts of `wanted`.
        wanted: what the hooks gave.

    Raises:
        ModelError: a logit is not finite.
    """
    if not bool(torch.isfinite(found).all()):
        raise ModelError("the model written out gives logits that are not finite; steer with hooks instead")
    return Verification(
        absolute=float((found - wanted.hooked).abs().max()),
        relative=_relative(found, wanted.hooked),
        typical=_typical(found, wanted.hooked),
        rounding=wanted.rounding,
        agree=int((found.argmax(-1) == wanted.hooked.argmax(-1)).sum()),
        tokens=wanted.ids.numel(),
        rows=len(wanted.ids),
        effect=wanted.effect,
        dtype=str(wanted.dtype).removeprefix("torch."),
        is_full=wanted.is_full,
    )


def _dtype(model: nn.Module) -> torch.dtype:
    dtype = inner_model(model).dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _typical(found: Tensor, wanted: Tensor) -> float:
    """The difference of logits at the median token, relative to the largest logit."""
    return float((found - wanted).abs().amax(-1).median() / _largest(wanted))


def _largest(logits: Tensor) -> Tensor:
    return logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of logits, relative to the largest logit."""
    return float((found - wanted).abs().max() / _largest(wanted))


@contextlib.contextmanager
def _moved(model: nn.Module, noise: Tensor | None) -> Iterator[None]:
    """Multiply the input embeddings by `noise` [b, t, d] for a while."""
    if noise is None:
        yield
        return
    factors, embedding = noise, find_decoder(model).body.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, _args, output: output * factors.to(output))
    try:
        yield
    finally:
        handle.remove()


def _noise(model: nn.Module, ids: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Factors [b, t, d] that move half of all numbers by one unit in the last place."""
    embedding = find_decoder(model).body.get_input_embeddings()
    sides = torch.randint(0, 2, (*ids.shape, embedding.weight.shape[1]), generator=generator)
    return 1 + sides * torch.finfo(dtype).eps
