"""Where what is shipped lies, recipes to dictionaries: beside the package in a checkout, inside it once installed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from steerkit._support.hub import PREFIX, HubName, fetched
from steerkit.errors import UnknownNameError, near_miss, unknown_name

__all__ = [
    "dictionaries",
    "dictionary_path",
    "named_file",
    "recipe_path",
    "recipes",
    "shipped_vectors",
    "trait_path",
    "traits",
    "vector_names",
    "vector_path",
    "vectors",
]


_NAME = re.compile(r"[\w-]+(/[\w-]+)?")  # with a dot it is a file
_EMBEDDED = "smollm2-135m"


def _folder(name: str) -> Path:
    package = Path(__file__).resolve().parent.parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def _exists(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.exists()
    except OSError:
        return False


def recipes() -> dict[str, Path]:
    """The shipped recipes, name to file, sorted."""
    return {path.stem: path for path in sorted(_folder("recipes").glob("*.toml"))}


def vectors() -> dict[str, Path]:
    """The shipped vectors, ``model/name`` to file, sorted."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(_folder("vectors").glob("*/*.safetensors"))}


def shipped_vectors(model: str | None = None) -> list[str]:
    """The names of the vectors that come with steerkit, sorted; `SteeringVector.load` reads one by its name.

    Args:
        model: alias of a model, such as ``smollm2-135m``, to list its vectors only.

    Returns:
        Names such as ``"smollm2-135m/optimism-caa"``. The part behind the slash is enough for one of the model in use,
        or, where none is said, of the embedded model.

    Example:
        >>> "smollm2-135m/optimism-caa" in shipped_vectors()
        True
    """
    return [name for name in vectors() if model is None or name.partition("/")[0] == model]


def dictionaries() -> dict[str, Path]:
    """The shipped dictionaries, ``model/site`` to file, sorted."""
    found = sorted(_folder("dictionaries").glob("*/*.safetensors"))
    return {f"{path.parent.name}/{path.stem}": path for path in found}


def dictionary_path(name: str | Path) -> Path:
    """Find a dictionary by its path or its shipped name.

    Args:
        name: a file or folder, or a name such as ``smollm2-135m/resid_post.14``.
    """
    shipped = dictionaries()
    return shipped[str(name)] if str(name) in shipped and not _exists(Path(name)) else Path(name)


def traits() -> dict[str, Path]:
    """The shipped trait specifications, name to file, sorted."""
    return {path.stem: path for path in sorted(_folder("recipes").glob("traits/*.toml"))}


def trait_path(name: str | Path) -> Path:
    """Find a trait specification by its path or its shipped name.

    Args:
        name: a .toml or .json file, or a name such as ``optimistic``.

    Raises:
        UnknownNameError: neither a file nor a shipped trait.
    """
    path = Path(name)
    if path.suffix in (".toml", ".json"):
        return path
    if str(name) not in traits():
        raise unknown_name("trait", str(name), traits())
    return traits()[str(name)]


def recipe_path(name: str) -> Path:
    """Find a recipe by its path or its shipped name.

    Args:
        name: a .toml file, or a name such as ``optimism-caa``.

    Raises:
        UnknownNameError: neither a file nor a shipped recipe.
    """
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    if name not in recipes():
        raise unknown_name("recipe", name, recipes())
    return recipes()[name]


def vector_path(name: str, model: str = "") -> Path:
    """Find a vector by its path, its shipped name, or its name on the Hub, from which it is then downloaded.

    Args:
        name: a file, or a name such as ``optimism-caa``, ``smollm2-135m/optimism-caa`` or ``hub:user/repository``.
        model: alias of the model in use, whose vectors come first; then come those of the embedded model.

    Raises:
        UnknownNameError: neither a file nor a shipped vector.
        VectorFileError: nothing of that name can be had from the Hub.
    """
    if name.startswith(PREFIX):
        return fetched(HubName.parse(name))
    path = Path(name)
    if path.suffix == ".safetensors" or not _NAME.fullmatch(name) or _exists(path):
        return path
    return named_file(name, vector_names(model))


def vector_names(model: str = "") -> dict[str, Path]:
    """The shipped vectors by each of their names, ``model/name`` and ``name``.

    Args:
        model: alias of the model in use, whose vectors have the short names; then come those of the embedded model.
    """
    shipped = vectors()

    def last(key: str) -> tuple[bool, bool]:
        owner = key.partition("/")[0]
        return owner != model, owner != _EMBEDDED

    short = {key.partition("/")[2]: shipped[key] for key in reversed(sorted(shipped, key=last))}
    return {**shipped, **short}


def named_file(name: str, files: Mapping[str, Path], also: Iterable[str] = ()) -> Path:
    """The file that a name stands for: one of those given, and never a path, whatever the name looks like.

    Args:
        name: such as a request's.
        files: by name.
        also: further names that an error offers.

    Raises:
        UnknownNameError: nothing is called so.
    """
    if name in files:
        return files[name]
    short = {one for one in (*files, *also) if "/" not in one}
    if _NAME.fullmatch(name):
        raise unknown_name("vector", name, short)
    raise UnknownNameError(
        f"unknown vector {name!r}; a request names vectors, and no files: whoever starts the server gives it the files "
        f"that have names; {near_miss(name, short)}"
    )
