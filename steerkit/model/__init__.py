"""Loading a model and its tokenizer.

`loading` tells what a name means, `aliases` are the short names, `pretrained` loads from this machine, `conversion`
turns the embedded model into one that loads fast, `quiet` keeps transformers' messages away.
"""

from __future__ import annotations

from steerkit.model.aliases import ALIASES, Embedded, hub_id
from steerkit.model.loading import load_model
from steerkit.model.quiet import quiet

__all__ = ["ALIASES", "Embedded", "hub_id", "load_model", "quiet"]
