"""A LoRA adapter for llama.cpp (`llama-cli --lora FILE`), for what is no addition: ablation, edited matrices.

    h W^T  ->  h (W + B A)^T          lora_a = A [r, in], lora_b = B [out, r], both float32

The layout is that of llama.cpp's `convert_lora_to_gguf.py`: `general.type = "adapter"`, `adapter.type = "lora"`,
tensors `<name of the matrix>.lora_a` and `.lora_b`, their product scaled by `adapter.lora.alpha` / r. Each pair has a
rank of its own here, so alpha 0 is written, by which llama.cpp does not scale. Rows of query and key matrices of Llama
stand in another order there, pair by pair for the rotation, so rows of B do too. Embeddings have A as [vocabulary, r].

llama.cpp's adapters have no biases, so a constant that is added at a block's output is a control vector there
(`steerkit.export.gguf`). A matrix that is the model's embedding and its head at once cannot be adapted: llama.cpp looks
adapters up by name and would apply the pair to both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steerkit._support.precision import full_precision
from steerkit.errors import ModelError, SiteError
from steerkit.export.adapter_parts import AdapterParts, parts_for
from steerkit.export.gguf_container import write_gguf
from steerkit.export.verification import Verification, expected, verify
from steerkit.export.weight_changes import changes_of
from steerkit.network.block_trace import evaluation_mode
from steerkit.network.decoder import execution_device, find_decoder, inner_model
from steerkit.network.plain_weights import is_plain
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_updates
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["FAMILIES", "Family", "GgufLora", "write_gguf_lora", "write_parts"]


class Family(NamedTuple):
    """How llama.cpp has a family of transformers: its name there, and whether rows are in rotary pairs."""

    name: str
    in_pairs: bool


# Those that the tests load in llama.cpp; others may differ in the names or the order of their matrices.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", True),
        "mistral": Family("llama", True),
        "qwen2": Family("qwen2", False),
        "qwen3": Family("qwen3", False),
    }
)


@dataclass(frozen=True)
class GgufLora:
    """What was written.

    Attributes:
        file: where.
        rank: the largest of all pairs.
        tensors: what is adapted, under llama.cpp's names.
        verification: the comparison of the model with the pairs added to its weights with the hooks.
    """

    file: Path
    rank: int
    tensors: tuple[str, ...]
    verification: Verification


@full_precision()
def write_gguf_lora(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Sequence[SteeringVector],
    path: str | Path,
    *,
    strength: float | None = None,
) -> GgufLora:
    """Write a LoRA adapter for llama.cpp that does what vectors do at every token, whole or not at all.

    Args:
        model: the transformers model, in memory and not quantised; its own weights give the difference.
        tokenizer: its tokenizer, for the texts to compare on; None takes arbitrary tokens.
        vectors: one vector or several, which act in this order; their scope has to be `all`.
        path: where; missing folders are made.
        strength: in the paper unit; None takes each file's suggested strength, else 1. A vector's own comes first.

    Returns:
        What was written, and how far its logits are from those of the hooks.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, the change has too high a rank, or the strength is not one
            finite number.
        SiteError: this family is not known to be the same in llama.cpp, or its adapters have no form for the change.
        ModelError: its logits are not those of the hooks; nothing is written.
        VectorFileError: the file cannot be written there.
    """
    inner: Any = inner_model(model)
    family, listed = _family(inner), vectors_of(vectors)
    parts = parts_for(inner, changes_of(exact_updates(inner, listed, strength)))
    _refuse_others(inner, parts)
    wanted = expected(inner, tokenizer, listed, strength)
    found = verify(_logits_with(inner, parts, wanted.ids), wanted)
    if not found.holds:
        raise ModelError(f"{path}: not written, its logits are not those of the hooks ({found.sentence()})")
    names = write_parts(inner, parts, family, Path(path))
    return GgufLora(Path(path), parts.rank, names, found)


def write_parts(model: Any, parts: AdapterParts, family: Family, path: Path) -> tuple[str, ...]:
    """Write the pieces of an adapter under llama.cpp's names.

    Args:
        model: the transformers model.
        parts: linear layers and embeddings.
        family: of the model.
        path: where.

    Returns:
        The names of what is adapted.

    Raises:
        SiteError: a matrix has no name in llama.cpp.
        VectorFileError: the file cannot be written there.
    """
    pairs = _named(model, parts, family)
    tensors = {f"{name}.{end}": one for name, pair in pairs.items() for end, one in zip(_ENDS, pair, strict=True)}
    metadata: dict[str, str | int | float] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    write_gguf(path, family.name, metadata, tensors)
    return tuple(pairs)


def _family(model: Any) -> Family:
    """How llama.cpp has the family of a model.

    Raises:
        SiteError: it is not known.
    """
    kind = model.config.get_text_config().model_type
    if kind not in FAMILIES:
        raise SiteError(
            f"{kind}: whether llama.cpp has the same matrices is known of {', '.join(FAMILIES)} only; write an "
            "adapter for peft and convert that with llama.cpp's convert_lora_to_gguf.py"
        )
    return FAMILIES[kind]


@torch.no_grad()
def _logits_with(model: Any, parts: AdapterParts, ids: Tensor) -> Tensor:
    """Logits [b, t, v] of the model with the pairs added to its weights, which stay as they are.

    Raises:
        SiteError: a weight is packed.
    """
    changed: dict[str, Tensor] = {}
    for path, (left, right) in {**parts.linear, **parts.embeddings}.items():
        module = model.get_submodule(path)
        if not is_plain(module, "weight"):
            raise SiteError(f"`{path}` is quantised; load the model in float32 or bfloat16")
        change = (left @ right).mT if path in parts.embeddings else left @ right
        old = module.weight
        changed[f"{path}.weight"] = (old.float() + change.to(old.device)).to(old.dtype)
    where = execution_device(find_decoder(model))
    with evaluation_mode(model):
        found = functional_call(model, changed, (), {"input_ids": ids.to(where), "use_cache": False})
    logits: Tensor = found.logits.float().cpu()
    return logits


_ENDS = ("lora_a", "lora_b")


def _refuse_others(model: Any, parts: AdapterParts) -> None:
    """Refuse what llama.cpp's adapters have no form for.

    Raises:
        SiteError: a bias, a matrix of several experts, or an embedding that is the head as well.
    """
    if parts.biases:
        raise SiteError(
            f"`{next(iter(parts.biases))}` gains a bias, which llama.cpp's adapters have not; an addition at block "
            "outputs is a control vector there (--to gguf)"
        )
    other = next(iter((*parts.stacks, *parts.whole)), None)
    if other is not None:
        raise SiteError(f"`{other}`: llama.cpp's adapters have no form for this module; bake it, or steer with hooks")
    if parts.embeddings and _is_tied(model):
        raise SiteError(
            f"`{next(iter(parts.embeddings))}` is the head of this model as well, and llama.cpp would adapt both; bake "
            "it, or leave the embeddings out (settings writes=...)"
        )


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def _named(model: Any, parts: AdapterParts, family: Family) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each matrix under its name in llama.cpp; those of which nothing changes are left out.

    Raises:
        SiteError: a matrix that has no name there.
    """
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name)
    names = gguf.get_tensor_name_map(architecture, find_decoder(model).num_layers)
    text = model.config.get_text_config()
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads} if family.in_pairs else {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path, (left, right) in {**parts.linear, **parts.embeddings}.items():
        name = names.get_name(f"{path}.weight", (".weight",))
        if name is None:
            raise SiteError(f"`{path}` has no name in llama.cpp's {family.name}; bake it, or steer with hooks")
        if left.shape[-1] == 0:
            continue
        short = name.split(".")[-2]
        if short in heads:
            left = _in_pairs(left, heads[short])
        found[name] = (right.mT if path in parts.embeddings else right, left)
    return found


def _in_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, r] whose rotary halves follow each other, in llama.cpp's order: pair by pair."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return halves.transpose(1, 2).reshape(rows.shape)
