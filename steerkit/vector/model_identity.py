"""What identifies a model and its tokenizer in a vector file: family, sizes, public name, chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from steerkit.errors import VectorMismatchError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["model_facts", "public_id", "same_id", "template_digest"]


def model_facts(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """What a vector file says about the model and tokenizer it belongs to.

    Args:
        model: a transformers model, wrapped or not.
        tokenizer: its tokenizer.

    Returns:
        `model_type`, `hidden_size`, `num_layers`, `model_id`, `model_revision` and `chat_template_sha256`, under the
        names of `SteeringVector`'s fields; None where unknown.

    Raises:
        VectorMismatchError: the model has no transformers config.
        SiteError: it is no decoder whose blocks can be found.
    """
    from steerkit.network.decoder import find_decoder, inner_model

    config: Any = getattr(inner_model(model), "config", None)
    if not hasattr(config, "get_text_config"):
        raise VectorMismatchError(f"{type(model).__name__} has no config of transformers; pass a model of transformers")
    decoder, text = find_decoder(model), config.get_text_config()
    name = getattr(config, "_name_or_path", None)
    return {
        "model_type": text.model_type,
        "hidden_size": text.hidden_size,
        "num_layers": decoder.num_layers,
        "model_id": public_id(name) if name else None,
        "model_revision": getattr(config, "_commit_hash", None),
        "chat_template_sha256": template_digest(tokenizer),
    }


def template_digest(tokenizer: Any) -> str | None:
    """The sha256, in hex, of a tokenizer's chat template; None where it has none.

    Args:
        tokenizer: of any model.
    """
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def public_id(name: str) -> str:
    """A model's name without the place on this machine: a path gives its last part, a hub snapshot its repository.

    Args:
        name: a hub id or a path.
    """
    path = Path(name)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    if path.is_absolute() or name.startswith((".", "~")):
        return path.resolve().name or name
    return PureWindowsPath(name).name if PureWindowsPath(name).is_absolute() else name


def same_id(one: str, other: str) -> bool:
    """Whether two ids may be one model: `org/name`, and a local copy called `name`.

    Args:
        one: a public id.
        other: a public id.
    """
    return ("/" not in one or "/" not in other) and one.rsplit("/", 1)[-1] == other.rsplit("/", 1)[-1]
