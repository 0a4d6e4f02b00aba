"""Telling the formats of dictionaries apart by what lies there, and reading each by its own file."""

from __future__ import annotations

from pathlib import Path

from steerkit._support.shipped import dictionaries, dictionary_path
from steerkit.dictionary import gemma_scope, llama_scope, saelens, sparsify
from steerkit.dictionary.dictionary import Dictionary
from steerkit.errors import VectorFileError
from steerkit.network.sites import Site

__all__ = ["load_dictionary"]

_FORMATS = (
    "a folder of SAELens, sparsify or Llama Scope, a params.npz of Gemma Scope, or a .safetensors file that steerkit "
    "saved"
)


def load_dictionary(path: str | Path, *, site: Site | str | None = None) -> Dictionary:
    """Read a dictionary of any known format. Nothing is fetched, unpickled or run.

    Args:
        path: a file that steerkit saved, a `params.npz` of Gemma Scope or its folder, or a folder of Llama Scope,
            SAELens (`cfg.json`, `sae_weights.safetensors`) or sparsify (`cfg.json`, `sae.safetensors`); or the name of
            a shipped one, such as ``smollm2-135m/resid_post.14``.
        site: where it belongs, where neither the files nor their folders' names say so, or say something else.

    Raises:
        VectorFileError: nothing of that kind is there, it is damaged, its format is not read, or its site is unknown.
        SiteError: `site` is none.

    Example:
        >>> load_dictionary("nowhere.safetensors")
        Traceback (most recent call last):
        ...
        steerkit.errors.VectorFileError: nowhere.safetensors: no such file or folder; give a folder of SAELens, ...
    """
    path = dictionary_path(path)
    place = None if site is None else Site.of(site)
    if not path.exists():
        raise VectorFileError(
            f"{path}: no such file or folder; give {_FORMATS}, or a shipped name: {', '.join(dictionaries())}"
        )
    if path.is_dir():
        return _of_folder(path, place)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"):
        raise VectorFileError(
            f"{path}: a pickle, which can run code and is never read; load it where you trust it, and save what it "
            "holds with steerkit.dictionary.Dictionary(...).save, or with SAELens's save_model"
        )
    if path.suffix == ".npz":
        return gemma_scope.read(path, place)
    if path.suffix == ".safetensors":
        beside = path.parent
        if (
            path.name == saelens.WEIGHTS
            or path.name == sparsify.WEIGHTS
            or (beside.parent / llama_scope.CONFIG).is_file()
        ):
            return _of_folder(beside.parent if (beside.parent / llama_scope.CONFIG).is_file() else beside, place)
        found = Dictionary.load(path)
        return found if place is None else found.at_site(place)
    raise VectorFileError(f"{path}: no dictionary of a known format; give {_FORMATS}")


def _of_folder(path: Path, site: Site | None) -> Dictionary:
    """Read the dictionary whose files lie in a folder.

    Raises:
        VectorFileError: none does, or several do.
    """
    if (path / saelens.WEIGHTS).is_file():
        return saelens.read(path, site)
    if (path / sparsify.WEIGHTS).is_file():
        return sparsify.read(path, site)
    if (path / llama_scope.CONFIG).is_file():
        return llama_scope.read(path, site)
    if (path / gemma_scope.WEIGHTS).is_file():
        return gemma_scope.read(path / gemma_scope.WEIGHTS, site)
    inner = sorted(one.name for one in path.iterdir() if one.is_dir())
    if inner and any((path / one / name).is_file() for one in inner for name in (saelens.WEIGHTS, sparsify.WEIGHTS)):
        raise VectorFileError(f"{path}: holds several dictionaries ({', '.join(inner[:4])}); give one of its folders")
    raise VectorFileError(f"{path}: no dictionary of a known format lies there; give {_FORMATS}")
