"""Every family x scope x mode: what `generate` does equals one plain forward pass, and differs from the baseline."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import transformers as tf

from tests import modes, tolerances
from tests.choices import mostly_slow
from tests.families import FAMILIES, FURTHER, FURTHER_CONFIGS, QUIET, build

SCOPES = (
    *("response", "all", "prompt", "generated", "first(4)", "front", "mid", "back", "response(3)", "generated(2)"),
    *("response(1:4)", "generated(1:)"),
)


@functools.cache
def model_of(family: str) -> Any:
    return build(family).eval()


def check(family: str, scope: str, mode: str) -> None:
    if (family, mode) in modes.EXCEPTIONS:
        pytest.skip(modes.EXCEPTIONS[family, mode])
    model, tolerance = model_of(family), tolerances.of_family(family)
    site = modes.Site(1, "resid_pre" if scope in ("front", "mid", "back") else "resid_post")
    vector = modes.vector_for(model, scope=scope, site=site)
    ran = modes.run_steered(model, mode, vector)
    assert ran
    for one, expected, _ in ran:
        assert len(one.answer) == modes.NEW
        assert modes.gap(one, expected) < tolerance, (family, scope, mode)
    # A steer that does nothing must fail: what the mode gave is not what the baseline gives. A beam shows only one
    # sum of log-probabilities, which may come out nearly alike by chance, so there one answer that differs by more than
    # rounding is enough.
    is_sum = ran[0][0].processed
    differs = [modes.gap(one, baseline) > (10 * tolerance if is_sum else 1e-3) for one, _, baseline in ran]
    assert any(differs) if is_sum else all(differs), (family, scope, mode)


COVERING = sorted(
    {
        (family, scope, mode)
        for number, family in enumerate(FAMILIES)
        for place, mode in enumerate(modes.MODES)
        for scope in (SCOPES[(number + place) % len(SCOPES)], *(["response"] if (number + place) % 3 == 0 else []))
    }
)
EVERYTHING = sorted(set(itertools.product(FAMILIES, SCOPES, modes.MODES)) - set(COVERING))


# Every further family in every scope: cached, uncached and padded, and five of the other modes in turn.
BASIC = ("cached", "uncached", "left_padded")
OTHERS = tuple(mode for mode in modes.MODES if mode not in BASIC)
COVERING_FURTHER = [
    (family, SCOPES[(place + number) % len(SCOPES)], mode)
    for number, family in enumerate(FURTHER)
    for place, mode in enumerate((*BASIC, *(OTHERS[(5 * number + step) % len(OTHERS)] for step in range(5))))
]
EVERYTHING_FURTHER = set(itertools.product(FURTHER, SCOPES, modes.MODES)) - set(COVERING_FURTHER)


@pytest.mark.parametrize("family", FAMILIES)
def test_covering(family: str) -> None:
    modes.check_all(check, (cell for cell in COVERING if cell[0] == family))


@pytest.mark.parametrize("family", mostly_slow(FURTHER, list(FURTHER)[::2]))
def test_covering_of_further_families(family: str) -> None:
    modes.check_all(check, (cell for cell in COVERING_FURTHER if cell[0] == family))


@pytest.mark.parametrize("scope", SCOPES)
def test_a_cache_whose_first_layer_stays_empty_is_counted(scope: str) -> None:
    """MiniMax keeps the state of linear attention beside its cache, whose layer there has no length for good."""
    classes, given = FURTHER_CONFIGS["minimax"]
    assert classes == "MiniMax"
    torch.manual_seed(0)
    kinds = ["linear_attention", "full_attention"] * 2
    model = tf.MiniMaxForCausalLM(tf.MiniMaxConfig(**QUIET, **{**given, "layer_types": kinds})).eval()
    for one, expected, baseline in modes.run_steered(model, "cached", modes.vector_for(model, scope=scope)):
        assert modes.gap(one, expected) < 1e-5
        assert modes.gap(one, baseline) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", FURTHER)
def test_full_product_of_further_families(family: str) -> None:
    modes.check_all(check, sorted(cell for cell in EVERYTHING_FURTHER if cell[0] == family))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "scope", "mode"), EVERYTHING)
def test_full_product(family: str, scope: str, mode: str) -> None:
    check(family, scope, mode)


@pytest.mark.parametrize("family", mostly_slow([*FAMILIES, *FURTHER], list(FAMILIES)[::2]))
def test_bare_model_holds_the_equality_in_every_mode_not_excepted(family: str) -> None:
    """What the tests above assume of transformers itself."""
    wrong = []
    for mode in modes.MODES:
        holds, why = True, ""
        try:
            for one, expected, _ in modes.run_steered(model_of(family), mode, None):
                off = modes.gap(one, expected)
                holds, why = holds and off < tolerances.of_family(family), f"{why} {off:.1e}"
        except Exception as error:  # noqa: BLE001 - transformers says in many ways that it lacks a mode
            holds, why = False, f"{type(error).__name__}: {error}"[:120]
        if holds == ((family, mode) in modes.EXCEPTIONS):
            wrong.append(f"{mode}: {'now holds, take it off the list' if holds else why}")
    assert not wrong, "\n".join(wrong)
