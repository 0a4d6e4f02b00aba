"""Vectors as a LoRA adapter: a folder that `peft` loads onto the untouched model, scales, switches off and merges.

What changes comes from each method's `weight_updates`; this file knows no method. The change of a matrix is the
difference of its new and its old values. It is taken apart by a range finder: the matrix is applied to a few random
vectors, and where the images span fewer dimensions than there are vectors, they span all of its range.

    dW = B A        B [out, r], A [r, in]          r: the rank that is found, 1 for one direction taken out or added
    db              the bias of `lora_B` (peft's `lora_bias`), with A = B = 0 where only the bias changes

The scale of every module is 1 (lora_alpha = r), so that peft's `scale_layer` is a dial from 0 to 1 where the change is
linear in the strength. A changed bias acts where the model has none, too, but merges only into one. Embeddings get
peft's own form for them; beside changed biases, which peft cannot combine with it, they are stored whole
(`modules_to_save`). Matrices that several experts share one tensor of go by `target_parameters`. All is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from steerkit._support.files import check_folder, whole_folder
from steerkit._support.precision import full_precision
from steerkit.errors import ModelError
from steerkit.export.adapter_files import loaded_adapter, write_files
from steerkit.export.adapter_parts import parts_for
from steerkit.export.verification import Verification, expected, logits_of, verify
from steerkit.export.weight_changes import changes_of
from steerkit.export.weights_card import weights_card
from steerkit.model import hub_id, quiet
from steerkit.network.decoder import inner_model
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_updates
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Adapter", "write_adapter"]


@dataclass(frozen=True)
class Adapter:
    """What was written.

    Attributes:
        folder: where.
        rank: of every module.
        modules: modules and parameters it adapts.
        whole: modules that are stored whole.
        merges: whether peft can merge it: it cannot add a bias to a layer that has none.
        verification: the comparison with the hooks.
    """

    folder: Path
    rank: int
    modules: tuple[str, ...]
    whole: tuple[str, ...]
    merges: bool
    verification: Verification


@full_precision()
def write_adapter(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Sequence[SteeringVector],
    out: str | Path,
    *,
    strength: float | None = None,
    force: bool = False,
) -> Adapter:
    """Write a LoRA adapter that does what vectors do at every token, load it with peft and compare it with the hooks.

    Args:
        model: the transformers model, in memory. It is as it was afterwards.
        tokenizer: its tokenizer, for the texts to compare on; None takes arbitrary tokens.
        vectors: one vector or several, which act in this order; their scope has to be `all`.
        out: the folder to make.
        strength: in the paper unit; None takes each file's suggested strength, else 1. A vector's own comes first.
        force: replace an adapter that stands there.

    Returns:
        What was written, and how far its logits are from those of the hooks.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, the change has too high a rank, or the strength is not one
            finite number.
        SiteError: this architecture has no place for the exact form, or peft cannot express it.
        ModelError: peft is missing, the model has an adapter already or is offloaded, the folder cannot be written, or
            the adapter's logits are not those of the hooks; nothing is left behind.

    Example:
        write_adapter(model, tokenizer, vector.at(scope="all"), "optimism-lora", strength=2.0)
    """
    _need_peft()
    target, listed = Path(out).expanduser(), vectors_of(vectors)
    inner: Any = inner_model(model)
    check_folder(target, replace=force)
    if hasattr(model, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise ModelError(f"{type(inner).__name__} has an adapter in it already; merge or unload it first")
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise ModelError(f"{type(inner).__name__} is offloaded; load it into memory, an adapter is tried on the model")
    changes = changes_of(exact_updates(inner, listed, strength))
    parts = parts_for(inner, changes)
    wanted = expected(inner, tokenizer, listed, strength)
    with whole_folder(target, replace=force) as folder, quiet():
        write_files(inner, parts, folder)
        with loaded_adapter(inner, parts, folder) as adapted:
            found = verify(logits_of(adapted, wanted.ids), wanted)
        if not found.holds:
            raise ModelError(f"{target}: not written, its logits are not those of the hooks ({found.sentence()})")
        adapter = Adapter(
            folder=target,
            rank=parts.rank,
            modules=tuple(dict.fromkeys([*parts.linear, *parts.biases, *parts.embeddings, *parts.stacks])),
            whole=tuple(parts.whole),
            merges=all(inner.get_submodule(name).bias is not None for name in parts.biases),
            verification=found,
        )
        base = hub_id(model_facts(inner)["model_id"] or "the base model")
        use = _USE.replace("{base}", base)
        card = weights_card(target.name, inner, listed, strength, found, _facts(adapter), use, library="peft")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return adapter


_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "{name}")
```"""


def _facts(adapter: Adapter) -> dict[str, str]:
    """Rows of the card."""
    shown = ", ".join(f"`{name}`" for name in adapter.modules[:4]) + (", ..." if len(adapter.modules) > 4 else "")
    facts = {"rank": f"{adapter.rank}", "adapted": f"{len(adapter.modules)}: {shown}"}
    if adapter.whole:
        facts["stored whole"] = ", ".join(f"`{name}`" for name in adapter.whole)
    facts["merges"] = "yes" if adapter.merges else "no: it adds a bias to layers that have none"
    return facts


def _need_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError(
            "adapters are written and tried with peft, which is missing; pip install 'steerkit-hf[peft]'"
        ) from None
