#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0.
# Expected: 5.24 calls caches `cache` and still takes `past_key_values` with a warning, so what looks for the old name
#   goes on working until 5.40.
# Seen: the rename happens inside of `forward`, so hooks see whatever name the caller used. In `generate` no hook sees
#   `past_key_values` any more, without a warning: code that reads it there finds no cache. In a caller's own loop with
#   the old name, hooks of the model still see the old one, and hooks of its blocks the new one.
# Output seen:
#   generate: {'model': ['cache'], 'block': ['cache']}
#   a loop that passes past_key_values: {'model': ['past_key_values'], 'block': ['cache']}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(1, 9)[None]


def names(run):
    """What the cache is called in the arguments that hooks of the model and of its first block see."""
    seen = {"model": set(), "block": set()}

    def look(where):
        return lambda module, args, kwargs: seen[where].update({"cache", "past_key_values"} & set(kwargs))

    handles = [
        module.register_forward_pre_hook(look(where), with_kwargs=True)
        for where, module in (("model", model), ("block", model.model.layers[0]))
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {where: sorted(found) for where, found in seen.items()}


def loop():
    past = model(ids, use_cache=True).past_key_values
    model(ids[:, -1:], past_key_values=past)


generated = names(lambda: model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0))
own = names(loop)
print("generate:", generated)
print("a loop that passes past_key_values:", own)
assert generated == {"model": ["cache"], "block": ["cache"]}, "the behaviour has changed"
assert own == {"model": ["past_key_values"], "block": ["cache"]}, "the behaviour has changed"
PYTHON
