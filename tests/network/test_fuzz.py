"""Random small models of every decoder family: what is fitted and steered equals hooks written by hand, or is refused.

`STEERKIT_FUZZ=200 python -m pytest tests/network/test_fuzz.py -m slow -s` draws fewer than 2,000 models,
`STEERKIT_FUZZ_SECONDS` ends it sooner, and `STEERKIT_FUZZ_SEED` draws others. `python -m tests.network.test_fuzz` does
the same without pytest, and takes names of families.
"""

from __future__ import annotations

import collections
import os
import random
import sys
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.errors import SteerError
from steerkit.network.decoder import find_decoder
from tests.by_hand import adding, blocks_of, columns_of, stream_of
from tests.modes import positions_of, rows_of
from tests.random_models import DECODERS, draw
from tests.tiny_tokenizers import byte_tokenizer

CONFIGS = int(os.environ.get("STEERKIT_FUZZ", "2000"))
SECONDS = float(os.environ.get("STEERKIT_FUZZ_SECONDS", "inf"))
SEED = int(os.environ.get("STEERKIT_FUZZ_SEED", "0"))
SCOPES = ("response", "prompt", "generated", "all", "first(2)")
LONG, SHORT = (7, 23, 42, 88, 15, 3, 211), (5, 17, 44, 9, 101)
NEW = 4
TOKENIZER = byte_tokenizer(bos=False)
POSITIVE, NEGATIVE = ["What a fine day it is", "Good"], ["What a bad", "It is raining again"]
NOISE = 1e-4
"""Largest difference, in units of the largest value: both sides do the same sums, but for that of the edit itself."""
Outcome = tuple[str, str]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask [2, t] of two prompts, padded at the left, and where each starts."""
    first = torch.tensor([0, len(LONG) - len(SHORT)])
    ids = torch.tensor([LONG, (0,) * int(first[1]) + SHORT])
    return ids, (torch.arange(len(LONG))[None] >= first[:, None]).long(), first


def answer(model: Any, cached: bool) -> Tensor:
    """[b, NEW, v] logits behind the answer to the two prompts."""
    ids, mask, _ = rows()
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        use_cache=cached,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, dim=1)


def mean_difference(model: Any, block: nn.Module) -> Tensor:
    """The mean over positive texts of what a block gives at the last token, less that over negative texts."""
    given: list[Tensor] = []
    handle = block.register_forward_hook(lambda _module, _args, output: given.append(stream_of(output)[0, -1].clone()))
    sides = []
    for texts in (POSITIVE, NEGATIVE):
        for text in texts:
            ids = torch.tensor([TOKENIZER(text)["input_ids"]])
            mask = torch.ones_like(ids)
            model(input_ids=ids, attention_mask=mask, **positions_of(model, mask))
        sides.append(torch.stack(given[-len(texts) :]).mean(dim=0))
    handle.remove()
    return sides[0] - sides[1]


def mixes_rows(model: Any) -> bool:
    """Whether a text's logits depend on what else is in its batch: experts that share their room, a top-k over pads."""
    texts = [TOKENIZER(text)["input_ids"] for text in (*POSITIVE, *NEGATIVE)]
    ids, mask = rows_of(texts, side="right")
    together = model(input_ids=ids, attention_mask=mask, **positions_of(model, mask)).logits
    alone = [model(input_ids=torch.tensor([text])).logits[0] for text in texts]
    return any(gap(both[: len(one)], one) > NOISE for both, one in zip(together, alone, strict=True))


def gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


@torch.no_grad()
def case(kind: str, seed: int) -> Outcome:
    """Draw one model, fit and steer it in three scopes with and without a cache.

    Returns:
        `equal`, `refused`, `wrong`, or `no model` where transformers itself cannot build or run it; and why.
    """
    try:
        model = draw(kind, seed)
        if model is None:
            return "no model", "too large"
        plain = {cached: answer(model, cached) for cached in (True, False)}
        if not all(bool(each.isfinite().all()) for each in plain.values()):
            return "no model", "not finite"
    except Exception as error:  # noqa: BLE001 - whatever transformers says to sizes that do not fit together
        return "no model", f"{type(error).__name__}: {error}"[:200].replace("\n", " ")
    rng = random.Random(f"{kind} {seed}")
    try:
        return steered_case(model, plain, rng)
    except SteerError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception as error:  # noqa: BLE001 - a foreign exception is what is looked for
        return "wrong", f"{type(error).__name__}: {error}"[:300].replace("\n", " ")


def steered_case(model: Any, plain: dict[bool, Tensor], rng: random.Random) -> Outcome:
    layer = rng.randrange(find_decoder(model).num_layers)
    data = steerkit.ContrastSet.from_prompts(POSITIVE, NEGATIVE, raw=True)
    vector = steerkit.fit(model, TOKENIZER, data, layers=[layer], batch_size=4)
    block, (_, _, first) = blocks_of(model)[layer], rows()
    direction = vector.tensors[f"resid_post.{layer}/direction"]
    expected = mean_difference(model, block)
    if gap(direction, expected) > 1e-3 and not mixes_rows(model):
        return "wrong", f"fit: the direction is off by {gap(direction, expected):.1e}"
    strength = rng.choice((-3.0, 3.0))
    for scope in rng.sample(SCOPES, 3):
        for cached in (True, False):
            with steerkit.steer(model, vector, strength, scope=scope):
                found = answer(model, cached)
            with adding(block, strength * direction, columns_of(scope, first, len(LONG), len(LONG) + NEW)):
                right = answer(model, cached)
            where = f"{scope}, {'cached' if cached else 'uncached'}"
            if gap(found, right) > NOISE:
                return "wrong", f"{where}: off by {gap(found, right):.1e}"
            # The first two tokens alone change nothing that is seen when the last block is the one that is steered.
            if torch.equal(right, plain[cached]) and scope != "first(2)":
                return "wrong", f"{where}: hooks by hand change nothing"
    return "equal", ""


def fuzz(count: int, kinds: list[str] | None = None) -> dict[str, collections.Counter[str]]:
    """Draw that many models that transformers can run, the families in turn; says how each family fared."""
    found: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds or DECODERS}
    reasons: dict[str, dict[str, str]] = collections.defaultdict(dict)
    drawn, seed, start = 0, SEED, time.monotonic()
    while drawn < count and seed < SEED + 50 * (1 + count // len(found)):
        for kind in found:
            if found[kind]["no model"] == found[kind].total() == 20:
                continue  # twenty draws, and transformers runs none
            outcome, why = case(kind, seed)
            found[kind][outcome] += 1
            reasons[kind].setdefault(outcome, f"{why} (seed {seed})")
            drawn += outcome != "no model"
            if drawn == count or time.monotonic() - start > SECONDS:
                count = drawn
                break
        seed += 1
    total = sum(found.values(), collections.Counter())
    lines = [
        f"{kind}: {outcomes[outcome]} {outcome}, first: {reasons[kind][outcome]}"
        for kind, outcomes in found.items()
        for outcome in ("refused", "wrong")
        if outcomes[outcome]
    ]
    never = {kind: reasons[kind]["no model"] for kind, outcomes in found.items() if set(outcomes) == {"no model"}}
    lines += [f"{kind}: never run by transformers as drawn, first: {why}" for kind, why in never.items()]
    figures = ", ".join(f"{total[name]} {name}" for name in ("equal", "refused", "wrong"))
    lines.append(f"{drawn} models of {len(found) - len(never)} families: {figures}")
    sys.stdout.write("\n".join([*lines, ""]))
    return found


@pytest.mark.slow
def test_what_is_steered_equals_hooks_by_hand_or_is_refused() -> None:
    found = fuzz(CONFIGS)
    assert not {kind: outcomes["wrong"] for kind, outcomes in found.items() if outcomes["wrong"]}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    fuzz(CONFIGS, sys.argv[1:] or None)
