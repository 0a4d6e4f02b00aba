"""Gates on a model whose blocks are compiled one by one: right in every mode, and what has no gate stays compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.composition import Composition
from steerkit.errors import ModelError
from tests import modes
from tests.families import build
from tests.gated import READ, REPEATED, WRITE, gated_vector
from tests.modes import LONG, SHORT
from tests.steering.test_when import known_of

MODES: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
}
PROMPTS = (LONG, SHORT, REPEATED, LONG)  # closed, open, open, closed


@pytest.fixture
def model() -> Iterator[Any]:
    torch._dynamo.reset()
    # All blocks share one code object, and each is traced anew for each shape.
    with torch._dynamo.config.patch(recompile_limit=200):
        yield build("llama")
    torch._dynamo.reset()


class Counted:
    """Compiles the blocks of a model, and counts how often each of them ran compiled."""

    def __init__(self, model: nn.Module) -> None:
        self.ran = [0] * len(model.model.layers)
        for number, block in enumerate(model.model.layers):
            block.compile(backend=self._backend(number), fullgraph=True)

    def _backend(self, number: int) -> Callable[..., Any]:
        def backend(graph: Any, _inputs: Any, **_options: Any) -> Any:
            def run(*args: Any) -> Any:
                self.ran[number] += 1
                return graph.forward(*args)

            return run

        return backend


def answers(model: Any, mode: str, vectors: Any) -> list[Tensor]:
    with contextlib.nullcontext() if vectors is None else steerkit.steer(model, vectors):
        alone = [modes.generate(model, [prompt], **MODES[mode])[0].logits for prompt in PROMPTS]
        return [*alone, *(each.logits for each in modes.generate(model, [LONG, SHORT], **MODES[mode]))]


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(bool((a - b).abs().max() < 1e-5 * b.abs().max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["conditional", "a when(early > 0)", "a when(early > 0 per token)"])
@pytest.mark.parametrize("mode", MODES)
def test_gates_are_right_where_blocks_are_compiled(model: Any, rule: str, mode: str) -> None:
    vectors: Any = gated_vector(model)
    if rule != "conditional":
        vectors = Composition.parse(rule).vectors(known_of(model, "early", "a"))
    baseline, expected = answers(model, mode, None), answers(model, mode, vectors)
    assert not close(baseline, expected)
    counted = Counted(model)
    assert close(answers(model, mode, vectors), expected)
    assert any(counted.ran)
    assert close(answers(model, mode, None), baseline)
    assert all(counted.ran)


def test_blocks_with_a_gate_alone_run_uncompiled(model: Any) -> None:
    vector, counted = gated_vector(model), Counted(model)
    calls = [block._compiled_call_impl for block in model.model.layers]
    with steerkit.steer(model, vector), steerkit.steer(model, vector):
        modes.generate(model, [SHORT])
        assert [bool(times) for times in counted.ran] == [layer not in (READ.layer, WRITE.layer) for layer in range(4)]
    assert [block._compiled_call_impl for block in model.model.layers] == calls
    with pytest.raises(KeyError), steerkit.steer(model, vector):
        raise KeyError
    assert [block._compiled_call_impl for block in model.model.layers] == calls


def test_contexts_that_end_in_another_order_leave_blocks_as_they_were(model: Any) -> None:
    vector = gated_vector(model)
    Counted(model)
    calls = [block._compiled_call_impl for block in model.model.layers]
    first, second = steerkit.steer(model, vector), steerkit.steer(model, vector)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.model.layers[WRITE.layer]._compiled_call_impl is None
    second.__exit__(None, None, None)
    assert [block._compiled_call_impl for block in model.model.layers] == calls


@pytest.mark.parametrize("part", ["model", "body", "wrapper", "block"])
def test_what_is_compiled_around_a_gate_is_refused(model: Any, part: str) -> None:
    vector, given = gated_vector(model), model
    if part == "wrapper":
        given = torch.compile(model, backend="eager")
    elif part == "block":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    else:
        (model if part == "model" else model.model).compile(backend="eager")
    with pytest.raises(ModelError, match=r"cannot steer a compiled model.*block\.compile\(\)"):
        steerkit.steer(given, vector)
