"""Adapters: what peft loads does what the hooks do, and scales, switches off and merges as adapters do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import steerkit
from steerkit.errors import ModelError, ScopeError, SiteError, StrengthError, VectorMismatchError
from steerkit.export import adapter_files, adapter_parts
from steerkit.export import peft as exporting
from steerkit.export.adapter_files import loaded_adapter, write_files
from steerkit.export.adapter_parts import AdapterParts, parts_for
from steerkit.export.peft import write_adapter
from steerkit.export.range_finder import low_rank
from steerkit.maths.directions import orthonormalise
from steerkit.methods.selective import SelectiveSteering
from steerkit.vector.steering_vector import SteeringVector
from tests import tolerances
from tests.export.test_baking import added, gap, hooked, left_in, logits
from tests.families import build
from tests.methods import test_ablation
from tests.program import Cli
from tests.rotations import planted
from tests.tiny_tokenizers import CHATML, byte_tokenizer

# Whether the layer has a bias into which the addition can be merged.
ADDED = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": False,
    "phi3": False,
    "gpt2": True,
    "gpt_neox": True,
    "opt": True,
    "falcon": False,
    "falcon_new": False,
    "bloom": True,
    "cohere": False,
    "gpt_oss": True,
}
# Whether the embeddings are stored whole, beside biases or because they are called in a way of their own.
ABLATED = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": False,
    "phi3": False,
    "gpt2": True,
    "gpt_neox": True,
    "opt": True,
    "falcon": False,
    "falcon_new": False,
    "mixtral": False,
    "qwen3_moe": False,
    "cohere": False,
}
ROTATED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "gemma3_vlm",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "bloom",
    "cohere",
)
TIED = ("gpt2", "opt", "falcon", "falcon_new", "cohere")


@pytest.fixture(autouse=True)
def _peft_talks() -> Iterator[None]:
    """peft warns of what merging would do, and asks for an attribute that transformers 5 renames."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def adapted(model: nn.Module, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, str(folder)).eval()


def check(family: str, vector: SteeringVector, strength: float, tmp_path: Path) -> tuple[Any, Any]:
    """Written, loaded by peft onto another copy of the model, equal to the hooks; off, it is the model bit for bit."""
    model = build(family)
    baseline, wanted = logits(model), hooked(model, vector, strength)
    adapter = write_adapter(model, None, vector, tmp_path / "out", strength=strength)
    assert torch.equal(logits(model), baseline), "the model is as it was"
    loaded = adapted(build(family), tmp_path / "out")
    assert gap(logits(loaded), wanted) < tolerances.of_family(family)
    assert gap(wanted, baseline) > 0.1
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), baseline)
    return adapter, loaded


@pytest.mark.parametrize("family", ADDED)
def test_an_addition(family: str, tmp_path: Path) -> None:
    adapter, loaded = check(family, added(build(family)), 0.7, tmp_path)
    assert adapter.rank == 1
    assert adapter.merges == ADDED[family]
    with_adapter = logits(loaded)
    if adapter.merges:
        assert gap(logits(loaded.merge_and_unload()), with_adapter) < tolerances.of_family(family)
    else:
        with pytest.raises(RuntimeError, match="no bias"):
            loaded.merge_and_unload()


@pytest.mark.parametrize("family", ABLATED)
def test_removal_at_every_write(family: str, tmp_path: Path) -> None:
    """A tied head stays as it is without being untied, as long as nothing is merged."""
    vector = test_ablation.vector_for(build(family), writes="every", untie=True)
    adapter, loaded = check(family, vector, 1.0, tmp_path)
    assert adapter.rank == 1
    assert bool(adapter.whole) == ABLATED[family]
    if family not in TIED:
        with_adapter = logits(loaded)
        assert gap(logits(loaded.merge_and_unload()), with_adapter) < tolerances.of_family(family)


@pytest.mark.parametrize("family", ROTATED)
def test_selective_rotation(family: str, tmp_path: Path) -> None:
    adapter, loaded = check(family, planted(build(family), SelectiveSteering()), 40.0, tmp_path)
    assert (adapter.rank, adapter.merges, adapter.whole) == (2, True, ())
    with_adapter = logits(loaded)
    merged = loaded.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    assert gap(logits(merged), with_adapter) < tolerances.of_family(family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_scale_is_a_dial_for_the_strength(family: str, tmp_path: Path) -> None:
    model = build(family)
    vector = added(model)
    write_adapter(model, None, vector, tmp_path / "out", strength=2.0)
    loaded = adapted(build(family), tmp_path / "out")
    for scale in (0.5, 0.0, -1.0):
        for module in loaded.modules():
            if hasattr(module, "scale_layer"):
                module.set_scale("default", scale)
        assert gap(logits(loaded), hooked(model, vector, 2 * scale)) < tolerances.of_family(family)


def test_several_vectors_have_as_many_ranks(tmp_path: Path) -> None:
    model = build("llama")
    drawn = orthonormalise(test_ablation.draw(2, 32))
    one, two = (test_ablation.vector_for(model, direction=direction, writes="every") for direction in drawn)
    with steerkit.steer(model, [one, two]):
        wanted = logits(model)
    adapter = write_adapter(model, None, [one, two], tmp_path / "out")
    assert adapter.rank == 2
    assert gap(logits(adapted(build("llama"), tmp_path / "out")), wanted) < 1e-5
    mixed = [added(model, strength=0.5), planted(model, SelectiveSteering()).at(strength=30.0)]
    with steerkit.steer(model, mixed):
        wanted = logits(model)
    assert write_adapter(model, None, mixed, tmp_path / "mixed").rank == 2
    assert gap(logits(adapted(build("llama"), tmp_path / "mixed")), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_low_precision(family: str, tmp_path: Path) -> None:
    model = build(family).bfloat16()
    vector = test_ablation.vector_for(model, writes="every", untie=True)
    adapter = write_adapter(model, None, vector, tmp_path / "out")
    assert adapter.verification.typical < 2 * adapter.verification.rounding
    content = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.dtype for value in content.values()} == {torch.float32}


def test_transformers_loads_it_too(tmp_path: Path) -> None:
    model = build("llama")
    vector = planted(model, SelectiveSteering())
    wanted = hooked(model, vector, 40.0)
    write_adapter(model, None, vector, tmp_path / "out", strength=40.0)
    model.load_adapter(str(tmp_path / "out"))
    assert gap(logits(model), wanted) < 1e-5


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    for family in ("gpt2", "mixtral", "llama"):
        model = build(family)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        attributes, modules = set(vars(model)), [(name, id(module)) for name, module in model.named_modules()]
        model.lm_head.weight.requires_grad_(False)
        needs = {name: value.requires_grad for name, value in model.named_parameters()}
        write_adapter(model, None, test_ablation.vector_for(model, writes="every", untie=True), tmp_path / family)
        after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], value) for name, value in state.items())
        assert set(vars(model)) == attributes
        assert [(name, id(module)) for name, module in model.named_modules()] == modules
        assert {name: value.requires_grad for name, value in model.named_parameters()} == needs


# taking a change apart


@pytest.mark.parametrize("shape", [(40, 30), (3, 40, 30), (30, 200), (9, 5)])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_low_rank_finds_the_rank_and_the_factors(shape: tuple[int, ...], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(*shape[:-1], rank, generator=generator)
    right = torch.randn(*shape[:-2], rank, shape[-1], generator=generator)
    weight = torch.randn(*shape, generator=generator)
    change = (weight + left @ right) - weight
    found_left, found_right = low_rank(change, 10.0)
    assert found_left.shape == (*shape[:-1], rank)
    assert found_right.shape == (*shape[:-2], rank, shape[-1])
    assert float((found_left @ found_right - left @ right).abs().max()) < 2e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_training_is_compared_without_dropout_and_stays_in_training(family: str, tmp_path: Path) -> None:
    model = build(family).train()
    next(model.children()).eval()
    flags = [module.training for module in model.modules()]
    assert True in flags and False in flags
    assert write_adapter(model, None, added(model), tmp_path / "half").verification.holds
    assert [module.training for module in model.modules()] == flags
    model.train()
    write_adapter(model, None, added(model), tmp_path / "out")
    assert all(module.training for module in model.modules())


def test_low_rank_refuses_a_change_of_full_rank() -> None:
    with pytest.raises(StrengthError, match="above 256"):
        low_rank(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)), 4.0)


# what peft cannot express, and failures


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", "no adapter for experts and biases in one"),
        ("mamba", "peft refuses this adapter"),
        ("gemma2", "norms what `self_attn` gives"),
    ],
)
def test_what_peft_cannot_express_is_refused(family: str, reason: str, tmp_path: Path) -> None:
    model = build(family)
    before = logits(model)
    with pytest.raises(SiteError, match=reason):
        write_adapter(model, None, test_ablation.vector_for(model, writes="every", untie=True), tmp_path / "out")
    assert left_in(tmp_path) == []
    assert torch.equal(logits(model), before)


def test_a_layer_that_bears_the_name_of_a_stack_of_experts_is_adapted(tmp_path: Path) -> None:
    """peft takes a module of that name for the experts, and leaves the module out; as a parameter it is adapted."""
    model = build("qwen3_next")
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    along, gate = test_ablation.draw(32), test_ablation.draw(24)
    parts = parts_for(model, {name: lambda old: None if old is None else old + torch.outer(along, gate)})
    assert list(parts.stacks) == [name] and not parts.linear
    (tmp_path / "out").mkdir()
    write_files(model, parts, tmp_path / "out")
    changed = build("qwen3_next")
    with torch.no_grad():
        changed.get_parameter(name).add_(torch.outer(along, gate))
    assert gap(logits(adapted(model, tmp_path / "out")), logits(changed)) < 1e-5
    left_out = AdapterParts(linear={name.removesuffix(".weight"): (along[:, None], gate[None])})
    (tmp_path / "other").mkdir()
    other = build("qwen3_next")
    write_files(other, left_out, tmp_path / "other")
    with (
        pytest.raises(SiteError, match=r"peft (leaves out|refuses).*bake it"),
        loaded_adapter(other, left_out, tmp_path / "other"),
    ):
        pass


def test_wrong_models_and_vectors_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(VectorMismatchError, match="cannot steer LlamaForCausalLM"):
        write_adapter(model, None, added(model, num_layers=9), tmp_path / "out")
    with pytest.raises(ScopeError, match="made for 'response'"):
        write_adapter(model, None, added(model, scope="response"), tmp_path / "out")
    with pytest.raises(ModelError, match="merge or unload"):
        write_adapter(build("llama_peft"), None, added(model), tmp_path / "out")
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="is offloaded"):
        write_adapter(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("step", ["_tensors", "logits_of", "weights_card"])
def test_nothing_stays_behind(step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before, modules = logits(model), [id(module) for module in model.modules()]

    def fails(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(adapter_files if step == "_tensors" else exporting, step, fails)
    with pytest.raises(ModelError if isinstance(error, OSError) else KeyboardInterrupt):
        write_adapter(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []
    assert [id(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), before)


def test_an_adapter_that_differs_is_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = build("llama"), adapter_files._tensors

    def off(*args: Any) -> dict[str, Tensor]:
        return {name: 1.001 * value for name, value in real(*args).items()}

    monkeypatch.setattr(adapter_files, "_tensors", off)
    with pytest.raises(ModelError, match="not those of the hooks"):
        write_adapter(model, None, added(model), tmp_path / "out")
    assert left_in(tmp_path) == []


def test_what_stands_there_stays_unless_forced(tmp_path: Path) -> None:
    model = build("llama")
    write_adapter(model, None, added(model), tmp_path / "out")
    with pytest.raises(ModelError, match="is there already"):
        write_adapter(model, None, added(model), tmp_path / "out")
    write_adapter(model, None, added(model), tmp_path / "out", force=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelError, match="not replaced"):
        write_adapter(model, None, added(model), tmp_path / "mine", force=True)
    assert left_in(tmp_path) == ["mine", "out"]


def test_the_card_and_the_config(tmp_path: Path) -> None:
    model = build("gpt2")
    adapter = write_adapter(model, byte_tokenizer(CHATML), added(model), tmp_path / "out", strength=0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert adapter.verification.sentence() in card
    for text in (
        "library_name: peft",
        'PeftModel.from_pretrained(model, "out")',
        "| strength | 0.5 |",
        "| merges | yes |",
    ):
        assert text in card, text
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"], config["lora_bias"]) == (1, 1, True, True)
    assert config["target_modules"] == ["transformer.h.2.mlp.c_proj"]


def test_the_command(cli: Cli, answer: Callable[..., Any], here: Path, tiny: Path) -> None:
    words = ("export", "--to", "peft", "--vector", "v.safetensors", "--model", tiny, "--out", "lora")
    ended = cli(*words)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert "--scope all" in ended.err
    ended = cli(*words, "--scope", "all")
    assert (ended.code, ended.err) == (0, "")
    assert max(map(len, ended.out.splitlines())) <= 80
    replace(SteeringVector.load("v.safetensors"), suggested_strength=None).save("w.safetensors")
    found = answer(*words, "--vector", "w.safetensors", "--strength", 2, "--strength", 1, "--scope", "all", "--force")
    assert (found["format"], found["rank"], found["merges"]) == ("peft", 1, False)
    assert found["vector"] == ["v.safetensors", "w.safetensors"]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    wanted = hooked(model, SteeringVector.load("v.safetensors").at(scope="all"), 3.0)
    assert gap(logits(adapted(model, Path("lora"))), wanted) < 1e-5
    assert cli("export", "--to", "peft").code == 2
    assert cli(*words, "--strength", 1, "--strength", 2).code == 2
    assert cli("export", "v.safetensors", "--vector", "w.safetensors", "--to", "gguf").code == 2


def test_without_peft_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"steerkit-hf\[peft\]"):
        write_adapter(build("llama"), None, added(build("llama")), tmp_path / "out")


class Packed(nn.Linear):
    """A layer that keeps whole numbers and a scale."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features, bias=False)
        self.weight = nn.Parameter((old.weight.detach() * 64).round().to(torch.int8), requires_grad=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(h, self.weight.to(h) / 64)


def test_a_quantised_weight_counts_as_its_layer_acts() -> None:
    model: Any = build("llama")
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Packed(mlp.down_proj)
    found = adapter_parts._values(model, "model.layers.0.mlp.down_proj.weight")
    assert found is not None
    assert torch.equal(found, mlp.down_proj.weight.float() / 64)


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = embedded
    folder = Path(__file__).resolve().parents[2] / "vectors/smollm2-135m"
    vectors = [
        SteeringVector.load(folder / f"{name}-caa.safetensors").at(scope="all") for name in ("optimism", "warmth")
    ]
    adapter = write_adapter(model, tokenizer, vectors, tmp_path / "out")
    assert adapter.verification.holds
    assert adapter.verification.agree == adapter.verification.tokens
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
