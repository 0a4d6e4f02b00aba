"""A vector as weights: `baking` writes a checkpoint, `peft` an adapter, `gguf` a control vector for llama.cpp; `verify`
compares what was written with the hooks, `checkpoint` stores tensors, `weights_card` says what was done.
"""

from __future__ import annotations

from steerkit.export.baking import bake
from steerkit.export.gguf import write_control_vector
from steerkit.export.peft import write_adapter
from steerkit.export.verification import Verification, verify

__all__ = ["Verification", "bake", "verify", "write_adapter", "write_control_vector"]
