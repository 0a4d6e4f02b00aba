"""Vectors written into the weights: an ordinary checkpoint that transformers loads without steerkit.

What changes comes from each method's `weight_updates`; this file knows no method. It finds what the architecture needs
beside the numbers: a switch of the config for a bias that the model lacks (Llama's `mlp_bias`; the other biases that
come with it are zero), and untied embeddings where only one of two shared uses is to change. Whether a family has such
a switch is seen by building the model of the switched config without weights and looking at its names.

The checkpoint is written tensor by tensor, then loaded, and its logits compared with those of the hooks; it takes its
place only if they agree.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from steerkit._support.files import check_folder, whole_folder
from steerkit._support.precision import full_precision
from steerkit.errors import ModelError
from steerkit.export.checkpoint import write_checkpoint
from steerkit.export.checkpoint_plan import CheckpointPlan, plan_checkpoint, planned_value, untied_parameters
from steerkit.export.verification import Expected, Verification, expected, logits_of, verify
from steerkit.export.weight_changes import QUANTISED, changes_of
from steerkit.export.weights_card import weights_card
from steerkit.model import quiet
from steerkit.network.decoder import inner_model
from steerkit.network.plain_weights import hidden_weight, refuse_packed
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_updates
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Baked", "bake", "baked_of", "compared", "planned", "write_card"]


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        folder: where.
        changed: parameters that hold other values than before.
        added: biases that the model did not have; those not in `changed` are zero.
        untied: parameters that were shared with another part of the model and are no more.
        switches: what is set differently in the config.
        verification: the comparison with the hooks; None where it was switched off.
        resumed: files that an earlier run, which was stopped, had finished.
    """

    folder: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    untied: tuple[str, ...]
    switches: Mapping[str, bool]
    verification: Verification | None
    resumed: int = 0


@full_precision()
def bake(
    model: nn.Module,
    tokenizer: Any,
    vectors: SteeringVector | Sequence[SteeringVector],
    out: str | Path,
    *,
    strength: float | None = None,
    untie: bool = False,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> Baked:
    """Write a checkpoint with vectors in its weights. The model itself stays as it is.

    It acts on every token, so the vectors' scope has to be `all` (`vector.at(scope="all")`). Above the model, about one
    block of weights is in memory at a time; offloaded models work. The checkpoint is loaded again from the disk, block
    by block, and compared with the hooks. `bake_on_disk` takes a checkpoint that is larger than memory.

    Args:
        model: a transformers model, neither quantised nor with an adapter in it.
        tokenizer: its tokenizer, written beside it; None writes none.
        vectors: one vector or several, which act in this order.
        out: the folder to make.
        strength: in the paper unit; None takes each file's suggested strength, else 1. A vector's own comes first.
        untie: give a head that shares its weights with the embeddings weights of its own, where the vectors change only
            one of the two. The checkpoint grows by one embedding matrix.
        force: replace a checkpoint that stands there.
        shard_bytes: the size at which a new file begins.

    Returns:
        What was written, and how far its logits are from those of the hooks.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, or the strength is not one finite number.
        SiteError: this architecture has no place for the exact form.
        ModelError: the model is quantised or has an adapter, the folder cannot be written, or the checkpoint's logits
            are not those of the hooks; nothing is left behind.

    Example:
        steerkit.export.bake(model, tokenizer, vector.at(scope="all"), "optimistic-model", strength=2.0)
    """
    target, listed = Path(out).expanduser(), vectors_of(vectors)
    inner: Any = inner_model(model)
    check_folder(target, replace=force)
    _check_model(model, inner, target)
    plan = planned(inner, listed, strength, untie=untie)
    wanted = expected(inner, tokenizer, listed, strength)
    with whole_folder(target, replace=force) as folder, quiet():
        write_checkpoint(inner, plan.shapes, lambda name: planned_value(inner, plan, name), folder, shard_bytes)
        _write_beside(inner, tokenizer, plan.config, folder)
        baked = baked_of(plan, target, compared(type(inner), folder, wanted, target))
        write_card(baked, inner, listed, strength, folder)
    return baked


def planned(model: Any, vectors: Sequence[SteeringVector], strength: float | None, *, untie: bool) -> CheckpointPlan:
    """What a checkpoint with vectors in its weights is to hold.

    Args:
        model: the transformers model, out of any wrapper.
        vectors: what it is steered by.
        strength: as for `bake`.
        untie: as for `bake`.

    Raises:
        SteerError: as `bake` does for vectors that have no place in the weights.
    """
    with untied_parameters(model) if untie else contextlib.nullcontext():
        changes = changes_of(exact_updates(model, vectors, strength))
    return plan_checkpoint(model, changes, untie=untie)


def compared(kind: Any, folder: Path, wanted: Expected, target: Path) -> Verification:
    """Load a checkpoint that was written, and compare its logits with those of the hooks.

    Args:
        kind: the class of its model.
        folder: where it lies now.
        wanted: what the hooks gave.
        target: where it is to be.

    Raises:
        ModelError: they are others, or it does not load.
    """
    found = verify(_loaded_logits(kind, folder, wanted.ids), wanted)
    if not found.holds:
        raise ModelError(f"{target}: not written, its logits are not those of the hooks ({found.sentence()})")
    return found


def baked_of(plan: CheckpointPlan, target: Path, verification: Verification | None) -> Baked:
    """What is written by a plan.

    Args:
        plan: what the checkpoint holds.
        target: where it is to be.
        verification: the comparison with the hooks, if any.
    """
    return Baked(target, tuple(sorted(plan.changes)), plan.added, plan.untied, plan.switches, verification)


def write_card(
    baked: Baked, model: Any, vectors: Sequence[SteeringVector], strength: float | None, folder: Path
) -> None:
    """Write the page of Markdown beside the weights.

    Args:
        baked: what is written.
        model: what it was made of.
        vectors: what is in it.
        strength: as it was given.
        folder: where the weights lie now.
    """
    card = weights_card(baked.folder.name, model, vectors, strength, baked.verification, _facts(baked), _USE)
    (folder / "README.md").write_text(card, encoding="utf-8")


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Nothing else is needed: no hook, no steerkit."""


def _facts(baked: Baked) -> dict[str, str]:
    """Rows of the card."""
    zero = len(set(baked.added) - set(baked.changed))
    switches = ", ".join(f"`{name}={value}`" for name, value in baked.switches.items())
    return {
        "changed": f"{len(baked.changed)} parameters: "
        + ", ".join(f"`{name}`" for name in baked.changed[:4])
        + (", ..." if len(baked.changed) > 4 else ""),
        "config": switches or "as it was",
        "new biases": f"{len(baked.added)}, of which {zero} are zero" if baked.added else "none",
        "untied": ", ".join(f"`{name}`" for name in baked.untied) or "nothing",
    }


def _check_model(model: nn.Module, inner: Any, target: Path) -> None:
    """Refuse models whose weights cannot be rewritten.

    Raises:
        ModelError: an adapter, quantised weights, code of its own, or the folder the model came from.
    """
    owner = type(inner).__name__
    if hasattr(model, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise ModelError(f"{owner} has an adapter in it; merge it first (merge_and_unload), then bake")
    refuse_packed(inner)
    hidden = hidden_weight(inner)
    if hidden is not None or getattr(inner, "hf_quantizer", None) is not None:
        which = "" if hidden is None else f" ({hidden})"
        raise ModelError(f"{owner} is quantised{which}, and {QUANTISED}")
    if inner.is_remote_code():
        raise ModelError(f"{owner} is code from outside of transformers, which a checkpoint cannot hold; use hooks")
    source = Path(getattr(inner.config, "_name_or_path", "") or ".")
    if source.is_dir() and target.exists() and source.resolve() == target.resolve():
        raise ModelError(f"{target}: the model itself lies there; choose another folder")


def _write_beside(model: Any, tokenizer: Any, config: Any, folder: Path) -> None:
    """Config, generation config, tokenizer and chat template."""
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise ModelError(f"the model's generation config cannot be saved ({str(error).splitlines()[0]})") from None
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _loaded_logits(kind: Any, folder: Path, ids: Tensor) -> Tensor:
    """Load the checkpoint as anybody would, its weights left on the disk until their block runs, and run it.

    Raises:
        ModelError: a weight is missing or left over.
    """
    chatter = logging.getLogger("accelerate.big_modeling")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="steerkit-") as spare:
            made, report = kind.from_pretrained(
                folder,
                device_map={"": "disk"},
                offload_folder=spare,
                local_files_only=True,
                output_loading_info=True,
            )
            wrong = {what: names for what, names in report.items() if names}
            if wrong:
                raise ModelError(f"not written: loaded again, the checkpoint has {wrong}; please report this")
            logits = logits_of(made.eval(), ids)
            del made
            gc.collect()
            return logits
    finally:
        chatter.setLevel(level)
