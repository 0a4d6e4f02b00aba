"""Batches that do not fit into memory are run in halves, with the results of the smaller size, and nothing twice."""

from __future__ import annotations

import ast
import contextlib
import functools
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit._support.memory import is_out_of_memory
from steerkit.activations.recording import record
from steerkit.errors import ModelError
from steerkit.evaluate.judges.local import LocalJudge
from steerkit.evaluate.setup import Setup
from steerkit.fitting.passes import Passes
from steerkit.monitor import Monitor
from steerkit.network.decoder import find_decoder
from steerkit.prompts.batching import batches, run_batches
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import render
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TOKENIZER = byte_tokenizer(CHATML)
PROMPTS = ["One", "Twenty-two", "Three and a half", "Four", "Fifty-five or so", "Six"]
PAIRS = [(f"What about {number}?", f" {number} is fine.", f" No {number}, never.") for number in range(7)]


build_once = functools.cache(build)


def model(family: str = "llama") -> Any:
    return build_once(family)


@functools.cache
def vector() -> SteeringVector:
    return steerkit.fit(model(), TOKENIZER, steerkit.ContrastSet.from_answers(PAIRS), layers=[1, 2])


def real_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@contextlib.contextmanager
def room_for(rows: int, family: str = "llama", error: Callable[[], Exception] = real_error) -> Iterator[list[int]]:
    """The third block of four has room for so many rows; gives how many each pass came with."""
    seen: list[int] = []

    def enter(_module: Any, args: Any) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > rows:
            raise error()

    handle = find_decoder(model(family)).blocks[2].register_forward_pre_hook(enter)
    try:
        yield seen
    finally:
        handle.remove()


def sampled(size: int, **options: Any) -> list[str]:
    settings = {"max_new_tokens": 5, "do_sample": True, "seed": 3, "vector": vector(), "strength": 2.0, **options}
    return steerkit.generate(model(), TOKENIZER, PROMPTS, batch_size=size, **settings)


def recorded(size: int) -> Any:
    found = record(model(), TOKENIZER, PROMPTS, ["resid_post.1", "resid_post.3"], readout="mean", batch_size=size)
    return found.positive, found.norms


def recorded_under(size: int) -> Any:
    rendered = [render(TOKENIZER, Conversation(prompt)) for prompt in PROMPTS]
    return Passes(model(), TOKENIZER, find_decoder(model()), size).record(
        rendered, ["resid_post.3"], "last", vector().at(2.0)
    )


def fitted(method: str, family: str, size: int) -> Any:
    data = steerkit.ContrastSet.from_answers(PAIRS)
    layers = None if method == "steer2edit" else [1, 3]
    found = steerkit.fit(model(family), TOKENIZER, data, method=method, layers=layers, batch_size=size)
    return found.tensors, found.norms


def setup(size: int) -> Setup:
    return Setup(
        model(), TOKENIZER, steerkit.ContrastSet.from_answers(PAIRS), batch_size=size, max_new_tokens=4
    ).first_neutral(4)


def measured(size: int) -> Any:
    scores = ["preference_margin", "divergence", "repetition"]
    return {name: one.as_row() for name, one in steerkit.measure(setup(size).trial(vector(), 1.5), scores).items()}


def gate(size: int) -> Any:
    rendered = [render(TOKENIZER, Conversation(prompt)) for prompt in PROMPTS]
    return Passes(model(), TOKENIZER, find_decoder(model()), size).logits(rendered, vector().at(2.0))


WORK: dict[str, tuple[Callable[[int], Any], str]] = {
    "record": (recorded, "llama"),
    "record steered": (lambda size: recorded_under(size).positive, "llama"),
    "fit": (lambda size: fitted("caa", "llama", size), "llama"),
    "fit on running sums": (lambda size: fitted("austeer", "llama", size), "llama"),
    "fit on experts": (lambda size: fitted("steer2edit", "mixtral", size), "mixtral"),
    "generate": (lambda size: sampled(size, do_sample=False, seed=None), "llama"),
    "generate, one seed": (sampled, "llama"),
    "generate, a seed and a strength each": (
        lambda size: sampled(size, seed=range(6), strength=torch.linspace(-3, 3, 6)), "llama",
    ),
    "measure": (measured, "llama"),
    "logits": (gate, "llama"),
    "judge": (lambda size: LocalJudge(model(), TOKENIZER, least_mass=0.0, batch_size=size).score(PROMPTS), "llama"),
    "monitor": (
        lambda size: Monitor(model(), TOKENIZER, vector(), calibrated=False, batch_size=size).score(PROMPTS), "llama",
    ),
}  # fmt: skip


def same(first: Any, second: Any) -> bool:
    """Whether two results are the same; sums over batches to rounding, where batches differ."""
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        return torch.allclose(first, second, rtol=1e-5, atol=1e-6)
    return bool(first == pytest.approx(second, rel=1e-5)) if isinstance(first, float) else bool(first == second)


@pytest.mark.parametrize("name", WORK)
def test_results_are_those_of_a_smaller_batch(name: str) -> None:
    work, family = WORK[name]
    expected = work(3)
    with room_for(3, family) as seen, pytest.warns(UserWarning, match="rows a pass do not fit into memory; going on"):
        found = work(6)
    assert same(found, expected)
    assert max(seen) > 3


def test_the_size_stays_down_and_is_told_once() -> None:
    work = batches([render(TOKENIZER, Conversation(prompt)) for prompt in PROMPTS * 4], 12, pad_id=0)
    tried: list[int] = []

    def run(batch: Any) -> tuple[int, ...]:
        tried.append(len(batch.rows))
        if len(batch.rows) > 4:
            raise real_error()
        return tuple(batch.rows)

    with pytest.warns(UserWarning) as told:
        found = [row for _, rows in run_batches(work, run) for row in rows]
    assert found == [row for batch in work for row in batch.rows]
    assert tried == [12, 6, 3, 3, 3, 3, 3, 3, 3, 3]
    assert [str(one.message) for one in told] == [
        "12 rows a pass do not fit into memory; going on with 6",
        "6 rows a pass do not fit into memory; going on with 3",
    ]


def test_halves_are_no_wider_than_their_rows_and_pairs_stay_together() -> None:
    rendered = [render(TOKENIZER, Conversation(prompt)) for prompt in PROMPTS]
    for side in ("right", "left"):
        (batch,) = batches(rendered, 6, pad_id=0, side=side, groups=2)  # type: ignore[arg-type]
        parts = batch.parts(3)
        assert [part.rows for part in parts] == [batch.rows[:2], batch.rows[2:4], batch.rows[4:]]
        for part in parts:
            again = batches([rendered[row] for row in part.rows], 2, pad_id=0, side=side, groups=2)[0]  # type: ignore[arg-type]
            assert torch.equal(part.input_ids, again.input_ids)
            assert torch.equal(part.attention_mask, again.attention_mask)
            assert torch.equal(part.prompt_lengths, again.prompt_lengths)


def test_one_row_that_does_not_fit_is_an_error_in_one_line() -> None:
    with room_for(0), pytest.warns(UserWarning), pytest.raises(ModelError, match=r"a text of \d+ tokens") as caught:
        sampled(2)
    assert "\n" not in str(caught.value)
    assert "quantize 4bit" in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(sampled(2)) == len(PROMPTS)  # the model is as it was


def test_nothing_of_the_failed_pass_is_kept_in_memory() -> None:
    made: list[Any] = []

    def run(batch: Any) -> int:
        assert all(one() is None for one in made)
        activations = torch.zeros(len(batch.rows), 4)
        made.append(weakref.ref(activations))
        if len(batch.rows) > 2:
            try:
                raise real_error()
            except RuntimeError as error:
                held = error  # a frame that holds its own error is a cycle
                raise held from None
        return 0

    work = batches([render(TOKENIZER, Conversation(prompt)) for prompt in PROMPTS], 6, pad_id=0)
    with pytest.warns(UserWarning):
        list(run_batches(work, run))
    assert len(made) == 1 + 1 + 6


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)"), True),
        (torch.OutOfMemoryError("XPU out of memory"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory."), False),
    ],
)
def test_which_errors_mean_memory(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory
    expected = pytest.warns(UserWarning) if is_memory else pytest.raises(type(error))
    with room_for(3, error=lambda: error), expected:
        sampled(6)


def test_every_loop_over_batches_halves() -> None:
    """A loop over `batches` that is not `run_batches` would crash where memory runs out."""
    found = []
    for file in sorted(Path(steerkit.__file__).parent.rglob("*.py")):
        loops = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.For)]
        found += [file.name for loop in loops if re.match(r"_?batches\(", ast.unparse(loop.iter))]
    # What these run for each batch halves by itself.
    assert found == ["held_out.py", "difference.py", "rollouts.py"]
