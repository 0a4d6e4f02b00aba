"""A model whose every number is known: it prefers what it is steered to, and falls into a loop above a known strength.

A Llama without working blocks: the residual stream is the token's embedding, one dimension for every token and one more
for the trait. Unsteered, every token predicts its successor. Letters A-M carry the trait, N-Z its opposite; adding the
trait makes A-M likelier, N-Z less likely, and above `LOOPS_ABOVE` the word " a" likelier than any successor.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from tests.families import QUIET
from tests.tiny_tokenizers import CHATML, byte_tokenizer

LOOPS_ABOVE = 2.0
NEXT, LIKED, CONSTANT = 5.0, 0.3, 10.0
WIDTH = 384
LETTERS = 6
LIKED_LETTERS, OTHER_LETTERS = "ABCDEFGHIJKLM", "NOPQRSTUVWXYZ"


def answer(letters: str) -> str:
    """An answer whose letters alone carry the trait: it begins and ends as all others do.

    Each letter stands after a token without the trait, so that what is predicted there is steered and nothing else.
    """
    return "so " + "".join(f"{letter}." for letter in letters)


def looping_model() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    tokenizer = byte_tokenizer(CHATML)
    config = tf.LlamaConfig(
        vocab_size=320,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **QUIET,
    )
    model = tf.LlamaForCausalLM(config).eval()
    trait, constant = WIDTH - 1, WIDTH - 2
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()
        head.zero_()
        embedding[:, constant] = CONSTANT  # so that the final norm divides all states by nearly the same
        for token in range(320):
            embedding[token, token] = 1.0
            head[(token + 7) % 320, token] = NEXT
        (stop,) = tokenizer(".", add_special_tokens=False)["input_ids"]
        for letters, sign in ((LIKED_LETTERS, 1.0), (OTHER_LETTERS, -1.0)):
            ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]
            embedding[ids, trait] = sign
            head[ids, trait] = LIKED * sign
            head[:, ids] = 0.0
            head[stop, ids] = 4 * NEXT  # after a letter comes the stop, whatever steers
        (loop,) = tokenizer(" a", add_special_tokens=False)["input_ids"]
        # Per token of an answer the two sides differ by this much in the trait; a successor has the logit NEXT.
        gap = 2 * LETTERS / len(tokenizer(answer("ABCDEF"), add_special_tokens=False)["input_ids"])
        head[loop, trait] = NEXT / (gap * LOOPS_ABOVE)
    return model, tokenizer


def trait_data(items: int, *, seed: int = 0) -> ContrastSet:
    """Pairs of answers of equal length: letters with the trait against letters with its opposite."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(items):
        picks = torch.randint(13, (LETTERS,), generator=generator).tolist()
        sides = [answer("".join(alphabet[one] for one in picks)) for alphabet in (LIKED_LETTERS, OTHER_LETTERS)]
        rows.append((f"Item {number}?", *sides))
    return ContrastSet.from_answers(rows)


def swapped(data: ContrastSet, *, seed: int = 0) -> ContrastSet:
    """The same pairs with labels drawn by lot: a contrast of pure noise."""
    generator = torch.Generator().manual_seed(seed)
    swap = torch.rand(len(data), generator=generator) < 0.5
    rows = []
    for number, (positive, negative) in enumerate(zip(data.positive, data.negative, strict=True)):
        answers = (positive.answer, negative.answer) if swap[number] else (negative.answer, positive.answer)
        rows.append((positive.prompt, *answers))
    return ContrastSet.from_answers(rows)


NEUTRAL = [
    Conversation(f"Number {number}?", answer=answer) for number, answer in enumerate(("xyz 123", "uvw 456", "rst 7"))
]
