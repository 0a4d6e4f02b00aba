"""What a checkpoint with changed weights holds: its config, its parameters, new biases and untied embeddings.

A bias that the model lacks needs a switch of the config (Llama's `mlp_bias`; the other biases that come with it are
zero), biases in several places perhaps several; a change of one of two shared uses needs untied embeddings. Whether a
family has such switches is seen by building the model of the switched config without weights and looking at its names.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.export.weight_changes import Change
from steerkit.model import quiet
from steerkit.network.stored_tensors import stored, stored_dtype

__all__ = ["CheckpointPlan", "plan_checkpoint", "planned_value", "untied_parameters"]


@dataclass(frozen=True)
class CheckpointPlan:
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


@contextlib.contextmanager
def untied_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the context, give each use of a shared parameter a parameter of its own that has the same memory."""
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


def plan_checkpoint(model: Any, changes: Mapping[str, Change], *, untie: bool) -> CheckpointPlan:
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
        config, turned = _with_biases(model, config, missing)
        switches |= dict.fromkeys(turned, True)
    made = _empty(type(model), config)
    again = _shared(made, changes)
    if again:
        raise SiteError(f"{type(model).__name__} ties `{next(iter(again))}` whatever its config says; steer with hooks")
    names = _written(made)
    added = tuple(sorted(set(names) - present))
    return CheckpointPlan(config, names, changes, added, tuple(sorted(shared.values())), switches)


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


def _with_biases(model: Any, config: Any, missing: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """The config with the fewest switches under which the model has the missing biases and no other new weights.

    Raises:
        SiteError: no switches do that.
    """
    present = set(model.state_dict())
    text = config.get_text_config()
    switches = sorted(name for name, value in text.to_dict().items() if value is False and "bias" in name)
    for turned in (some for count in range(1, len(switches) + 1) for some in combinations(switches, count)):
        tried = copy.deepcopy(config)
        for switch in turned:
            setattr(tried.get_text_config(), switch, True)
        try:
            names = set(_empty(type(model), tried).state_dict())
        except (TypeError, ValueError, NotImplementedError):
            continue
        if names >= present.union(missing) and all(name.endswith("bias") for name in names - present):
            return tried, turned
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


def planned_value(model: nn.Module, plan: CheckpointPlan, name: str) -> Tensor:
    """One tensor of the checkpoint; changed in float32 and rounded once.

    Args:
        model: with the old values.
        plan: what the checkpoint holds.
        name: of a parameter or buffer.

    Returns:
        [...] in the dtype that is stored.
    """
    old, dtype = stored(model, name), stored_dtype(model, name)
    change = plan.changes.get(name)
    if change is not None:
        return change.rounded(old, dtype)
    return torch.zeros(plan.shapes[name], dtype=dtype) if old is None else old
