"""Each method against a slow, obvious form of what its paper says, written token by token."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steerkit
from steerkit.activations.moments import Means
from steerkit.errors import DataError, FitError, ScopeError
from steerkit.maths import directions, edits
from steerkit.methods.actadd import ActivationAddition
from steerkit.methods.caa import ContrastiveActivationAddition, equalise
from steerkit.methods.repe import RepresentationControl
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from tests.families import HIDDEN, build
from tests.modes import LONG, PAD, SHORT, rows_of, vector_for
from tests.tiny_tokenizers import byte_tokenizer

TEXTS = ["I love it", "we adore this one so much", "good"]
OTHERS = ["I hate it", "we detest this one", "really bad"]


@functools.cache
def model_of(family: str = "llama") -> Any:
    return build(family)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def watching(module: nn.Module, side: str, look: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show (and let replace) what a block reads or gives."""

    def before(_module: nn.Module, args: Any) -> Any:
        changed = look(args[0])
        return None if changed is None else (changed, *args[1:])

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        changed = look(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_pre_hook(before) if side == "pre" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def stream_of(model: Any, ids: Sequence[int], layer: int, side: str = "post") -> Tensor:
    """[t, d] of one unpadded text."""
    seen: list[Tensor] = []
    with watching(find_decoder(model).blocks[layer], side, lambda h: seen.append(h[0].clone())), torch.no_grad():
        model(input_ids=torch.tensor([list(ids)]))
    return seen[0]


def slow_mean(rows: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(rows[0].shape, dtype=torch.float64)
    for row in rows:
        total = total + row.double()
    return total / len(rows)


# CAA


def test_caa_is_the_mean_difference_of_last_tokens() -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    data = steerkit.ContrastSet.from_prompts(TEXTS, OTHERS, raw=True)
    vector = steerkit.fit(model, tokenizer, data, method="caa", layers=[0, 3], batch_size=4)
    for layer in (0, 3):
        sides = [
            [stream_of(model, tokenizer(text)["input_ids"], layer)[-1] for text in side] for side in (TEXTS, OTHERS)
        ]
        paired = slow_mean([one - other for one, other in zip(*sides, strict=True)])
        torch.testing.assert_close(vector.params(Site(layer))["direction"].double(), paired, rtol=1e-4, atol=1e-5)


def test_caa_of_unpaired_sides_is_the_difference_of_means() -> None:
    model, tokenizer = model_of("gpt2"), byte_tokenizer(None)
    data = steerkit.ContrastSet.from_prompts(TEXTS, OTHERS[:2], raw=True)
    vector = steerkit.fit(model, tokenizer, data, method="caa", layers=[1], batch_size=2)
    sides = [[stream_of(model, tokenizer(text)["input_ids"], 1)[-1] for text in side] for side in (TEXTS, OTHERS[:2])]
    expected = slow_mean(sides[0]) - slow_mean(sides[1])
    torch.testing.assert_close(vector.params(Site(1))["direction"].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.* has no chat template")
def test_caa_reads_the_answers_letter() -> None:
    """The paper's readout: the letter between the brackets, two tokens before the end, and the same by its span."""
    model, tokenizer = model_of(), byte_tokenizer(None)
    questions = ["Is it so? ", "Which one do you choose: "]
    data = steerkit.ContrastSet.from_answers([(question, "(A)", "(B)") for question in questions])
    sides = []
    for answer in ("(A)", "(B)"):
        rows = []
        for question in questions:
            ids = tokenizer(question + answer)["input_ids"]
            assert tokenizer.decode(ids[-2:-1]) == answer[1]
            rows.append(stream_of(model, ids, 2)[-2])
        sides.append(rows)
    expected = slow_mean(sides[0]) - slow_mean(sides[1])
    for readout in (-2, (1, 2)):
        vector = steerkit.fit(model, tokenizer, data, layers=[2], readout=readout)
        torch.testing.assert_close(vector.params(Site(2))["direction"].double(), expected, rtol=1e-4, atol=1e-5)


def test_caa_equalise() -> None:
    plain = [vector_for(model_of(), scope="all", size=size, seed=seed) for seed, size in enumerate((1.0, 5.0, 0.2))]
    named = dict(zip("abc", plain, strict=True))
    rows = {name: vector.params(Site(1))["direction"] for name, vector in named.items()}
    before = {name: row.clone() for name, row in rows.items()}
    mean = sum(math.sqrt(sum(float(entry) ** 2 for entry in row)) for row in rows.values()) / 3
    for name, vector in equalise(named).items():
        length = math.sqrt(sum(float(entry) ** 2 for entry in rows[name]))
        expected = torch.tensor([float(entry) * mean / length for entry in rows[name]])
        torch.testing.assert_close(vector.params(Site(1))["direction"], expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(named[name].params(Site(1))["direction"], before[name])
    zero = replace(plain[0], tensors={"resid_post.1/direction": torch.zeros(HIDDEN)})
    with pytest.raises(FitError):
        equalise({"a": plain[0], "zero": zero})
    with pytest.raises(FitError):
        equalise({"a": plain[0], "b": vector_for(model_of(), scope="all", site=Site(2))})


@pytest.mark.parametrize("method", ["caa", "repe"])
def test_bug_21_swapped_labels_give_the_exact_negation(method: str) -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    for positive, negative in ((TEXTS, OTHERS), (TEXTS, OTHERS[:2])):
        one, other = (
            steerkit.fit(model, tokenizer, data, method=method, layers=[1, 2])
            for data in (
                steerkit.ContrastSet.from_prompts(positive, negative, raw=True),
                steerkit.ContrastSet.from_prompts(negative, positive, raw=True),
            )
        )
        for site in one.sites:
            a, b = one.params(site)["direction"], other.params(site)["direction"]
            if method == "repe" and len(positive) != len(negative):  # the same rows in another order
                torch.testing.assert_close(a, -b, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(a, -b)


@pytest.mark.parametrize("reading", ["pca", "difference"])
@pytest.mark.parametrize("sizes", [(6, 6), (6, 4), (1, 5)])
def test_bug_21_swapped_sides_of_a_site(reading: str, sizes: tuple[int, int]) -> None:
    method = RepresentationControl(reading=reading)  # type: ignore[arg-type]
    positive, negative = draw(sizes[0], 8) + 1.0, draw(sizes[1], 8, seed=1)
    forth, back = method.fit_site(positive, negative), method.fit_site(negative, positive)
    torch.testing.assert_close(forth["direction"], -back["direction"], rtol=1e-5, atol=1e-6)
    exact = ContrastiveActivationAddition()
    assert torch.equal(
        exact.fit_site(positive, negative)["direction"], -exact.fit_site(negative, positive)["direction"]
    )


def test_bug_21_the_positive_side_lies_along_the_direction() -> None:
    positive, negative = draw(9, 8) + 0.7, draw(9, 8, seed=1)
    for reading in ("pca", "difference"):
        direction = RepresentationControl(reading=reading).fit_site(positive, negative)["direction"]  # type: ignore[arg-type]
        assert float((positive.mean(0) - negative.mean(0)) @ direction) > 0


@pytest.mark.parametrize(
    "method",
    [ContrastiveActivationAddition(), *(RepresentationControl(reading=kind) for kind in ("pca", "difference", "mean"))],
    ids=lambda method: f"{method.name}-{getattr(method, 'reading', '')}",
)
def test_bug_22_fitting_leaves_its_inputs_alone(method: Any) -> None:
    for sizes in ((5, 5), (5, 3)):
        positive, negative = draw(sizes[0], 8) + 1.0, draw(sizes[1], 8, seed=1)
        before = positive.clone(), negative.clone()
        method.fit_site(positive, negative)
        assert torch.equal(positive, before[0])
        assert torch.equal(negative, before[1])


def test_bug_22_edits_leave_the_activations_alone() -> None:
    h, v = draw(2, 5, 8), draw(8, seed=1)
    before = h.clone()
    edits.add(h, v)
    edits.keep_norm(h + v, h)
    edits.add_window(h, draw(3, 8), torch.arange(5).expand(2, -1) - 1)
    assert torch.equal(h, before)


def test_identical_sides_have_no_direction() -> None:
    rows = draw(4, 8)
    for method in (
        ContrastiveActivationAddition(),
        RepresentationControl(),
        RepresentationControl(reading="difference"),
    ):
        with pytest.raises(FitError):
            method.fit_site(rows, rows.clone())


def test_streamed_means_equal_means() -> None:
    positive, negative = draw(37, 8) * 100 + 1000, draw(23, 8, seed=1)
    means = Means()
    for start in range(0, 40, 5):
        means.update(positive[start : start + 5], negative[start : start + 5])
    got = means.result()
    torch.testing.assert_close(got[0][0].double(), slow_mean(list(positive)), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(got[1][0].double(), slow_mean(list(negative)), rtol=1e-6, atol=1e-6)
    with pytest.raises(FitError):
        Means().result()


# Representation reading and control


def power_iteration(rows: Tensor) -> Tensor:
    """First principal axis of the rows about the origin, by multiplying again and again."""
    point = torch.ones(rows.shape[1], dtype=torch.float64)
    for _ in range(5000):
        total = torch.zeros_like(point)
        for row in rows.double():
            total = total + row * float(row @ point)
        point = total / total.norm()
    return point


def test_repe_mean_and_difference() -> None:
    positive, negative = draw(5, 8), draw(5, 8, seed=1)
    got = RepresentationControl(reading="mean").fit_site(positive, negative)["direction"]
    torch.testing.assert_close(got.double(), slow_mean(list(positive)), rtol=1e-5, atol=1e-6)
    got = RepresentationControl(reading="difference").fit_site(positive, negative)["direction"]
    pairs = [one - other for one, other in zip(positive, negative, strict=True)]
    torch.testing.assert_close(got.double(), slow_mean(pairs), rtol=1e-5, atol=1e-6)
    got = RepresentationControl(reading="mean").fit_site(positive, draw(2, 8))["direction"]
    torch.testing.assert_close(got.double(), slow_mean(list(positive)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", ["difference", "unit"])
def test_repe_pca_is_the_first_axis_of_uncentred_pair_differences(scaling: str) -> None:
    positive, negative = draw(6, 8) * 2 + 0.5, draw(6, 8, seed=1)
    pairs = torch.stack([one - other for one, other in zip(positive, negative, strict=True)])
    axis, mean = power_iteration(pairs), slow_mean(list(pairs))
    axis = -axis if float(axis @ mean) < 0 else axis
    got = RepresentationControl(reading="pca", scaling=scaling).fit_site(positive, negative)["direction"]  # type: ignore[arg-type]
    length = float(mean.norm()) if scaling == "difference" else 1.0
    torch.testing.assert_close(got.double(), axis * length, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["caa", "repe"])
@pytest.mark.parametrize("nuisance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("sizes", [(200, 200), (200, 150)])
def test_bug_20_a_planted_direction_is_found_beside_nuisance_variance(
    method: str, nuisance: float, sizes: tuple[int, int]
) -> None:
    """Pairs share a strong nuisance; what is left of it differs within pairs, weaker than the planted direction."""
    width = 32
    planted, other = directions.unit(draw(width)), directions.unit(draw(width, seed=1))
    other = directions.unit(other - (other @ planted) * planted)
    shared = draw(max(sizes), 1, seed=2) * nuisance * other
    sides = []
    for sign, size, seed in ((1.0, sizes[0], 3), (-1.0, sizes[1], 4)):
        own = 0.3 * draw(size, width, seed=seed) + 0.4 * min(nuisance, 1.0) * draw(size, 1, seed=seed + 10) * other
        sides.append(sign * 1.5 * planted + shared[:size] * (1.0 if sizes[0] == sizes[1] else 0.3) + own)
    default = {"caa": ContrastiveActivationAddition(), "repe": RepresentationControl()}[method]
    found = default.fit_site(*sides)["direction"]
    assert float(torch.cosine_similarity(found, planted, dim=0)) > 0.95


def test_repe_restores_the_norm_of_every_token() -> None:
    model = model_of()
    plain = vector_for(model, scope="all")
    settings = RepresentationControl(restore_norm=True).settings
    vector = replace(plain, method="repe", edit="add_keep_norm", settings=settings)
    before = stream_of(model, LONG, 1)
    v = plain.params(Site(1))["direction"]
    with steerkit.steer(model, vector, -1.5):
        after = stream_of(model, LONG, 1)
    for old, new in zip(before, after, strict=True):
        moved = old.double() - 1.5 * v.double()
        torch.testing.assert_close(new.double(), moved * (old.double().norm() / moved.norm()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bug_24_norms_are_kept_for_each_token(dtype: torch.dtype) -> None:
    h = (draw(2, 50, 512) * torch.logspace(-3, 1.5, 50)[None, :, None]).to(dtype)
    h[0, 7], h[1, 0] = 0.0, 0.0
    method = RepresentationControl(restore_norm=True)
    params = {"direction": draw(512, seed=1) * 3}
    prepared = method.prepare(params, torch.tensor(2.0), dtype, torch.device("cpu"))
    edited = method.edit(h, prepared, None).to(dtype)  # type: ignore[arg-type]
    before, after = h.float().norm(dim=-1), edited.float().norm(dim=-1)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=0)
    assert not edited[0, 7].any()
    assert not edited[1, 0].any()
    assert torch.isfinite(edited).all()


def test_bug_24_a_token_the_edit_makes_zero_stays_zero_and_has_gradients() -> None:
    v = draw(8, seed=1)
    h = torch.stack([-v, v, torch.zeros(8)])[None].requires_grad_()
    edited = edits.keep_norm(h + v, h)
    assert not edited[0, 0].any()
    assert not edited[0, 2].any()
    edited.sum().backward()
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_bug_34_large_float16_activations_stay_finite_where_norms_are_restored() -> None:
    """Entries near the top of float16 and a direction on top of them: the sum itself does not fit, the result does."""
    h = torch.full((1, 3, 8), 6.0e4, dtype=torch.float16)
    method = RepresentationControl(restore_norm=True)
    prepared = method.prepare({"direction": torch.full((8,), 2.0e4)}, torch.tensor(1.0), h.dtype, h.device)
    edited = method.edit(h, prepared, None).to(h.dtype)  # type: ignore[arg-type]
    torch.testing.assert_close(edited, h, rtol=1e-3, atol=0)


def test_bug_36_every_setting_of_a_method_changes_the_vector_or_the_edit() -> None:
    positive, negative = draw(6, 8) + 0.5, draw(6, 8, seed=1)
    found = [
        RepresentationControl(**settings).fit_site(positive, negative)["direction"]
        for settings in ({}, {"reading": "mean"}, {"reading": "difference"}, {"scaling": "unit"})
    ]
    for index, one in enumerate(found):
        assert not any(torch.allclose(one, other) for other in found[:index])
    assert RepresentationControl(restore_norm=True).edit_name != RepresentationControl().edit_name
    model, tokenizer = model_of(), byte_tokenizer(None)
    pair = steerkit.ContrastSet.from_prompts(["Love"], ["so"], raw=True)
    for settings in ({"position": "back"}, {"filler": "."}):
        default, other = (
            steerkit.fit(model, tokenizer, pair, method="actadd", settings=chosen) for chosen in ({}, settings)
        )
        assert default.scope != other.scope or default.digest != other.digest
        assert default != other
    for wrong in ({"reading": "x"}, {"scaling": "x"}):
        with pytest.raises(FitError):
            RepresentationControl(**wrong)
    with pytest.raises(FitError):
        ActivationAddition(position="x")  # type: ignore[arg-type]


# Activation addition


def fitted(model: Any, plus: str, minus: str, **settings: Any) -> steerkit.SteeringVector:
    data = steerkit.ContrastSet.from_prompts([plus], [minus], raw=True)
    return steerkit.fit(model, byte_tokenizer(None), data, method="actadd", layers=[2], settings=settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize(("plus", "minus"), [("Love", "Hat"), ("a", "long one"), ("wed", "")])
def test_actadd_is_the_difference_row_by_row(family: str, plus: str, minus: str) -> None:
    model, tokenizer = model_of(family), byte_tokenizer(None)
    if minus == "":
        with contextlib.suppress(DataError):
            steerkit.ContrastSet.from_prompts([plus], [minus], raw=True)
    vector = fitted(model, plus, minus)
    rows = [tokenizer(text)["input_ids"] for text in (plus, minus)]
    space = tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert len(space) == 1
    width = max(map(len, rows))
    rows = [ids + space * (width - len(ids)) for ids in rows]
    site = Site(2, "resid_pre")
    expected = stream_of(model, rows[0], 2, "pre") - stream_of(model, rows[1], 2, "pre")
    got = vector.params(site)["direction"]
    assert torch.equal(got, expected)
    assert not got[0].any()  # the shared BOS
    assert got[1:].norm(dim=-1).min() > 0


def slow_addition(
    model: Any, ids: Tensor, mask: Tensor, rows: Tensor, strengths: Sequence[float], starts: Sequence[int]
) -> Tensor:
    """Logits with row i of the vector added to the i-th token from each row's start, one token at a time."""

    def change(h: Tensor) -> Tensor:
        h = h.clone()
        for row in range(h.shape[0]):
            first = mask[row].tolist().index(1)
            for place in range(rows.shape[0]):
                h[row, first + starts[row] + place] = h[row, first + starts[row] + place] + strengths[row] * rows[place]
        return h

    with watching(find_decoder(model).blocks[2], "pre", change), torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["front", "mid", "back"])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_actadd_windows(family: str, position: str, side: str) -> None:
    model = model_of(family)
    vector = fitted(model, "Lov", "Ha", position=position)
    assert vector.scope == position
    rows = vector.params(Site(2, "resid_pre"))["direction"]
    window = rows.shape[0]
    ids, mask = rows_of([SHORT, LONG], side=side)
    lengths = [5, 8]
    starts = {
        "front": [0, 0],
        "mid": [length // 2 - window // 2 for length in lengths],
        "back": [length - window for length in lengths],
    }[position]
    expected = slow_addition(model, ids, mask, rows, [2.0, -1.0], starts)
    with steerkit.steer(model, vector, [2.0, -1.0], prompt_lengths=lengths), torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=1e-4, atol=1e-4)


def test_actadd_refuses_a_prompt_shorter_than_the_vector() -> None:
    model = model_of()
    vector = vector_for(model, scope="front")  # three rows
    ids, mask = rows_of([LONG, SHORT[:2]])
    common: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 3, "min_new_tokens": 3}
    for scope in ("front", "mid", "back"):
        with steerkit.steer(model, vector, scope=scope):
            with pytest.raises(ScopeError, match="2 tokens"):
                model.generate(input_ids=ids, attention_mask=mask, **common)
            with pytest.raises(ScopeError, match="2 tokens"):
                model.generate(input_ids=ids, attention_mask=mask, prefill_chunk_size=4, **common)
            model.generate(input_ids=ids[:1], attention_mask=mask[:1], **common)
    with steerkit.steer(model, vector, prompt_lengths=[9, 2]), pytest.raises(ScopeError, match="2 tokens"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", ["front", "mid", "back"])
def test_actadd_edits_the_prompt_once_with_a_cache_and_in_every_pass_without(position: str, use_cache: bool) -> None:
    model = model_of()
    vector = vector_for(model, scope=position, site=Site(2, "resid_pre"))
    seen: list[Tensor] = []
    old: list[Tensor] = []
    block = find_decoder(model).blocks[2]
    with steerkit.steer(model, vector):
        # Prepended now, it runs before the steering hook; the other one behind it.
        handles = [
            block.register_forward_pre_hook(lambda _m, args: old.append(args[0].clone()), prepend=True),
            block.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone())),
        ]
        ids = torch.tensor([LONG])
        mask = torch.ones_like(ids)
        common: dict[str, Any] = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 4, "min_new_tokens": 4}
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **common)
        for handle in handles:
            handle.remove()
    rows = vector.params(Site(2, "resid_pre"))["direction"]
    start = {"front": 0, "mid": len(LONG) // 2 - 1, "back": len(LONG) - 3}[position]
    assert len(seen) == 4
    for number, (before, after) in enumerate(zip(old, seen, strict=True)):
        expected = before.clone()
        if number == 0 or not use_cache:
            expected[0, start : start + 3] += rows
        assert torch.equal(after, expected)


def test_actadd_takes_one_pair_and_a_filler_of_one_token() -> None:
    model, tokenizer = model_of(), byte_tokenizer(None)
    two = steerkit.ContrastSet.from_prompts(["a", "b"], ["c", "d"], raw=True)
    with pytest.raises(DataError, match="one pair"):
        steerkit.fit(model, tokenizer, two, method="actadd")
    with pytest.raises(DataError, match="filler"):
        fitted(model, "Love", "H", filler="xyz")
    with pytest.raises(FitError, match="same tokens"):
        fitted(model, "you ", "you")


# The addition itself, in a plain forward


def in_scope(scope: str, place: int, prompt: int) -> bool:
    if scope == "all":
        return True
    if scope == "prompt":
        return place <= prompt - 1
    if scope == "response":
        return place >= prompt - 1
    if scope == "generated":
        return place >= prompt
    return place < int(scope[len("first(") : -1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["all", "prompt", "response", "generated", "first(1)", "first(4)"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "mamba", "gpt_oss", "llama_peft"])
def test_addition_in_a_plain_forward(family: str, scope: str, side: str) -> None:
    model = model_of(family)
    vector = vector_for(model, scope=scope)
    v = vector.params(Site(1))["direction"]
    ids, mask = rows_of([SHORT, LONG], side=side)
    lengths, strengths = [3, 6], [1.5, -0.5]

    def change(h: Tensor) -> Tensor:
        h = h.clone()
        for row in range(2):
            place = 0
            for column in range(h.shape[1]):
                if mask[row, column] == 0:
                    continue
                if in_scope(scope, place, lengths[row]):
                    h[row, column] = h[row, column] + strengths[row] * v
                place += 1
        return h

    positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if family == "gpt2" else {}
    with watching(find_decoder(model).blocks[1], "post", change), torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, **positions).logits
    with steerkit.steer(model, vector, strengths, prompt_lengths=lengths), torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, **positions).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["caa", "repe"])
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "mlp_post"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bug_13_what_is_fitted_at_a_site_is_what_the_edit_receives(
    family: str, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activation recorded for a text is, bit for bit, the tensor that the method's `edit` is given."""
    model, tokenizer = model_of(family), byte_tokenizer(None)
    site = Site(2, kind)
    text = "just one text"
    recorded = steerkit.record(model, tokenizer, [text], [site])[site][0]
    data = steerkit.ContrastSet.from_prompts([text], ["another"], raw=True)
    vector = steerkit.fit(model, tokenizer, data, method=method, sites=[site])
    assert vector.sites == (site,)
    received: list[Tensor] = []
    owner = {"caa": ContrastiveActivationAddition, "repe": RepresentationControl}[method]
    original = owner.edit

    def spy(self: Any, h: Tensor, prepared: Any, tokens: Any) -> Tensor:
        received.append(h)
        return original(self, h, prepared, tokens)

    monkeypatch.setattr(owner, "edit", spy)
    with steerkit.steer(model, vector, 1.0, scope="all"), torch.no_grad():
        model(**tokenizer(text, return_tensors="pt"))
    assert torch.equal(received[0][0, -1], recorded)


def test_bug_13_a_vector_of_another_site_is_another_edit() -> None:
    """`resid_post.1` and `resid_pre.2` are one tensor; `resid_pre.1` is another, and so are the logits."""
    model = model_of()
    ids = torch.tensor([LONG])
    logits = {}
    for site in (Site(1, "resid_post"), Site(2, "resid_pre"), Site(1, "resid_pre")):
        with steerkit.steer(model, vector_for(model, scope="all", site=site)), torch.no_grad():
            logits[site] = model(input_ids=ids).logits
    same, other = logits[Site(2, "resid_pre")], logits[Site(1, "resid_pre")]
    assert torch.equal(logits[Site(1, "resid_post")], same)
    assert (same - other).abs().max() > 1e-3
