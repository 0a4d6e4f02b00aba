"""Windows and fades over generated tokens, in every way to generate, beside a hook written by hand."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import ScopeError, StrengthError
from steerkit.network.decoder import find_decoder
from tests import modes, tolerances
from tests.choices import mostly_slow
from tests.families import FAMILIES, build, shortened
from tests.gated import gated_vector
from tests.modes import LONG, SHORT, vector_for
from tests.pairwise import covering

START = 1.5
# Scope, fade. Answers have five tokens.
SCHEDULES: dict[str, tuple[str, str | None]] = {
    "window": ("response(1:3)", None),
    "window of generated": ("generated(1:)", None),
    "linear": ("response", "linear over 3"),
    "linear everywhere": ("all", "linear over 4 to -1"),
    "exponential": ("generated", "exponential over 2"),
    "cosine": ("response", "cosine over 4 to 0.5"),
    "both": ("response(1:4)", "linear over 3 to 2"),
}


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family).eval()


def strength_by_hand(name: str, column: int, prompt: int) -> float:
    """What is added at a column of one unpadded row, in words of the schedule alone."""
    scope, fade = SCHEDULES[name]
    k = column - (prompt - 1)  # the generated token that the column chooses
    inside = {
        "response(1:3)": 1 <= k < 3,
        "generated(1:)": k - 1 >= 1,
        "response": k >= 0,
        "all": True,
        "generated": k >= 1,
        "response(1:4)": 1 <= k < 4,
    }[scope]
    if not inside:
        return 0.0
    k = max(k, 0)
    return {
        None: START,
        "linear over 3": START * max(1 - k / 3, 0),
        "linear over 4 to -1": START + (-1 - START) * min(k / 4, 1),
        "exponential over 2": START * 0.5 ** (k / 2),
        "cosine over 4 to 0.5": 0.5 + (START - 0.5) * (1 + math.cos(math.pi * min(k / 4, 1))) / 2,
        "linear over 3 to 2": START + (2 - START) * min(k / 3, 1),
    }[fade]


@contextlib.contextmanager
def by_hand(model: Any, direction: Tensor, name: str, prompt: int, factor: float = 1.0) -> Iterator[None]:
    """One unpadded row in one pass: the direction is added to block 1, column by column."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        steered = stream.clone()
        for column in range(stream.shape[1]):
            steered[:, column] += factor * strength_by_hand(name, column, prompt) * direction
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    handle = find_decoder(model).blocks[1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def scheduled(model: Any, name: str) -> steerkit.SteeringVector:
    scope, fade = SCHEDULES[name]
    return vector_for(model, scope=scope).at(strength=START, scope=scope, fade=fade)


def check(family: str, name: str, mode: str) -> None:
    model, vector = model_of(family), scheduled(model_of(family), name)
    lengths = [len(SHORT), len(LONG), 4] if mode == "right_padded_forward" else None
    with torch.no_grad(), steerkit.steer(model, vector, prompt_lengths=lengths):
        ran = modes.MODES[mode](model)
    direction = vector.tensors["resid_post.1/direction"]
    for one in ran:
        expected = modes.reference(model, one, lambda ran: by_hand(model, direction, name, len(ran.prompt)))
        assert modes.gap(one, expected) < tolerances.of_family(family), (family, name, mode)
    plain = [modes.reference(model, one, lambda _: modes.no_steering()) for one in ran]
    assert any(modes.gap(one, bare) > 1e-3 for one, bare in zip(ran, plain, strict=True)), (family, name, mode)


CELLS = [
    (family, name, mode)
    for family in FAMILIES
    for name in SCHEDULES
    for mode in modes.MODES
    if (family, mode) not in modes.EXCEPTIONS and not mode.startswith("per_row")
]
CHOICE = {*covering(CELLS, strength=1), *covering([cell for cell in CELLS if cell[0] in ("llama", "mamba", "gpt_oss")])}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, list(FAMILIES)[::2]))
def test_every_way_to_generate_is_the_hook_by_hand(family: str) -> None:
    modes.check_all(check, sorted(cell for cell in CHOICE if cell[0] == family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_product(family: str) -> None:
    modes.check_all(check, (cell for cell in CELLS if cell[0] == family and cell not in CHOICE))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_anew_with_each_generate(name: str) -> None:
    """And goes on where a cache is continued: what the first call put there stays, and the prompt ends later."""
    model = model_of()
    with torch.no_grad(), steerkit.steer(model, scheduled(model, name)):
        first = modes.generate(model, [SHORT, LONG])
        again = modes.generate(model, [SHORT, LONG])
        for one, other in zip(first, again, strict=True):
            assert one.answer == other.answer
            assert torch.equal(one.logits, other.logits)


def test_assisted_decoding_is_plain_decoding() -> None:
    model, draft = model_of(), shortened(build("llama"), 2)
    for name in SCHEDULES:
        with torch.no_grad(), steerkit.steer(model, scheduled(model, name)):
            (plain,) = modes.generate(model, [LONG])
            (assisted,) = modes.generate(model, [LONG], assistant_model=draft)
        assert assisted.answer == plain.answer, name
        assert (assisted.logits - plain.logits).abs().max() < 1e-4, name


def test_each_row_fades_from_its_own_strength() -> None:
    model = model_of()
    vector, factors = scheduled(model, "linear").at(strength=[START, -2 * START]), (1.0, -2.0)
    direction = vector.tensors["resid_post.1/direction"]
    for mode in ("left_padded", "beams", "num_return_sequences"):
        prompts = [SHORT, LONG]
        with torch.no_grad(), steerkit.steer(model, vector):
            ran = modes.generate(model, prompts) if mode == "left_padded" else modes.MODES[mode](model)
        for place, one in enumerate(ran):
            factor = factors[place * 2 // len(ran)]
            hand = functools.partial(by_hand, model, direction, "linear", len(one.prompt), factor)
            assert modes.gap(one, modes.reference(model, one, lambda _, hand=hand: hand())) < 1e-4, mode


def test_what_has_faded_to_nothing_is_the_unsteered_model_bitwise() -> None:
    """The cache keeps what was steered; what is computed then is the bare model's."""
    model = model_of()
    vector = vector_for(model, scope="generated").at(strength=START, fade="linear over 1")  # token 1 on: 0
    with torch.no_grad():
        (plain,) = modes.generate(model, [LONG])
        with steerkit.steer(model, vector):
            (faded,) = modes.generate(model, [LONG])
    assert faded.answer == plain.answer
    assert torch.equal(faded.logits, plain.logits)


def test_changed_strength_and_strength_that_rises_from_nothing() -> None:
    model = model_of()
    vector = vector_for(model, scope="response").at(fade=f"linear over 4 to {START}")
    direction = vector.tensors["resid_post.1/direction"]
    with torch.no_grad(), steerkit.steer(model, vector, 0.0) as steering:
        (risen,) = modes.generate(model, [LONG])
        steering.strength = START  # and so it stays
        (steady,) = modes.generate(model, [LONG])
    with torch.no_grad(), steerkit.steer(model, vector_for(model, scope="response"), START):
        (constant,) = modes.generate(model, [LONG])
    assert steady.answer == constant.answer
    torch.testing.assert_close(steady.logits, constant.logits)

    def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
        k = (torch.arange(output.shape[1]) - (len(LONG) - 1)).clamp_min(0)
        return output + (START * (k / 4).clamp_max(1))[None, :, None] * direction

    handle = find_decoder(model).blocks[1].register_forward_hook(hook)
    expected = modes.reference(model, risen, lambda _: modes.no_steering())
    handle.remove()
    assert modes.gap(risen, expected) < 1e-4


def test_what_cannot_fade_is_refused() -> None:
    model = model_of()
    fading = scheduled(model, "linear everywhere")
    with pytest.raises(StrengthError, match=r"fade\(linear"), steerkit.edited(model, fading):
        pass
    with steerkit.steer(model, fading), pytest.raises(ScopeError, match="a fade counts generated tokens, and this"):
        model(torch.tensor([LONG]))
    with pytest.raises(ScopeError, match="lies in the prompt"):
        steerkit.steer(model, vector_for(model, scope="front").at(fade="linear over 4"))
    for wrong in ("linear", "linear over 0", "lineal over 4", "linear over 4 to nan", "linear over 9999999999", ""):
        with pytest.raises(StrengthError, match="fade"):
            fading.at(fade=wrong)


def test_a_gated_vector_fades() -> None:
    """Its shift is made anew for each token; a fade to its own strength changes nothing."""
    model = model_of()
    for vector in (gated_vector(model), gated_vector(model).at(scope="generated")):
        with torch.no_grad():
            with steerkit.steer(model, vector, 2.0):
                (steady,) = modes.generate(model, [SHORT])
            with steerkit.steer(model, vector.at(fade="linear over 3 to 2"), 2.0):
                (same,) = modes.generate(model, [SHORT])
            with steerkit.steer(model, vector.at(fade="linear over 2"), 2.0):
                (faded,) = modes.generate(model, [SHORT])
        assert torch.equal(steady.logits, same.logits)
        assert not torch.allclose(steady.logits, faded.logits, atol=1e-3)


@pytest.mark.parametrize("name", ["both", *(pytest.param(one, marks=pytest.mark.slow) for one in SCHEDULES)])
def test_compiled_decoding_with_a_static_cache(name: str) -> None:
    from tests.steering.test_compile import counted, steerkit_compile_config

    torch._dynamo.reset()
    model = shortened(build("llama"), 2)
    backend, calls = counted()
    config = steerkit_compile_config(backend)
    with torch.no_grad(), steerkit.steer(model, scheduled(model, name)):
        (eager,) = modes.generate(model, [LONG])
        (compiled,) = modes.generate(model, [LONG], cache_implementation="static", compile_config=config)
    torch._dynamo.reset()
    assert calls
    assert compiled.answer == eager.answer
    assert (compiled.logits - eager.logits).abs().max() < 1e-4
