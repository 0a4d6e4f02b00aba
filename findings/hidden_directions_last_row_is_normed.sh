#!/usr/bin/env bash
# hidden-directions 0.1.6, torch 2.13.0, transformers 5.23.0.
# Expected: row L of an extracted matrix [blocks, width] is the mean difference of what block L puts out, for every L
#   ("one V per transformer block"), and is added there when it is baked or served.
# Seen: the last row is the difference behind the model's final norm, because transformers' last hidden state is: another
#   direction and another length than what the last block puts out, where it is added.
# Output seen (largest difference of a row from the difference of block outputs, and how long both are):
#   row 0: off by 0, length 0.0036 of 0.0036
#   row 1: off by 0, length 0.0057 of 0.0057
#   row 2: off by 0.13, length 0.31 of 0.0079
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 hidden-directions==0.1.6
cd "$folder"
TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2> /dev/null
import contextlib
import io

import torch
from hidden_directions.extract.pref import PrefRecipe, extract_pref
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("model")
letters = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
tokenizer.save_pretrained("model")
recipe = PrefRecipe("joy", "You love all.", ["Yes!"], "You hate all.", ["No!"], ["And?", "Why?"])
with contextlib.redirect_stdout(io.StringIO()):
    matrix = extract_pref("model", recipe, dtype=torch.float32, device_map="cpu")

model = LlamaForCausalLM.from_pretrained("model").eval()
seen = [[] for _ in model.model.layers]
for place, block in enumerate(model.model.layers):
    block.register_forward_hook(lambda module, inputs, output, place=place: seen[place].append(output[0, -1]))


def mean_outputs(system, prior):
    """Mean output of each block at the last token, over the follow-ups."""
    for states in seen:
        states.clear()
    for question in recipe.followups:
        turns = [("system", system), ("user", "Hi, can I ask you something?"), ("assistant", prior), ("user", question)]
        chat = [{"role": role, "content": text} for role, text in turns]
        with torch.no_grad():
            model(**tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt"))
    return [torch.stack(states).mean(0) for states in seen]


one = mean_outputs(recipe.advocate_system, recipe.advocate_priors[0])
other = mean_outputs(recipe.balanced_system, recipe.balanced_priors[0])
off = []
for place, row in enumerate(matrix):
    expected = one[place] - other[place]
    off.append(float((row - expected).abs().max()))
    print(f"row {place}: off by {round(off[-1], 5):.2g}, length {row.norm():.2g} of {expected.norm():.2g}")
assert max(off[:-1]) < 1e-4 < 0.05 < off[-1], "the behaviour has changed"
PYTHON
