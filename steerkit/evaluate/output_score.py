"""Output score: does writing a direction make the model say what the direction stands for?

    M      = the tokens that the model's head reads off the direction alone (the logit lens), the 20 likeliest
    p      = next-token probabilities behind a neutral beginning, with a great deal of the direction at its last token
    S_out  = (1 - min over t in M of rank(t) / V) * max over t in M of p(t)          rank 0 is the likeliest token

Arad, Mueller, Belinkov (2025), "SAEs Are Good for Steering - If You Select the Right Features", arXiv 2505.20063, on
latents of sparse autoencoders, of which those with a score under about .01 steer badly. Nothing in it needs a
dictionary, so here it is one pass for any direction that is written to the residual stream.

The published amount is 10 times the strongest latent of the token, which a direction without a dictionary has not; then
it is twice the usual length of a token's activations there, our own choice. The lens is run through the model itself:
the last block's output is the direction, as long as activations there usually are, because a norm's epsilon would
flatten a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.activations.recording import record_ids
from steerkit.errors import DataError
from steerkit.maths.directions import unit
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device, find_decoder
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, locate
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render

__all__ = ["LEAST", "PREFIX", "TOP", "OutputScores", "in_the_stream", "lens_tokens", "output_scores", "score_of"]

PREFIX = "From my experience,"
TOP = 20
LEAST = 0.01
"""What is called enough in the paper's comparison."""
_NORMS = 2.0
_ROWS = 64


@dataclass(frozen=True, eq=False)
class OutputScores:
    """Output scores of some directions.

    Attributes:
        scores: [k] float32.
        tokens: [k, m] int64, ids of the lens, the likeliest first.
        words: by direction what these tokens say.
    """

    scores: Tensor
    tokens: Tensor
    words: tuple[tuple[str, ...], ...]


def in_the_stream(site: Site) -> bool:
    """Whether what is added at a site is added to the residual stream as it is.

    Args:
        site: any.
    """
    return site.kind in ("resid_pre", "resid_post", "attn_out", "mlp_out", "mixer_out")


def score_of(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """The score itself.

    Args:
        probabilities: [k, v] of the next token.
        tokens: [k, m] ids of the lens.

    Returns:
        [k]

    Example:
        >>> score_of(torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]), torch.tensor([[3, 1]]))
        tensor([0.2400])
    """
    own = probabilities.gather(-1, tokens)
    best = own.max(dim=-1).values
    rank = (probabilities > best[:, None]).sum(dim=-1)
    return (1.0 - rank / probabilities.shape[-1]) * best


def lens_tokens(model: nn.Module, tokenizer: Any, directions: Tensor, *, count: int = TOP) -> Tensor:
    """The tokens that the model's last norm and head read off directions.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        directions: [k, d] in the residual stream; their lengths do not matter.
        count: how many tokens of each.

    Returns:
        [k, count] int64 ids, the likeliest first.

    Raises:
        DataError: a direction has no length, or another width than the stream.
    """
    decoder = find_decoder(model)
    last = Site(decoder.num_layers - 1)
    ids = _prefix(tokenizer, PREFIX)
    length = _usual_length(model, tokenizer, last)
    rows = _unit(directions, decoder.hidden_size) * length
    found = [
        _next_logits(model, last, ids[:1], part, replaces=True).topk(count, dim=-1).indices
        for part in torch.split(rows, _ROWS)
    ]
    return torch.cat(found)


def output_scores(
    model: nn.Module,
    tokenizer: Any,
    site: Site | str,
    directions: Tensor,
    *,
    amounts: Tensor | None = None,
    prefix: str = PREFIX,
    count: int = TOP,
) -> OutputScores:
    """Output scores of directions at one site.

    Args:
        model: a transformers model, unsteered.
        tokenizer: its tokenizer.
        site: where they are written; one whose activations are added to the stream.
        directions: [k, d].
        amounts: [k], how much of each direction is added; None adds twice the usual length of activations there.
        prefix: the neutral beginning.
        count: tokens of the lens.

    Raises:
        DataError: at this site nothing is added to the stream as it is; or a direction has no length or another width.
        SiteError: the model has no such site.
    """
    place = Site.of(site)
    if not in_the_stream(place):
        raise DataError(
            f"output score: {place} is no place in the residual stream, so the head cannot read it; leave it out"
        )
    width = find_decoder(model).hidden_size
    if amounts is None:
        added = _unit(directions, width) * _NORMS * _usual_length(model, tokenizer, place)
    else:
        _unit(directions, width)
        added = directions.float() * amounts.float()[:, None]
    tokens = lens_tokens(model, tokenizer, directions, count=count)
    ids = _prefix(tokenizer, prefix)
    scores = [
        score_of(torch.softmax(_next_logits(model, place, ids, part, replaces=False), dim=-1), own)
        for part, own in zip(torch.split(added, _ROWS), torch.split(tokens, _ROWS), strict=True)
    ]
    words = tuple(tuple(tokenizer.decode([one]) for one in row) for row in tokens.tolist())
    return OutputScores(torch.cat(scores), tokens, words)


def _prefix(tokenizer: Any, text: str) -> tuple[int, ...]:
    return render(tokenizer, Conversation.of(text, raw=True)).ids


def _usual_length(model: nn.Module, tokenizer: Any, site: Site) -> float:
    """Median length of a token's activations at a site, over neutral texts, each one's first token left out."""
    from steerkit.prompts.neutral import neutral_texts

    texts = [render(tokenizer, text).ids[:64] for text in neutral_texts()[:8]]
    (rows,) = record_ids(model, texts, [site]).values()
    return float(torch.cat([one[1:].norm(dim=-1) for one in rows]).median())


def _unit(directions: Tensor, width: int) -> Tensor:
    if directions.dim() != 2 or directions.shape[-1] != width:
        raise DataError(f"output score: directions have shape {list(directions.shape)}; give [k, {width}]")
    if not bool((directions.norm(dim=-1) > 0).all()):
        raise DataError("output score: a direction has length 0, so there is nothing to read; leave it out")
    return unit(directions.float())


def _next_logits(model: nn.Module, site: Site, ids: Sequence[int], rows: Tensor, *, replaces: bool) -> Tensor:
    """Next-token logits [k, v] float32 behind one text, each with a row [k, d] at the last token of a site."""
    (tap,) = locate(model, [site]).values()
    decoder = find_decoder(model)
    device = execution_device(decoder)
    inputs = torch.tensor([list(ids)], device=device, dtype=torch.long).expand(len(rows), -1)
    inner: Any = decoder.model
    handle = _attached(tap, rows, len(ids), replaces)
    try:
        with torch.no_grad(), evaluation_mode(inner):
            logits: Tensor = inner(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False, logits_to_keep=1
            ).logits
    finally:
        handle.remove()
    return logits[:, -1].float().cpu()


def _attached(tap: Tap, rows: Tensor, width: int, replaces: bool) -> Any:
    """Put rows [k, d] in the place of the last token of each text, or add them there."""

    def moved(h: Tensor) -> Tensor:
        own = h.reshape(len(rows), width, -1)
        last = rows.to(h.device, h.dtype) if replaces else own[:, -1] + rows.to(h.device, h.dtype)
        return torch.cat([own[:, :-1], last[:, None]], dim=1).reshape(h.shape)

    return tap.attach(moved)
