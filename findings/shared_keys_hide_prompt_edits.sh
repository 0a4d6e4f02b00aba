#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: a change of the residual stream at earlier tokens reaches later tokens through the attention of every block
# behind it, as in a Llama.
# Seen: Gemma 4's last `num_kv_shared_layers` blocks read the keys and values of earlier blocks and make none of their own.
# What is added to the stream of earlier tokens behind the last block with keys of its own reaches no later token: the
# logits stay bitwise the same. One block earlier it does reach them.
# Output seen:
#   blocks with keys of their own: 0, 1; change of the last token's logits when the tokens before it are changed
#   behind block 0: 2.46
#   behind block 1: 0.00
#   behind block 2: 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

torch.manual_seed(0)
config = Gemma4TextConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64,
    initializer_range=0.3, num_kv_shared_layers=2, sliding_window=16,
    layer_types=["sliding_attention", "full_attention"] * 2,
)  # fmt: skip
model = Gemma4ForCausalLM(config).eval()
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    plain = model(ids).logits[0, -1]
changes = {}
for block in (0, 1, 2):

    def add(_module, _args, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[:, :-1] += 3.0
        return (h, *output[1:]) if isinstance(output, tuple) else h

    handle = model.model.layers[block].register_forward_hook(add)
    with torch.no_grad():
        changes[block] = (model(ids).logits[0, -1] - plain).abs().max().item()
    handle.remove()
print("blocks with keys of their own: 0, 1; change of the last token's logits when the tokens before it are changed")
for block, change in changes.items():
    print(f"behind block {block}: {change:.2f}")
assert changes[0] > 1e-3 and changes[1] == changes[2] == 0.0, "the behaviour has changed"
PYTHON
