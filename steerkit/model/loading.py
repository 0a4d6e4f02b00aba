"""`load_model`: an alias, a hub name, a folder or a .gguf file in; a model ready to steer and its tokenizer out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from steerkit.errors import ModelError, SteerError, UnknownNameError, unknown_name
from steerkit.model.aliases import ALIASES, embedded_gguf
from steerkit.model.conversion import from_cache
from steerkit.model.placement import options_of
from steerkit.model.pretrained import first_line, from_folder, load
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
    quantize: Literal["4bit", "8bit"] | None = None,
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
        _refuse_revision(name, revision)
        embedded = ALIASES[name]
        pieces = embedded_gguf(embedded)
        if pieces:
            return from_cache(name, pieces, options, cache_dir, sha256=embedded.sha256)
        # The hub's weights of the same name are others: what was measured on the alias does not hold for them.
        way = f"`steerkit fetch {name}` shows its terms and brings it ({embedded.size} MB)"
        raise ModelError(
            f"{name}: is not here yet; {way if embedded.terms else embedded.install}. {embedded.hub_id} has other "
            "weights (not rounded to 4 bits), so it is taken under its own name only"
        )
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        _refuse_revision(name, revision)
        if not path.is_file():
            raise ModelError(f"{path}: no such file; give a .gguf file, a folder or a hub name (org/name)")
        return from_cache(path.stem, (path,), options, cache_dir)
    if path.is_dir():
        _refuse_revision(name, revision)
        return from_folder(path, options)
    if path.exists():
        raise ModelError(
            f"{name}: is no model; give a folder with a config.json, a .gguf file or a hub name (org/name)"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(f"{name}: no such folder; give a folder with a config.json, or a hub name (org/name)")
    return _from_hub(name, options, revision, cache_dir)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"{name}: revision {revision!r} means something for hub names only; leave it out")


def _from_hub(
    hub_id: str,
    options: Mapping[str, Any],
    revision: str | None,
    cache_dir: str | Path | None,
) -> tuple[Any, Any]:
    """Load from the hub or its cache.

    Raises:
        UnknownNameError: neither knows a name without an organisation, which may be a mistaken alias.
        ModelError: neither has it, or it cannot be loaded.
    """
    from transformers import AutoConfig

    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    where = {key: value for key, value in where.items() if value is not None}
    is_known = False
    try:
        if not _hub_answers(hub_id, revision):
            where["local_files_only"] = True
        with quiet():
            # Alone and first: everything else asks for several files.
            allowed = options.get("trust_remote_code", False)
            AutoConfig.from_pretrained(hub_id, trust_remote_code=allowed, **where)
        is_known = True
        return load(hub_id, {**options, **where})
    except SteerError:
        raise
    except Exception as error:
        reason = first_line(error)
        if "/" not in hub_id and not is_known:
            raise UnknownNameError(
                f"{unknown_name('model', hub_id, ALIASES)} (no alias, folder or file, nor found on the hub: {reason})"
            ) from error
        embedded = ALIASES["smollm2-135m"]
        raise ModelError(
            f"{hub_id}: cannot be loaded ({reason}); check the name and the network, give a local folder, or take the "
            f"embedded model ({embedded.install})"
        ) from error


def _hub_answers(hub_id: str, revision: str | None) -> bool:
    """Whether the hub can be reached: one request, which is not repeated where the client repeats each for 20 s.

    Without an answer what was downloaded before is taken.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json", revision=revision))
    except HfHubHTTPError:  # an answer, if only that there is no such model
        return True
    except Exception:  # noqa: BLE001 - whatever the network says, and names that are none
        return False
    return True
