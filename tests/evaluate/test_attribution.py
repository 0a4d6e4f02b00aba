"""Slopes of effects against differences of measured ones, and costs against measured divergences."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import steerkit
from steerkit.errors import DataError, ModelError
from steerkit.evaluate.attribution import attribute, attribute_all, kl_curvatures
from steerkit.evaluate.attribution.costs import strength_within
from steerkit.evaluate.curve import random_like
from steerkit.evaluate.scorers._base import Column, Scorer
from steerkit.evaluate.scoring import measure, scorer_of, scores_of
from steerkit.evaluate.trial import Answer, Trial
from steerkit.network.sites import Site
from steerkit.prompts.conversation import Conversation
from steerkit.vector.steering_vector import SteeringVector
from tests import quantised
from tests.families import BLOCKS, build
from tests.tiny_tokenizers import CHATML, byte_tokenizer


def pairs(first: int, count: int) -> steerkit.ContrastSet:
    numbers = range(first, first + count)
    return steerkit.ContrastSet.from_answers(
        [(f"Is it {number}?", f"Yes, it is {number}.", f"No, not a {number}.") for number in numbers]
    )


def setup_of(model: Any) -> steerkit.Setup:
    calm = [Conversation(prompt, answer=answer) for prompt, answer in (("Hi", "Hello."), ("Where?", "Here, I think."))]
    return steerkit.Setup(model, byte_tokenizer(CHATML), pairs(12, 4), batch_size=3, neutral=calm)


@pytest.fixture(scope="module")
def setup() -> steerkit.Setup:
    return setup_of(build("llama"))


def vector_of(setup: steerkit.Setup, method: str, *sites: str, **settings: Any) -> SteeringVector:
    data = steerkit.ContrastSet.from_prompts(["joy"], ["woe is"], raw=True) if method == "actadd" else pairs(0, 8)
    return steerkit.fit(setup.model, setup.tokenizer, data, method=method, sites=list(sites) or None, settings=settings)


def difference(setup: steerkit.Setup, vector: SteeringVector, step: float = 1e-2, **options: Any) -> Tensor:
    """[n] by how much each item's margin rises per unit of strength: measured on both sides of none."""
    up, down = (
        scores_of(setup.trial(vector, one, **options), scorer_of("preference_margin"))["preference_margin"]
        for one in (step, -step)
    )
    return (up - down) / (2 * step)


METHODS = [
    ("caa", "resid_post.1"),
    ("caa", "resid_pre.2"),
    ("caa", "z.2"),
    ("caa", "mlp_post.1"),
    ("caa", "attn_out.3"),
    ("ablation", "resid_post.2"),
    ("repe", "mlp_out.1"),
    ("austeer", ""),
    ("iti", ""),
    ("steer2edit", ""),
    ("actadd", ""),
]


@pytest.mark.parametrize(("method", "site"), METHODS)
def test_it_is_the_slope_of_the_measured_margin(setup: steerkit.Setup, method: str, site: str) -> None:
    vector = vector_of(setup, method, *filter(None, [site]))
    found = attribute(setup, vector, controls=0)
    slow = difference(setup, vector, 1e-3 if method in ("actadd", "steer2edit") else 1e-2)
    assert float(slow.abs().max()) > 1e-3
    assert torch.allclose(found.total.items, slow, rtol=1e-2, atol=3e-3 * float(slow.abs().max()))
    unsteered = scores_of(setup.baseline, scorer_of("preference_margin"))["preference_margin"]
    assert torch.allclose(found.scores, unsteered, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2", "falcon_new"])
def test_in_other_families_too(family: str) -> None:
    setup = setup_of(build(family))
    vector = vector_of(setup, "caa", "resid_post.1")
    found, slow = attribute(setup, vector, controls=0), difference(setup, vector)
    assert torch.allclose(found.total.items, slow, rtol=1e-2, atol=5e-3 * float(slow.abs().max()))


@pytest.mark.parametrize("scope", ["all", "prompt", "response", "generated", "first(3)", "response(2)"])
def test_the_scope_is_kept(setup: steerkit.Setup, scope: str) -> None:
    vector = vector_of(setup, "caa", "resid_post.1").at(scope=scope)
    found, slow = attribute(setup, vector, controls=0), difference(setup, vector)
    assert torch.allclose(found.total.items, slow, rtol=1e-2, atol=3e-3 * float(slow.abs().max()))


def test_the_unit_is_kept(setup: steerkit.Setup) -> None:
    vector = vector_of(setup, "caa", "resid_post.1")
    paper, norm = (attribute(setup, vector.at(unit=unit), controls=0).total.items for unit in ("paper", "norm"))
    length = float(vector.params(Site(1))["direction"].norm())
    assert torch.allclose(norm, paper * (vector.typical(Site(1)) or 0.0) / length, rtol=1e-4)


def test_sites_add_up_and_so_do_heads_and_neurons(setup: steerkit.Setup) -> None:
    """A site's slope is the one of its tensors alone; what heads give adds up to what attention gives."""
    both = attribute(setup, vector_of(setup, "caa", "z.1", "mlp_post.2"), controls=0)
    assert torch.allclose(both.total.items, difference(setup, both.vector), rtol=1e-2, atol=1e-3)
    for site, slope in both.sites.items():
        alone = attribute(setup, vector_of(setup, "caa", str(site)), controls=0)
        assert torch.allclose(alone.total.items, slope.items, atol=1e-5)
        assert slope.parts is not None
        assert slope.parts.shape == (4, 4 if site.kind == "z" else 48)
        assert torch.allclose(slope.parts.sum(dim=1), slope.items, atol=1e-5)
    out = attribute(setup, vector_of(setup, "caa", "attn_out.1"), controls=0)
    assert torch.allclose(both.sites[Site(1, "z")].items, out.total.items, atol=1e-4)  # the readout is linear
    first, second = both.parts(2)
    assert abs(first.slope.mean) >= abs(second.slope.mean)
    assert first.slope.low <= first.slope.mean <= first.slope.high


def test_one_head_alone_is_its_part(setup: steerkit.Setup) -> None:
    vector = vector_of(setup, "caa", "z.1")
    found = attribute(setup, vector, controls=0).sites[Site(1, "z")]
    only = torch.zeros(4, 8)
    only[2] = vector.params(Site(1, "z"))["direction"].reshape(4, 8)[2]
    alone = SteeringVector(**{**vars_of(vector), "tensors": {"z.1/direction": only.flatten()}})
    assert found.parts is not None
    assert torch.allclose(found.parts[:, 2], difference(setup, alone), rtol=2e-2, atol=1e-3)


def vars_of(vector: SteeringVector) -> dict[str, Any]:
    from dataclasses import fields

    return {one.name: getattr(vector, one.name) for one in fields(vector) if one.init}


def test_random_directions_have_the_spread_that_the_gradient_says(setup: steerkit.Setup) -> None:
    """|v| * |mean gradient| / sqrt(d); the mean gradient by one slope for each coordinate."""
    vector = vector_of(setup, "caa", "resid_post.1")
    found = attribute(setup, vector, controls=300)
    width, length = 32, float(vector.params(Site(1))["direction"].norm())
    ways = [
        SteeringVector(**{**vars_of(vector), "tensors": {"resid_post.1/direction": row}}) for row in torch.eye(width)
    ]
    gradient = torch.tensor([one.total.estimate.mean for one in attribute_all(setup, ways)])
    assert found.total.spread == pytest.approx(length * float(gradient.norm()) / width**0.5, rel=0.12)
    assert found.total.z == pytest.approx(found.total.estimate.mean / found.total.spread)
    control = random_like(vector, seed=1)
    assert float(found.total.random[0]) == pytest.approx(float(difference(setup, control).mean()), rel=2e-2, abs=1e-3)


def test_many_vectors_share_the_passes(setup: steerkit.Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = [vector_of(setup, "caa", f"resid_post.{layer}") for layer in range(BLOCKS)]
    apart = [attribute(setup, one, controls=0).total.items for one in vectors]
    passes = []
    hook = setup.model.register_forward_pre_hook(lambda *_: passes.append(1))
    together = attribute_all(setup, vectors)
    hook.remove()
    assert len(passes) == 3  # 8 texts, 3 rows each
    for one, alone in zip(together, apart, strict=True):
        assert torch.allclose(one.total.items, alone, atol=1e-5)


@dataclass(frozen=True)
class Certainty(Scorer):
    """A scorer of somebody else's."""

    name = "certainty"
    title = "log-probability of the likeliest first token"
    columns: ClassVar[Any] = {"certainty": Column("certainty", "nats", "higher")}

    def texts(self, setup: steerkit.Setup) -> list[Any]:
        return [positive for positive, _ in setup.pairs]

    def of_text(self, answer: Answer) -> Tensor:
        return torch.log_softmax(answer.logits[0], dim=-1).max()

    def of_items(self, values: Tensor) -> Tensor:
        return values

    def score(self, trial: Trial) -> dict[str, Tensor]:
        found = trial.over_answers(self.texts(trial.setup), self.of_text)
        return {"certainty": torch.stack(found).detach()}


def test_any_scorer_that_gradients_go_through(setup: steerkit.Setup) -> None:
    vector, scorer = vector_of(setup, "caa", "resid_post.1"), Certainty()
    found = attribute(setup, vector, scorer, controls=0)
    up, down = (scorer.score(setup.trial(vector, one))["certainty"] for one in (1e-3, -1e-3))
    assert torch.allclose(found.total.items, (up - down) / 2e-3, rtol=2e-2, atol=3e-3)
    with pytest.raises(DataError, match="repetition: no gradient goes through this scorer"):
        attribute(setup, vector, "repetition")


def test_what_has_no_slope_is_refused(setup: steerkit.Setup) -> None:
    for method, reason in (("set_projection", "no strength leaves"), ("conditional", "a gate decides by the prompt")):
        with pytest.raises(DataError, match=f"{method}: {reason}"):
            attribute(setup, vector_of(setup, method, "resid_post.1"))
    with pytest.raises(DataError, match="caa: fade decides"):
        attribute(setup, vector_of(setup, "caa", "resid_post.1").at(fade="linear over 4"))


def test_checkpointing_and_precision() -> None:
    """The same ranking, or refused."""
    setup = setup_of(build("llama"))
    vectors = [vector_of(setup, "caa", f"resid_post.{layer}") for layer in range(BLOCKS)]
    expected = torch.tensor([one.total.estimate.mean for one in attribute_all(setup, vectors)])
    checkpointed = copy.deepcopy(setup.model)
    checkpointed.activation_checkpointing_enable()
    checkpointed.train()
    half = copy.deepcopy(setup.model).to(torch.bfloat16)
    for model, close in ((checkpointed, 1e-5), (half, 0.1)):
        found = torch.tensor([one.total.estimate.mean for one in attribute_all(setup_of(model), vectors)])
        assert torch.allclose(found, expected, atol=close * float(expected.abs().max()))
        assert found.argsort().tolist() == expected.argsort().tolist()
    assert checkpointed.training

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h * 1.0

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError("no backward of this kernel")

    block = setup.model.model.layers[2]
    handle = block.register_forward_hook(lambda _m, _a, output: Opaque.apply(output))
    with pytest.raises(ModelError, match=r"no gradient goes through it .no backward of this kernel."):
        attribute(setup, vectors[0])
    handle.remove()


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("kind", ["torchao", "bnb4", "quanto", "dynamic"])
def test_a_quantised_model_is_right_or_refused(kind: str, tmp_path: Any) -> None:
    setup = setup_of(quantised.quantised(kind, tmp_path))
    vector = vector_of(setup, "caa", "resid_post.1")
    if kind == "dynamic":  # whose kernels have no backward pass
        with pytest.raises(ModelError, match="no gradient goes through it"):
            attribute(setup, vector)
        return
    found, slow = attribute(setup, vector, controls=0), difference(setup, vector, 3e-2)
    assert torch.allclose(found.total.items, slow, rtol=0.02, atol=0.02 * float(slow.abs().max()))


@pytest.mark.parametrize("layers", [(0,), (2,), (1, 3)])
def test_the_curvature_is_that_of_the_measured_divergence(setup: steerkit.Setup, layers: tuple[int, ...]) -> None:
    vector = vector_of(setup, "caa", *(f"resid_post.{layer}" for layer in layers))
    (found,) = kl_curvatures(setup, [vector], draws=300)
    measured = measure(setup.trial(vector, 0.02), ["divergence"])["kl"].estimate.mean
    assert found == pytest.approx(2 * measured / 0.02**2, rel=0.2)  # of 600 draws a twentieth is off by 12 %
    assert strength_within(found, 0.3) == pytest.approx((0.6 / found) ** 0.5)
    assert strength_within(0.0, 0.3) == float("inf")


def test_the_model_is_left_as_it_was(setup: steerkit.Setup) -> None:
    before = [(one.requires_grad, one.grad) for one in setup.model.parameters()]
    with torch.inference_mode():
        attribute(setup, vector_of(setup, "caa", "resid_post.1"), controls=1)
    assert [(one.requires_grad, one.grad) for one in setup.model.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in setup.model.modules())
