"""What the tests ask for: every edit in every scope, schedules, orders, gates."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.engines.vllm.models import KINDS, VOCAB

EDITS = {"add": 1.0, "off": 1.0, "set": 1.3, "turn": 70.0, "aim": 200.0, "above": 110.0}
SCOPES = ("@all", "@prompt", "@response", "@generated", "[2:4]", "@generated[1:3]", "@first(3)")
FADES = ("fade(linear over 3)", "fade(cosine over 4 to 0.5)", "fade(exponential over 2)")
SEVERAL = (
    "off-post + add-post*0.5",
    "add-post*0.5 + off-post",
    "add-attn@generated*0.7 - add-post@prompt*0.4",
    "turn-mlp*40 + set-post[1:] + add-attn*0.5",
    "add-post*0.1 norm",
    "add-post~off-post",
    "add-post*0",
)
GATED = ("late", "early", "mean@response", "controller", "late[1:3]*2 + add-attn*0.5", "early@generated")


def prompt(seed: int, length: int) -> list[int]:
    """A prompt of some length."""
    return random.Random(seed).choices(range(VOCAB), k=length)


def every_edit(lengths: Sequence[int]) -> list[tuple[list[int], str | None]]:
    """Requests with every edit at every kind of site in every scope, plain ones between them."""
    said: list[str | None] = [
        f"{edit}-{kind}{scope}*{strength:g}" for edit, strength in EDITS.items() for kind in KINDS for scope in SCOPES
    ]
    said += [f"{edit}-post@response*{strength:g} {FADES[0]}" for edit, strength in EDITS.items()]
    said += [f"add-attn*2 {fade}" for fade in FADES]
    said += [*SEVERAL, None, None]
    random.Random(0).shuffle(said)
    return [(prompt(number, lengths[number % len(lengths)]), one) for number, one in enumerate(said)]


def gated() -> list[tuple[list[int], str | None]]:
    """Requests with gates, some of which open."""
    prompts = [[5, 17, 44, 9, 101, 63], [9, 8, 7], [7, 23, 42, 88, 15], [1, 2, 3, 4], prompt(9, 30)]
    return [(one, said) for one in prompts for said in (*GATED, None)]
