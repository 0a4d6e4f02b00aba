"""What undoes a finetuned trait at one cost: `python -m benchmarks.tuning [--steps N] [--write]`.

The embedded model is finetuned by LoRA on answers in pirate speech mixed with plain ones, as in `benchmarks.finetune`,
and beside it on plain ones alone. Then the trait is taken out of the finetuned model in four ways: what finetuning
contributes is scaled down block by block, the task vector is taken away, the same with a coefficient for each tensor,
learned on other questions, and the shipped persona vector is subtracted. Each is measured at the
strength at which the KL divergence from the finetuned model is the same, on plain answers to questions of neither kind.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import steerkit
from benchmarks.finetune import BATCH, held_out, rows_of, shown, trained
from benchmarks.results import recorded
from steerkit import tuning
from steerkit.evaluate.intervals import interval
from steerkit.methods._subject import Schedule
from steerkit.prompts.batching import Batch, batches
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered, render

VECTOR, BUDGETS, TAUGHT = "pirate-persona", (0.1,), 8
LEARNING = Schedule(epochs=4, batch_size=8, rate=0.1, decay=0.1)
WORDS = """The embedded model, finetuned by LoRA on answers in pirate speech mixed with plain ones, and beside it on
plain ones alone ({steps} steps each). Tuning contribution: the share of finetuning in what all blocks add to a prompt's
last token (TuCo), on {held} questions that were not trained on.

Then the trait is taken out of the finetuned model in four ways, each at the strength at which the KL divergence from
the finetuned model on {plain} plain answers to other questions is {budget:g} nats per token, to a tenth of it. Margin:
how much likelier a pirate answer is than a plain one, on {held} questions. The way that undoes the trait best has the
most negative change.
"""
Edit = Callable[[float, Batch], AbstractContextManager[Any]]


class Way(NamedTuple):
    """A way to take the trait out: on which model, how, and the first strength that is tried."""

    name: str
    model: Any
    edit: Edit
    first: float


@torch.no_grad()
def answers(
    model: Any, texts: Sequence[Rendered], around: Callable[[Batch], AbstractContextManager[Any]]
) -> list[Tensor]:
    """Log-probabilities [t, v] at the places that predict each answer's tokens."""
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for batch in batches(texts, 8, pad_id=0):
        with around(batch):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        for index, row in enumerate(batch.rows):
            places = slice(texts[row].prompt_length - 1, len(texts[row].ids) - 1)
            found[row] = torch.log_softmax(logits[index, places].float(), dim=-1)
    return found


def mean_log_probs(found: Sequence[Tensor], texts: Sequence[Rendered]) -> Tensor:
    parts = zip(found, texts, strict=True)
    return torch.stack(
        [logs.gather(-1, torch.tensor(text.ids[text.prompt_length :])[:, None]).mean() for logs, text in parts]
    )


class Trial:
    """The held-out texts, and what the finetuned model says of them."""

    def __init__(self, tokenizer: Any, held: Sequence[dict[str, str]], plain: Sequence[dict[str, str]]) -> None:
        self.pairs = [
            render(tokenizer, Conversation(row["prompt"], answer=row[side]))
            for row in held
            for side in ("pirate", "plain")
        ]
        self.plain = [render(tokenizer, Conversation(row["prompt"], answer=row["response"])) for row in plain]
        self.before: list[Tensor] = []

    def kl(self, way: Way, strength: float) -> Tensor:
        """[m] mean KL divergence from the finetuned model on each plain answer."""
        now = answers(way.model, self.plain, lambda batch: way.edit(strength, batch))
        self.before = self.before or now
        parts = zip(self.before, now, strict=True)
        return torch.stack([(old.exp() * (old - new)).sum(-1).mean() for old, new in parts])

    def margin(self, way: Way, strength: float) -> Tensor:
        """[n] how much likelier than plain answers pirate ones are."""
        found = answers(way.model, self.pairs, lambda batch: way.edit(strength, batch))
        means = mean_log_probs(found, self.pairs)
        return means[0::2] - means[1::2]

    def strength(self, way: Way, budget: float) -> tuple[float, float]:
        """The strength at which the mean KL divergence is the budget, to a tenth of it, and what it is there.

        It grows with about the square of the strength; of the last two guesses the slope is taken.
        """
        power, strength = 2.0, way.first
        before: tuple[float, float] | None = None
        for _ in range(4):
            found = float(self.kl(way, strength).mean())
            if abs(found - budget) < 0.1 * budget:
                break
            if before is not None and before[0] != strength and found > 0 and before[1] > 0:
                power = min(max(math.log(found / before[1]) / math.log(strength / before[0]), 0.5), 4.0)
            before = strength, found
            strength *= (budget / found) ** (1 / power)
        return strength, found


def taught(model: Any, tokenizer: Any, pirate: Sequence[dict[str, str]]) -> ContrastSet:
    """The untrained model's own answers against pirate ones, to questions that were trained on."""
    prompts = [Conversation(row["prompt"]) for row in pirate[:TAUGHT]]
    own = steerkit.generate(model, tokenizer, prompts, max_new_tokens=32, batch_size=TAUGHT)
    return ContrastSet.from_answers(
        [(row["prompt"], answer or ".", row["response"]) for row, answer in zip(pirate, own, strict=False)]
    )


def profiles(named: dict[str, tuple[Any, Any]], tokenizer: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Print the tuning contribution of each finetuned model; its profile over blocks."""
    print("| trained on | tuning contribution, L1 | L2 | without massive dimensions | blocks of the largest share |")
    print("| --- | --- | --- | --- | --- |")
    found = {}
    for name, (model, base) in named.items():
        one = tuning.contribution(model, base, tokenizer, list(prompts))
        best = one.profile.topk(4)
        blocks = ", ".join(f"{block} ({share:.2f})" for share, block in zip(*(x.tolist() for x in best), strict=True))
        others = " | ".join(shown(interval(values, shares=False), ".3f") for values in (one.l2, one.without_massive))
        print(f"| {name} | {shown(one.estimate, '.3f')} | {others} | {blocks} |", flush=True)
        found[name] = one.profile
    return found


def main(steps: int) -> Any:
    """Print the tables as Markdown; the untrained model."""
    warnings.filterwarnings("ignore")
    began = time.process_time()
    base, tokenizer = steerkit.load_model()
    pirate, neutral = rows_of("pirate"), rows_of("neutral")
    count = steps * BATCH // 4
    held, plain = held_out(pirate, neutral, used=3 * count), neutral[-12:]
    print(WORDS.format(steps=steps, held=len(held), plain=len(plain), budget=BUDGETS[0]))
    adapted, _ = trained(pirate[: 3 * count] + neutral[:count], None, steps)
    control, _ = trained(neutral[: 4 * count], None, steps)
    both = {"pirate": (adapted, None), "plain": (control, None)}
    profile = profiles(both, tokenizer, [row["prompt"] for row in held])["pirate"]
    del control, both
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    vector = tuning.TaskVector.between(base, merged)
    data = taught(base, tokenizer, pirate)
    learned = tuning.learn_coefficients(merged, tokenizer, [vector], data, schedule=LEARNING)
    weights = block_norms(learned.vector)
    order = torch.stack([torch.tensor(weights), profile]).argsort(dim=1).argsort(dim=1).float()
    largest = torch.tensor(weights).topk(4).indices.tolist()
    print(f"\nLearned coefficients: the largest change at blocks {', '.join(map(str, largest))}; rank correlation over")
    print(f"blocks with the profile of contributions {float(torch.corrcoef(order)[0, 1]):+.2f}\n", flush=True)
    persona = steerkit.SteeringVector.load(f"vectors/smollm2-135m/{VECTOR}.safetensors")

    def steered(strength: float, batch: Batch) -> AbstractContextManager[Any]:
        return steerkit.steer(merged, persona, strength=-strength, prompt_lengths=batch.prompt_lengths)

    ways = [
        Way("contribution scaled by 1 - s", adapted, lambda s, _: tuning.scaled(adapted, None, 1.0 - s), 0.4),
        Way("task vector, -s", merged, lambda s, _: tuning.added(merged, vector, -s), 0.4),
        Way("learned coefficients, s", merged, lambda s, _: tuning.added(merged, learned.vector, s), 1.0),
        Way("persona vector, -s", merged, steered, 1.0),
    ]
    trial = Trial(tokenizer, held, plain)
    still = Way("", merged, lambda *_: contextlib.nullcontext(), 0.0)
    trial.kl(still, 0.0)
    first, untrained = trial.margin(still, 0.0), trial.margin(still._replace(model=base), 0.0)
    print(f"margin of pirate over plain answers: untrained {shown(interval(untrained, shares=False))}, finetuned")
    print(f"{shown(interval(first, shares=False))} nats per token\n")
    print("| way | s | KL on plain answers | margin | change of the margin |\n| --- | --- | --- | --- | --- |")
    for budget in BUDGETS:
        for way in ways:
            strength, kl = trial.strength(way, budget)
            margin = trial.margin(way, strength)
            cells = [f"{strength:.2f}", f"{kl:.3f}", shown(interval(margin, shares=False))]
            change = shown(interval(margin, before=first, shares=False))
            print(f"| {way.name} | {' | '.join(cells)} | {change} |", flush=True)
    print("\n| share of the task vector left | margin | KL on plain answers |\n| --- | --- | --- |")
    for left in (0.75, 0.5, 0.0):
        margin, kl = trial.margin(ways[1], 1.0 - left), float(trial.kl(ways[1], 1.0 - left).mean())
        print(f"| {left:g} | {shown(interval(margin, shares=False))} | {kl:.3f} |", flush=True)
    print(f"\n{(time.process_time() - began) / 60:.1f} CPU minutes")
    return base


def block_norms(vector: tuning.TaskVector) -> list[float]:
    """How far a task vector moves the weights of each block."""
    squares: dict[int, float] = {}
    for name, norm in vector.norms().items():
        parts = name.split(".")
        if "layers" in parts:
            block = int(parts[parts.index("layers") + 1])
            squares[block] = squares.get(block, 0.0) + norm**2
    return [squares[block] ** 0.5 for block in sorted(squares)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "What finetuning added, and how to take it away"
    with recorded("tuning", title, "benchmarks.tuning", wanted=options.write) as facts:
        facts["model"] = main(options.steps)
