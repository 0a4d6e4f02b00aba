"""Tiny models and what finetuning may have made of them: weights moved by noise, and adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import VOCAB, build

IDS = torch.tensor([[3, 17, 42, 99, 7, 250], [5, 6, 80, 31, 12, 64]])


def finetuned(base: nn.Module, *, seed: int = 1, size: float = 0.05) -> Any:
    """A copy of a model with every parameter moved."""
    made = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((size * noise).to(parameter.dtype))
    return made


def pair(family: str = "llama") -> tuple[Any, Any]:
    """A finetuned model and its base."""
    base = build(family)
    return finetuned(base).eval(), base.eval()


def with_base_blocks(tuned: Any, base: Any) -> Any:
    """The base's blocks between the finetuned embeddings, norm and head."""
    made = copy.deepcopy(tuned)
    layers, others = made.model.layers, base.model.layers
    for layer in range(len(layers)):
        layers[layer].load_state_dict(others[layer].state_dict())
    return made


def greedy(model: Any, ids: Tensor = IDS, **options: Any) -> Any:
    """Greedy tokens, or those of beams."""
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCAB - 1, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **options: Any) -> Any:
    return model(input_ids=ids, **options).logits
