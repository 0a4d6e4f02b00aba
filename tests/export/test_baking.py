"""`bake`: the checkpoint that plain transformers loads is the model steered by hooks, and a failure leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor

import steerkit
from steerkit.errors import ModelError, ScopeError, SiteError, SteerError, StrengthError, VectorMismatchError
from steerkit.export import baking
from steerkit.export.baking import bake
from steerkit.methods.selective import SelectiveSteering
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests import modes, tolerances
from tests.choices import mostly_slow
from tests.families import BLOCKS, HIDDEN, build
from tests.methods import test_ablation
from tests.program import Cli
from tests.rotations import planted
from tests.tiny_tokenizers import CHATML, byte_tokenizer

ADDED = {
    "llama": "mlp_bias",
    "gpt2": None,
    "gpt_neox": None,
    "opt": None,
    "falcon": "bias",
    "falcon_new": "bias",
    "bloom": None,
    "gpt_oss": None,
    "mamba": "use_bias",
}
NO_SWITCH = ("mistral", "qwen2", "qwen3", "phi3", "cohere")
NO_FORM = {
    "gemma2": "norms what `mlp` gives",
    "gemma3_text": "norms what `mlp` gives",
    "olmo2": "norms what `mlp` gives",
    "opt_post": "norms stand on the residual stream",
    "mixtral": "experts, which have no bias",
    "qwen3_moe": "experts, which have no bias",
    "qwen3_next": "experts, which have no bias",
}
UNTIED = ("llama", "qwen2", "mistral", "phi3", "gpt_neox", "mixtral", "qwen3_moe", "gpt_oss")
TIED = ("gpt2", "opt", "falcon", "mamba", "cohere")
ROTATED = ("llama", "gemma2", "gemma3_vlm", "gpt2", "gpt_neox", "phi3", "bloom", "cohere")
SCORED = torch.tensor([modes.LONG, (*modes.SHORT, 8, 61, 30)])


def added(model: Any, **changes: Any) -> SteeringVector:
    return replace(modes.vector_for(model, scope="all", site=Site(2)), **changes)


def tied_llama() -> Any:
    config = tf.LlamaConfig(**{**build("llama").config.to_dict(), "tie_word_embeddings": True})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=SCORED, use_cache=False).logits
    return found.float()


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def hooked(model: Any, vector: SteeringVector, strength: float) -> Tensor:
    with steerkit.steer(model, vector, strength):
        return logits(model)


def loaded(folder: Path, kind: Any = tf.AutoModelForCausalLM, **options: Any) -> Any:
    """The way anybody loads it; every weight has to be in the files, and nothing else."""
    model, report = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def left_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# what is written is what the hooks do


@pytest.mark.parametrize(("family", "writes"), [("gpt2", ("attn_out.0", "mlp_out.2")), ("gemma2", ("attn_raw.1",))])
def test_an_ablation_of_chosen_writes_leaves_tied_embeddings_alone(
    family: str, writes: tuple[str, ...], tmp_path: Path
) -> None:
    model = build(family)
    vector = test_ablation.vector_for(model, writes=writes)
    baked = bake(model, None, vector, tmp_path / "out", strength=0.6)
    assert not any("wte" in name or "embed" in name for name in baked.changed)
    assert gap(logits(loaded(tmp_path / "out")), hooked(model, vector, 0.6)) < tolerances.of_family(family)


@pytest.mark.parametrize("family", ADDED)
def test_an_addition_is_a_bias(family: str, tmp_path: Path) -> None:
    model = build(family)
    vector = added(model)
    baseline, wanted = logits(model), hooked(model, vector, 0.7)
    baked = bake(model, None, vector, tmp_path / "out", strength=0.7)
    again = loaded(tmp_path / "out")
    assert type(again) is type(model)
    assert gap(logits(again), wanted) < tolerances.of_family(family)
    assert gap(wanted, baseline) > 0.1
    assert dict(baked.switches) == ({ADDED[family]: True} if ADDED[family] else {})
    assert (baked.added == ()) == (ADDED[family] is None)
    for name in set(baked.added) - set(baked.changed):
        assert not bool(again.get_parameter(name).any()), name
    before = dict(model.named_parameters())
    same = before.keys() - set(baked.changed)
    assert all(torch.equal(again.get_parameter(name), before[name]) for name in same)
    assert not baked.untied


@pytest.mark.parametrize("family", NO_SWITCH)
def test_families_without_a_switch_for_the_bias_are_refused(family: str, tmp_path: Path) -> None:
    model = build(family)
    with pytest.raises(SiteError, match=r"no switch in its config that brings one.*export an adapter"):
        bake(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("family", NO_FORM)
def test_families_in_which_a_bias_is_another_thing_are_refused(family: str, tmp_path: Path) -> None:
    model = build(family)
    with pytest.raises(SiteError, match=NO_FORM[family]):
        bake(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("family", UNTIED)
def test_ablation_with_a_head_of_its_own(family: str, tmp_path: Path) -> None:
    model = build(family)
    vector = test_ablation.vector_for(model, writes="every")
    wanted = hooked(model, vector, 1.0)
    baked = bake(model, None, vector, tmp_path / "out")
    assert gap(logits(loaded(tmp_path / "out")), wanted) < tolerances.of_family(family)
    assert gap(wanted, logits(model)) > 0.1
    assert (baked.untied, dict(baked.switches), baked.added) == ((), {}, ())


@pytest.mark.parametrize("family", [*TIED, "tied_llama"])
def test_ablation_with_a_tied_head_needs_it_untied(family: str, tmp_path: Path) -> None:
    model = tied_llama() if family == "tied_llama" else build(family)
    vector = test_ablation.vector_for(model, writes="every")
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    with pytest.raises(SiteError, match="--untie"):
        bake(model, None, vector, tmp_path / "out")
    wanted = hooked(model, vector, 1.0)
    baked = bake(model, None, vector, tmp_path / "out", untie=True)
    again = loaded(tmp_path / "out")
    assert gap(logits(again), wanted) < 1e-5
    assert again.config.tie_word_embeddings is False
    assert torch.equal(again.get_output_embeddings().weight, embedding)
    assert not torch.allclose(again.get_input_embeddings().weight, embedding)
    assert len(baked.untied) == 1
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is embedding
    assert model.config.tie_word_embeddings is True


def test_a_vector_fitted_to_untie_still_needs_consent(tmp_path: Path) -> None:
    """Its file would untie the head in `edited`; a checkpoint that grows is another matter."""
    model = build("gpt2")
    vector = test_ablation.vector_for(model, writes="every", untie=True)
    with pytest.raises(SiteError, match=r"tied weights.*--untie"):
        bake(model, None, vector, tmp_path / "out")


def test_untie_leaves_tied_what_need_not_be_untied(tmp_path: Path) -> None:
    model = build("gpt2")
    baked = bake(model, None, added(model), tmp_path / "out", untie=True)
    assert baked.untied == ()
    assert loaded(tmp_path / "out").config.tie_word_embeddings is True


@pytest.mark.parametrize("family", ROTATED)
def test_selective_rotation(family: str, tmp_path: Path) -> None:
    model = build(family)
    vector = planted(model, SelectiveSteering())
    wanted = hooked(model, vector, 40.0)
    bake(model, None, vector, tmp_path / "out", strength=40.0)
    assert gap(logits(loaded(tmp_path / "out", type(model))), wanted) < tolerances.of_family(family)
    assert gap(wanted, logits(model)) > 0.1


def test_several_vectors_act_in_order(tmp_path: Path) -> None:
    model = build("gpt2")
    vectors = [
        added(model, strength=0.5),
        replace(modes.vector_for(model, scope="all", site=Site(2), seed=1), strength=-1.5),
        test_ablation.vector_for(model, writes="every"),
    ]
    with steerkit.steer(model, vectors):
        wanted = logits(model)
    bake(model, None, vectors, tmp_path / "out", untie=True)
    assert gap(logits(loaded(tmp_path / "out")), wanted) < 1e-5
    with steerkit.steer(model, vectors[-1:]):
        assert gap(logits(model), wanted) > 0.1


def test_vectors_that_do_not_go_together_as_weights_are_withdrawn(tmp_path: Path) -> None:
    """The ablation does not know of the bias that the addition brings, so it would not be taken out of that."""
    model = build("llama")
    vectors = [added(model), test_ablation.vector_for(model, writes="every")]
    with pytest.raises(ModelError, match="not those of the hooks"):
        bake(model, None, vectors, tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mamba", "gpt_oss", "bloom"])
def test_low_precision_is_compared_with_what_rounding_explains(family: str, tmp_path: Path) -> None:
    model = build(family).bfloat16()
    baked = bake(model, None, added(model), tmp_path / "out", strength=0.7)
    found = baked.verification
    assert found.dtype == "bfloat16"
    assert found.typical < 2 * found.rounding < 0.05
    assert found.effect > 0.3
    again = loaded(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {value.dtype for value in model.parameters()}


def test_low_precision_hides_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strength that is a fifth too large is far outside of what rounding explains."""
    model = build("llama").bfloat16()
    real = baking.exact_updates
    monkeypatch.setattr(baking, "exact_updates", lambda inner, vectors, strength: real(inner, vectors, 1.2 * strength))
    with pytest.raises(ModelError, match="at the median token, where one rounding"):
        bake(model, None, added(model), tmp_path / "out", strength=1.0)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("sharpness", [1, 10, 30])
def test_an_ill_conditioned_model_is_allowed_its_own_rounding_and_no_fault(
    sharpness: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharp attention makes much of one rounding: what is allowed grows with it, and stays far below every fault."""
    model = build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(sharpness)
    found = bake(model, None, added(model), tmp_path / "out", strength=1.0).verification
    assert found.holds
    assert found.allowed < found.effect / 1000
    assert (found.allowed > 3e-4) == (sharpness == 30), "the cases are not what they say"
    real = baking.exact_updates
    faults: dict[str, Callable[[Any, float], Any]] = {
        "a hundredth too strong": lambda vectors, strength: real(model, vectors, 1.01 * strength),
        "the other sign": lambda vectors, strength: real(model, vectors, -strength),
        "one block off": lambda vectors, strength: real(
            model, [modes.vector_for(model, scope="all", site=Site(1))], strength
        ),
        "nothing": lambda vectors, strength: real(model, vectors, 0.0),
    }
    for name, fault in faults.items():
        monkeypatch.setattr(baking, "exact_updates", lambda _, *given, fault=fault: fault(*given))
        with pytest.raises(ModelError, match="one rounding of the input makes"):
            bake(model, None, added(model), tmp_path / name, strength=1.0)


# the checkpoint is an ordinary one


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "gemma3_vlm"])
def test_files_hold_the_names_and_pieces_that_save_pretrained_writes(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "plain")
    is_rotated = family == "gemma3_vlm"
    vector = planted(model, SelectiveSteering()) if is_rotated else test_ablation.vector_for(model, writes="every")
    bake(model, None, vector, tmp_path / "out", strength=40.0 if is_rotated else 1.0, untie=True)
    plain, found = stored(tmp_path / "plain"), stored(tmp_path / "out")
    untied = {"lm_head.weight"} if family == "gpt2" else set()
    assert found.keys() == plain.keys() | untied
    assert all(found[name].shape == value.shape for name, value in plain.items())
    assert 0 < sum(not torch.equal(found[name], value) for name, value in plain.items()) < len(plain)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


def test_config_tokenizer_template_and_generation_config_come_along(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    model.generation_config.max_new_tokens = 7
    bake(model, tokenizer, added(model), tmp_path / "out")
    again = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == CHATML
    assert again("So?").input_ids == tokenizer("So?").input_ids
    assert loaded(tmp_path / "out").generation_config.max_new_tokens == 7
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"], config["mlp_bias"]) == (["LlamaForCausalLM"], "float32", True)


def test_a_model_in_training_is_compared_without_dropout_and_stays_in_training(tmp_path: Path) -> None:
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    assert bake(model, None, added(model), tmp_path / "out").verification.holds
    assert [module.training for module in model.modules()] == flags


def test_it_can_be_split_into_files(tmp_path: Path) -> None:
    model = build("mixtral")
    vector = test_ablation.vector_for(model, writes="every")
    bake(model, None, vector, tmp_path / "one")
    bake(model, None, vector, tmp_path / "many", shard_bytes=60_000)
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in many.values())
    assert torch.equal(logits(loaded(tmp_path / "many")), logits(loaded(tmp_path / "one")))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("family", mostly_slow(["llama", "gpt2", "mamba"], ["llama", "mamba"]))
def test_offloaded_models_give_the_same_bytes(family: str, place: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    vector = test_ablation.vector_for(model, writes="every")
    bake(model, None, vector, tmp_path / "here", untie=True)
    if place == "disk":
        spread = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "plain", device_map={"": "disk"}, offload_folder=tmp_path / "off"
        )
    else:
        from accelerate import cpu_offload

        spread = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        cpu_offload(spread, execution_device=torch.device("cpu"))
    assert all(value.is_meta for value in spread.parameters())
    bake(spread.eval(), None, vector, tmp_path / "there", untie=True)
    here, there = stored(tmp_path / "here"), stored(tmp_path / "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


MEASURE = """
import sys, threading, time
import torch, transformers
from steerkit.export import baking
from tests.methods import test_ablation
from benchmarks.__main__ import kilobytes

torch.set_num_threads(1)
sizes = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, vocab_size=2000)

def build(blocks):
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=blocks, max_position_embeddings=128)
    model = transformers.LlamaForCausalLM(config).eval()
    return model, test_ablation.vector_for(model, writes="every")

small, vector = build(2)
baking.bake(small, None, vector, sys.argv[1] + "/small")  # what is allocated once: code, threads, buffers
model, vector = build(24)
sizes = [sum(value.nbytes for value in part.parameters()) for part in (model, model.model.layers[0])]
before, peak, done = kilobytes("RssAnon"), 0, False

def watch():  # not the peak the system keeps: that counts files looked at through memory, too
    global peak
    while not done:
        peak = max(peak, kilobytes("RssAnon"))
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
baking.bake(model, None, vector, sys.argv[1] + "/out")
done = True
thread.join()
print(*sizes, 1024 * (peak - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory a process has")
def test_memory_stays_about_one_block_above_the_model(tmp_path: Path) -> None:
    # Freed memory goes back to the system at once, so that what is counted is in use.
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=given)
    total, block, above = (float(word) for word in done.stdout.split()[-3:])
    assert total > 20 * block
    # A copy of the changed weights would be 8 blocks, one of the model 24.
    assert above < 2 * block, f"{above / block:.1f} blocks above the model"


ROOT = Path(__file__).resolve().parents[2]
ALONE = """
import sys
sys.modules["steerkit"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt", return_dict=True)
out = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
print(out[0].tolist())
"""


def generated_alone(folder: Path) -> list[int]:
    done = subprocess.run([sys.executable, "-c", ALONE, str(folder)], capture_output=True, text=True, check=True)
    ids: list[int] = json.loads(done.stdout.splitlines()[-1])
    return ids


def generated(model: Any, tokenizer: Any) -> list[int]:
    chat = [{"role": "user", "content": "Hi"}]
    inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    ids: list[int] = out[0].tolist()
    return ids


def generated_with_hooks(model: Any, tokenizer: Any, vector: SteeringVector, strength: float) -> list[int]:
    with steerkit.steer(model, vector, strength):
        return generated(model, tokenizer)


@pytest.mark.slow  # a process of its own; in this one checkpoints are loaded every time
def test_it_loads_and_generates_where_steerkit_is_not(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), byte_tokenizer(CHATML)
    vector = added(model)
    bake(model, tokenizer, vector, tmp_path / "out", strength=0.7)
    ids = generated_alone(tmp_path / "out")
    assert ids == generated_with_hooks(model, tokenizer, vector, 0.7)
    assert ids != generated_with_hooks(model, tokenizer, vector, 0.0)


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = build("gpt2")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes, config = set(vars(model)), model.config.to_dict()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    bake(model, None, test_ablation.vector_for(model, writes="every"), tmp_path / "out", untie=True)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert (set(vars(model)), model.config.to_dict()) == (attributes, config)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


# what cannot be exact is refused, and a failure leaves nothing


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"scope": "response"}, ScopeError, "made for 'response'.*--scope all"),
        ({"strength": [1.0, 2.0]}, StrengthError, "one finite number"),
        ({"unit": "norm"}, StrengthError, "unit 'paper'"),
    ],
)
def test_what_weights_cannot_do_is_refused(
    change: dict[str, Any], error: type[SteerError], match: str, tmp_path: Path
) -> None:
    model = build("llama")
    with pytest.raises(error, match=match):
        bake(model, None, added(model).at(**change), tmp_path / "out")
    assert left_in(tmp_path) == []


def test_a_wrong_model_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(VectorMismatchError, match="cannot steer LlamaForCausalLM"):
        bake(model, None, added(model, num_layers=BLOCKS + 1), tmp_path / "out")
    with pytest.raises(StrengthError, match="no exact weight form"):
        window = modes.vector_for(model, scope="front", site=Site(1, "resid_pre"))
        bake(model, None, replace(window, scope="all", edit="add_window"), tmp_path / "out")
    assert left_in(tmp_path) == []


def test_models_that_cannot_be_rewritten_are_refused(tmp_path: Path) -> None:
    adapted = build("llama_peft")
    with pytest.raises(ModelError, match="merge it first"):
        bake(adapted, None, added(adapted), tmp_path / "out")
    model: Any = build("llama")
    model.hf_quantizer = object()
    with pytest.raises(ModelError, match=r"quantised.*export an adapter"):
        bake(model, None, added(model), tmp_path / "out")
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, HIDDEN, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ModelError, match="quantised"):
        bake(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []


def test_a_checkpoint_that_differs_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = build("llama"), baking.planned_value
    monkeypatch.setattr(baking, "planned_value", lambda inner, plan, name: 1.001 * real(inner, plan, name))
    with pytest.raises(ModelError, match="not those of the hooks"):
        bake(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("no")])
@pytest.mark.parametrize("step", ["planned_value", "_write_beside", "_loaded_logits", "weights_card"])
def test_nothing_stays_behind(step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("gpt2"), []
    real = getattr(baking, step)

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == (4 if step == "planned_value" else 1):
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(baking, step, fails)
    shown = (ModelError, "cannot be written .No space") if isinstance(error, OSError) else (type(error), None)
    with pytest.raises(shown[0], match=shown[1]):
        bake(model, None, added(model), tmp_path / "new" / "out")
    assert calls
    assert left_in(tmp_path / "new") == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    model = build("gpt2")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="cannot be written"):
        bake(model, None, added(model), tmp_path / "file" / "out")
    with pytest.raises(ModelError, match=r"is there already.*--force"):
        bake(model, None, added(model), tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    for name in ("file", "mine"):
        with pytest.raises(ModelError, match="not replaced"):
            bake(model, None, added(model), tmp_path / name, force=True)
    assert left_in(tmp_path) == ["file", "mine"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "dear"


def test_an_old_checkpoint_goes_only_by_force_and_only_for_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt2")
    bake(model, None, added(model), tmp_path / "out", strength=0.5)
    old = stored(tmp_path / "out")
    with pytest.raises(ModelError, match="is there already"):
        bake(model, None, added(model), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(baking, "_loaded_logits", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError):
            bake(model, None, added(model), tmp_path / "out", force=True)
    assert all(torch.equal(value, old[name]) for name, value in stored(tmp_path / "out").items())
    bake(model, None, added(model), tmp_path / "out", force=True)
    assert not all(torch.equal(value, old[name]) for name, value in stored(tmp_path / "out").items())
    assert left_in(tmp_path) == ["out"]
    itself = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ModelError, match="the model itself lies there"):
        bake(itself, None, added(model), tmp_path / "out", force=True)


KILLED = """
import sys, time
from pathlib import Path
from steerkit.export import baking
from tests.families import build
from tests.export.test_baking import added

def hangs(*_):
    print("here", flush=True)
    time.sleep(60)

if sys.argv[2] == "hang":
    baking._loaded_logits = hangs
baking.bake(build("gpt2"), None, added(build("gpt2")), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_what_a_killed_process_leaves_the_next_one_clears(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    with subprocess.Popen([*command, "hang"], stdout=subprocess.PIPE, cwd=ROOT) as dying:
        assert dying.stdout is not None
        assert dying.stdout.readline() == b"here\n"
        during = left_in(tmp_path)
        assert len(during) == 1
        assert during[0].startswith(".out.steerkit-")
        bake(build("gpt2"), None, added(build("gpt2")), tmp_path / "out")
        assert left_in(tmp_path) == [*during, "out"], "another process at work is left alone"
        dying.send_signal(signal.SIGKILL)
    assert left_in(tmp_path) == [*during, "out"]
    bake(build("gpt2"), None, added(build("gpt2")), tmp_path / "out", force=True)
    assert left_in(tmp_path) == ["out"]


def test_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []

    def interrupted(*_: Any) -> None:
        there.extend(left_in(tmp_path))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(baking, "_loaded_logits", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            bake(build("gpt2"), None, added(build("gpt2")), tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(there) == 1
    assert left_in(tmp_path) == []


# the card and the command


def test_the_card_says_what_was_baked_and_how_near_it_is(tmp_path: Path) -> None:
    model = build("llama")
    vector = added(model, scope="response", suggested_strength=0.7).at(scope="all")
    baked = bake(model, byte_tokenizer(CHATML), vector, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert baked.verification.sentence() in card
    for text in (
        "library_name: transformers",
        'from_pretrained("out")',
        f"digest `{vector.digest[:16]}`",
        "| strength | 0.7 |",
        "measured with its own scope",
        "`model.layers.2.mlp.down_proj.bias`",
        "`mlp_bias=True`",
        "| new biases | 12, of which 11 are zero |",
    ):
        assert text in card, text


def test_the_command(cli: Cli, here: Path, tiny: Path) -> None:
    ended = cli("bake", "--vector", "v.safetensors", "--model", tiny, "--out", "out")
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "--scope all" in ended.err
    words = ("bake", "--vector", "v.safetensors", "--model", tiny, "--scope", "all", "--strength", 2, "--out", "out")
    ended = cli(*words)
    assert (ended.code, ended.err) == (0, "")
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "mlp_bias=True" in ended.out
    model = tf.AutoModelForCausalLM.from_pretrained(tiny)
    wanted = hooked(model, SteeringVector.load("v.safetensors").at(scope="all"), 2.0)
    assert gap(logits(loaded(Path("out"))), wanted) < 1e-5
    assert cli(*words).code == 1
    assert "is there already" in cli(*words).err
    assert cli(*words, "--strength", 3).code == 2


def test_the_command_answers_in_json(answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    words = ("--vector", "v.safetensors", "--model", tiny, "--scope", "all", "--dtype", "bfloat16", "--out", "out")
    found = answer("bake", *words)
    assert (found["folder"], found["vector"], found["new_biases"]) == ("out", "v.safetensors", 12)
    assert (found["precision"], found["config"]) == ("bfloat16", {"mlp_bias": True})
    assert 0 < found["relative_at_the_median_token"] < 4 * found["one_rounding_there"]
    assert loaded(Path("out")).dtype == torch.bfloat16


@pytest.mark.slow  # half a gigabyte; tiny models of all families are baked every time
@pytest.mark.embedded
def test_the_embedded_model(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = embedded
    vector = SteeringVector.load(ROOT / "vectors/smollm2-135m/optimism-caa.safetensors").at(scope="all")
    baked = bake(model, tokenizer, vector, tmp_path / "out")
    assert baked.verification.holds
    assert baked.verification.agree == baked.verification.tokens == 192
    assert baked.verification.effect > 0.1
    suggested = vector.suggested_strength
    assert suggested is not None
    baked_model = loaded(tmp_path / "out")  # in a process of its own above, with a smaller model
    assert generated(baked_model, tokenizer) == generated_with_hooks(model, tokenizer, vector, suggested)
