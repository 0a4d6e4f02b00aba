"""A compiled model is steered like an eager one, and is never silently unsteered."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import steerkit
from tests import modes
from tests.families import build, shortened
from tests.pairwise import pairwise

IDS = torch.tensor([[5, 17, 44, 9, 101, 63], [7, 23, 42, 88, 15, 3]])


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch._dynamo.reset()
    # Tracing takes seconds a block: one that is steered and one that is not is the least.
    yield shortened(build("llama"), request.param)
    torch._dynamo.reset()


def counted() -> tuple[Any, list[int]]:
    """A backend that compiles nothing and counts how often it is asked to."""
    calls: list[int] = []

    def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
        calls.append(1)
        return graph.forward

    return backend, calls


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one - other).abs().max() / other.abs().max()) < 1e-5)


@pytest.mark.parametrize(
    ("how", "when", "scope"),
    pairwise(
        ["torch.compile", "model.compile"],
        ["inside", "before"],  # the cheaper one first: the choice takes more of what stands first
        ["all", "first(4)", "response", "prompt", "front"],
        strength=1,
    ),
)
def test_bug_40_fullgraph_equals_eager(model: Any, scope: str, when: str, how: str) -> None:
    vector = modes.vector_for(model, scope=scope)
    lengths = [4, 3] if scope in ("response", "prompt") else None
    with torch.no_grad():
        baseline = model(IDS).logits
        with steerkit.steer(model, vector, prompt_lengths=lengths):
            expected = model(IDS).logits
        backend, _ = counted()
        if how == "torch.compile":
            compiled = torch.compile(model, fullgraph=True, backend=backend)
        else:
            model.compile(fullgraph=True, backend=backend)
            compiled = model
        if when == "before":
            assert close(compiled(IDS).logits, baseline)
        for _ in range(2):
            with steerkit.steer(model, vector, prompt_lengths=lengths):
                assert close(compiled(IDS).logits, expected)
            assert close(compiled(IDS).logits, baseline)
    assert not close(expected, baseline)


@pytest.mark.parametrize("rows", [False, True])
def test_a_changed_strength_recompiles_nothing(model: Any, rows: bool) -> None:
    vector = modes.vector_for(model, scope="all")
    backend, calls = counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    values: list[Any] = [[1.0, -2.0], [0.0, 3.0], [0.0, 0.0], [2.0, 2.0]] if rows else [1.0, -2.0, 0.0, 3.0]
    with torch.no_grad(), steerkit.steer(model, vector, values[0]) as steering:
        compiled(IDS)
        before = len(calls)
        for value in values:
            steering.strength = value
            got = compiled(IDS).logits
            with torch.compiler.set_stance("force_eager"):
                assert close(got, model(IDS).logits)
        assert len(calls) == before


@pytest.mark.parametrize("scope", [pytest.param("all", marks=pytest.mark.slow), "response"])
def test_twenty_contexts_of_any_strengths_are_compiled_once(model: Any, scope: str) -> None:
    """Once under steering, and once outside, where what was left of the first context does nothing."""
    backend, calls = counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    strengths: list[Any] = [1.0, 2.0, 0.0, [1.0, -2.0], [0.0, 3.0], -1.0, [0.0, 0.0]]
    lengths = None if scope == "all" else [4, 3]
    counters.clear()
    with torch.no_grad():
        baseline = model(IDS).logits
        for number in range(20):
            with steerkit.steer(
                model, modes.vector_for(model, scope=scope), strengths[number % 7], prompt_lengths=lengths
            ):
                got = compiled(IDS).logits
                with torch.compiler.set_stance("force_eager"):
                    assert close(got, model(IDS).logits)
            assert close(compiled(IDS).logits, baseline)
            assert len(calls) == 2
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("fade", [None, "linear over 3"])
def test_rows_of_their_own_are_compiled_once(model: Any, fade: str | None) -> None:
    """Two vectors of one method share an edit where neither fades; a fade of other ends would be compiled again."""
    backend, calls = counted()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for number in range(4):
        one, other = (modes.vector_for(model, scope="response", seed=2 * number + place) for place in range(2))
        rows: list[Any] = [[one.at(1.0 + number, fade=fade)], [other.at(-0.5 * number, fade=fade)]]
        if number == 3:
            rows = [rows[1], rows[0]]
        with torch.no_grad(), steerkit.steer(model, rows, prompt_lengths=[3, 2]):
            got = compiled(IDS).logits
            with torch.compiler.set_stance("force_eager"):
                assert close(got, model(IDS).logits)
        assert len(calls) == 1


def test_as_many_strengths_as_rows_or_one(model: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=counted()[0])
    with torch.no_grad(), steerkit.steer(model, modes.vector_for(model, scope="all"), [1.0, 2.0, 3.0]):
        with pytest.raises(RuntimeError, match="one per row of the batch"):
            compiled(IDS)
        twice = IDS.repeat_interleave(3, dim=0)
        expected = torch.cat([compiled(IDS[:1].expand(3, -1)).logits[place, None] for place in range(3)])
        assert close(compiled(twice[:3]).logits, expected)


def test_hooks_that_stay_behind_do_nothing_to_eager_code(model: Any) -> None:
    compiled = torch.compile(model, fullgraph=True, backend=counted()[0])
    vector = modes.vector_for(model, scope="response")
    with torch.no_grad():
        baseline = model(IDS).logits
        with steerkit.steer(model, vector, prompt_lengths=[4, 3]):
            compiled(IDS)
        assert any(module._forward_hooks for module in model.modules())
        assert torch.equal(model(IDS).logits, baseline), "and nobody asks here where the prompt ends"
        with steerkit.steer(model, vector, prompt_lengths=[4, 3]):
            assert not torch.equal(model(IDS).logits, baseline)
        assert torch.equal(model(IDS).logits, baseline)


def test_the_real_compiler_agrees(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        baseline = compiled(IDS).logits
        with steerkit.steer(model, vector):
            assert close(compiled(IDS).logits, model(IDS).logits)
        assert close(compiled(IDS).logits, baseline)


@pytest.mark.parametrize(
    ("scope", "thread"),
    [
        *pairwise(["response", "all"], [False, True], strength=1),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in itertools.product(["generated", "prompt", "response(3)", "generated(2)"], [False, True])
        ),
    ],
)
def test_generate_with_a_compiled_static_cache(model: Any, scope: str, thread: bool) -> None:
    """`generate` compiles by itself with a static cache on an accelerator; streamers run it in a worker thread."""
    ids = torch.tensor([modes.SHORT])
    backend, calls = counted()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}

    def run(*, compiled: bool) -> list[int]:
        more: dict[str, Any] = {}
        if compiled:
            config = steerkit_compile_config(backend)
            more = {"cache_implementation": "static", "compile_config": config}
        got: list[list[int]] = []

        def work() -> None:
            with torch.no_grad():
                got.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options, **more)[0].tolist())

        if thread:
            worker = threading.Thread(target=work)
            worker.start()
            worker.join()
        else:
            work()
        return got[0]

    vector = modes.vector_for(model, scope=scope)
    baseline = run(compiled=False)
    assert run(compiled=True) == baseline
    compiles = len(calls)
    assert compiles > 0
    with steerkit.steer(model, vector):
        expected = run(compiled=False)
        assert run(compiled=True) == expected
    assert run(compiled=True) == baseline
    assert expected != baseline


def steerkit_compile_config(backend: Any) -> Any:
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=False, dynamic=False, backend=backend)
    config._compile_all_devices = True  # transformers' own switch to compile on the CPU
    return config


def test_a_copy_made_inside_the_context_is_not_steered(model: Any) -> None:
    with torch.no_grad(), steerkit.steer(model, modes.vector_for(model, scope="all")):
        twin = copy.deepcopy(model)
        steered = model(IDS).logits
    with torch.no_grad():
        baseline = model(IDS).logits
        assert torch.equal(twin(IDS).logits, baseline)
    assert not torch.equal(steered, baseline)
