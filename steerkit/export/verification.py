"""Whether a model written out is the model steered by hooks: their logits on a few texts.

The texts are some of the shipped neutral ones, half as a chat where the tokenizer has a template, half as plain text,
all cut to one length so that no row is padded. Differences are relative to the largest logit. Two right ways to compute
the same thing differ by their roundings, and by how much depends on precision, processor and model; so the model is run
again with its input embeddings moved by as much as rounding moves them, and what is written out may differ by a small
multiple of what that did. In float32 no logit may differ by more than that, or than 1e-5 where that is larger; in
bfloat16 and float16 the largest difference of the median token counts (routers send single tokens elsewhere).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError
from steerkit.evaluate.neutral import neutral_texts
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device, find_decoder, inner_model
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.steering.steering import steer
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Expected", "Verification", "expected", "logits_of", "probe_ids", "verify"]

FULL_PRECISION = 1e-5
"""What is allowed in float32 of every model: about a hundred roundings of the largest logit."""
ROUNDINGS = 4.0
"""How many times the effect of one rounding of the input embeddings is allowed."""
_DRAWS = 3
_ROWS, _TOKENS = 6, 32


class Verification(NamedTuple):
    """How far the model written out is from the model steered by hooks.

    Attributes:
        absolute: the largest difference of a logit.
        relative: the same over the largest logit.
        typical: the largest difference of a logit at the median token, over the largest logit.
        rounding: what one rounding of the input embeddings does to the logits: as `relative` in float32, the worst of
            a few draws; as `typical` in bfloat16 and float16.
        agree: tokens whose likeliest successor is the same.
        tokens: tokens compared.
        rows: texts compared.
        effect: the largest difference that steering makes, as `relative`.
        dtype: the model's precision.
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

    @property
    def is_full(self) -> bool:
        """Whether the model computes in float32."""
        return self.dtype == "float32"

    @property
    def allowed(self) -> float:
        """The largest difference that precision explains: of any logit in float32, at the median token otherwise."""
        own = ROUNDINGS * self.rounding
        return max(FULL_PRECISION, own) if self.is_full else own

    @property
    def holds(self) -> bool:
        """Whether the difference is no more than precision explains."""
        return (self.relative if self.is_full else self.typical) <= self.allowed

    def sentence(self) -> str:
        """The result in words."""
        said = f"largest difference of a logit {self.absolute:.2g} ({self.relative:.2g} relative"
        if self.is_full:
            said += f", at most {self.allowed:.2g} is allowed)"
        else:
            said += (
                f"; {self.typical:.2g} at the median token, where one rounding of the input makes {self.rounding:.2g} "
                f"and {ROUNDINGS:g} times that is allowed)"
            )
        return f"{said}; the same likeliest token at {self.agree} of {self.tokens} tokens"


class Expected(NamedTuple):
    """What the model steered by hooks gives.

    Attributes:
        ids: the texts [b, t].
        hooked: logits [b, t, v], float32, on the CPU.
        effect: as in `Verification`.
        rounding: as in `Verification`.
        dtype: the model's precision.
    """

    ids: Tensor
    hooked: Tensor
    effect: float
    rounding: float
    dtype: torch.dtype


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
    return torch.tensor([row[-length:] for row in rows]).clamp_max(vocabulary - 1)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, *, noise: Tensor | None = None) -> Tensor:
    """Logits [b, t, v] of one plain pass without dropout, float32, on the CPU.

    Args:
        model: the transformers model.
        ids: token ids [b, t], no row padded.
        noise: what the input embeddings are multiplied by, [b, t, d].
    """
    inner: Any = inner_model(model)
    ids = ids.to(execution_device(find_decoder(model)))
    inputs: dict[str, Tensor] = {"input_ids": ids}
    if noise is not None:
        embedded = inner.get_input_embeddings()(ids)
        inputs = {"inputs_embeds": embedded * noise.to(embedded)}
    with evaluation_mode(model):
        logits: Tensor = model(**inputs, use_cache=False).logits
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
    dtype = inner_model(model).dtype
    assert isinstance(dtype, torch.dtype)
    with steer(model, vectors, strength):
        hooked = logits_of(model, ids)
        if dtype == torch.float32:
            draws = (logits_of(model, ids, noise=_noise(model, ids, dtype, seed)) for seed in range(_DRAWS))
            rounding = max(_relative(moved, hooked) for moved in draws)
        else:
            rounding = _typical(logits_of(model, ids, noise=_noise(model, ids, dtype)), hooked)
    return Expected(ids, hooked, _relative(logits_of(model, ids), hooked), rounding, dtype)


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
    )


def _typical(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().amax(-1).median() / _largest(wanted))


def _largest(logits: Tensor) -> Tensor:
    return logits.abs().max().clamp_min(torch.finfo(torch.float32).tiny)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / _largest(wanted))


def _noise(model: nn.Module, ids: Tensor, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Factors [b, t, d] that move half of all numbers by one unit in the last place."""
    embedding = find_decoder(model).body.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(0, 2, (*ids.shape, embedding.weight.shape[1]), generator=generator)
    return 1 + sides * torch.finfo(dtype).eps
