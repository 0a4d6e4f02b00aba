#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: an error raised by a forward hook inside `generate_batch` reaches the caller, as it does from `generate`.
# Seen: the batch runs in a thread of its own, which catches it. The call returns as usual, each request with no tokens and
#   the error as a text in `.error`; who reads `generated_tokens` alone sees an empty answer.
# Output seen:
#   generate raises the hook's error: True
#   generate_batch answers: [] and keeps the error in .error: True
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
model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).eval()
settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
paged = ContinuousBatchingConfig(block_size=32, num_blocks=16, max_batch_tokens=128)


def refuse(module, inputs, output):
    raise ValueError("this module does not take such a pass")


model.model.layers[1].register_forward_hook(refuse)
try:
    model.generate(torch.tensor([[5, 6, 7]]), generation_config=settings)
    raised = False
except ValueError:
    raised = True
options = {"generation_config": settings, "continuous_batching_config": paged, "warmup": False}
(answer,) = model.generate_batch([[5, 6, 7]], **options).values()
print("generate raises the hook's error:", raised)
print("generate_batch answers:", answer.generated_tokens, "and keeps the error in .error:", answer.error is not None)
assert raised and answer.generated_tokens == [] and answer.error, "the behaviour has changed"
PYTHON
