#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: a forward hook that keeps the tensor a module returned, without cloning it, holds what the module returned.
# Seen: Falcon's block with parallel attention adds the attention's output into the MLP's output in place, after the
#   MLP's hooks have run. The kept tensor then holds attention and MLP. A reader has to clone or reduce inside the hook.
# Output seen:
#   kept tensor is what the MLP returned: False
#   kept tensor is MLP + attention: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import FalconConfig, FalconForCausalLM

torch.manual_seed(0)
config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
model = FalconForCausalLM(config).eval()
block, seen = model.transformer.h[0], {}
block.mlp.register_forward_hook(lambda module, inputs, output: seen.update(kept=output, copy=output.clone()))
block.self_attention.register_forward_hook(lambda module, inputs, output: seen.update(attention=output[0].clone()))
with torch.no_grad():
    model(torch.arange(1, 9)[None])
unchanged = torch.equal(seen["kept"], seen["copy"])
both = torch.equal(seen["kept"], seen["copy"] + seen["attention"])
print("kept tensor is what the MLP returned:", unchanged)
print("kept tensor is MLP + attention:", both)
assert both and not unchanged, "the behaviour has changed"
PYTHON
