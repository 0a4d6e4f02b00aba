"""The texts that the shipped dictionary is trained on: `python -m benchmarks.dictionary_texts OUT.jsonl`.

What steerkit ships, and what the embedded model says to prompts that are written here: a topic in a form of request,
every topic with some of the forms, sampled at temperature 1 with a seed for each. Left out are the shipped neutral
texts (on which the dictionary is judged) and the held-out items of every recipe (on which latents are).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import steerkit
from steerkit._support.files import write_whole
from steerkit.recipe import find_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("optimism-caa", "formality-caa", "imagery-caa", "enthusiasm-caa", "warmth-caa", "truthful-iti")
PAGES = ("docs/how-to", "docs/explanation", "docs/tutorials")
REQUESTS, PIECE = 400, 1200  # requests that are taken; characters of a page in one text
SEED, BATCH, LONGEST = 7, 32, 80

FORMS = (
    "Tell me three facts about {}.",
    "Write a short story about {}.",
    "Explain {} to a child of six.",
    "What is the history of {}?",
    "Write a poem of eight lines about {}.",
    "Give me five tips about {}.",
    "Write a formal letter that mentions {}.",
    "What do people get wrong about {}?",
    "Write a dialogue between two friends about {}.",
    "Describe {} as a scientist would.",
    "Write a list of ten words that have to do with {}.",
    "Complain about {}.",
    "Praise {} in a few sentences.",
    "Write a news report about {}.",
    "Write a recipe or a set of instructions that has to do with {}.",
    "Write a product review about {}.",
    "Make a joke about {}.",
    "Argue for and against {}.",
    "Write a diary entry about {}.",
    "Write a question about {} and answer it with numbers.",
)
TOPICS = [
    "rain", "bread", "the moon", "trains", "chess", "onions", "the heart", "taxes", "football", "violins", "bees",
    "concrete", "the French Revolution", "sleep", "glass", "volcanoes", "cats", "the internet", "salt", "weddings",
    "bicycles", "gravity", "coffee", "elections", "forests", "mathematics", "old age", "fashion", "whales",
    "bridges", "money", "the Roman Empire", "exams", "gardens", "cancer", "cinema", "snow", "computers",
    "friendship", "deserts", "cheese", "law courts", "ghosts", "the violin maker", "electricity", "dogs", "oceans",
    "poverty", "libraries", "vaccines", "mountains", "fear", "airports", "kings and queens", "rice", "dinosaurs",
    "teachers", "steel", "dreams", "spiders", "the stock market", "winter", "languages", "war", "soap", "stars",
    "jealousy", "potatoes", "ships", "school", "medicine", "birds", "cities", "paper", "happiness", "rivers",
    "robots", "funerals", "fire", "tea",
]  # fmt: skip


def main() -> None:
    """Write the texts, one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dictionary_texts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--generated", type=int, default=320, help="texts that the embedded model writes")
    options = parser.parse_args()
    rows = [*shipped(), *generated(options.generated)]
    random.Random(SEED).shuffle(rows)
    write_whole(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    kinds = sorted({str(row["kind"]) for row in rows})
    print(", ".join(f"{sum(row['kind'] == kind for row in rows)} {kind}" for kind in kinds))


def shipped() -> Iterator[dict[str, Any]]:
    """Prompts and answers of recipes, finetuning data, pages, and the unsteered and prompted model's answers."""
    for name in RECIPES:
        train, _ = find_recipe(name).split()
        for side in (train.positive, train.negative):
            for one in side:
                if isinstance(one.prompt, str) and one.answer is not None:
                    yield {"kind": "recipes", "prompt": one.prompt, "response": one.answer}
    for row in lines("recipes/prompts/requests.jsonl")[:REQUESTS]:
        yield {"kind": "requests", "prompt": row["prompt"]}
    for file in sorted((ROOT / "recipes" / "finetune").glob("*.jsonl")):
        for row in lines(file):
            yield {"kind": "finetune", "prompt": row["prompt"], "response": row["response"]}
    for file in sorted((ROOT / "vectors" / "smollm2-135m" / "evidence").glob("*.jsonl")):
        if file.name.startswith(("unsteered", "prompted")):
            for row in lines(file)[1::2]:
                if row.get("text", "").strip():
                    yield {"kind": "evidence", "prompt": row["question"], "response": row["text"]}
    for folder in PAGES:
        for file in sorted((ROOT / folder).glob("*.md")):
            text = file.read_text(encoding="utf-8")
            for start in range(0, len(text), PIECE):
                yield {"kind": "pages", "text": text[start : start + PIECE]}


def lines(file: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]


def prompts() -> list[str]:
    """Every topic in every form, in one shuffled order."""
    found = [form.format(topic) for topic in TOPICS for form in FORMS]
    random.Random(SEED).shuffle(found)
    return found


def generated(count: int) -> Iterator[dict[str, Any]]:
    """What the embedded model answers, sampled."""
    asked = prompts()[:count]
    model, tokenizer = steerkit.load_model()
    seeds = list(range(SEED, SEED + len(asked)))
    texts = steerkit.generate(
        model,
        tokenizer,
        asked,
        max_new_tokens=LONGEST,
        batch_size=BATCH,
        seed=seeds,
        do_sample=True,
        temperature=1.0,
    )
    for prompt, text in zip(asked, texts, strict=True):
        if text.strip():
            yield {"kind": "generated", "prompt": prompt, "response": text}


if __name__ == "__main__":
    main()
