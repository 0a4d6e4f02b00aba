"""The embedded model, converted once into the cache folder.

It is a 4-bit GGUF inside a PyPI package. Reading one takes about 20 s, so it is converted once and loaded from there
in about 2 s. The conversion happens in a temporary folder that takes its place in one step, under a lock that the
operating system frees when its owner dies.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steerkit.errors import ModelError, SteerError
from steerkit.model.pretrained import first_line, from_folder, from_gguf, load
from steerkit.model.quiet import quiet

__all__ = ["from_cache"]

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
"""Part of the cache's key; it grows when converted folders of older versions must not be used any more."""
SIZES = "sizes.json"


def from_cache(alias: str, gguf: Path, options: Mapping[str, Any], cache_dir: str | Path | None) -> tuple[Any, Any]:
    """Load the converted embedded model, converting it where that was not done or the result is damaged.

    Args:
        alias: the name of the model.
        gguf: the file it comes from.
        options: of `from_pretrained`; without a dtype the weights are float32.
        cache_dir: as for `load_model`.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: it cannot be converted, or `options` do not fit it.
    """
    options = {"dtype": torch.float32, **options}
    folder = _converted(alias, gguf, cache_dir)
    found = _identity(folder)
    try:
        return load(str(folder), {**options, "local_files_only": True})
    except SteerError:
        raise
    except Exception as error:
        if _is_loadable(folder):
            raise ModelError(f"{alias}: cannot be loaded like this ({first_line(error)}); check {options}") from error
    logger.warning("the converted model in %s is damaged; converting it anew", folder)
    return from_folder(_converted(alias, gguf, cache_dir, damaged=found), options)


def _is_loadable(folder: Path) -> bool:
    """Whether the plainest way of loading works, so that a failure lies with what was asked for."""
    try:
        from_folder(folder, {"dtype": torch.float32})
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
            f"{alias}: cannot be converted into {cache} ({first_line(error)}); set STEERKIT_CACHE to a folder with "
            "600 MB free that can be written"
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write a .gguf file as float32 in the format of `save_pretrained`."""
    logger.info("converting the embedded model once (about 20 s): %s", gguf.name)
    model, tokenizer = from_gguf(gguf, {})
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
