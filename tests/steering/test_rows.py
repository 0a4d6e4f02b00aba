"""Rows of one batch under compositions of their own: equal to single runs, and unsteered rows bitwise alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import CompositionError, DataError, ScopeError, StrengthError
from steerkit.network.sites import Site
from steerkit.steering.stacked_edits import StackedEdit
from tests import modes, tolerances
from tests.families import FAMILIES, build
from tests.gated import gated_vector
from tests.modes import LONG, SHORT, vector_for
from tests.pairwise import covering
from tests.tiny_tokenizers import byte_tokenizer

# Two rows; with `left_padded`, three. Two vectors of one kind share an edit, the third differs in scope or method.
MODES = ("left_padded", "num_return_sequences", "beams", "static_cache", "chunked_prefill", "inputs_embeds")


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family).eval()


def rows_of_vectors(model: Any, kind: str) -> list[list[steerkit.SteeringVector]]:
    """What each of two rows is steered by."""
    a, b, c = (vector_for(model, scope="response", seed=seed) for seed in range(3))
    if kind == "one each":
        return [[a.at(1.0)], [b.at(-0.7)]]
    if kind == "several":
        return [[a.at(1.0), b.at(0.5)], [c.at(-1.0), b.at(2.0), a.at(0.3)]]
    if kind == "scopes and fades":
        return [[a.at(1.0, scope="generated")], [b.at(1.0, scope="all"), c.at(2.0, fade="linear over 3")]]
    ablating = replace(a, method="ablation", edit="project_out", settings={"writes": "fitted"})
    return [[ablating.at(1.0), b.at(1.0)], [b.at(-1.0), replace(ablating, tensors=c.tensors).at(0.5)]]


KINDS = ("one each", "several", "scopes and fades", "methods")
CELLS = [
    (family, kind, mode)
    for family in FAMILIES
    for kind in KINDS
    for mode in MODES
    if (family, mode) not in modes.EXCEPTIONS
]
CHOICE = {*covering(CELLS, strength=1), *covering([cell for cell in CELLS if cell[0] in ("llama", "mamba")])}


def check(family: str, kind: str, mode: str) -> None:
    model = model_of(family)
    rows: list[Any] = rows_of_vectors(model, kind)
    if mode == "left_padded":
        rows.append(None)
    if mode == "chunked_prefill":
        rows = rows[::-1]  # it has the long prompt first
    with torch.no_grad(), steerkit.steer(model, rows):
        ran = modes.MODES[mode](model)
    each = len(ran) // len(rows)
    for place, one in enumerate(ran):
        own = rows[place // each]

        def alone(ran: modes.Ran, own: Any = own) -> Any:
            lengths = [len(ran.prompt)]
            return modes.no_steering() if own is None else steerkit.steer(model, own, prompt_lengths=lengths)

        assert modes.gap(one, modes.reference(model, one, alone)) < tolerances.of_family(family), (family, kind, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_its_single_run(family: str) -> None:
    modes.check_all(check, sorted(cell for cell in CHOICE if cell[0] == family))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_full_product(family: str) -> None:
    modes.check_all(check, (cell for cell in CELLS if cell[0] == family and cell not in CHOICE))


def logits(model: Any, ids: Sequence[Sequence[int]], vectors: Any) -> Tensor:
    steering = modes.no_steering() if vectors is None else steerkit.steer(model, vectors, prompt_lengths=4)
    with torch.no_grad(), steering:
        return model(torch.tensor(ids), use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_unsteered_rows_are_bitwise_the_bare_model(family: str, kind: str) -> None:
    model = model_of(family)
    ids = [LONG, LONG[::-1], LONG, LONG[::-1]]
    first, second = rows_of_vectors(model, kind)
    mixed, bare = logits(model, ids, [None, first, None, second]), logits(model, ids, None)
    assert torch.equal(mixed[[0, 2]], bare[[0, 2]])
    for row, own in ((1, first), (3, second)):
        expected = logits(model, ids, own)
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(mixed[row], bare[row], atol=1e-3)


def test_plain_additions_of_all_rows_are_one_edit_to_a_site() -> None:
    model = model_of()
    vectors = [vector_for(model, scope="response", seed=seed) for seed in range(8)]
    with steerkit.steer(model, [[one.at(1.0 + n)] for n, one in enumerate(vectors)]) as steering:
        (edit,) = steering._edits
        assert isinstance(edit, StackedEdit)
        assert len(edit.parts) == 8
    elsewhere = vector_for(model, scope="response", site=Site(2))
    rows = [
        [vectors[0].at(1.0), elsewhere.at(1.0)],
        [elsewhere.at(2.0), vectors[1].at(1.0)],
        None,
        [vectors[2].at(1.0)],
    ]
    assert steerkit.steer(model, rows).sites == (Site(1), Site(2))


def test_a_gate_decides_for_its_own_rows() -> None:
    """Both prompts open the gate; only the row that has the gated vector is steered."""
    model = model_of()
    gated, plain = gated_vector(model), vector_for(model, scope="response", seed=3)
    prompts = [SHORT, SHORT, LONG]
    with torch.no_grad():
        bare = modes.generate(model, prompts)
        with steerkit.steer(model, [None, [gated.at(2.0)], [plain.at(1.0)]]):
            mixed = modes.generate(model, prompts)
        with steerkit.steer(model, gated, 2.0):
            alone = modes.generate(model, prompts)
    assert torch.equal(mixed[0].logits, bare[0].logits)
    torch.testing.assert_close(mixed[1].logits, alone[1].logits, rtol=1e-4, atol=1e-4)
    assert mixed[1].answer != bare[1].answer
    assert mixed[2].answer != bare[2].answer


def test_generate_keeps_rows_with_their_prompts() -> None:
    """It sorts prompts by length and cuts them into batches; a batch may have no steered row."""
    model, tokenizer = model_of(), byte_tokenizer(None)
    prompts = ["a much longer prompt", "ab", "middle one", "abc"]
    a, b = (vector_for(model, scope="response", seed=seed) for seed in range(2))
    rows = [[a.at(1.5)], None, [b.at(-2.0), a.at(0.5)], None]
    alone = [
        steerkit.generate(model, tokenizer, [prompt], vector=own, max_new_tokens=5)[0]
        for prompt, own in zip(prompts, rows, strict=True)
    ]
    for size in (1, 2, 4):
        assert steerkit.generate(model, tokenizer, prompts, vector=rows, max_new_tokens=5, batch_size=size) == alone
    with pytest.raises(DataError, match="4 compositions for 2 prompts"):
        steerkit.generate(model, tokenizer, prompts[:2], vector=rows)


def test_texts_per_row(tmp_path: Any) -> None:
    model = model_of()
    names = []
    for seed in range(2):
        vector = vector_for(model, scope="response", seed=seed)
        names.append(str(vector.save(tmp_path / f"{seed}.safetensors")))
    a, b = (steerkit.SteeringVector.load(name) for name in names)
    texts: list[Any] = [f"{names[0]}*2", f"{names[0]}*0.5 - {names[1]}", None]
    same: list[Any] = [[a.at(2.0)], [a.at(0.5), b.at(-1.0)], None]
    ids = [LONG, LONG[::-1], LONG]
    assert torch.equal(logits(model, ids, texts), logits(model, ids, same))


def test_a_strength_for_all_that_name_none() -> None:
    model = model_of()
    a, b = (vector_for(model, scope="response", seed=seed) for seed in range(2))
    with torch.no_grad(), steerkit.steer(model, [[a], [b.at(1.0)]], 2.0, prompt_lengths=4) as steering:
        twice = model(torch.tensor([LONG, LONG])).logits
        steering.strength = 0.0
        none = model(torch.tensor([LONG, LONG])).logits
    assert torch.equal(twice, logits(model, [LONG, LONG], [[a.at(2.0)], [b.at(1.0)]]))
    assert torch.equal(none[0], logits(model, [LONG, LONG], None)[0])
    assert torch.equal(none[1], twice[1])


def test_wrong_rows_are_refused() -> None:
    model = model_of()
    vector = vector_for(model, scope="all")
    for wrong in ([None, None], [None, vector], [[vector], 3], [[vector], ["x"]]):
        with pytest.raises(CompositionError):
            steerkit.steer(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(StrengthError, match="row 0: a vector in a row has one strength"):
        steerkit.steer(model, [[vector.at([1.0, 2.0])], None])
    with steerkit.steer(model, [[vector], None]), pytest.raises(ScopeError, match="2 values for a pass of 3 rows"):
        model(torch.tensor([LONG] * 3))
    with pytest.raises(StrengthError, match="3 numbers for 2 rows"), steerkit.steer(model, [[vector], None], [1, 2, 3]):
        pass
