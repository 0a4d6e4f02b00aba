"""`added`: a model with a task vector in its weights, put back bit for bit."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError, StrengthError
from steerkit.methods._protocols import WeightUpdate
from steerkit.network.decoder import inner_model
from steerkit.network.plain_weights import refuse_packed
from steerkit.steering.weights import written
from steerkit.tuning.task_vector import TaskVector

__all__ = ["added"]


@contextlib.contextmanager
def added(model: nn.Module, vector: TaskVector, scale: float = 1.0) -> Iterator[None]:
    """Add a task vector to a model's weights inside a `with` block; afterwards each weight is bitwise what it was.

    Each weight is changed in float32 and rounded once. Weights that are one stay one. At scale 0 nothing is written.

    Args:
        model: the transformers model that the vector's base is, in memory and not quantised.
        vector: the task vector.
        scale: what it is multiplied by; -1 takes it away from a finetuned model, and nothing is wrong with 0.4.

    Yields:
        Nothing.

    Raises:
        StrengthError: `scale` is not finite.
        ModelError: the model lacks a weight that differs or has another shape there, its weights are changed already,
            or a weight is offloaded or quantised.

    Example:
        with steerkit.tuning.added(model, -tau, 0.5):
            model.generate(**inputs)
    """
    if not math.isfinite(scale):
        raise StrengthError(f"the scale is {scale}; give a finite number")
    inner, scaled = inner_model(model), vector * scale
    refuse_packed(inner)
    updates = [
        WeightUpdate(name, functools.partial(_plus, scaled, name))
        for name in vector.shapes
        if scaled.touches(name) and _is_parameter(inner, name, vector.shapes[name])
    ]
    with written(inner, updates, "added", keeps_tied=True):
        yield


def _plus(vector: TaskVector, name: str, old: Tensor | None) -> Tensor:
    """A weight with its difference added."""
    assert old is not None  # or `_is_parameter` would have refused
    return vector.rows(name, old.reshape(old.shape or (1,)), 0).reshape(old.shape)


def _is_parameter(inner: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor that differs is a weight; a buffer is left alone.

    Raises:
        ModelError: the model has no such tensor, or one of another shape.
    """
    path, _, leaf = name.rpartition(".")
    try:
        owner = inner.get_submodule(path)
        value = getattr(getattr(owner, "base_layer", owner), leaf)
    except AttributeError:
        value = None
    if not isinstance(value, torch.Tensor):
        raise ModelError(
            f"the task vector changes {name}, which {type(inner).__name__} has not; give its own base model, or "
            "(where files split what the model stacks) a difference between models in memory"
        )
    if tuple(value.shape[1:]) != shape[1:] or (shape and value.shape[0] < shape[0]):
        raise ModelError(f"{name} is {list(value.shape)} in {type(inner).__name__} and differs in {list(shape)}")
    return isinstance(value, nn.Parameter)
