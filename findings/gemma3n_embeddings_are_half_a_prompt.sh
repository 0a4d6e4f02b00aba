#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
# Expected: `generate(inputs_embeds=...)` with the embeddings of some ids reads the same prompt as `generate(input_ids=...)`.
# Seen: Gemma 3n looks ids up in a second table, whose rows go into every block. Without ids that part is left out, with
#   no warning, so the prompt is read by what is another model, while generated tokens have both parts. The forward pass
#   takes the rows as `per_layer_inputs` and then agrees; `generate` refuses that argument, so there is no way with it.
# Output seen:
#   one pass, embeddings alone: logits differ by 0.398 of the largest
#   one pass, per_layer_inputs beside them: 0.0e+00
#   generate, embeddings alone: the first step differs by 0.398 of the largest, warnings: 0
#   generate, per_layer_inputs beside them: ValueError: The following `model_kwargs` are not used by the model:
#     ['per_layer_inputs']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

torch.manual_seed(0)
config = Gemma3nTextConfig(
    vocab_size=64,
    vocab_size_per_layer_input=64,
    hidden_size=32,
    hidden_size_per_layer_input=8,
    intermediate_size=[64] * 4,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_kv_shared_layers=0,
    laurel_rank=4,
    activation_sparsity_pattern=[0.0] * 4,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
model = Gemma3nForCausalLM(config).eval()
for weight in model.parameters():
    torch.nn.init.normal_(weight, std=0.3)
ids = torch.tensor([[3, 9, 27, 17]])
embeddings = model.get_input_embeddings()(ids).detach()
rows = model.model.get_per_layer_inputs(ids).detach()


def off(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


with torch.no_grad():
    expected = model(input_ids=ids, use_cache=False).logits
    alone = off(model(inputs_embeds=embeddings, use_cache=False).logits, expected)
    both = off(model(inputs_embeds=embeddings, per_layer_inputs=rows, use_cache=False).logits, expected)
print(f"one pass, embeddings alone: logits differ by {alone:.3f} of the largest")
print(f"one pass, per_layer_inputs beside them: {both:.1e}")

options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
options |= {"output_logits": True, "return_dict_in_generate": True}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    steps = model.generate(inputs_embeds=embeddings, **options).logits
told = [one for one in caught if "per_layer" in str(one.message)]
generated = off(steps[0], model.generate(input_ids=ids, **options).logits[0])
print(f"generate, embeddings alone: the first step differs by {generated:.3f} of the largest, warnings: {len(told)}")
try:
    model.generate(inputs_embeds=embeddings, per_layer_inputs=rows, **options)
    refused = ""
except ValueError as error:
    refused = str(error)
print("generate, per_layer_inputs beside them: ValueError:", refused.split(" (note")[0])
assert alone > 0.05 and generated > 0.05 and not told, "the behaviour has changed"
assert both < 1e-5, "the behaviour has changed"
assert "per_layer_inputs" in refused, "the behaviour has changed"
PYTHON
