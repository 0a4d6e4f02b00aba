#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: `generate_batch(persistent_manager=True)` keeps compiled graphs and buffers for the next call; after the model's
#   weights have been changed in place, the next call answers as the model is now.
# Seen: the kept manager also keeps the key and value blocks of finished prompts and finds them again by token ids alone. A
#   prompt that begins alike is answered from blocks of the old weights (or of hooks that have gone), without a word.
#   `destroy_cached_continuous_batching_manager()`, or `allow_block_sharing=False`, gives the right answer.
# Output seen:
#   before, kept manager and generate agree: True
#   after the weights have changed, kept manager and generate agree: False
#   after the weights have changed, new manager and generate agree: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import logging

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes, initializer_range=0.5)).eval()
prompt = torch.randint(1, 300, (72,)).tolist()
settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
paged = ContinuousBatchingConfig(block_size=32, num_blocks=16, max_batch_tokens=128)


def batched(keep):
    options = {"generation_config": settings, "continuous_batching_config": paged, "warmup": False}
    (answer,) = model.generate_batch([prompt], persistent_manager=keep, **options).values()
    return answer


def alone():
    return model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()


print("before, kept manager and generate agree:", batched(True).generated_tokens == alone())
with torch.no_grad():
    for block in model.model.layers:
        block.self_attn.k_proj.weight.neg_()
kept, fresh = batched(True).generated_tokens, alone()
print("after the weights have changed, kept manager and generate agree:", kept == fresh)
model.destroy_cached_continuous_batching_manager()
new = batched(False).generated_tokens
print("after the weights have changed, new manager and generate agree:", new == fresh)
assert kept != fresh and new == fresh, "the behaviour has changed"
PYTHON
