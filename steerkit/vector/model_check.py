"""Whether a vector can steer a model: refused where it cannot, warned of where it was fitted on another one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from steerkit.errors import VectorMismatchError
from steerkit.network.decoder import inner_model
from steerkit.network.weight_digests import check_weights
from steerkit.vector.model_identity import model_facts, same_id

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["check_model", "warn_of_difference"]

_COMPARED: Mapping[str, str] = MappingProxyType(
    {
        "model_type": "model type",
        "model_id": "model",
        "model_revision": "revision",
        "chat_template_sha256": "the chat template with digest",
    }
)


def check_model(vector: SteeringVector, model: nn.Module, tokenizer: Any) -> None:
    """Refuse a model that a vector cannot steer; warn of one it was not fitted on.

    Args:
        vector: the vector.
        model: a transformers model, wrapped or not.
        tokenizer: its tokenizer, to compare chat templates; None compares none.

    Raises:
        VectorMismatchError: the model has another width or depth, or other weights than the vector is tied to.
    """
    inner = inner_model(model)
    facts = model_facts(model, tokenizer)
    width, layers = facts["hidden_size"], facts["num_layers"]
    if (width, layers) != (vector.hidden_size, vector.num_layers):
        raise VectorMismatchError(
            f"vector fitted on {vector.model_type} ({vector.num_layers} layers, width {vector.hidden_size}) cannot "
            f"steer {type(inner).__name__} ({layers} layers, width {width}): fit one on this model, or load the other"
        )
    if vector.extra.get("weights"):
        check_weights(model, vector.extra["weights"])
    for name in _COMPARED:
        warn_of_difference(vector, name, facts.get(name), stacklevel=4)


def warn_of_difference(vector: SteeringVector, name: str, theirs: str | None, *, stacklevel: int) -> None:
    """Warn where a model differs from the one a vector was fitted on, if both are known.

    Args:
        vector: the vector.
        name: the fact that is compared, a field of the vector.
        theirs: what it is in the model at hand.
        stacklevel: how many calls up the warning points.
    """
    mine = getattr(vector, name)
    if mine is None or theirs is None or mine == theirs or (name == "model_id" and same_id(mine, theirs)):
        return
    warnings.warn(
        f"the vector was fitted on {_COMPARED[name]} {mine!r}, this is {theirs!r}; steering may do something else here",
        stacklevel=stacklevel,
    )
