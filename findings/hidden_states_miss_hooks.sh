#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: a forward hook that returns another output of a block changes that block's entry in `hidden_states` and all
#   later ones.
# Seen: the first call with output_hidden_states=True installs hooks of its own on the blocks, and they stay. A hook
#   registered after that call runs behind them: the block's own entry shows the output without the change, while the
#   rest of the model is computed with it. Registered with prepend=True it is reported.
# Output seen (entries of a model with three blocks, 0 is the embedding; the hook is on the first block):
#   hooks on the first block before and after the first call: 0 1
#   entries changed by a hook registered later: [2, 3]
#   entries changed by a hook with prepend=True: [1, 2, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()
block = model.model.layers[0]


def states():
    with torch.no_grad():
        return model(torch.arange(1, 9)[None], output_hidden_states=True).hidden_states


def changed(prepend):
    """Entries of `hidden_states` that differ from those without the hook."""
    handle = block.register_forward_hook(lambda module, inputs, output: output + 1.0, prepend=prepend)
    found = [place for place, (a, b) in enumerate(zip(plain, states())) if not torch.equal(a, b)]
    handle.remove()
    return found


before = len(block._forward_hooks)
plain = states()
after = len(block._forward_hooks)
later, first = changed(False), changed(True)
print("hooks on the first block before and after the first call:", before, after)
print("entries changed by a hook registered later:", later)
print("entries changed by a hook with prepend=True:", first)
assert (before, after, later, first) == (0, 1, [2, 3], [1, 2, 3]), "the behaviour has changed"
PYTHON
