"""`generate_batch`: several requests in one row, in a thread of its own, with prompt blocks that outlive a call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import steerkit
from steerkit.errors import ModelError, ScopeError
from tests import modes
from tests.families import build

# One block of the cache holds 32 tokens: shorter prompts share nothing.
START = torch.randint(1, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [[*START, 7, 9, 11], [*START, 5], [3, 4, 5, 6]]
SETTINGS = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
SHARING = {"block_size": 32, "num_blocks": 16, "max_batch_tokens": 128}


@pytest.fixture
def model() -> Iterator[Any]:
    made = build("llama").eval()
    yield made
    made.destroy_cached_continuous_batching_manager()


def config(**more: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{**SHARING, **more})


def answers(model: Any, *, keep: bool = False, **more: Any) -> list[list[int]]:
    found = model.generate_batch(
        PROMPTS,
        generation_config=SETTINGS,
        continuous_batching_config=config(**more),
        persistent_manager=keep,
        warmup=False,
    )
    by_prompt = {tuple(one.prompt_ids): list(one.generated_tokens) for one in found.values()}
    return [by_prompt[tuple(prompt)] for prompt in PROMPTS]


def one_by_one(model: Any) -> list[list[int]]:
    """What `generate` answers to each prompt alone."""
    rows = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [model.generate(row, generation_config=SETTINGS)[0, row.shape[1] :].tolist() for row in rows]


@pytest.mark.parametrize("keep", [False, True])
def test_every_token_is_steered_as_in_generate(model: Any, keep: bool) -> None:
    vector = modes.vector_for(model, scope="all")
    baseline = one_by_one(model)
    with steerkit.steer(model, vector, 2.0):
        expected = one_by_one(model)
        assert answers(model, keep=keep) == expected
    assert expected != baseline


def test_blocks_made_under_steering_do_not_outlive_it_nor_come_into_it(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    baseline = answers(model, keep=True)
    assert baseline == one_by_one(model)
    with steerkit.steer(model, vector, 2.0) as steering:
        steered = answers(model, keep=True)
        assert steered == one_by_one(model)
        steering.strength = -3.0
        assert answers(model, keep=True) == one_by_one(model) != steered
    assert answers(model, keep=True) == baseline


def test_blocks_made_with_edited_weights_do_not_outlive_them(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    baseline = answers(model, keep=True)
    with steerkit.edited(model, vector, 2.0):
        assert answers(model, keep=True) == one_by_one(model) != baseline
    assert answers(model, keep=True) == baseline


@pytest.mark.parametrize("scope", ["response", "prompt", "generated", "first(2)"])
def test_a_scope_that_cannot_be_known_is_no_empty_answer(model: Any, scope: str) -> None:
    baseline = one_by_one(model)
    with pytest.raises(ScopeError, match="several texts share a row"):  # noqa: SIM117
        with steerkit.steer(model, modes.vector_for(model, scope=scope)):
            answers(model)
    assert one_by_one(model) == baseline
    with steerkit.steer(model, modes.vector_for(model, scope=scope)):
        one_by_one(model)  # nothing is left of the refusal


def test_a_strength_for_each_row_is_no_empty_answer(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    with pytest.raises(ScopeError, match="got 3 values for a pass of 1 rows"):  # noqa: SIM117
        with steerkit.steer(model, vector, [1.0, 2.0, 0.0]):
            answers(model)


def test_the_user_s_own_error_comes_first(model: Any) -> None:
    with pytest.raises(KeyError, match="mine"):  # noqa: SIM117
        with steerkit.steer(model, modes.vector_for(model, scope="response")):
            answers(model)
            raise KeyError("mine")


def test_a_running_manager_that_shares_is_refused(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    manager = model.init_continuous_batching(SETTINGS, config())
    manager.start()
    try:
        with pytest.raises(ModelError, match="stop it first"), steerkit.steer(model, vector):
            pass
        with pytest.raises(ModelError, match="stop it first"), steerkit.edited(model, vector):
            pass
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    finally:
        manager.stop()
    with steerkit.steer(model, vector):
        pass


def test_a_manager_left_running_is_told_of(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    manager = model.init_continuous_batching(SETTINGS, config())
    try:
        with pytest.raises(ModelError, match="end of steer"), steerkit.steer(model, vector):
            manager.start()
    finally:
        manager.stop()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_running_manager_that_shares_nothing_is_steered(model: Any) -> None:
    vector = modes.vector_for(model, scope="all")
    manager = model.init_continuous_batching(SETTINGS, config(allow_block_sharing=False))
    manager.start()
    try:
        with steerkit.steer(model, vector, 2.0):
            expected = one_by_one(model)
            manager.add_request(PROMPTS[0], request_id="one")
            got = None
            while got is None or not got.is_finished():
                got = manager.get_result("one", timeout=30)
        assert list(got.generated_tokens) == expected[0]
    finally:
        manager.stop()
