"""Loading a model and its tokenizer.

`loading` tells what a name means, `aliases` are the short names, `placement` is where a model goes and in which form,
`weights` which weights it holds, `pretrained` loads from this machine, `conversion` turns .gguf files into folders that
load fast, `quiet` keeps transformers' messages away.
"""

from __future__ import annotations

from steerkit.model.aliases import ALIASES, Embedded, embedded_gguf, hub_id
from steerkit.model.conversion import converted
from steerkit.model.loading import load_model
from steerkit.model.placement import describe
from steerkit.model.quiet import quiet
from steerkit.model.weights import Weights, weights_of

__all__ = [
    "ALIASES",
    "Embedded",
    "Weights",
    "converted",
    "describe",
    "embedded_gguf",
    "hub_id",
    "load_model",
    "quiet",
    "weights_of",
]
