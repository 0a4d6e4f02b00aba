"""Every method there is, with the settings that it cannot be fitted without on the tiny models."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from steerkit.methods import Method
from steerkit.methods import _registry as registry
from steerkit.network.sites import Site

_FOLDER = tempfile.TemporaryDirectory(prefix="steerkit-ready-")


@functools.cache
def dictionary_path(width: int = 32, latents: int = 64, layer: int = 1) -> str:
    """A random dictionary for the tiny models, whose latents fire on their activations."""
    from tests.dictionary.made import made

    one = made("relu", site=Site(layer), width=width, latents=latents, encoder_bias=torch.zeros(latents))
    return str(one.save(Path(_FOLDER.name, f"{width}-{latents}-{layer}.safetensors")))


def settings_of(name: str, layer: int = 1) -> dict[str, Any]:
    """What a method needs besides its defaults; nothing for most."""
    return {"dictionary": dictionary_path(layer=layer)} if name == "latent" else {}


def ready(name: str, layer: int = 1) -> Method:
    """The method of that name, as it can be fitted on the tiny models."""
    return registry.resolve(name).from_settings(settings_of(name, layer))
