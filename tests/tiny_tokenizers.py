"""Small byte-level tokenizers with chat templates, built offline in milliseconds; every id is below 300.

Every byte is a token, so any text can be written. The merges join letters across words and line ends, as large
vocabularies do, so that a token may hold the end of a prompt together with the start of an answer.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
SPECIALS = (
    BOS,
    EOS,
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<think>",
    "</think>",
)
# "Ġ" is a space and "Ċ" a line end, as byte-level vocabularies write them.
MERGES = (
    "t h",
    "i n",
    "e r",
    "th e",
    "Ġ t",
    "Ġ a",
    "Ġ Ġ",
    "Ċ Ċ",
    "Ċ H",
    "Ċ I",
    ". Ġ",
    "? Ġ",
    "e Ġ",
    "] Ġ",
    "Ġ H",
    "? Y",
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# No generation prompt; the answer stands after a space, and the template brings the BOS, one for each user turn.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Drops what earlier assistant turns thought; `enable_thinking=False` begins the answer after an empty thought.
THINKING = (
    "{% set last = namespace(user=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set last.user = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and loop.index0 < last.user %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

# Refuses the system role and calls the assistant "model".
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "thinking": THINKING, "gemma": GEMMA}


def byte_tokenizer(
    template: str | None = CHATML,
    bos: bool = True,
    *,
    eos: bool = False,
    merges: bool = True,
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer without a pad token.

    Args:
        template: its chat template; None for a base model.
        bos: put a BOS before a text that is tokenised with special tokens.
        eos: put an EOS after it.
        merges: join common neighbours; without them every byte is one token.
        trim_offsets: leave spaces out of the character offsets, as GPT-NeoX tokenizers do.
    """
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [tuple(merge.split()) for merge in MERGES] if merges else []
    for left, right in pairs:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    single = " ".join([BOS] * bos + ["$A"] + [EOS] * eos)
    added = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single=single, special_tokens=added),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = template
    return tokenizer
