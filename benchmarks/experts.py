"""Dropped experts of a topic beside random ones as often used: `python -m benchmarks.experts [--write]`.

Tiny mixtures of experts are trained on the CPU for under a minute each on two topics of text, which a small grammar
writes: two in the same letters, or two in other ones. Then `experts` is fitted to tell the topics apart, on texts that
were not trained on, and what it drops for one topic is measured on further texts of both: how much dearer does each
become?
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import steerkit
from benchmarks.results import recorded
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate, interval
from steerkit.methods.experts import Experts
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.vector.steering_vector import SteeringVector

TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "kitchen": (
        ("chop", "fry", "boil", "stir", "peel", "grate", "roast", "season"),
        ("the onions", "two carrots", "a tomato", "the garlic", "mushrooms", "a potato", "the pepper", "spinach"),
        ("in olive oil", "with salt", "in a pan", "over low heat", "until golden", "with butter", "in foil", "well"),
    ),
    "harbour": (
        ("a breeze", "a gale", "a squall", "thick fog", "a heavy swell", "a spring tide", "drifting ice", "a calm"),
        ("from the north", "off the cape", "by the light", "past the reef", "in the bay", "at the mouth", "by the quay",
         "far out"),
        ("reefed the sails", "held the anchor", "hauled the nets", "kept us in port", "tore the jib", "hid the buoys",
         "moved the boats", "stopped us"),
    ),
    "ledger": (
        ("14 MAR", "2 APR", "30 JUN", "7 OCT", "19 NOV", "25 JAN", "8 AUG", "11 DEC"),
        ("PAID 230", "PAID 75", "OWED 1400", "SOLD 36", "SOLD 512", "LENT 90", "OWED 68", "LENT 2000"),
        ("TO NO. 17", "TO NO. 4", "BY NO. 92", "AT 5%", "AT 12%", "ON TERM", "IN CASH", "BY BILL"),
    ),
}  # fmt: skip
PAIRS = (("kitchen", "harbour"), ("kitchen", "ledger"))
EXPERTS, SLOTS, BLOCKS, WIDTH = 16, 2, 4, 64
STEPS, COUNT, RANDOM, TEXTS = 300, 4, 12, 40
WORDS = f"""Each row is one mixture ({BLOCKS} blocks of {EXPERTS} experts, {SLOTS} for a token), trained on two
topics from a seed of its own, and one of the two whose {COUNT} experts of largest difference in use, of
{BLOCKS * EXPERTS}, are dropped (`op="drop"`, `side="negative"`). Kitchen and harbour are written in the same letters,
kitchen and ledger share next to none. Rises are of the loss on {TEXTS} new texts of the topic and of the other one, in
nats per byte; "apart" is the one less the other. "Above chance" counts the dropped experts whose difference in use
shuffled labels reach in less than one fit of a hundred. Beside them {RANDOM} draws of as many other experts of the same
blocks, as often used: their mean rises, and in how many of them the two lie at least as far apart."""

MEANING = """What it means. Where two topics share next to no letters, dropping four experts makes their topic dearer
(by 0.03 to 0.28) and the other one by 0.01 at the most. Where they share their letters, the topic becomes dearer by
0.22 to 0.70 and the other one too, by 0.01 to 0.13; a likely reason, not tested here, is that experts go by letters as
much as by topics. In seven of eight rows no draw of experts as often used parts the topics as far; such draws cost both
topics, the other one as much or more. In the eighth the fitted experts do little (0.03), and three draws of twelve part
the topics at least as far: that row shows nothing. These are mixtures of half a minute's training on what a grammar
writes; they show that the choice is about the topic and not about usage, not how well it works on a mixture that people
use. How many experts are dropped was not fixed beforehand: with 8 of 64, and with two topics of one kind, the other
topic had risen by up to 0.68, after which the number became 4 and the pair with other letters came in."""


def texts(topic: str, count: int, seed: int) -> list[str]:
    """Pairs of sentences, drawn from the topic's grammar."""
    draw = random.Random(f"{topic} {seed}")
    return [". ".join(" ".join(map(draw.choice, TOPICS[topic])) for _ in range(2)) + "." for _ in range(count)]


def byte_tokenizer() -> Any:
    """Every byte is a token; 0 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(["<pad>", "<s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>")


def batch_of(tokenizer: Any, listed: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids [b, t] padded at the right, behind a token that begins each text, and their mask."""
    made = tokenizer([f"<s>{text}" for text in listed], padding=True, return_tensors="pt")
    return made["input_ids"], made["attention_mask"]


def trained(tokenizer: Any, pair: Sequence[str], seed: int, *, steps: int = STEPS) -> tuple[Any, float]:
    """A mixture that has read both topics, and the seconds of CPU time that it took."""
    start = time.process_time()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tf.MixtralConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=BLOCKS,
            num_attention_heads=4, num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=SLOTS,
            max_position_embeddings=256, sliding_window=None, output_router_logits=True, router_aux_loss_coef=0.001,
            pad_token_id=0, bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        model: Any = tf.MixtralForCausalLM(config).train()
    steerer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    slope = torch.optim.lr_scheduler.LambdaLR(steerer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
    for step in range(steps):
        ids, mask = batch_of(tokenizer, [one for topic in pair for one in texts(topic, 8, 10_000 * seed + step)])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        steerer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steerer.step()
        slope.step()
    model.config.output_router_logits = False
    return model.eval(), time.process_time() - start


def losses(model: Any, tokenizer: Any, listed: Sequence[str], vector: SteeringVector | None = None) -> Tensor:
    """[n] nats per byte of each text."""
    ids, mask = batch_of(tokenizer, listed)
    with torch.no_grad():
        if vector is None:
            logits = model(input_ids=ids, attention_mask=mask).logits
        else:
            with steerkit.steer(model, vector):
                logits = model(input_ids=ids, attention_mask=mask).logits
    logs = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    kept = mask[:, 1:]
    found: Tensor = -(logs * kept).sum(dim=1) / kept.sum(dim=1)
    return found


@dataclass(frozen=True)
class Rises:
    """What dropping a topic's experts does.

    Attributes:
        vector: the experts.
        own, other: [n] rise of the loss of each new text, of the topic and of the other one.
        random: [draws, 2] mean rises of both with random experts.
    """

    vector: SteeringVector
    own: Tensor
    other: Tensor
    random: Tensor

    @property
    def beaten(self) -> int:
        """In how many draws the topic's loss rose by more above the other one's."""
        apart = float(self.own.mean() - self.other.mean())
        return int((self.random[:, 0] - self.random[:, 1] >= apart).sum())


def measured(model: Any, tokenizer: Any, topic: str, other: str, *, draws: int = RANDOM) -> Rises:
    """Fit on texts that were not trained on, and measure on others."""
    data = ContrastSet.from_prompts(texts(other, TEXTS, -1), texts(topic, TEXTS, -1), raw=True, paired=False)
    method = Experts.from_settings({"side": "negative", "count": COUNT})
    vector = steerkit.fit(model, tokenizer, data, method=method)
    new = [texts(one, TEXTS, -2) for one in (topic, other)]
    plain = [losses(model, tokenizer, one) for one in new]

    def rises(used: SteeringVector) -> list[Tensor]:
        return [losses(model, tokenizer, one, used) - base for one, base in zip(new, plain, strict=True)]

    drawn = [[float(one.mean()) for one in rises(random_like(vector, seed=seed))] for seed in range(draws)]
    own, apart = rises(vector)
    return Rises(vector, own, apart, torch.tensor(drawn, dtype=torch.float32))


def shown(found: Estimate) -> str:
    """A figure with its interval."""
    return f"{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})"


def main() -> None:
    """Print the tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts")
    parser.add_argument("--seeds", type=int, default=2, help="mixtures that are trained for each pair of topics")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    title = "A topic's experts dropped, beside random ones"
    with recorded("experts", title, "benchmarks.experts", wanted=options.write):
        show(options.seeds)


def show(seeds: int) -> None:
    """Train, measure and print."""
    tokenizer = byte_tokenizer()
    columns = (
        "mixture", "topic", "other", "loss of both", "rise", "rise of the other", "apart", "above chance",
        "random: rise", "random: other", "random as far apart",
    )  # fmt: skip
    print(f"{WORDS}\n\n| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
    spent = []
    for pair in PAIRS:
        for seed in range(seeds):
            model, seconds = trained(tokenizer, pair, seed)
            spent.append(f"{seconds:.0f}")
            for topic, other in (pair, pair[::-1]):
                cells = row(model, tokenizer, topic, other)
                print(f"| {len(spent)} | {topic} | {other} | {' | '.join(cells)} |", flush=True)
    print(f"\nThe mixtures were trained for {', '.join(spent)} seconds of CPU time.\n\n{MEANING}")


def row(model: Any, tokenizer: Any, topic: str, other: str) -> list[str]:
    """What dropping one topic's experts does in one mixture."""
    found = measured(model, tokenizer, topic, other)
    base = [f"{float(losses(model, tokenizer, texts(one, TEXTS, -2)).mean()):.2f}" for one in (topic, other)]
    above = sum(one[-1] == "yes" for one in Experts().table(found.vector).rows)
    return [
        " and ".join(base), *(shown(interval(one)) for one in (found.own, found.other, found.own - found.other)),
        f"{above} of {COUNT}", *(f"{float(one):+.2f}" for one in found.random.mean(dim=0)),
        f"{found.beaten} of {len(found.random)}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
