"""Task vectors: arithmetic on checkpoints, state dicts and adapters; into a model and out of it, bit for bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steerkit.errors import ModelError, StrengthError
from steerkit.network.decoder import inner_model
from steerkit.tuning import TaskVector, added
from tests.families import build
from tests.tuning.pairs import finetuned, logits


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in inner_model(model).state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_added_once_it_is_the_finetuned_model_and_afterwards_the_base_again() -> None:
    base = build("llama")
    tuned = finetuned(base)
    before, wanted = state(base), state(tuned)
    vector = TaskVector.between(base, tuned)
    with added(base, vector):
        assert torch.equal(vector.difference("lm_head.weight"), wanted["lm_head.weight"] - before["lm_head.weight"])
        for name, value in base.state_dict().items():
            largest = torch.maximum(before[name].abs(), wanted[name].abs())
            assert bool(((value - wanted[name]).abs() <= torch.finfo(torch.float32).eps * largest).all()), name
    assert same(state(base), before)


def test_in_bfloat16_it_is_the_finetuned_model_exactly() -> None:
    base = build("llama").to(torch.bfloat16)
    tuned = finetuned(base)
    vector, wanted = TaskVector.between(base, tuned), state(tuned)
    with added(base, vector):
        shares = [float((value == wanted[name]).double().mean()) for name, value in base.state_dict().items()]
    assert min(shares) == 1.0


def test_at_0_and_with_its_negation_nothing_changes() -> None:
    base = build("llama")
    vector, before = TaskVector.between(base, finetuned(base)), state(base)
    with added(base, vector, 0.0):
        assert same(state(base), before)
    with added(base, vector + -vector):
        for name, value in base.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    with pytest.raises(KeyError), added(base, vector):
        raise KeyError
    assert same(state(base), before)


def test_sums_are_free_of_order_and_analogies_hold() -> None:
    base = build("llama")
    a, b, c = (TaskVector.between(base, finetuned(base, seed=seed)) for seed in (1, 2, 3))
    for name in c.shapes:
        assert torch.equal((a + b).difference(name), (b + a).difference(name))
        torch.testing.assert_close((c + (a - a)).difference(name), c.difference(name), rtol=0, atol=1e-6)
        by_hand = c.difference(name) + b.difference(name) - a.difference(name)
        torch.testing.assert_close((c + (b - a)).difference(name), by_hand, rtol=0, atol=1e-6)
        assert torch.equal((0.5 * a).difference(name), a.difference(name) * 0.5)
    half = a.weighted({name: 0.5 for name in a.shapes if "layers.2" in name})
    assert half.norms()["model.norm.weight"] == a.norms()["model.norm.weight"]
    name = "model.layers.2.mlp.up_proj.weight"
    assert half.norms()[name] == pytest.approx(a.norms()[name] / 2)


def test_tied_weights_count_once_and_stay_one() -> None:
    import transformers

    config = build("llama").config
    config.tie_word_embeddings = True
    base = transformers.LlamaForCausalLM(config).eval()
    tuned = finetuned(base)
    vector = TaskVector.between(base, tuned)
    assert "lm_head.weight" not in vector.shapes
    assert "counts once" in vector.left_out["lm_head.weight"]
    before = logits(base)
    with added(base, vector):
        assert base.lm_head.weight is base.model.embed_tokens.weight
        torch.testing.assert_close(logits(base), logits(tuned), rtol=0, atol=1e-4)
    assert torch.equal(logits(base), before)


def test_integers_and_flags_are_left_alone_and_what_is_missing_is_told() -> None:
    kinds = {"flag": torch.tensor([True]), "steps": torch.tensor([3]), "small": torch.tensor([200], dtype=torch.uint8)}
    weight = torch.tensor([1e-9], dtype=torch.float32)
    base = {"w": weight, "gone": torch.ones(1, dtype=torch.float32), **kinds}
    tuned = {
        "w": 2 * weight,
        "new": torch.ones(1, dtype=torch.float32),
        **{name: one + 1 for name, one in kinds.items()},
    }
    vector = TaskVector.between(base, tuned)
    assert list(vector.shapes) == ["w"]
    assert float(vector.difference("w")) == float(weight)  # float16 would make it 0
    assert vector.left_out["gone"] == "the finetuned model lacks it"
    assert vector.left_out["new"] == "the base lacks it"
    assert {name for name, why in vector.left_out.items() if "floating" in why} == set(kinds)


def test_checkpoints_are_read_in_whatever_files_they_are(tmp_path: Path) -> None:
    base = build("llama")
    tuned = finetuned(base)
    whole, parts = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned", max_shard_size="20KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    found, wanted = TaskVector.between(whole, str(parts)), TaskVector.between(base, tuned)
    assert found.shapes == wanted.shapes
    for name in found.shapes:
        assert torch.equal(found.difference(name), wanted.difference(name))


def test_new_rows_of_embeddings_are_left_out_and_told(tmp_path: Path) -> None:
    base = build("llama")
    tuned = finetuned(base)
    saved(base, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.resize_token_embeddings(330)
    vector = TaskVector.between(tmp_path / "base", saved(tuned, tmp_path / "tuned"))
    assert vector.shapes["model.embed_tokens.weight"] == (320, 32)
    assert vector.left_out["model.embed_tokens.weight"].endswith("[320, 32] became [330, 32]")


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("llama", ["q_proj", "down_proj"], {"alpha_pattern": {"down_proj": 3}, "rank_pattern": {"q_proj": 2}}),
        ("llama", ["v_proj"], {"use_rslora": True}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
    ],
)
def test_an_adapter_is_the_product_of_its_matrices(tmp_path: Path, family: str, targets: Any, options: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = build(family).eval()
    before = state(base)
    torch.manual_seed(0)
    how = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(base), how)
        saved(adapted, tmp_path / "lora")
        merged = adapted.merge_and_unload()
    vector = TaskVector.between(base, tmp_path / "lora")
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert set(vector.shapes) == changed
    for name in changed:
        torch.testing.assert_close(vector.difference(name), merged.state_dict()[name] - before[name], rtol=0, atol=1e-5)
    with added(base, vector, 0.5), added_nowhere(base, vector):
        pass
    assert same(state(base), before)


class added_nowhere:
    """A second context on the same model is refused."""

    def __init__(self, model: Any, vector: TaskVector) -> None:
        self._context = added(model, vector)

    def __enter__(self) -> None:
        with pytest.raises(ModelError, match="edited already"):
            self._context.__enter__()

    def __exit__(self, *_: object) -> None:
        return None


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    base = build("llama")
    vector = TaskVector.between(base, finetuned(base))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(StrengthError, match="finite"):
            vector * bad
        with pytest.raises(StrengthError, match="finite"), added(base, vector, bad):
            pass
        with pytest.raises(StrengthError, match="finite"):
            vector.weighted({"lm_head.weight": bad})
    with pytest.raises(ModelError, match="does not differ"):
        vector.weighted({"nothing": 1.0})
    with pytest.raises(ModelError, match="GPT2LMHeadModel has not"), added(build("gpt2"), vector):
        pass
    other = {name: value for name, value in base.state_dict().items()} | {"lm_head.weight": torch.zeros(3, 3)}
    with pytest.raises(ModelError, match="before and"):
        TaskVector.between(base, other)
    with pytest.raises(ModelError, match="share no"):
        TaskVector.between({"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    with pytest.raises(ModelError, match="on the disk and the other in memory"):
        TaskVector.between(base, tmp_path)


def test_more_than_a_plain_lora_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    refused: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["lm_head"]}, "save"),
    ]
    for number, (options, said) in enumerate(refused):
        folder = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved(get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"], **options)), folder)
        with pytest.raises(ModelError, match=f"{said}.* is more than a plain LoRA"):
            TaskVector.between("base", folder)
    weights = load_file(tmp_path / "0" / "adapter_model.safetensors")
    save_file(weights, tmp_path / "3" / "adapter_model.safetensors")
    (tmp_path / "3" / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    with pytest.raises(ModelError, match="is no part of a plain LoRA"):
        TaskVector.between("base", tmp_path / "3")
