#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: a model that runs in float32 runs in float64 too, as Llama does; float64 is what gradients are checked in.
# Seen: models with routed experts compute them with `grouped_mm` by default, which takes no doubles. `eager` experts do.
# Output seen:
#   Llama in float64: torch.float64
#   Mixtral in float64, experts_implementation=grouped_mm: RuntimeError: Expected mat_a to be Float32, BFloat16 or Float16
#     matrix, got Double
#   Mixtral in float64, experts_implementation=eager: torch.float64
#   by default: grouped_mm
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes["num_key_value_heads"] = 4
ids = torch.arange(1, 9)[None]
dense = LlamaForCausalLM(LlamaConfig(**sizes)).double().eval()
print("Llama in float64:", dense(ids).logits.dtype)
routed = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).double().eval()
seen = {}
for how in ("grouped_mm", "eager"):
    routed.set_experts_implementation(how)
    try:
        seen[how] = str(routed(ids).logits.dtype)
    except RuntimeError as error:
        seen[how] = f"RuntimeError: {str(error).splitlines()[0]}"
    print(f"Mixtral in float64, experts_implementation={how}:", seen[how])
default = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).config._experts_implementation
print("by default:", default)
assert seen["grouped_mm"].startswith("RuntimeError") and seen["eager"] == "torch.float64", "the behaviour has changed"
assert default == "grouped_mm", "the behaviour has changed"
PYTHON
