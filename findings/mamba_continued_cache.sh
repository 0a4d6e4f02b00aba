#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: a cache that holds a prefix can be continued by the rest of the text, in one pass or token by token, as with
#   attention caches, and gives the logits of one pass over the whole text.
# Seen: token by token it does. Five tokens in one pass run without a word and give other logits. The cache knows no
#   length either: get_seq_length() raises ValueError.
# Output seen:
#   relative error, one token at a time: 1.4e-07
#   relative error, five tokens at once: 3.5e-04
#   get_seq_length: ValueError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2)).eval()
ids = torch.arange(1, 11)[None]


def continued(width):
    """Logits of the last five tokens, fed `width` at a time to a cache that holds the first five."""
    cache = model(ids[:, :5], use_cache=True).cache_params
    parts = [model(part, cache_params=cache, use_cache=True).logits for part in ids[:, 5:].split(width, dim=1)]
    return torch.cat(parts, dim=1), cache


with torch.no_grad():
    whole = model(ids).logits[:, 5:]
    (single, cache), (chunk, _) = continued(1), continued(5)
errors = [float((found - whole).norm() / whole.norm()) for found in (single, chunk)]
print(f"relative error, one token at a time: {errors[0]:.1e}")
print(f"relative error, five tokens at once: {errors[1]:.1e}")
try:
    length = cache.get_seq_length()
except ValueError:
    length = "ValueError"
print(f"get_seq_length: {length}")
assert errors[0] < 1e-6 and errors[1] > 1e-4 and length == "ValueError", "the behaviour has changed"
PYTHON
