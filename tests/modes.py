"""Every way to run a model, each checked against one plain forward pass over the produced ids.

The reference is the same for all modes: feed prompt + answer of one row, unpadded, through one forward pass of the
steered model with `prompt_lengths`, and read the logits that produced each answer token. That plain pass is itself
checked against hooks written out by hand (`test_steering_formula.py`).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.network.decoder import find_decoder, inner_model
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

NEW = 5
SHORT, LONG = (5, 17, 44, 9, 101, 63), (7, 23, 42, 88, 15, 3, 211, 99, 30)
PAD = 0
PER_ROW = (1.0, -0.7)
RESID = Site(1, "resid_post")


def vector_for(model: nn.Module, *, scope: str, site: Site = RESID, size: float = 3.0, seed: int = 0) -> SteeringVector:
    """A random addition (or, for front, mid and back, a random window of three rows) big enough to change the text."""
    decoder = find_decoder(model)
    generator = torch.Generator().manual_seed(seed)
    window = scope in ("front", "mid", "back")
    direction = torch.randn((3, decoder.hidden_size) if window else (decoder.hidden_size,), generator=generator)
    return SteeringVector(
        suggested_strength=1.0,
        method="actadd" if window else "caa",
        tensors={f"{site}/direction": direction * size},
        sites=(site,),
        edit="add_window" if window else "add",
        scope=scope,
        unit="paper",
        model_type=decoder.model.config.get_text_config().model_type,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
    )


def no_steering() -> Any:
    return contextlib.nullcontext()


@dataclass
class Ran:
    """What a mode produced: for each answer its prompt, its new ids and the logits [t, v] behind each."""

    prompt: Sequence[int]
    answer: Sequence[int]
    logits: Tensor
    strength: float | None = None  # where rows differ
    processed: bool = False  # logits are log-probabilities of the chosen tokens only


def rows_of(prompts: Sequence[Sequence[int]], *, side: str = "left") -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), width), PAD), torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids, mask


def generate(model: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Ran]:
    ids, mask = rows_of(prompts)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options}
    out = model.generate(
        input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
    )
    width = ids.shape[1]
    each = out.sequences.shape[0] // len(prompts)
    stacked = torch.stack(out.logits, dim=1) if settings.get("num_beams", 1) == 1 else None
    ran = []
    for row, sequence in enumerate(out.sequences):
        answer = sequence[width:].tolist()
        if stacked is not None:
            ran.append(Ran(prompts[row // each], answer, stacked[row, : len(answer)]))
    return ran


def cached(model: Any) -> list[Ran]:
    return generate(model, [SHORT])


def uncached(model: Any) -> list[Ran]:
    return generate(model, [SHORT], use_cache=False)


def left_padded(model: Any) -> list[Ran]:
    return generate(model, [SHORT, LONG, SHORT[:4]])


def num_return_sequences(model: Any) -> list[Ran]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return generate(model, [SHORT, LONG], num_return_sequences=2, do_sample=True, temperature=1.0, top_k=0)


def beams(model: Any) -> list[Ran]:
    ids, mask = rows_of([SHORT, LONG])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        output_scores=True,
        return_dict_in_generate=True,
        length_penalty=0.0,
    )
    answers = out.sequences[:, ids.shape[1] :]
    return [
        Ran((SHORT, SHORT, LONG, LONG)[row], answer.tolist(), out.sequences_scores[row], processed=True)
        for row, answer in enumerate(answers)
    ]


def static_cache(model: Any) -> list[Ran]:
    return generate(model, [SHORT, LONG], cache_implementation="static", disable_compile=True)


def chunked_prefill(model: Any) -> list[Ran]:
    return generate(model, [LONG, SHORT], prefill_chunk_size=4)


def chunked_to_one(model: Any) -> list[Ran]:
    return generate(model, [LONG], prefill_chunk_size=2)  # the last chunk is one token wide, like a decoding step


def prompt_lookup(model: Any) -> list[Ran]:
    repeated = (5, 17, 44, 9, 5, 17, 44, 9, 5, 17)
    return generate(model, [repeated], prompt_lookup_num_tokens=3)


def inputs_embeds(model: Any) -> list[Ran]:
    ids, mask = rows_of([SHORT, LONG])
    embeds = model.get_input_embeddings()(ids)
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
    )
    stacked = torch.stack(out.logits, dim=1)
    return [
        Ran(prompt, sequence.tolist(), stacked[row])
        for row, (prompt, sequence) in enumerate(zip((SHORT, LONG), out.sequences, strict=True))
    ]


def continued(model: Any) -> list[Ran]:
    """A second `generate` on the cache of the first: what was cached keeps what it got."""
    ids = torch.tensor([SHORT])
    common: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "return_dict_in_generate": True}
    first = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, **common
    )
    longer = torch.cat([first.sequences, torch.tensor([[12, 77, 31]])], dim=1)
    out = model.generate(
        input_ids=longer,
        attention_mask=torch.ones_like(longer),
        past_key_values=first.past_key_values,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        output_logits=True,
        **common,
    )
    answer = out.sequences[0, longer.shape[1] :].tolist()
    return [Ran(longer[0].tolist(), answer, torch.stack(out.logits, dim=1)[0])]


def per_row(model: Any) -> list[Ran]:
    return each_its_own(generate(model, [SHORT, LONG]))


def per_row_returned(model: Any) -> list[Ran]:
    return each_its_own(num_return_sequences(model))


def per_row_beams(model: Any) -> list[Ran]:
    return each_its_own(beams(model))


def right_padded_forward(model: Any) -> list[Ran]:
    """No `generate`: one batch of whole texts, scored with the prompt lengths given."""
    ids, mask = rows_of([SHORT + LONG[:NEW], LONG + SHORT[:NEW], SHORT[:4] + LONG[:NEW]], side="right")
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **positions_of(model, mask)).logits
    prompts, answers = (SHORT, LONG, SHORT[:4]), (LONG[:NEW], SHORT[:NEW], LONG[:NEW])
    return [
        Ran(prompt, answer, logits[row, len(prompt) - 1 : len(prompt) - 1 + NEW])
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def each_its_own(ran: list[Ran]) -> list[Ran]:
    """Mark every answer with the strength that its prompt was given."""
    each = len(ran) // len(PER_ROW)
    return [replace(one, strength=PER_ROW[place // each]) for place, one in enumerate(ran)]


MODES: dict[str, Callable[[Any], list[Ran]]] = {
    mode.__name__: mode
    for mode in (
        cached,
        uncached,
        left_padded,
        num_return_sequences,
        beams,
        static_cache,
        chunked_prefill,
        chunked_to_one,
        prompt_lookup,
        inputs_embeds,
        per_row,
        per_row_returned,
        per_row_beams,
        right_padded_forward,
    )
}

# Where transformers does not offer the mode. Tested: the baseline model is run in every cell, and a listed cell that
# starts to hold fails the test of exceptions.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("gemma3_vlm", "inputs_embeds"): "the class takes no inputs_embeds in generate",
    ("mamba", "chunked_prefill"): "no chunked prefill with a recurrent cache",
    ("mamba", "chunked_to_one"): "no chunked prefill with a recurrent cache",
    ("mamba", "prompt_lookup"): "no assisted decoding with a recurrent cache",
    ("qwen3_next", "prompt_lookup"): "no assisted decoding with a recurrent cache",
    ("gpt_neo", "static_cache"): "a window over a static cache sees other tokens (transformers 5.23)",
    ("jamba", "chunked_prefill"): "a second chunk starts from an empty state (transformers 5.23)",
    ("jamba", "chunked_to_one"): "a second chunk starts from an empty state (transformers 5.23)",
    **{
        ("minimax", mode): "beams do not move the linear cache (transformers 5.23)"
        for mode in ("beams", "per_row_beams")
    },
    **dict.fromkeys(
        itertools.product(
            ("mamba2", "falcon_mamba", "minimax", "openai_gpt"), ("chunked_prefill", "chunked_to_one", "prompt_lookup")
        ),
        "no cache of tokens that could be filled in chunks or cut",
    ),
    **dict.fromkeys(
        itertools.product(
            ("jamba", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid", "zamba2", "olmo_hybrid", "qwen3_5"),
            ("prompt_lookup",),
        ),
        "no assisted decoding with a recurrent cache",
    ),
    ("kimi_linear", "prompt_lookup"): "no assisted decoding with a recurrent cache",
    **dict.fromkeys(
        itertools.product(("bamba", "falcon_h1", "nemotron_h", "zamba2", "openai_gpt"), ("inputs_embeds",)),
        "the class takes no inputs_embeds in generate",
    ),
}


def positions_of(model: Any, mask: Tensor) -> dict[str, Tensor]:
    takes = "position_ids" in inspect.signature(inner_model(model).forward).parameters
    return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if takes else {}


def plain_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """[t, v] logits of one unpadded row in one forward pass."""
    inputs = torch.tensor([list(ids)])
    mask = torch.ones_like(inputs)
    with torch.no_grad():
        return model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[0]


def reference(model: Any, ran: Ran, steered: Callable[[Ran], Any]) -> Tensor:
    """The logits (or the score of a beam) that one plain forward pass gives for what a mode produced."""
    with steered(ran):
        logits = plain_logits(model, [*ran.prompt, *ran.answer])
    start = len(ran.prompt) - 1
    behind = logits[start : start + len(ran.answer)]
    if ran.processed:
        chosen = torch.log_softmax(behind.float(), dim=-1).gather(-1, torch.tensor(ran.answer)[:, None])
        return chosen.sum()
    return behind


def gap(ran: Ran, expected: Tensor) -> float:
    """Largest difference, relative to the largest value; of a beam's score, which may be near 0, to a nat at least."""
    least = 1.0 if ran.processed else 1e-6
    return float((ran.logits.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(least))


def run_steered(
    model: Any, mode: str, vector: SteeringVector | None, strength: float = 1.0
) -> list[tuple[Ran, Tensor, Tensor]]:
    """Run a mode steered (or the baseline); per answer what it gave, what it should give, what the baseline gives."""
    lengths = [len(SHORT), len(LONG), 4] if mode == "right_padded_forward" else None
    given: Any = list(PER_ROW) if mode.startswith("per_row") else strength
    context = steerkit.steer(model, vector, given, prompt_lengths=lengths) if vector is not None else no_steering()
    with context, torch.no_grad():
        ran = MODES[mode](model)

    def again(one: Ran) -> Any:
        if vector is None:
            return no_steering()
        own = strength if one.strength is None else one.strength
        return steerkit.steer(model, vector, own, prompt_lengths=[len(one.prompt)])

    return [(one, reference(model, one, again), reference(model, one, lambda _: no_steering())) for one in ran]


def check_all(check: Callable[[str, str, str], None], cells: Iterable[tuple[str, str, str]]) -> None:
    """Check some cells (a family, what is done, a mode) and tell of all that fail; one that is skipped is left out."""
    failures = []
    for cell in cells:
        try:
            check(*cell)
        except pytest.skip.Exception:
            continue
        except Exception as error:  # noqa: BLE001 - every cell of a family is run before it is judged
            failures.append(f"{cell}: {type(error).__name__}: {error}"[:300])
    assert not failures, "\n".join(failures)
