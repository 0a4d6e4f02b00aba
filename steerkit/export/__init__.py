"""A vector as weights, for programs that know nothing of steering.

`baking` writes a checkpoint, `baking_on_disk` one that may be larger than memory, `peft` a LoRA adapter, `gguf` a
control vector for llama.cpp and `gguf_lora` an adapter for it, `svec` the JSON of other programs. `verification`
compares what was written with the hooks, `weights_card` says in Markdown what was done.
"""

from __future__ import annotations

from steerkit.export.baking import bake
from steerkit.export.baking_on_disk import bake_on_disk
from steerkit.export.gguf import write_control_vector
from steerkit.export.gguf_lora import write_gguf_lora
from steerkit.export.peft import write_adapter
from steerkit.export.svec import write_svec
from steerkit.export.verification import Verification, verify

__all__ = [
    "Verification",
    "bake",
    "bake_on_disk",
    "verify",
    "write_adapter",
    "write_control_vector",
    "write_gguf_lora",
    "write_svec",
]
