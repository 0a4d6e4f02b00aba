"""Steering while training: on in training steps and at no other time, right gradients, nothing left behind."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

import steerkit
from steerkit.errors import DataError, FitError, ModelError, ScopeError
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.steering.callback import SteeringCallback, additions, span_ablation
from steerkit.vector.steering_vector import SteeringVector
from tests.families import build
from tests.modes import LONG, SHORT, rows_of, vector_for
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ROWS = [{"input_ids": list(ids), "labels": list(ids)} for ids in (LONG, LONG[::-1], LONG, LONG[::-1])]
RESID = Site(1, "resid_post")


def direction_at(vector: SteeringVector, site: Site = RESID) -> Tensor:
    return vector.params(site)["direction"]


def trainer_of(model: Any, folder: Any, *callbacks: Any, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "seed": 0,
        **options,
    }
    return kind(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=ROWS,
        eval_dataset=ROWS[:2],
        callbacks=list(callbacks),
    )


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="(transformers|torch|accelerate|peft).*")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        was, _ = model.training, model.eval()
        found: Tensor = model(input_ids=torch.tensor([LONG])).logits
        model.train(was)
    return found


def hooks_of(model: nn.Module) -> int:
    """Our own hooks; a trainer leaves one of its own under gradient checkpointing."""
    hooks = [
        hook for one in model.modules() for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
    ]
    return sum(type(hook).__module__.startswith("steerkit") for hook in hooks)


class ByHand(Trainer):
    """Trains with the hook of the paper: written out, on in training steps."""

    edit: Callable[[Tensor], Tensor]

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        block = find_decoder(model).blocks[1]
        handle = block.register_forward_hook(
            lambda _module, _args, output: (
                self.edit(output) if torch.is_tensor(output) else (self.edit(output[0]), *output[1:])
            )
        )
        try:
            return super().training_step(model, *args, **kwargs)
        finally:
            handle.remove()


def trained(model: Any, folder: Any, *callbacks: Any, **options: Any) -> list[Tensor]:
    trainer_of(model, folder, *callbacks, **options).train()
    return [parameter.detach().clone() for parameter in model.parameters()]


def trained_by_hand(model: Any, folder: Any, edit: Callable[[Tensor], Tensor], **options: Any) -> list[Tensor]:
    trainer = trainer_of(model, folder, kind=ByHand, **options)
    trainer.edit = edit  # type: ignore[attr-defined]
    trainer.train()
    return [parameter.detach().clone() for parameter in model.parameters()]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def moved(got: list[Tensor], model: Any) -> bool:
    return any(not torch.allclose(one, other, atol=1e-5) for one, other in zip(got, model.parameters(), strict=True))


# What is trained is the model with the paper's edit.


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_prevention_trains_the_model_with_the_addition(family: str, accumulate: int, tmp_path: Any) -> None:
    vector = vector_for(build(family), scope="response")
    options: dict[str, Any] = {
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 2 // accumulate,
    }
    model = no_dropout(build(family))
    got = trained(model, tmp_path, SteeringCallback(vector, 1.5), **options)
    by_hand = trained_by_hand(
        no_dropout(build(family)), tmp_path, lambda h: h + 1.5 * direction_at(vector).to(h), **options
    )
    close(got, by_hand)
    assert moved(trained(no_dropout(build(family)), tmp_path, **options), model)  # steering made a difference
    assert hooks_of(model) == 0


def test_ablation_trains_the_model_without_the_span(tmp_path: Any) -> None:
    model = build("llama")
    vectors = [vector_for(model, scope="all", seed=seed) for seed in (0, 1)]
    rows = torch.stack([direction_at(one) for one in vectors])
    q = torch.linalg.svd(rows, full_matrices=False).Vh  # another orthonormal basis of the same span

    got = trained(model, tmp_path, SteeringCallback(vectors, mode="ablate"))
    close(got, trained_by_hand(build("llama"), tmp_path, lambda h: h - (h @ q.T) @ q))
    assert moved(trained(build("llama"), tmp_path), model)


def test_ablation_of_a_span_leaves_nothing_of_it() -> None:
    model = build("llama")
    sites = (Site(1), Site(2))
    first = vector_for(model, scope="all", seed=0)
    second, third = (
        vector_for(model, scope="all", site=site, seed=seed) for site, seed in ((Site(1), 1), (Site(2), 2))
    )
    made = span_ablation([first, second, third])
    assert [one.sites for one in made] == [sites, sites[:1]]
    ids = torch.tensor([LONG])
    with steerkit.steer(model, made):
        acts = steerkit.activations.record_ids(model, ids.tolist(), sites)
    for site, found in ((Site(1), (first, second)), (Site(2), (third,))):
        for vector in found:
            direction = direction_at(vector, site)
            assert float((acts[site][0] @ direction).abs().max()) < 1e-4 * float(acts[site][0].norm())
    with pytest.raises(FitError, match="dependent"):
        span_ablation([first, first])


def test_directions_of_another_method_are_added() -> None:
    model = build("llama")
    caa = vector_for(model, scope="response")
    (ablation,) = span_ablation([caa])
    (added,) = additions([ablation])
    assert (added.method, added.scope) == ("caa", "all")
    unit = direction_at(caa) / direction_at(caa).norm()
    torch.testing.assert_close(direction_at(added), unit)
    with steerkit.steer(model, added, 1.0):
        steered = logits_of(model)
    with steerkit.steer(model, caa, strength=1 / float(direction_at(caa).norm()), scope="all"):
        torch.testing.assert_close(steered, logits_of(model))


class Delegates(steerkit.SteeringCallback):
    """As a user's own subclass does."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, **kwargs)


def test_a_subclass_steers_every_step_too(tmp_path: Any) -> None:
    vector = vector_for(build("llama"), scope="response")
    expected = trained(build("llama"), tmp_path / "a", steerkit.SteeringCallback(vector, 2.0))
    got = trained(build("llama"), tmp_path / "b", Delegates(vector, 2.0))
    close(got, expected)
    plain = trained(build("llama"), tmp_path / "c")
    assert any(not torch.allclose(one, other, atol=1e-5) for one, other in zip(got, plain, strict=True))


def test_a_strength_stays_only_where_it_means_the_same() -> None:
    vector = replace(vector_for(build("llama"), scope="response"), suggested_strength=4.0)
    assert additions([vector])[0].suggested_strength == 4.0
    (added,) = additions([vector.at(strength=0.3, unit="norm")])
    assert (added.strength, added.unit) == (0.3, "norm")
    (taken,) = span_ablation([vector.at(strength=3.0)])
    assert (taken.strength, taken.unit, taken.suggested_strength) == (None, "paper", None)


def test_the_vector_is_fixed(tmp_path: Any) -> None:
    vector = vector_for(build("llama"), scope="all")
    before = direction_at(vector).clone()
    trained(build("llama"), tmp_path, SteeringCallback(vector))
    assert torch.equal(direction_at(vector), before)
    assert not direction_at(vector).requires_grad


# Only in training steps.


class Looks(TrainerCallback):
    """Looks at what the model gives at the trainer's events; stands behind or before the steering callback."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def look(self, name: str, model: Any) -> None:
        clean = build("llama")
        clean.load_state_dict(model.state_dict())
        self.seen.setdefault(name, []).append((logits_of(model), logits_of(clean)))

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look("evaluate", model)

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look("prediction", model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look("step", model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.look("end", model)


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluation_is_unsteered_unless_asked(during: bool, accumulate: int, tmp_path: Any) -> None:
    model, looks = build("llama"), Looks()
    callback = SteeringCallback(vector_for(model, scope="all"), during_evaluation=during)
    trainer = trainer_of(
        model,
        tmp_path,
        callback,
        looks,
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
    )
    trainer.train()
    assert {name: len(found) for name, found in looks.seen.items()} == {
        "evaluate": 3, "prediction": 3, "step": 2, "end": 1,
    }  # fmt: skip
    for name, found in looks.seen.items():
        steered = name == "step" or (during and name != "end")
        assert all(torch.equal(got, clean) is not steered for got, clean in found), name
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    plain = trainer.evaluate()["eval_loss"]  # of the last state, unsteered in any case
    assert (logged[-1] == pytest.approx(plain, abs=1e-6)) is not during
    assert not callback.is_attached


class Fails(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of luck")


class FailsInside(Trainer):
    """Breaks off in the middle of a step, after its forward pass."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        super().compute_loss(*args, **kwargs)
        raise KeyboardInterrupt


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize("how", ["step", "forward"])
def test_an_error_leaves_no_steering(how: str, body: bool, tmp_path: Any) -> None:
    model = build("llama")
    clean = logits_of(model)
    acts = steerkit.record(model, byte_tokenizer(), ["Hi"], ["resid_post.2"])["resid_post.2"]
    callback = SteeringCallback(vector_for(model, scope="all"))
    if how == "step":
        trainer = trainer_of(model, tmp_path, callback, Fails())
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.train()
    else:
        trainer = trainer_of(model, tmp_path, callback, kind=FailsInside)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert torch.equal(logits_of(copy.deepcopy(model)), clean)  # a copy, before anything looked
    if body:  # called alone, as `record` does
        again = steerkit.record(model, byte_tokenizer(), ["Hi"], ["resid_post.2"])
        assert torch.equal(again["resid_post.2"], acts)
    assert torch.equal(logits_of(model), clean)
    assert hooks_of(model) == 0
    assert not callback.is_attached


class Peeks(TrainerCallback):
    """Runs the model in another thread in the middle of a step, and notes whether the step is steered."""

    def __init__(self, callback: SteeringCallback, *, take_off: bool = False) -> None:
        self.callback, self.take_off, self.seen = callback, take_off, list[bool]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append(self.callback.is_attached)
        if self.take_off:
            self.callback.__exit__(None, None, None)
        worker = threading.Thread(target=logits_of, args=(model,))
        worker.start()
        worker.join()


@pytest.mark.parametrize("take_off", [False, True])
def test_steering_lasts_as_long_as_the_training(take_off: bool, tmp_path: Any) -> None:
    callback = SteeringCallback(vector_for(build("llama"), scope="all"))
    peeks = Peeks(callback, take_off=take_off)
    trained(build("llama"), tmp_path, callback, peeks, max_steps=3)
    assert peeks.seen == [True] * 3


def test_a_training_that_failed_in_another_thread_leaves_no_steering(tmp_path: Any) -> None:
    model = build("llama")
    clean = logits_of(model)
    callback = SteeringCallback(vector_for(model, scope="all"))

    def train() -> None:
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer_of(model, tmp_path, callback, Fails()).train()

    worker = threading.Thread(target=train)
    worker.start()
    worker.join()
    assert callback.is_attached
    assert torch.equal(logits_of(model), clean)
    assert not callback.is_attached


def test_an_error_keeps_no_trainer_alive(tmp_path: Any) -> None:
    model = build("llama")
    trainer = trainer_of(model, tmp_path, SteeringCallback(vector_for(model, scope="all")), Fails())
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        trainer.train()
    del caught
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("scope", ["assistant", "answer"])
def test_scopes_by_role_take_the_trainer_s_tokenizer(scope: str, tmp_path: Any) -> None:
    tokenizer = byte_tokenizer(CHATML)
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So it is."}]
    ids = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    vector = vector_for(build("llama"), scope="all")
    found: list[Tensor] = []
    for given in ("all", scope):
        model, callback = build("llama"), SteeringCallback(vector, scope=given)
        rows = [{"input_ids": ids, "labels": ids}] * 2
        args = trainer_of(model, tmp_path).args
        given_too: dict[str, Any] = {"processing_class": tokenizer, "data_collator": default_data_collator}
        trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback], **given_too)
        trainer.train()
        found.append(logits_of(model))
    assert not torch.allclose(*found, atol=1e-5)
    with pytest.raises(ScopeError, match="processing_class="):
        trainer_of(build("llama"), tmp_path, SteeringCallback(vector, scope=scope)).train()


def test_an_error_leaves_no_steering_in_another_training_of_the_model(tmp_path: Any) -> None:
    model = build("llama")
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer_of(model, tmp_path, SteeringCallback(vector_for(model, scope="all")), Fails()).train()
    close(trained(model, tmp_path), trained(build("llama"), tmp_path))


def test_as_a_context_it_is_off_at_once(tmp_path: Any) -> None:
    model = build("llama")
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        SteeringCallback(vector_for(model, scope="all"), during_evaluation=True) as callback,
    ):
        trainer_of(model, tmp_path, callback, Fails()).train()
    assert hooks_of(model) == 0


def test_one_callback_serves_two_trainings(tmp_path: Any) -> None:
    model = build("llama")
    callback = SteeringCallback(vector_for(model, scope="all"))
    first = trained(model, tmp_path, callback)
    close(trained(build("llama"), tmp_path, callback), first)


# What else a trainer does.


def no_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_checkpointing_changes_nothing_outside_of_blocks(mode: Any, kind: str, reentrant: bool, tmp_path: Any) -> None:
    vector = vector_for(build("llama"), scope="all", site=Site(2, kind))
    expected = trained(build("llama"), tmp_path, SteeringCallback(vector, mode=mode))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    close(trained(build("llama"), tmp_path, SteeringCallback(vector, mode=mode), **options), expected)


def test_checkpointing_refuses_sites_inside_blocks_before_the_first_step(tmp_path: Any) -> None:
    model = build("llama")
    callback = SteeringCallback(vector_for(model, scope="all", site=Site(1, "mlp_out")))
    with pytest.raises(ScopeError, match="resid_pre or resid_post"):
        trainer_of(model, tmp_path, callback, gradient_checkpointing=True).train()
    assert hooks_of(model) == 0
    close(trained(build("llama"), tmp_path, callback), by_hand_inside(tmp_path))


def by_hand_inside(folder: Any) -> list[Tensor]:
    model = build("llama")
    direction = direction_at(vector_for(model, scope="all", site=Site(1, "mlp_out")), Site(1, "mlp_out"))
    find_decoder(model).blocks[1].mlp.register_forward_hook(lambda _module, _args, output: output + direction)
    return trained(model, folder)


def checkpointed(model: Any, *, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("mode", ["add", "ablate"])
@pytest.mark.parametrize("reentrant", [True, False, None])
def test_two_forwards_before_one_backward(reentrant: bool | None, mode: str) -> None:
    """Other tokens and another batch size in the second pass: nothing of it may reach the first."""
    model = build("llama").train()
    vector = vector_for(model, scope="all")
    change = {"add": additions, "ablate": span_ablation}[mode]([vector])
    direction = direction_at(vector) / direction_at(vector).norm()

    def edit(h: Tensor) -> Tensor:
        return h + direction_at(vector) if mode == "add" else h - (h @ direction)[..., None] * direction

    batches = [rows_of([LONG, SHORT]), rows_of([SHORT])]

    def loss(where: Any) -> Tensor:
        parts = [where(input_ids=ids, attention_mask=mask, labels=ids).loss for ids, mask in batches]
        return parts[0] * 2 + parts[1]

    handle = (
        find_decoder(model)
        .blocks[1]
        .register_forward_hook(lambda _module, _args, output: torch.where(now[0][..., None] != 0, edit(output), output))
    )
    now: list[Tensor] = []
    parts = []
    for ids, mask in batches:
        now[:] = [mask]
        parts.append(model(input_ids=ids, attention_mask=mask, labels=ids).loss)
    (parts[0] * 2 + parts[1]).backward()
    handle.remove()
    expected = [parameter.grad.clone() for parameter in model.parameters()]

    model = build("llama").train()
    if reentrant is not None:
        checkpointed(model, reentrant=reentrant)
    with steerkit.steer(model, change):
        loss(model).backward()
    for parameter, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("site", [Site(1), Site(2, "resid_pre"), Site(1, "mlp_out")], ids=str)
@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_gradients_of_weights_match_finite_differences(mode: str, site: Site) -> None:
    model = build("gpt2").double().eval()  # Llama-likes compute their norms in float32
    change = {"add": additions, "ablate": span_ablation}[mode]
    vectors = change([vector_for(model, scope="all", site=site, seed=seed) for seed in (0, 1)])
    weight = find_decoder(model).blocks[1].mlp.c_fc.weight
    way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    way = way / way.norm()
    ids = torch.tensor([LONG])

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])  # theirs is float32

    with steerkit.steer(model, vectors):
        loss().backward()
        slopes = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight.add_(step * way)
                slopes.append(float(loss()))
                weight.sub_(step * way)
    along, slope = float((weight.grad * way).sum()), (slopes[0] - slopes[1]) / 2e-5
    assert abs(slope) > 1e-3
    assert abs(along - slope) < 1e-6 * max(1.0, abs(slope))


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def test_adapters_are_trained_under_steering(tmp_path: Any) -> None:
    vector = vector_for(build("llama"), scope="all")
    model = lora(build("llama"))
    weights = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    got = trained(model, tmp_path, SteeringCallback(vector, 2.0))
    close(got, trained_by_hand(lora(build("llama")), tmp_path, lambda h: h + 2 * direction_at(vector)))
    assert moved(trained(lora(build("llama")), tmp_path), model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    assert hooks_of(model) == 0


def test_adapters_with_checkpointing(tmp_path: Any) -> None:
    vector = vector_for(build("llama"), scope="all")
    expected = trained(lora(build("llama")), tmp_path, SteeringCallback(vector, 2.0))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = lora(build("llama"))
    model.enable_input_require_grads()
    close(trained(model, tmp_path, SteeringCallback(vector, 2.0), **options), expected)


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("during", [False, True])
def test_a_compiled_training_is_steered_alike(during: bool, tmp_path: Any) -> None:
    """Evaluated after each of twelve steps; compiled once for each state and not once for each step."""
    vector, count = vector_for(build("llama"), scope="all"), 0
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 12}

    def counting(graph: Any, _example: Any) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    eager, compiled = build("llama"), build("llama")
    first = trainer_of(eager, tmp_path, SteeringCallback(vector, during_evaluation=during), **options)
    first.train()
    torch._dynamo.reset()
    compiled.compile(backend=counting)
    second = trainer_of(compiled, tmp_path, SteeringCallback(vector, during_evaluation=during), **options)
    second.train()
    close([one.detach() for one in compiled.parameters()], [one.detach() for one in eager.parameters()])
    assert losses_of(second) == pytest.approx(losses_of(first), abs=1e-4)
    assert 1 <= count <= 4
    assert hooks_of(compiled) == 0
    torch.testing.assert_close(logits_of(compiled), logits_of(eager), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_mistakes(tmp_path: Any) -> None:
    model = build("llama")
    vector = vector_for(model, scope="all")
    with pytest.raises(DataError, match="'sideways'"):
        SteeringCallback(vector, mode="sideways")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no single direction"):
        SteeringCallback(vector_for(model, scope="front"), mode="ablate")
    with pytest.raises(ScopeError, match="cannot tell where the prompt ends"):
        trainer_of(model, tmp_path, SteeringCallback(vector, scope="response")).train()
    logits_of(model)
    assert hooks_of(model) == 0

    class Two:
        n_gpu = 2

    with pytest.raises(ModelError, match="torchrun"):
        SteeringCallback(vector).on_train_begin(Two(), None, None, model=model)
    assert hooks_of(model) == 0
