"""Where a model is put and in which form, and every mistake one can make about it, told in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import steerkit
from steerkit.errors import ModelError, RecipeError
from steerkit.model import describe, placement
from steerkit.recipe import Recipe
from tests.program import PAIRS, RECIPE, Cli, jsonl

NONE = {"device": None, "device_map": None, "dtype": None, "quantize": None, "attn": None}


def options(**asked: Any) -> dict[str, Any]:
    return placement.options_of(**{**NONE, **asked})


def refused(run: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is told to transformers ------------------------------------------------------------------------------------


def test_the_accelerator_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options() == options(device="cpu") == {}
    monkeypatch.setattr(placement, "devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    assert (
        options() == options(device="cuda") == options(device=torch.device("cuda:0")) == {"device_map": {"": "cuda:0"}}
    )
    assert options(device="cuda:1") == {"device_map": {"": "cuda:1"}}
    assert options(device="cpu") == {}
    assert options(device_map="auto") == {"device_map": "auto"}
    monkeypatch.setattr(placement, "devices", lambda: ["mps", "cpu"])
    assert options() == {"device_map": {"": "mps"}}


def test_devices_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    assert placement.devices() == ["cuda:0", "cuda:1", "cpu"]
    assert placement.accelerator() == "cuda:0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement.accelerator() == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto", torch.bfloat16])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_model_is_loaded_as_asked(dtype: Any, attn: str, tiny: Path) -> None:
    model, tokenizer = steerkit.load_model(tiny, device="cpu", dtype=dtype, attn=attn)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert (model.dtype, model.device.type, model.config._attn_implementation) == (wanted, "cpu", attn)
    assert describe(model) == f"on cpu, {str(wanted).removeprefix('torch.')}"
    assert steerkit.generate(model, tokenizer, ["Hello"], max_new_tokens=2)


def test_a_map_spreads_a_model(tiny: Path) -> None:
    assert describe(steerkit.load_model(tiny, device_map="auto")[0]) == "on cpu, float32"
    spread = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    spread |= {f"model.layers.{block}": "cpu" if block < 2 else "meta" for block in range(4)}
    model, _ = steerkit.load_model(tiny, device="cpu")
    model.hf_device_map = {**spread, "model.layers.1": 1}
    assert describe(model) == "on cpu, cuda:1, meta, float32"


def test_code_runs_only_where_it_is_allowed(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "steerkit_own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'steerkit_own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "own" in refused(lambda: steerkit.load_model(folder, device="cpu"))
    assert not (tmp_path / "modules").exists()
    model, _ = steerkit.load_model(folder, device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "Own"


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device": "cuda:7"}, "device 'cuda:7': this machine has cpu; give one of them, or leave it out"),
        ({"device": "gpu"}, "device 'gpu': this machine has cpu"),
        ({"device": "cpu", "device_map": "auto"}, "one device or a map over several; give one of them"),
        ({"dtype": "bfloat"}, "dtype 'bfloat': no such precision; did you mean 'bfloat16'"),
        ({"dtype": "int8"}, "dtype 'int8': no such precision"),
        ({"dtype": "load"}, "dtype 'load': no such precision"),
        ({"quantize": "3bit"}, "quantize '3bit': there are 4bit and 8bit"),
        ({"attn": "flash"}, "attn 'flash': no such attention; there are: eager, flash_attention_2"),
        ({"attn": "kernels-community/flash-attn"}, "no such attention"),
    ],
    ids=str,
)
def test_what_does_not_exist(asked: dict[str, Any], said: str, tiny: Path) -> None:
    assert said in refused(lambda: steerkit.load_model(tiny, **asked))


def test_a_precision_that_the_device_lacks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*_shape: int, dtype: Any, device: str) -> None:
        raise TypeError(f"BFloat16 is not supported on {device.upper()}\nmore")

    monkeypatch.setattr(placement, "devices", lambda: ["mps", "cpu"])
    monkeypatch.setattr(torch, "ones", ones)
    assert refused(lambda: steerkit.load_model(tiny, dtype="bfloat16")) == (
        "dtype 'bfloat16': mps does not compute in it (BFloat16 is not supported on MPS); give float32, or another "
        "device"
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"), MemoryError()])
def test_a_model_that_does_not_fit(error: Exception, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    said = refused(lambda: steerkit.load_model(tiny))
    assert "does not fit into memory" in said
    assert "load it with dtype bfloat16, quantize 4bit, device_map auto, or on another device" in said


def test_an_attention_that_is_not_installed_is_told(tiny: Path) -> None:
    said = refused(lambda: steerkit.load_model(tiny, attn="flash_attention_2"))
    assert "flash" in said.lower() and "leave attn_implementation out" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('device = "cpu"\ndevice_map = "auto"', "one device or a map over several"),
        ('dtype = "float8"', "dtype 'float8': no such precision"),
        ('quantize = "2bit"', "quantize '2bit'"),
        ("quantize = 4", "a text is wanted"),
        ('trust_remote_code = "yes"', "true or false is wanted"),
        ('devise = "cpu"', "unknown key 'devise'; did you mean 'device'"),
    ],
)
def test_a_recipe_s_mistake_names_its_key(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "joy.jsonl").write_text(jsonl(PAIRS))
    file = tmp_path / "joy-caa.toml"
    file.write_text(RECIPE.format(model="x").replace("[data]", f"{line}\n[data]"))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_s_options_reach_the_model_and_the_file(cli: Cli, here: Path, tiny: Path) -> None:
    recipe = Path("joy-caa.toml").read_text().replace("[data]", 'dtype = "bfloat16"\nattn = "eager"\n[data]')
    Path("joy-caa.toml").write_text(recipe)
    ended = cli("extract", "joy-caa.toml")
    assert ended.code == 0, ended.err
    assert f"--model {tiny} --dtype bfloat16 --attn eager" in ended.out
    made = steerkit.SteeringVector.load("joy-caa.safetensors")
    assert made.extra["recipe"]["model"] == {"name": str(tiny), "dtype": "bfloat16", "attn": "eager"}


def test_the_command_line_says_it_in_one_line_too(cli: Cli, here: Path, tiny: Path) -> None:
    words = ("generate", "Hello", "--model", tiny)
    assert cli(*words, "--device", "cuda:7").err.startswith("error: device 'cuda:7': this machine has cpu;")
    assert cli(*words, "--device", "cpu", "--device-map", "auto").err.startswith("error: device 'cpu' with device_map")
    assert cli(*words, "--dtype", "float8").code == 2
