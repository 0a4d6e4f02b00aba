"""How much attention goes to a text's first token, and in how many heads it is a sink.

    alpha_k = 1 / (T - k + 1)  *  sum over i >= k of A[i, k]           positions from 1, A the map of one head
    sinks   = share of the heads with alpha_1 > 0.3, at T = 64

Many models park attention that has nowhere to go on the first token. Where steering takes that away, attention is
spread over tokens that were not meant, and texts fall apart for a reason no effect shows.

Gu et al. (2024), "When Attention Sink Emerges in Language Models: An Empirical View", arXiv 2410.10781, from where 64
tokens and 0.3 are. Here alpha is the mean over a few texts before it is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerkit.checks.doctor.case import Case
from steerkit.errors import ModelError
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.prompts.rendering import render
from steerkit.steering.steering import steer
from steerkit.tokens.transformers_facts import eager_attention

__all__ = ["SINK", "first_token_weights", "sink_weights"]

SINK = 0.3
_TOKENS, _ROWS = 64, 4
_PROMPT = 2  # tokens that count as the prompt: scopes that begin with the answer write all tokens but the first


def first_token_weights(maps: Tensor) -> Tensor:
    """How much of the attention goes to the first token: alpha_1.

    Args:
        maps: [..., t, t] attention maps, rows of which sum to 1.

    Returns:
        [...]

    Example:
        >>> import torch
        >>> first_token_weights(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor(0.7500)
    """
    return maps[..., 0].mean(dim=-1)


def sink_weights(case: Case, *, steered: bool) -> Tensor:
    """The mean of alpha_1 over a few texts of 64 tokens, head by head.

    Args:
        case: the model, and the vector it was given.
        steered: whether that vector steers.

    Returns:
        [heads of all blocks that have attention maps] float32, on the CPU.

    Raises:
        ModelError: the model gives no attention maps.
    """
    ids = _ids(case)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "output_attentions": True}
    with eager_attention(case.decoder.model), torch.no_grad():
        if steered and case.given is not None:
            with steer(
                case.model, case.given, case.strength, prompt_lengths=[_PROMPT] * len(ids), tokenizer=case.tokenizer
            ):
                found = case.model(**inputs)
        else:
            found = case.model(**inputs)
    maps = getattr(found, "attentions", None) or ()
    square = [one for one in maps if isinstance(one, Tensor) and one.dim() == 4 and one.shape[-1] == one.shape[-2]]
    if not square:
        raise ModelError(f"{type(case.decoder.model).__name__} gives no attention maps: it has no eager attention")
    return torch.cat([first_token_weights(one).float().mean(dim=0).cpu() for one in square])


def _ids(case: Case) -> Tensor:
    """[b, t] the first tokens of a few texts that are long enough, without pads."""
    longest = getattr(case.decoder.model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    length, rows, told = min(_TOKENS, longest), [], ""
    for text in neutral_texts():
        told = f"{told} {text.prompt} {text.answer}".strip()
        ids = render(case.tokenizer, Conversation(told, raw=True)).ids
        if len(ids) >= length:
            rows.append(list(ids[:length]))
            told = ""
        if len(rows) == _ROWS:
            break
    return torch.tensor(rows, dtype=torch.long, device=case.row([0])[0].device)
