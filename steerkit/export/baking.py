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
import copy
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit._support.files import check_folder, whole_folder
from steerkit.errors import ModelError, SiteError
from steerkit.export.checkpoint import stored, stored_dtype, write_checkpoint
from steerkit.export.verification import Verification, expected, logits_of, verify
from steerkit.export.weights_card import weights_card
from steerkit.methods._protocols import WeightUpdate
from steerkit.model import quiet
from steerkit.network.decoder import inner_model
from steerkit.steering.strengths import vectors_of
from steerkit.steering.weights import exact_updates
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Baked", "Change", "bake", "changes_of"]

Change = Callable[[Tensor | None], Tensor]


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        folder: where.
        changed: parameters that hold other values than before.
        added: biases that the model did not have; those not in `changed` are zero.
        untied: parameters that were shared with another part of the model and are no more.
        switches: what is set differently in the config.
        verification: the comparison with the hooks.
    """

    folder: Path
    changed: tuple[str, ...]
    added: tuple[str, ...]
    untied: tuple[str, ...]
    switches: Mapping[str, bool]
    verification: Verification


@dataclass(frozen=True)
class _Plan:
    """What the checkpoint is to hold.

    Attributes:
        config: of the model to be written.
        shapes: its parameters and buffers, as files hold them.
        changes: the functions of the old weights, by name.
        added: biases that the model lacks.
        untied: parameters that get a copy of their own.
        switches: what differs in the config.
    """

    config: Any
    shapes: Mapping[str, torch.Size]
    changes: Mapping[str, Change]
    added: tuple[str, ...]
    untied: tuple[str, ...]
    switches: Mapping[str, bool]


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
    by block, and compared with the hooks.

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
        steerkit.export.bake.bake(model, tokenizer, vector.at(scope="all"), "optimistic-model", strength=2.0)
    """
    target, listed = Path(out).expanduser(), vectors_of(vectors)
    inner: Any = inner_model(model)
    check_folder(target, replace=force)
    _check_model(model, inner, target)
    with _untied(inner) if untie else contextlib.nullcontext():
        changes = changes_of(exact_updates(inner, listed, strength))
    plan = _plan(inner, changes, untie=untie)
    wanted = expected(inner, tokenizer, listed, strength)
    with whole_folder(target, replace=force) as folder, quiet():
        write_checkpoint(inner, plan.shapes, lambda name: _value(inner, plan, name), folder, shard_bytes)
        _write_beside(inner, tokenizer, plan.config, folder)
        found = verify(_loaded_logits(type(inner), folder, wanted.ids), wanted)
        if not found.holds:
            raise ModelError(f"{target}: not written, its logits are not those of the hooks ({found.sentence()})")
        baked = Baked(target, tuple(sorted(changes)), plan.added, plan.untied, plan.switches, found)
        card = weights_card(target.name, inner, listed, strength, found, _facts(baked), _USE)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return baked


def changes_of(updates: Sequence[WeightUpdate]) -> dict[str, Change]:
    """One change for each parameter; where there are several, they act in order.

    Args:
        updates: what `exact_updates` gave.
    """
    listed: dict[str, list[Change]] = {}
    for update in updates:
        listed.setdefault(update.name, []).append(update.update)
    return {name: _in_turn(some) for name, some in listed.items()}


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


def _in_turn(changes: Sequence[Change]) -> Change:
    def change(old: Tensor | None) -> Tensor:
        value = old
        for one in changes:
            value = one(value)
        assert value is not None
        return value

    return change


def _check_model(model: nn.Module, inner: Any, target: Path) -> None:
    """Refuse models whose weights cannot be rewritten.

    Raises:
        ModelError: an adapter, quantised weights, code of its own, or the folder the model came from.
    """
    owner = type(inner).__name__
    if hasattr(model, "peft_config") or getattr(inner, "_hf_peft_config_loaded", False):
        raise ModelError(f"{owner} has an adapter in it; merge it first (merge_and_unload), then bake")
    small = [name for name, value in inner.named_parameters() if not value.is_floating_point()]
    if getattr(inner, "is_quantized", False) or getattr(inner, "hf_quantizer", None) is not None or small:
        raise ModelError(
            f"{owner} is quantised, and an edit can vanish below its steps; bake the unquantised model and quantise "
            "that, or export an adapter (steerkit export --to peft)"
        )
    if inner.is_remote_code():
        raise ModelError(f"{owner} is code from outside of transformers, which a checkpoint cannot hold; use hooks")
    source = Path(getattr(inner.config, "_name_or_path", "") or ".")
    if source.is_dir() and target.exists() and source.resolve() == target.resolve():
        raise ModelError(f"{target}: the model itself lies there; choose another folder")


@contextlib.contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """Let each use of a shared parameter be a parameter of its own for a while, without copying its values."""
    seen: set[int] = set()
    undo: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name, value in list(model.named_parameters(remove_duplicate=False)):
        if id(value) in seen:
            path, _, leaf = name.rpartition(".")
            undo.append((model.get_submodule(path), leaf, value))
        seen.add(id(value))
    try:
        for owner, leaf, value in undo:
            setattr(owner, leaf, nn.Parameter(value.detach(), requires_grad=value.requires_grad))
        yield
    finally:
        for owner, leaf, value in undo:
            setattr(owner, leaf, value)


def _plan(model: Any, changes: Mapping[str, Change], *, untie: bool) -> _Plan:
    """Find the config that holds the changed weights, and what its files hold.

    Raises:
        SiteError: there is no place for a bias, or a shared weight would change where it should not.
    """
    config, switches = copy.deepcopy(model.config), dict[str, bool]()
    # Offloaded weights are separate empty tensors; a model without weights shows what the class ties.
    shared = {**_shared(_empty(type(model), config), changes), **_shared(model, changes)}
    if shared:
        if not untie:
            name, other = next(iter(shared.items()))
            raise SiteError(
                f"{type(model).__name__} uses `{name}` as `{other}` too (tied weights), which is not to change; "
                "give it weights of its own with --untie (untie=True), or steer with hooks"
            )
        for one in {id(part): part for part in (config, config.get_text_config())}.values():
            one.tie_word_embeddings = False
        switches["tie_word_embeddings"] = False
    present = set(model.state_dict())
    missing = sorted(set(changes) - present)
    if missing:
        config, switch = _with_biases(model, config, missing)
        switches[switch] = True
    made = _empty(type(model), config)
    again = _shared(made, changes)
    if again:
        raise SiteError(f"{type(model).__name__} ties `{next(iter(again))}` whatever its config says; steer with hooks")
    names = _written(made)
    added = tuple(sorted(set(names) - present))
    return _Plan(config, names, changes, added, tuple(sorted(shared.values())), switches)


def _shared(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, str]:
    """Parameters that change under one of their names and not under another."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    return {
        name: other
        for group in names.values()
        for name in group
        for other in group
        if name in changes and other not in changes
    }


def _with_biases(model: Any, config: Any, missing: Sequence[str]) -> tuple[Any, str]:
    """The config with the one switch under which the model has the missing biases and no other new weights.

    Raises:
        SiteError: no switch does that.
    """
    present = set(model.state_dict())
    text = config.get_text_config()
    switches = sorted(name for name, value in text.to_dict().items() if value is False and "bias" in name)
    for switch in switches:
        tried = copy.deepcopy(config)
        setattr(tried.get_text_config(), switch, True)
        try:
            names = set(_empty(type(model), tried).state_dict())
        except (TypeError, ValueError, NotImplementedError):
            continue
        if names >= present.union(missing) and all(name.endswith("bias") for name in names - present):
            return tried, switch
    tried_out = f" ({', '.join(switches)} tried)" if switches else ""
    raise SiteError(
        f"{type(model).__name__} has no bias at `{missing[0]}` and no switch in its config that brings one{tried_out}; "
        "export an adapter (steerkit export --to peft), or steer with hooks"
    )


def _empty(kind: Any, config: Any) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"), quiet():
        made: nn.Module = kind(copy.deepcopy(config))
    return made


def _written(made: Any) -> dict[str, torch.Size]:
    """What files of a model hold: everything in its state but what is tied to something else or not saved."""
    left_out = set(getattr(made, "all_tied_weights_keys", None) or ())
    left_out.update(made._keys_to_ignore_on_save or ())
    return {name: value.shape for name, value in made.state_dict().items() if name not in left_out}


def _value(model: nn.Module, plan: _Plan, name: str) -> Tensor:
    """One tensor of the checkpoint; changed in float32 and rounded once."""
    old, dtype = stored(model, name), stored_dtype(model, name)
    change = plan.changes.get(name)
    with torch.no_grad():
        if change is not None:
            return change(None if old is None else old.float()).to(dtype)
        return torch.zeros(plan.shapes[name], dtype=dtype) if old is None else old


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
