"""`edited`: run a model with its weights changed, and put them back bit for bit. The only file that changes weights.

What is to be changed comes from `exact_updates`, which the exports that write weights elsewhere use as well.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerkit._support.precision import full_precision
from steerkit.errors import ModelError, ScopeError, StrengthError, VectorFileError
from steerkit.methods._protocols import HasWeightForm, WeightUpdate
from steerkit.methods._registry import default_strength, method_of
from steerkit.network.decoder import inner_model
from steerkit.network.plain_weights import is_plain, refuse_packed
from steerkit.steering.shared_prefixes import drop_shared_prefixes, refuse_running_batches
from steerkit.steering.strengths import strength_value, vectors_of
from steerkit.tokens.clock import Hook
from steerkit.vector.applying import varying
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["edited", "exact_strength", "exact_updates", "written"]


class _Edited(Hook):
    """Marks a model whose weights are changed at present."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        return None


@contextlib.contextmanager
def edited(model: nn.Module, vector: SteeringVector, strength: float | Tensor | None = None) -> Iterator[None]:
    """Apply a method's exact weight form inside a `with` block.

    Every token is written, so the vector's scope has to be `all` (`vector.at(scope="all")`). Within the block no hook
    changes anything (one inert hook marks the model), a bias that the model lacked stands in its `state_dict`, and a
    weight that another part of the model shares is shared no more: only the part the method names is changed.
    Afterwards each weight is bitwise what it was.

    Args:
        model: the transformers model, its weights in memory and not quantised.
        vector: the vector.
        strength: one number [] in the vector's paper unit; None takes the file's suggested strength, else the
            method's default.

    Yields:
        Nothing.

    Raises:
        VectorFileError: this is no vector, or several.
        VectorMismatchError: the vector was fitted on a model of another width or depth.
        ScopeError: the vector's scope is not `all`.
        StrengthError: the method has no exact weight form, or the strength is not one finite number.
        SiteError: this model has no place for the exact form.
        ModelError: the model is edited already, continuous batching runs on it and shares prompt blocks, or a weight is
            offloaded or quantised.
    """
    target = inner_model(model)
    _refuse_twice(target, "edited")
    listed = vectors_of(vector)
    if len(listed) > 1:
        raise VectorFileError(f"edited: got {len(listed)} vectors; give one, or write several with bake")
    updates = exact_updates(model, listed, strength)
    with written(target, updates, "edited"):
        yield


@contextlib.contextmanager
def written(
    target: nn.Module, updates: Sequence[WeightUpdate], what: str, *, keeps_tied: bool = False
) -> Iterator[None]:
    """Change weights inside a `with` block, and put them back bit for bit.

    Args:
        target: the transformers model, out of any wrapper.
        updates: the changes, made in this order.
        what: who asks, for messages.
        keeps_tied: a weight that another part shares is changed for both; else it is shared no more.

    Yields:
        Nothing.

    Raises:
        ModelError: the model's weights are changed already, continuous batching runs on it and shares prompt blocks, or
            a weight is offloaded or quantised.
    """
    _refuse_twice(target, what)
    planned = [(*_parameter(target, update.name), update.update) for update in updates]
    uses = Counter(id(parameter) for _, parameter in target.named_parameters(remove_duplicate=False))
    refuse_running_batches(target, what)
    # Each step back is noted before its step is made, and all are taken even if one fails.
    with contextlib.ExitStack() as undo:
        undo.callback(drop_shared_prefixes, target)
        drop_shared_prefixes(target)
        undo.callback(_unmark, target)
        target.register_forward_pre_hook(_Edited())
        with torch.no_grad(), full_precision():
            for owner, leaf, update in planned:
                _write(owner, leaf, update, not keeps_tied and uses[id(getattr(owner, leaf))] > 1, undo)
        yield
    refuse_running_batches(target, f"end of {what}")


def _refuse_twice(target: nn.Module, what: str) -> None:
    """Refuse a model whose weights are changed at present.

    Raises:
        ModelError: they are.
    """
    if any(isinstance(hook, _Edited) for hook in target._forward_pre_hooks.values()):
        raise ModelError(f"{what}: this model's weights are edited already; leave that context first")


def exact_updates(
    model: nn.Module, vectors: SteeringVector | Sequence[SteeringVector], strength: float | Tensor | None = None
) -> list[WeightUpdate]:
    """The weight form of vectors, for every token.

    Args:
        model: the transformers model, wrapped or not.
        vectors: one vector or several; where two change one weight, the later changes what the earlier made.
        strength: one number [] in the paper unit, as for `edited`; a vector's own (`vector.at(...)`) comes first.

    Returns:
        The changes, to be made in this order.

    Raises:
        VectorMismatchError: a vector was fitted on a model of another width or depth.
        ScopeError: a vector's scope is not `all`.
        StrengthError: a method has no exact weight form, or the strength is not one finite number.
        SiteError: this model has no place for the exact form.
        ModelError: weights of the model are no parameters.
    """
    updates: list[WeightUpdate] = []
    refuse_packed(inner_model(model))
    for vector in vectors_of(vectors):
        vector.check(model)
        value = exact_strength(vector, strength)
        method = method_of(vector)
        assert isinstance(method, HasWeightForm)  # or `exact_strength` would have refused
        updates += method.weight_updates(inner_model(model), vector, value)
    return updates


def exact_strength(vector: SteeringVector, strength: float | Tensor | None = None) -> float:
    """The strength at which a vector goes into weights. Needs no model, so that a command can ask before loading one.

    Args:
        vector: the vector.
        strength: one number [], as for `exact_updates`.

    Raises:
        ScopeError: the vector's scope is not `all`.
        StrengthError: the method has no exact weight form, another unit than paper, a strength that
            is not the same at every token, or not one finite number.
    """
    method = method_of(vector)
    if not isinstance(method, HasWeightForm):
        raise StrengthError(f"{method.name} has no exact weight form; steer with hooks instead")
    if vector.scope != "all":
        accept = "accept that with vector.at(scope='all') or --scope all, or " if "all" in method.scopes else ""
        raise ScopeError(
            f"weights act on every token, this vector was made for '{vector.scope}', which is something else; {accept}"
            "steer with hooks"
        )
    if changing := varying(vector):
        raise StrengthError(f"what differs from token to token ({changing}) has no weight form; steer with hooks")
    if vector.unit != "paper":
        raise StrengthError(
            f"weights count in unit 'paper', the vector in '{vector.unit}'; use vector.at(unit='paper')"
        )
    given = vector.strength if vector.strength is not None else strength
    value = strength_value(default_strength(vector) if given is None else given)
    if isinstance(value, tuple):
        raise StrengthError(f"got {len(value)} strengths, one for each row; weights take one finite number")
    return value


def _parameter(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter (or lacks that bias), checked to be writable.

    Raises:
        ModelError: the weight is offloaded or quantised.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    owner = getattr(owner, "base_layer", owner)  # a LoRA layer adds to what its base layer gives
    if not is_plain(owner, leaf):
        kind = f"{type(owner).__module__.partition('.')[0]}.{type(owner).__name__}"
        raise ModelError(
            f"edited: {name} is quantised or packed ({kind}), so a change of it would be rounded or lost; steer with "
            "hooks, or load the model unquantised"
        )
    if (owner.weight if getattr(owner, leaf) is None else getattr(owner, leaf)).is_meta:
        raise ModelError(f"edited: {name} is offloaded and not in memory; load the model without offload")
    return owner, leaf


def _wide(old: Tensor) -> Tensor:
    """A copy in float32 at least, in which the update is computed."""
    return old.detach().to(torch.promote_types(old.dtype, torch.float32), copy=True)


def _write(
    owner: nn.Module, leaf: str, update: Callable[[Tensor | None], Tensor], shared: bool, undo: contextlib.ExitStack
) -> None:
    """Write one new weight, when what takes it back has been noted."""
    old: nn.Parameter | None = getattr(owner, leaf)
    if old is None:
        like: Tensor = owner.weight  # type: ignore[assignment]
        new = nn.Parameter(update(None).to(like), requires_grad=False)
    else:
        values = update(_wide(old)).to(old.dtype)
        if not shared:
            undo.callback(_put_back, old, old.detach().clone())
            old.copy_(values)
            return
        new = nn.Parameter(values, requires_grad=old.requires_grad)
    undo.callback(setattr, owner, leaf, old)
    setattr(owner, leaf, new)


@torch.no_grad()
def _put_back(parameter: nn.Parameter, kept: Tensor) -> None:
    """Give a weight the values it had."""
    parameter.copy_(kept)


def _unmark(model: nn.Module) -> None:
    """Take the mark off; one that was never set is no matter."""
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Edited)]:
        del hooks[key]
