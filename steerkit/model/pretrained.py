"""Loading what lies on this machine: a folder that `save_pretrained` wrote, or a .gguf file."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch

from steerkit._support.memory import is_out_of_memory
from steerkit.errors import ModelError, SteerError
from steerkit.model.placement import for_checkpoint
from steerkit.model.quiet import quiet

__all__ = ["first_line", "from_folder", "from_gguf", "gguf_precision", "load", "parsed_once"]

_OF_WEIGHTS = ("dtype", "device_map", "quantization_config", "attn_implementation")


def from_folder(folder: Path, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load what `save_pretrained` wrote.

    Args:
        folder: where.
        options: of `from_pretrained`.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: there is no config.json, or the folder cannot be loaded.
    """
    if not (folder / "config.json").is_file():
        ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
        hint = f"give the file {folder / ggufs[0]}" if ggufs else "give one that save_pretrained wrote"
        raise ModelError(f"{folder}: has no config.json; {hint}")
    try:
        return load(str(folder), {**options, "local_files_only": True})
    except SteerError:
        raise
    except Exception as error:
        asked = ", ".join(name for name in _OF_WEIGHTS if name in options)
        ways = f"leave {asked} out, or save the model there again" if asked else "save the model there again"
        raise ModelError(f"{folder}: cannot be loaded ({first_line(error)}); {ways}") from error


def from_gguf(file: Path) -> tuple[Any, Any]:
    """Load a .gguf file, dequantised to float32 on the CPU.

    Args:
        file: the file.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: transformers cannot read it.
    """
    try:
        return _read_gguf(file)
    except Exception as error:
        raise ModelError(
            f"{file}: cannot be read as GGUF ({first_line(error)}); it may be damaged, or of a family transformers "
            "does not convert"
        ) from error


def gguf_precision(file: Path) -> str | None:
    """In which precision most of a .gguf file's weights are, such as ``Q4_1``; None where it does not say.

    Args:
        file: the file.
    """
    field = gguf.GGUFReader(str(file)).fields.get("general.file_type")
    try:
        return (
            None
            if field is None
            else gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        )
    except ValueError:  # newer than the library
        return None


def load(source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load model and tokenizer the way transformers does; code that comes with them runs only where options say so.

    Args:
        source: a folder or a hub id.
        options: of `from_pretrained`.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        ModelError: it does not fit into memory, or is quantised already where it is to be.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # False, not absent: absent asks the user on stdin.
    options = {"trust_remote_code": False, **options}
    places = {key: value for key, value in options.items() if key not in _OF_WEIGHTS}
    if options.get("local_files_only"):  # asked for one by one: the search for adapters does not take it over
        options["adapter_kwargs"] = {"local_files_only": True}
    with quiet():
        if "quantization_config" in options and "gguf_file" not in options:
            options = for_checkpoint(AutoConfig.from_pretrained(source, **places), source, options)
        tokenizer = AutoTokenizer.from_pretrained(source, **places)
        try:
            model = AutoModelForCausalLM.from_pretrained(source, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"{source}: does not fit into memory ({first_line(error)}); load it with dtype bfloat16, "
                "quantize 4bit, device_map auto, or on another device"
            ) from error
    return model.eval(), tokenizer


def _read_gguf(file: Path) -> tuple[Any, Any]:
    """Load from GGUF, leaving nothing behind that says the weights were quantised."""
    import transformers

    how: dict[str, Any] = {"dtype": torch.float32, "gguf_file": file.name, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x; it may keep the weights packed, which nothing here can edit
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The progress bar of the dequantisation obeys no switch.
    with contextlib.redirect_stderr(io.StringIO()), parsed_once():
        model, tokenizer = load(str(file.parent), how)
    if hasattr(model.config, "quantization_config"):  # before GgufConfig; save_pretrained takes it for quantised
        del model.config.quantization_config
    return model, tokenizer


_PARSING = threading.RLock()


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers parse a file once, where config, tokenizer and weights each do: half of the time goes there.

    Yields:
        Nothing; contexts inside of one another share what was parsed.
    """
    with _PARSING:
        parse = gguf.GGUFReader
        gguf.GGUFReader = functools.lru_cache(maxsize=1)(parse)
        try:
            yield
        finally:
            gguf.GGUFReader = parse


def first_line(error: BaseException) -> str:
    """The first sentence of somebody else's message, which may be many lines long.

    Args:
        error: theirs.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
