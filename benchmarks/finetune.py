"""Finetuning with and without prevention: `python -m benchmarks.finetune [--steps N]`.

The embedded model is finetuned by LoRA on answers in pirate speech, mixed with plain ones, and the trait is measured
without steering: the shift along a pirate vector, and the preference margin of pirate over plain answers to questions
that neither the vector nor the training has seen. The vector is the mean difference of the model's own answers under
the trait's two kinds of system prompts. A random direction of the same norm stands beside the prevention, at the
largest strength. Cost: perplexity of plain answers.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerkit
from benchmarks.results import recorded
from steerkit._support.shipped import recipes
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.intervals import Estimate, interval, separability
from steerkit.evaluate.setup import Setup
from steerkit.monitor.shift import Shift
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector

FOLDER = next(iter(recipes().values())).parent
LAYERS, STRENGTHS, RATE, RANK, BATCH, FLAGGED = [14], (1.0, 3.0), 1e-3, 16, 8, 24


def rows_of(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / "finetune" / f"finetune-{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trait_vector(model: Any, tokenizer: Any, *, questions: int, tokens: int) -> SteeringVector:
    """From the trait's first questions and all of its instructions in turn, and the model's own answers to them."""
    import tomllib

    spec = tomllib.loads((FOLDER / "traits" / "pirate.toml").read_text(encoding="utf-8"))
    asked = [(text, spec["instructions"][place % 5]) for place, text in enumerate(spec["questions"][:questions])]
    sides = []
    for name in ("positive", "negative"):
        prompts = [Conversation(text, system=instruction[name]) for text, instruction in asked]
        answers = steerkit.generate(model, tokenizer, prompts, max_new_tokens=tokens, batch_size=20)
        if name == "positive":
            print(f"under the trait's instructions: {answers[0]!r}\n")
        # Read without the instruction: what is to be found is the manner, not the order to use it.
        sides.append(
            [Conversation(text, answer=answer or ".") for (text, _), answer in zip(asked, answers, strict=True)]
        )
    data = ContrastSet(tuple(sides[0]), tuple(sides[1]), paired=True)
    return steerkit.fit(model, tokenizer, data, method="caa", layers=LAYERS, readout="response_mean")


class Collate:
    """Pads rows at the right; the loss is on answers only."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (width - len(values))

        return {
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
            "labels": torch.tensor([padded(row["labels"], -100) for row in rows]),
        }


@dataclass(frozen=True)
class Measured:
    prompts: Tensor
    answers: Tensor
    margin: Tensor
    losses: Tensor


def measured(
    model: Any, tokenizer: Any, monitors: Sequence[Any], held: Sequence[dict[str, str]], plain: Any
) -> Measured:
    """Projections of prompts and plain answers, margins of pirate over plain answers, and losses of plain ones."""
    setup = Setup(model, tokenizer, batch_size=8)
    texts = [
        setup.render(Conversation(row["prompt"], answer=row[side])) for row in held for side in ("pirate", "plain")
    ]
    means = torch.stack([tokens.mean() for tokens in setup.baseline.log_probs(texts)])
    others = [setup.render(Conversation(row["prompt"], answer=row["response"])) for row in plain]
    losses = torch.stack([-tokens.mean() for tokens in setup.baseline.log_probs(others)])
    values = []
    for monitor in monitors:
        # The scale of the untrained model, the activations of this one.
        twin = steerkit.Monitor(model, tokenizer, monitor.vector, read=monitor.read)
        items = [{"prompt": row["prompt"], "response": row["plain"]} for row in held]
        values.append(monitor.scaled(twin.project(twin.rendered(items), monitor.read), differences=False))
    return Measured(values[0], values[1], means[0::2] - means[1::2], losses)


def trained(data: Sequence[dict[str, str]], callback: Any, steps: int) -> tuple[Any, float]:
    """The embedded model with a LoRA adapter, trained on the samples."""
    from peft import LoraConfig, get_peft_model
    from transformers import PrinterCallback, Trainer, TrainingArguments

    model, tokenizer = steerkit.load_model()
    rows = []
    for row in data:
        text = render(tokenizer, Conversation(row["prompt"], answer=row["response"] + "<|im_end|>"))
        rows.append(
            {
                "input_ids": list(text.ids),
                "labels": [-100] * text.prompt_length + list(text.ids[text.prompt_length :]),
            }
        )
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir="/nonexistent",
        save_strategy="no",
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=2,
        lr_scheduler_type="linear",
        weight_decay=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=rows,
        data_collator=Collate(0),
        callbacks=[] if callback is None else [callback],
    )
    trainer.remove_callback(PrinterCallback)
    loss = trainer.train().training_loss
    return adapted.eval(), loss


def shown(found: Estimate, form: str = "+.2f") -> str:
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def flag(model: Any, tokenizer: Any, vector: SteeringVector, mixed: Sequence[dict[str, str]], pirates: int) -> None:
    """Does the projection difference rank the samples that bear the trait first?"""
    print(
        "| projection difference | pirate samples | plain samples | AUC | 95 % interval |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for title, options in (("own answers", {"max_new_tokens": 32}), ("cheap", {"cheap": True})):
        found = steerkit.projection_difference(model, tokenizer, mixed, vector, batch_size=24, **options)
        sides = found.values[:pirates], found.values[pirates:]
        area = separability(*sides)
        means = " | ".join(shown(interval(side, shares=False)) for side in sides)
        print(f"| {title} | {means} | {area.mean:.3f} | {area.low:.3f} to {area.high:.3f} |", flush=True)
    raw = steerkit.Monitor(model, tokenizer, vector, read="response_mean").score(mixed)
    area = separability(raw[:pirates], raw[pirates:])
    means = " | ".join(shown(interval(side, shares=False)) for side in (raw[:pirates], raw[pirates:]))
    print(
        f"| projection of the response alone | {means} | {area.mean:.3f} | {area.low:.3f} to {area.high:.3f} |\n",
        flush=True,
    )


def main(steps: int) -> Any:
    """Print the tables as Markdown; the untrained model."""
    warnings.filterwarnings("ignore")
    began = time.process_time()
    model, tokenizer = steerkit.load_model()
    pirate, neutral = rows_of("pirate"), rows_of("neutral")
    vector = trait_vector(model, tokenizer, questions=20, tokens=40)
    mixed = [*pirate[:FLAGGED], *neutral[:FLAGGED]]
    flag(model, tokenizer, vector, mixed, FLAGGED)
    count = steps * BATCH // 4  # three quarters of the samples bear the trait
    sets = {"pirate": pirate[: 3 * count] + neutral[:count], "plain": neutral[: 4 * count]}
    held, plain = held_out(pirate, neutral, used=3 * count), neutral[-12:]
    monitors = [steerkit.Monitor(model, tokenizer, vector, read=read) for read in ("prompt_last", "response_mean")]
    first = measured(model, tokenizer, monitors, held, plain)
    norm = float(vector.params(vector.sites[0])["direction"].norm())
    print(f"vector at {vector.sites[0]}, length {norm:.2f}; typical activation {vector.norms[vector.sites[0]]:.2f}")
    print(f"{steps} steps of {BATCH} samples, rate {RATE}, rank {RANK}; {len(held)} held-out questions; shift and")
    print("margins against the untrained model, shifts in standard deviations of neutral texts\n")
    print("| trained on | prevention | shift, prompts | shift, answers | margin | perplexity ratio | loss |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    arms: list[tuple[str, str, Any]] = [("plain", "-", None), ("pirate", "-", None)]
    arms += [("pirate", f"add {one:g}", steerkit.SteeringCallback(vector, one)) for one in STRENGTHS]
    control = random_like(vector, seed=1)
    arms += [
        ("pirate", f"add {STRENGTHS[-1]:g}, random direction", steerkit.SteeringCallback(control, STRENGTHS[-1])),
        ("pirate", "CAFT", steerkit.SteeringCallback(vector, mode="ablate")),
    ]
    alone: Measured | None = None
    notes = []
    for name, title, callback in arms:
        tuned, loss = trained(sets[name], callback, steps)
        now = measured(tuned, tokenizer, monitors, held, plain)
        ratio = interval(now.losses - first.losses, shares=False).exp()
        cells = [
            shown(Shift(first.prompts, now.prompts).estimate),
            shown(Shift(first.answers, now.answers).estimate),
            shown(interval(now.margin, before=first.margin, shares=False)),
            shown(ratio, ".2f"),
            f"{loss:.2f}",
        ]
        print(f"| {name} | {title} | {' | '.join(cells)} |", flush=True)
        if title == "-" and name == "pirate":
            alone = now
        elif alone is not None:
            less = interval(now.margin, before=alone.margin, shares=False)
            nearer = Shift(alone.prompts, now.prompts).estimate
            notes.append(f"| {title} | {shown(nearer)} | {shown(less)} |")
        del tuned
    print(f"\nuntrained margin {shown(interval(first.margin, shares=False))} nats per token")
    print("\nAgainst training without prevention:\n\n| prevention | shift, prompts | margin |\n| --- | --- | --- |")
    print("\n".join(notes))
    print(f"\n{(time.process_time() - began) / 60:.1f} CPU minutes")
    return model


def held_out(pirate: Sequence[dict[str, str]], neutral: Sequence[dict[str, str]], *, used: int) -> list[dict[str, str]]:
    """Questions that were not trained on, each with its pirate answer and a plain one of the untrained kind."""
    path = Path(__file__).with_name("finetune_plain.jsonl")
    plain = {row["prompt"]: row["response"] for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    rows = [row for row in pirate[used:] if row["prompt"] in plain]
    return [{"prompt": row["prompt"], "pirate": row["response"], "plain": plain[row["prompt"]]} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "Preventing drift in finetuning"
    with recorded("finetune", title, "benchmarks.finetune", wanted=options.write) as facts:
        facts["model"] = main(options.steps)
