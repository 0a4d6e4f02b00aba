"""Every command on every kind of device at hand, in bfloat16: the same code on the CPU and on an accelerator."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import pytest
import torch

from steerkit.cli import app
from steerkit.persona import writers
from tests.cli.words import WORDS
from tests.program import LOADED

# A random model proves nothing, and a trait cannot be drafted by one: these may say so, by their exit code.
MAY_FAIL = {"doctor", "calibrate", "dictionary check", "find-strength", "persona draft", "persona extract"}
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WORDS)
def test_every_command_works_there(
    name: str,
    device: str,
    furnished: Path,
    tiny: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A random model never writes what is asked for, and always as much as it may.
    monkeypatch.setattr("steerkit.persona.drafting.TRIES", 1)
    monkeypatch.setattr(writers, "model_writer", functools.partial(writers.model_writer, max_new_tokens=8))
    words = [*name.split(), *map(str, WORDS[name]), "--model", str(tiny), "--device", device, "--dtype", "bfloat16"]
    with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
        warnings.simplefilter("ignore")
        app(words, prog_name="steerkit")
    err = capsys.readouterr().err
    place = "cuda:0" if device == "cuda" else device
    assert f"{LOADED}{tiny} on {place}, bfloat16\n" in err
    assert left.value.code in ((0, 1) if name in MAY_FAIL else (0,)), err
    assert "Traceback" not in err


@pytest.mark.gpu
def test_an_accelerator_is_taken_unasked(furnished: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        app(["generate", "Hello", "--max-new-tokens", "2", "--model", str(tiny)], prog_name="steerkit")
    assert left.value.code == 0
    assert f"{LOADED}{tiny} on cuda:0, float32\n" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_there(bits: str, furnished: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    words = ["generate", "Hello", "--vector", "v.safetensors", "--max-new-tokens", "2", "--model", str(tiny)]
    with pytest.raises(SystemExit) as left:
        app([*words, "--device", "cuda", "--quantize", bits], prog_name="steerkit")
    assert left.value.code == 0
    assert f", {bits[0]} bit\n" in capsys.readouterr().err


@pytest.mark.gpu
def test_memory_that_runs_out_there_is_met_by_smaller_batches(tiny: Path) -> None:
    import steerkit

    model, tokenizer = steerkit.load_model(tiny, device="cuda")
    prompts = [f"Number {number} is a fine one, is it not?" for number in range(64)]
    small = steerkit.generate(model, tokenizer, prompts, batch_size=8, max_new_tokens=4)
    free, _ = torch.cuda.mem_get_info()

    def take(_module: object, args: tuple[torch.Tensor, ...]) -> None:
        torch.empty(len(args[0]) * (free // 20), dtype=torch.uint8, device="cuda")

    handle = model.model.layers[1].register_forward_pre_hook(take)  # type: ignore[union-attr, arg-type, index]
    with pytest.warns(UserWarning, match="do not fit into memory"):
        found = steerkit.generate(model, tokenizer, prompts, batch_size=64, max_new_tokens=4)
    handle.remove()
    assert found == small
