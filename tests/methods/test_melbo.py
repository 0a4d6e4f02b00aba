"""MELBO against the published objective written out slowly, the trap of pads and first tokens, and its edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import DataError, FitError
from steerkit.evaluate.curve import random_like
from steerkit.fitting.subject import ModelSubject
from steerkit.methods._authoring import class_problem
from steerkit.methods.melbo import MELBO
from steerkit.network.decoder import find_decoder
from steerkit.prompts.prompt_set import PromptSet
from steerkit.vector.steering_vector import SteeringVector
from tests.families import BLOCKS, HIDDEN, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

PROMPTS = ["Why?", "What is it that the tide does at night?", "Say so."]


def fitted(family: str = "llama", prompts: Any = PROMPTS, *, batch_size: int = 16, **settings: Any) -> SteeringVector:
    method = MELBO.from_settings({"count": 3, "steps": 6, "rate": 0.05, **settings})
    return steerkit.fit(build(family), byte_tokenizer(CHATML), prompts, method=method, batch_size=batch_size)


def of(vector: SteeringVector, name: str) -> Tensor:
    return vector.params(vector.sites[0])[name]


def slow_change(direction: Tensor, source: int, target: int, p: float, q: float, last: int = 0) -> float:
    """The change of one direction, prompt by prompt and token by token, with hooks of its own."""
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    layers, total = model.model.layers, 0.0
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        outputs: list[Tensor] = []
        keep = outputs.append
        for push in (torch.zeros_like(direction), direction):
            handles = [
                layers[source].register_forward_hook(lambda _m, _a, out, push=push: out + push),
                layers[target].register_forward_hook(lambda _m, _a, out, keep=keep: keep(out[0].double())),
            ]
            with torch.no_grad():
                model(ids)
            for handle in handles:
                handle.remove()
        distances = [float((one - other).pow(2).sum().sqrt()) for other, one in zip(*outputs, strict=True)]
        counted = distances[1:] if not last else distances[-last:]
        total += sum(distance**p for distance in counted) ** (1 / q)
    return total / len(PROMPTS)


@pytest.mark.parametrize(("p", "q", "last"), [(2.0, 2.0, 0), (4.0, 1.0, 0), (1.0, 3.0, 2)])
@pytest.mark.parametrize("batch_size", [16, 2])
def test_the_change_is_the_published_objective(p: float, q: float, last: int, batch_size: int) -> None:
    vector = fitted(power=p, root=q, last=last, target=2, norm=3.0, batch_size=batch_size)
    assert str(vector.sites[0]) == "resid_post.1"
    for direction, change in zip(of(vector, "directions"), of(vector, "change")[:, -1], strict=True):
        assert float(change) == pytest.approx(slow_change(direction, 1, 2, p, q, last), rel=1e-4)


def test_gradients_make_the_change_larger_than_of_random_directions() -> None:
    vector = fitted(steps=30, norm=2.0)
    change = of(vector, "change")
    assert bool((change[:, -1] > 1.2 * change[:, 0]).all())
    assert change.shape == (3, 31)
    assert bool((change[:-1, -1] >= change[1:, -1]).all())
    assert torch.equal(of(vector, "direction"), of(vector, "directions")[0])


def test_the_slope_is_that_of_the_change() -> None:
    # One small step of plain gradients goes where finite differences point: what is learned is what is written down.
    start = fitted(count=1, steps=0, norm=3.0, target=2)
    moved = fitted(count=1, steps=1, rate=1e-3, norm=3.0, target=2)
    step = (of(moved, "direction") - of(start, "direction")).double()
    generator, origin = torch.Generator().manual_seed(1), of(start, "direction")
    slopes = []
    for place in torch.randperm(HIDDEN, generator=generator)[:6].tolist():
        push = torch.zeros(HIDDEN)
        push[place] = 0.02
        push -= (push @ origin) * origin / origin.square().sum()
        ahead, behind = (slow_change(origin + sign * push, 1, 2, 2.0, 2.0) for sign in (1, -1))
        slopes.append(((ahead - behind) * float(step[place]) > 0, abs(ahead - behind)))
    # Adam's first step has the sign of every slope.
    assert all(agree for agree, size in slopes if size > 1e-3), slopes
    assert sum(size > 1e-3 for _, size in slopes) >= 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_directions_have_the_length_and_are_orthogonal(family: str) -> None:
    found = of(fitted(family, norm=2.5, count=5), "directions").double()
    assert torch.allclose(found @ found.T, 2.5**2 * torch.eye(5, dtype=torch.double), atol=1e-4)


def test_each_direction_is_what_it_is_without_those_behind_it() -> None:
    several, alone = fitted(count=3, norm=2.0), fitted(count=1, norm=2.0)
    cosines = of(several, "directions") @ of(alone, "direction") / 4
    assert float(cosines.max()) == pytest.approx(1.0, abs=1e-4)


def test_passes_of_any_size_find_the_same() -> None:
    whole, parts = fitted(batch_size=16), fitted(batch_size=2)
    assert torch.allclose(of(whole, "directions"), of(parts, "directions"), atol=1e-3)


def test_seeds_and_the_same_data_tell() -> None:
    assert fitted() == fitted()
    assert fitted(seed=1) != fitted()
    assert fitted(prompts=PROMPTS[:2]).data_digest != fitted().data_digest


def test_no_step_leaves_the_random_directions_it_starts_from() -> None:
    start, learned = fitted(steps=0, norm=2.0), fitted(norm=2.0)
    assert of(start, "change").shape == (3, 1)
    assert sorted(of(start, "change")[:, 0].tolist()) == pytest.approx(sorted(of(learned, "change")[:, 0].tolist()))


def test_the_model_is_left_as_it_was() -> None:
    model = build("llama").train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    steerkit.fit(model, byte_tokenizer(CHATML), PROMPTS, method=MELBO(count=2, steps=2))
    assert model.training
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_apart_gives_each_direction_as_a_vector_that_travels() -> None:
    vector, model = fitted(norm=2.0), build("llama")
    several = MELBO().apart(vector)
    assert len(several) == 3
    ids = torch.arange(1, 9)[None]
    for place, one in enumerate(several):
        again = SteeringVector.from_bytes(one.to_bytes())
        assert torch.equal(of(again, "direction"), of(vector, "directions")[place])
        assert MELBO().apart(again) == [again]
        pushed = steerkit.SteeringVector.from_directions({1: of(one, "direction")}, model, scope="all")
        with torch.no_grad(), steerkit.steer(model, again):
            own = model(ids).logits
        with torch.no_grad(), steerkit.steer(model, pushed, 1.0):
            assert torch.equal(model(ids).logits, own)
    assert vector.scope == "all"


def test_the_control_holds_nothing_that_was_found() -> None:
    vector = fitted(norm=2.0)
    control = random_like(vector, seed=1)
    assert set(control.tensors) == {"resid_post.1/direction"}
    assert float(of(control, "direction").norm()) == pytest.approx(2.0, rel=1e-5)
    assert abs(float(of(control, "direction") @ of(vector, "direction"))) < 3.9


def test_the_table_lists_them() -> None:
    vector = fitted()
    table = MELBO().table(vector)
    assert [row[0] for row in table.rows] == [1, 2, 3]
    assert [row[1] for row in table.rows] == pytest.approx(of(vector, "change")[:, -1].tolist())


def test_the_length_that_nobody_names_is_an_eighth_of_that_of_the_activations() -> None:
    vector = fitted()
    assert float(of(vector, "direction").norm()) == pytest.approx(0.125 * vector.norms[vector.sites[0]], rel=1e-4)


def test_a_contrast_set_is_read_for_its_prompts() -> None:
    pairs = steerkit.ContrastSet.from_answers([(prompt, " Yes.", " No.") for prompt in PROMPTS])
    assert PromptSet.of(pairs) == replace(PromptSet.of(PROMPTS), source=pairs.source)
    assert fitted(prompts=pairs) == fitted()
    sides = steerkit.ContrastSet.from_prompts(["a b", "c d"], ["e f", "a b"])
    assert [one.prompt for one in PromptSet.of(sides).prompts] == ["a b", "c d", "e f"]


def test_prompts_are_for_methods_without_sides() -> None:
    with pytest.raises(DataError, match="make a ContrastSet"):
        steerkit.fit(build("llama"), byte_tokenizer(CHATML), PROMPTS, method="caa")
    with pytest.raises(DataError, match="put it into a list"):
        fitted(prompts="Why?")
    with pytest.raises(DataError, match="there is no prompt"):
        fitted(prompts=[])


def test_a_method_of_prompts_has_no_sides() -> None:
    model = build("llama")
    subject = ModelSubject(model, byte_tokenizer(CHATML), PromptSet.of(PROMPTS), find_decoder(model), 16, None, "it")
    assert [one.prompt for one in subject.prompts] == PROMPTS
    with pytest.raises(DataError, match="it is fitted on prompts, which have no sides"):
        _ = subject.data

    @dataclass(frozen=True)
    class ReadsBefore(MELBO):
        """Asks for sides that are not there."""

        readout: ClassVar[str | None] = "last"

    assert "write readout = None" in str(class_problem(ReadsBefore))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count = 0; give 1 or more"),
        ({"count": HIDDEN + 1}, f"count = {HIDDEN + 1}; resid_post.1 holds at most {HIDDEN}"),
        ({"norm": -1.0}, "norm = -1.0; give 0 or more"),
        ({"norm": float("nan")}, "norm = nan"),
        ({"power": 0.5}, "power = 0.5; give 1 or more"),
        ({"root": 0.5}, "root = 0.5; give 1 or more"),
        ({"steps": -1}, "steps = -1"),
        ({"rate": 0.0}, "rate = 0.0; give more than 0"),
        ({"target": 1}, f"target = 1 with the source resid_post.1; give a later block, up to {BLOCKS - 1}"),
        ({"target": BLOCKS}, f"give a later block, up to {BLOCKS - 1}"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FitError, match=message.replace("(", r"\(")):
        fitted(**settings)


def test_places_that_mean_nothing() -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    with pytest.raises(FitError, match="got 2 sites"):
        steerkit.fit(model, tokenizer, PROMPTS, method="melbo", layers=[0, 1])
    with pytest.raises(DataError, match="prompt 0 is one token"):
        raw = [steerkit.Conversation("", raw=True)]
        steerkit.fit(model, tokenizer, raw, method=MELBO(steps=0))
