"""`load_model`: an alias, a hub id, a folder or a .gguf file in; a model ready to steer and its tokenizer out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from steerkit.errors import ModelError, SteerError, unknown_name
from steerkit.model.aliases import ALIASES, embedded_gguf
from steerkit.model.conversion import from_cache
from steerkit.model.placement import options_of
from steerkit.model.pretrained import first_line, from_folder, from_gguf, load
from steerkit.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_model"]


def load_model(
    name: str | Path = "smollm2-135m",
    *,
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: Literal["4bit", "8bit"] | str | None = None,
    attn: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        name: an alias (`smollm2-135m`, the embedded default), a hub name (`org/name` or `name`), a folder that
            `save_pretrained` wrote, or a .gguf file.
        device: what it is put on, such as ``"cuda:1"`` or ``"cpu"``; None takes the accelerator that is there (CUDA,
            MPS, XPU), else the CPU.
        device_map: how it is spread over several devices, passed on to `from_pretrained`, such as ``"auto"``; in the
            place of `device`.
        dtype: of the weights; None takes float32 for .gguf files and the checkpoint's own elsewhere.
        quantize: make the weights of linear layers smaller while they are loaded, by bitsandbytes.
        attn: how attention is computed, such as ``"eager"`` or ``"sdpa"``; None leaves it to transformers.
        revision: branch, tag or commit of a hub repository; None takes its newest.
        trust_remote_code: run the Python files that come with the model; without it they are never run.
        cache_dir: where a converted or downloaded model is kept; None takes `$STEERKIT_CACHE`,
            `$XDG_CACHE_HOME/steerkit` or `~/.cache/steerkit` for converted ones, and the hub's own for downloads.

    Returns:
        The model and its tokenizer.

    Raises:
        UnknownNameError: `name` is no alias, folder or file, and the hub does not know it.
        ModelError: what it names cannot be loaded like this; the message says what to do.

    Example:
        model, tokenizer = steerkit.load_model()
    """
    name = str(name)
    options = options_of(device=device, device_map=device_map, dtype=dtype, quantize=quantize, attn=attn)
    if trust_remote_code:
        options["trust_remote_code"] = True
    path = Path(name).expanduser()
    if name in ALIASES:
        gguf = embedded_gguf(ALIASES[name])
        if gguf is None:
            return _from_hub(ALIASES[name].hub_id, options, revision, cache_dir, asked=name)
        _refuse_revision(name, revision)
        return from_cache(name, gguf, options, cache_dir)
    if path.suffix.lower() == ".gguf":
        _refuse_revision(name, revision)
        return from_gguf(path, options)
    if path.is_dir():
        _refuse_revision(name, revision)
        return from_folder(path, options)
    if path.exists():
        raise ModelError(f"{name}: is no model; give a folder with a config.json, a .gguf file or a hub id (org/name)")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such folder; give a folder with a config.json, or a hub id (org/name)")
    if "/" in name:
        return _from_hub(name, options, revision, cache_dir)
    error = unknown_name("model", name, ALIASES)
    raise type(error)(f"{error} (a hub id such as org/name, a folder or a .gguf file is taken too)")


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"{name}: revision {revision!r} means something for hub ids only; leave it out")


def _from_hub(
    hub_id: str,
    options: Mapping[str, Any],
    revision: str | None,
    cache_dir: str | Path | None,
    *,
    asked: str | None = None,
) -> tuple[Any, Any]:
    """Load from the hub or its cache.

    Raises:
        ModelError: neither has it, or it cannot be loaded.
    """
    from transformers import AutoConfig

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    where = {key: value for key, value in where.items() if value is not None}
    embedded = ALIASES["smollm2-135m"]
    try:
        with quiet():
            # Alone and first: the hub's client retries for 20 s per file, and everything else asks for several.
            allowed = options.get("trust_remote_code", False)
            AutoConfig.from_pretrained(hub_id, trust_remote_code=allowed, **where)
        return load(hub_id, {**options, **where})
    except SteerError:
        raise
    except Exception as error:
        if asked is None:
            ways = (
                f"check the name and the network, give a local folder, or take the embedded model ({embedded.install})"
            )
        else:
            ways = f"either {ALIASES[asked].install}, or connect to the network so that {hub_id} can be downloaded"
        raise ModelError(f"{asked or hub_id}: cannot be loaded ({first_line(error)}); {ways}") from error
