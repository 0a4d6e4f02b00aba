"""The shipped dictionary and the memory that training one takes: `python -m benchmarks.dictionary [--write] [--card]`.

The dictionary is measured on texts that it was not trained on: the neutral texts, held-out items of recipes, and the
same items' prompts alone. Memory is the peak of a process that trains on so many tokens, all different, at the first
block of the embedded model; `--card` writes the card beside the dictionary's file from these figures.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import steerkit
from benchmarks.results import FOLDER, recorded
from steerkit._support.files import write_whole
from steerkit.dictionary import Dictionary, load_dictionary
from steerkit.dictionary.fitness import check_dictionary
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.neutral import neutral_texts
from steerkit.recipe import find_recipe

FILE = Path("dictionaries/smollm2-135m/resid_post.14.safetensors")
TEXTS = "python -m benchmarks.dictionary_texts out/dictionary/texts.jsonl"
TRAIN = (
    "steerkit dictionary train --texts out/dictionary/texts.jsonl --site resid_post.14 --tokens 800000 --out "
    f"{FILE} --work out/dictionary/work"
)
HELD_OUT = ("optimism-caa", "formality-caa")
COUNTS = (20_000, 80_000, 320_000)


def main() -> None:
    """Print the figures as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dictionary")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    parser.add_argument("--card", action="store_true", help="write the card beside the dictionary, from the page")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory is not None:
        memory(options.memory)
        return
    if options.card:
        write_whole(FILE.with_suffix(".md"), card(load_dictionary(FILE)).encode())
        return
    title = "The shipped dictionary, and the memory of training one"
    with recorded("dictionary", title, "benchmarks.dictionary", wanted=options.write) as facts:
        model, tokenizer = steerkit.load_model()
        facts["model"] = model
        quality(model, tokenizer, load_dictionary(FILE))
        print(f"Trained by `{TEXTS}`, then `{TRAIN}`.\n")
        print(
            "Peak memory of a process that trains on that many tokens, no two texts alike, at block 0 (256 latents):\n"
        )
        print("| tokens | seconds | peak memory, MB |")
        print("| --- | --- | --- |")
        for count in COUNTS:
            ran = subprocess.run(
                [sys.executable, "-m", "benchmarks.dictionary", "--memory", str(count)],
                check=True,
                capture_output=True,
                text=True,
            )
            found = json.loads(ran.stdout.splitlines()[-1])
            print(f"| {found['tokens']} | {found['seconds']:.0f} | {found['peak']:.0f} |", flush=True)
        print()


def quality(model: Any, tokenizer: Any, dictionary: Dictionary) -> None:
    """Print how well the dictionary explains texts that it was not trained on."""
    print(
        f"`{FILE}`: {dictionary.num_latents} latents at {dictionary.site}, {dictionary.top_k} a token on average, "
        f"{FILE.stat().st_size / 1e6:.1f} MB.\n"
    )
    print("| texts | tokens | variance left (FVU) | latents that fire at a token (L0) | latents that never fire |")
    print("| --- | --- | --- | --- | --- |")
    for name, texts in texts_of().items():
        found = check_dictionary(model, tokenizer, dictionary, texts)
        cells = (str(found.tokens), f"{found.fvu:.3f}", f"{found.l0:.1f}", f"{found.dead:.0%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print()


def texts_of() -> dict[str, list[Conversation]]:
    """Texts by what they are called."""
    found = {"neutral texts": list(neutral_texts())}
    for name in HELD_OUT:
        _, held_out = find_recipe(name).split()
        found[f"held-out items of {name}"] = [*held_out.positive, *held_out.negative]
    return found


class Counted:
    """Texts without end, no two alike, of about forty tokens each."""

    def __iter__(self) -> Iterator[Conversation]:
        number = 0
        while True:
            number += 1
            words = " ".join(f"{number * place % 997} birds" for place in range(1, 9))
            yield Conversation(f"Text {number}: {words}.", raw=True)


def memory(count: int) -> None:
    """Train on so many tokens, and print the peak of this process."""
    import time

    from steerkit.dictionary.learning import Learning
    from steerkit.dictionary.training import train_dictionary

    model, tokenizer = steerkit.load_model()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        how = Learning(latents=256, top_k=16, tokens=count)
        found = train_dictionary(model, tokenizer, Counted(), "resid_post.0", how, work=work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = found.provenance["trained"]["tokens_read"]
    print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - begun, "peak": peak}))


def card(dictionary: Dictionary) -> str:
    """The dictionary's card, from its file and the page of its figures."""
    page = json.loads((FOLDER / "dictionary.json").read_text(encoding="utf-8"))
    (table,) = [part for part in page["parts"] if isinstance(part, dict) and "FVU" in str(part.get("columns"))]
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    trained: dict[str, Any] = dictionary.provenance["trained"]
    return _CARD.format(
        latents=dictionary.num_latents,
        site=dictionary.site,
        top_k=dictionary.top_k,
        width=dictionary.width,
        digest=dictionary.digest[:16],
        size=FILE.stat().st_size / 1e6,
        read=trained["tokens_read"],
        texts=trained["texts_read"],
        tokens=trained["tokens"],
        passes=trained["passes"],
        left=trained["unexplained"],
        dead=trained["dead"],
        table="\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        make_texts=TEXTS,
        train=TRAIN,
    )


_CARD = """# A dictionary of SmolLM2-135M-Instruct at {site}

{latents} latents of width {width} (BatchTopK, {top_k} a token on average), matrices in bfloat16, {size:.1f} MB, digest
`{digest}`. A test bench, so that everything about dictionaries runs on the embedded model; no tool for research.

- **Model:** the embedded 4-bit model (`smollm2-135m`), dequantised. On other weights of the same name check it first.
- **Data:** {read} tokens of {texts} texts, {passes} passes, {tokens} tokens in all. There was no corpus at hand: the
  texts are what steerkit ships (training items of recipes, requests, finetuning data, pages of the documentation,
  answers of the unsteered and the prompted model) and 320 texts that the model itself wrote to prompts of ours at
  temperature 1. Dictionaries of the field see a thousand times as much, of everything that people write.
- **Not in it:** the neutral texts' answers, and the answers of all held-out items of the recipes (a few of their
  questions occur with other answers). Massive tokens, more than ten times as long as the median of their text, and each
  text's first token were left out of training.
- **At the end of training** {left:.3f} of the variance was left on the training texts, and {dead} latents were dead.

{table}

The first token of each text is left out.

**Limits.** Most of the training texts are short answers in one chat format, many of them about the behaviours of the
recipes, so latents are fewer and coarser than the language would need, and good at telling those behaviours: nothing
that is measured with it on these recipes says what a dictionary of a large corpus would do. On text of another kind
(code, other languages, long documents) it explains less. No latent has been given a meaning by anybody.

Made by `{make_texts}`, then `{train}`; the figures by `python -m benchmarks.dictionary --write`, this card by
`python -m benchmarks.dictionary --card`.
"""


if __name__ == "__main__":
    main()
