"""GGUF files, converted once into the cache folder.

Reading one takes long (20 s for the embedded model, which is 4-bit GGUF inside a PyPI package), so each is converted
once and loaded from there in about a tenth of that. What counts is its content: a copy under the same name is the same
file, another content is converted too. The conversion happens in a temporary folder that takes its place in one step,
under a lock that the operating system frees when its owner dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steerkit.errors import ModelError, SteerError
from steerkit.model.aliases import ALIASES
from steerkit.model.pretrained import first_line, from_folder, from_gguf, gguf_precision, load, parsed_once
from steerkit.model.quiet import quiet
from steerkit.model.weights import SOURCE

__all__ = ["converted", "from_cache"]

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Part of the cache's key; it grows when converted folders of older versions must not be used any more."""
SIZES = "sizes.json"


def from_cache(
    name: str,
    pieces: Sequence[Path],
    options: Mapping[str, Any],
    cache_dir: str | Path | None,
    *,
    sha256: str = "",
) -> tuple[Any, Any]:
    """Load a converted .gguf file, converting it where that was not done or the result is damaged.

    Args:
        name: of the model: an alias, or what a file is called.
        pieces: the file it comes from, in one piece or in several.
        options: of `from_pretrained`; without a dtype the weights are float32.
        cache_dir: as for `load_model`.
        sha256: of the whole file, where it is known.

    Returns:
        The model and its tokenizer.

    Raises:
        ModelError: it cannot be converted, or `options` do not fit it.
    """
    options = {"dtype": torch.float32, **options}
    folder = converted(name, pieces, cache_dir, sha256=sha256)
    found = _identity(folder)
    try:
        return load(str(folder), {**options, "local_files_only": True})
    except SteerError:
        raise
    except Exception as error:
        if _is_loadable(folder):
            raise ModelError(f"{name}: cannot be loaded like this ({first_line(error)}); check {options}") from error
    logger.warning("the converted model in %s is damaged; converting it anew", folder)
    return from_folder(converted(name, pieces, cache_dir, sha256=sha256, damaged=found), options)


def _is_loadable(folder: Path) -> bool:
    """Whether the plainest way of loading works, so that a failure lies with what was asked for."""
    try:
        from_folder(folder, {"dtype": torch.float32})
    except ModelError:
        return False
    return True


def converted(
    name: str,
    pieces: Sequence[Path],
    cache_dir: str | Path | None = None,
    *,
    sha256: str = "",
    damaged: tuple[int, int] | None = None,
) -> Path:
    """The folder with the converted model, made where it is missing.

    Args:
        name: of the model, which becomes the name of its folder.
        pieces: the file it comes from.
        cache_dir: as for `load_model`.
        sha256: of the whole file, where it is known.
        damaged: the identity of a folder that must not be used.

    Returns:
        A folder as `save_pretrained` writes it.

    Raises:
        ModelError: it cannot be converted, or the cache cannot be written.
    """
    import filelock

    cache, source = _cache_folder(cache_dir), f"{pieces[0].name.partition('.gguf')[0]}.gguf"
    key = f"{source.removesuffix('.gguf')}-{_content(pieces)}-{CACHE_FORMAT}"
    target = cache / (key if name in ALIASES else f"file-{key}")
    folder = target / name
    if damaged is None and _is_whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / f"{target.name}.lock"):
            if _is_whole(folder) and _identity(folder) != damaged:
                return folder  # another process was faster
            shutil.rmtree(target, ignore_errors=True)
            for leftover in cache.glob(f".{target.name}.*"):  # of a process that was killed; the lock says it is gone
                shutil.rmtree(leftover, ignore_errors=True)
            partial = cache / f".{target.name}.{secrets.token_hex(8)}"
            try:
                gguf = pieces[0] if len(pieces) == 1 else _joined(pieces, partial / source, sha256)
                _convert(gguf, partial / name)
                if len(pieces) > 1:
                    gguf.unlink()
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except SteerError:
        raise
    except Exception as error:
        room = sum(piece.stat().st_size for piece in pieces) * 8 / 1e9
        raise ModelError(
            f"{name}: cannot be converted into {cache} ({first_line(error)}); set STEERKIT_CACHE to a folder with "
            f"{room:.1f} GB free that can be written"
        ) from error
    return folder


def _content(pieces: Sequence[Path]) -> str:
    """What tells the content of a file: two versions of a model have files of the same name and size."""
    size = code = 0
    for piece in pieces:
        with piece.open("rb") as file:
            while block := file.read(1 << 20):
                size, code = size + len(block), zlib.crc32(block, code)
    return f"{size}-{code:08x}"


def _joined(pieces: Sequence[Path], target: Path, sha256: str) -> Path:
    """The whole file, made of its pieces.

    Raises:
        ModelError: it is not the file that it should be.
    """
    target.parent.mkdir(parents=True)
    with target.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
    with target.open("rb") as whole:
        if hashlib.file_digest(whole, "sha256").hexdigest() != sha256:
            raise ModelError(f"{target.name}: is not what it should be once its pieces are joined; install them again")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write a .gguf file as float32 in the format of `save_pretrained`."""
    logger.info("converting %s once, into a form that loads fast", gguf.name)
    with parsed_once():
        model, tokenizer = from_gguf(gguf)
        source = {"file": gguf.name, "quantisation": gguf_precision(gguf)}
    folder.mkdir(parents=True)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder.parent / SOURCE).write_text(json.dumps(source), encoding="utf-8")
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
