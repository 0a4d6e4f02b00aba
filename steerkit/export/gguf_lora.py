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

from torch import Tensor, nn

from steerkit._support.precision import full_precision
from steerkit.errors import SiteError
from steerkit.export.adapter_parts import AdapterParts, parts_for
from steerkit.export.gguf_container import write_gguf
from steerkit.export.weight_changes import changes_of
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_updates
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["GgufLora", "write_gguf_lora"]


class _Family(NamedTuple):
    """How llama.cpp has a family of transformers: its name there, and whether rows are in rotary pairs."""

    name: str
    in_pairs: bool


# Those that the tests load in llama.cpp; others may differ in the names or the order of their matrices.
_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "llama": _Family("llama", True),
        "mistral": _Family("llama", True),
        "qwen2": _Family("qwen2", False),
        "qwen3": _Family("qwen3", False),
    }
)


@dataclass(frozen=True)
class GgufLora:
    """What was written.

    Attributes:
        file: where.
        rank: the largest of all pairs.
        tensors: what is adapted, under llama.cpp's names.
    """

    file: Path
    rank: int
    tensors: tuple[str, ...]


@full_precision()
def write_gguf_lora(
    model: nn.Module,
    vectors: SteeringVector | Sequence[SteeringVector],
    path: str | Path,
    *,
    strength: float | None = None,
) -> GgufLora:
    """Write a LoRA adapter for llama.cpp that does what vectors do at every token, whole or not at all.

    Args:
        model: the transformers model, in memory; its own weights give the difference.
        vectors: one vector or several, which act in this order; their scope has to be `all`.
        path: where; missing folders are made.
        strength: in the paper unit; None takes each file's suggested strength, else 1. A vector's own comes first.

    Returns:
        What was written.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, the change has too high a rank, or the strength is not one
            finite number.
        SiteError: this family is not known to be the same in llama.cpp, or its adapters have no form for the change.
        VectorFileError: the file cannot be written there.
    """
    inner: Any = inner_model(model)
    kind = inner.config.get_text_config().model_type
    family = _FAMILIES.get(kind)
    if family is None:
        raise SiteError(
            f"{kind}: whether llama.cpp has the same matrices is known of {', '.join(_FAMILIES)} only; write an "
            "adapter for peft and convert that with llama.cpp's convert_lora_to_gguf.py"
        )
    parts = parts_for(inner, changes_of(exact_updates(inner, vectors_of(vectors), strength)))
    _refuse_others(inner, parts)
    pairs = _named(inner, parts, family)
    tensors = {f"{name}.{end}": one for name, pair in pairs.items() for end, one in zip(_ENDS, pair, strict=True)}
    metadata: dict[str, str | int | float] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    write_gguf(Path(path), family.name, metadata, tensors)
    return GgufLora(Path(path), parts.rank, tuple(pairs))


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


def _named(model: Any, parts: AdapterParts, family: _Family) -> dict[str, tuple[Tensor, Tensor]]:
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
