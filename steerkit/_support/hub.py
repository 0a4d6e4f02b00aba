"""Files of vectors in repositories of the Hugging Face Hub: named, fetched once, checked, and kept in the Hub's cache.

A repository of vectors holds safetensors files at its top, each named as its vector, and `steerkit.json`, which lists
them with the sha256 of each file. Only these are ever downloaded, whatever else lies there. Nothing here is called, and
no request made, unless a name begins with `hub:` or the Hub is asked for by name.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steerkit.errors import UnknownNameError, VectorFileError, unknown_name

__all__ = ["INDEX", "INDEX_FORMAT", "PREFIX", "HubName", "fetched", "hub_error", "read_index"]

PREFIX, INDEX, INDEX_FORMAT = "hub:", "steerkit.json", 1
LARGEST_FILE, LARGEST_INDEX = 2**30, 2**20
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_PLAIN = re.compile(
    rf"(?P<user>{_PART})/(?P<repo>{_PART})(?:/(?P<name>{_PART}))?(?:@(?P<revision>[\w./-]{{1,120}}))?", re.ASCII
)
_NAME = re.compile(_PART, re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class _NoSuchFile(Exception):
    """A repository does not hold the file."""


@dataclass(frozen=True)
class HubName:
    """A vector on the Hub.

    Attributes:
        repo: its repository, `user/name`.
        name: of the vector in it; None where it holds one.
        revision: branch, tag or commit; None for the newest.
    """

    repo: str
    name: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Read the text form.

        Args:
            text: `hub:user/repository`, then `/name` of one of several vectors and `@revision`, each where wanted.

        Raises:
            VectorFileError: it is of another form.
        """
        found = _PLAIN.fullmatch(text.removeprefix(PREFIX))
        if found is None or ".." in text or "--" in text or found["repo"].endswith(".git"):
            raise VectorFileError(
                f"{text[:200]!r} names no vector on the hub; write hub:user/repository, hub:user/repository/vector or "
                "hub:user/repository@revision"
            )
        return cls(f"{found['user']}/{found['repo']}", found["name"], found["revision"])

    def __str__(self) -> str:
        name = "" if self.name is None else f"/{self.name}"
        return f"{PREFIX}{self.repo}{name}" + ("" if self.revision is None else f"@{self.revision}")


def fetched(wanted: HubName) -> Path:
    """The file of a vector on the Hub, downloaded where it is not in the Hub's cache yet.

    Args:
        wanted: which.

    Returns:
        The file in the cache. Without a network it is the one that the same name gave last.

    Raises:
        VectorFileError: there is no such repository, revision or file, one is too large, or not the one that is listed.
        UnknownNameError: the repository holds several vectors, or none of that name.

    Warns:
        UserWarning: a branch or a tag names another file than when it was read here last.
    """
    before = _cached(wanted)
    index = _index_of(wanted)
    if index is None and wanted.name is None:
        raise VectorFileError(
            f"{wanted}: has no {INDEX}, so it is no repository of steerkit's; name the file, as in {wanted.repo}/NAME"
        )
    if index is None:
        path = _downloaded(wanted, f"{wanted.name}.safetensors", LARGEST_FILE)
    else:
        listed = _listed(wanted, index)
        name = _chosen(wanted, listed)
        # Of the commit that the list is of, whatever the name means by now.
        path = _downloaded(replace(wanted, revision=index.parent.name), f"{name}.safetensors", LARGEST_FILE)
        if hashlib.sha256(path.read_bytes()).hexdigest() != listed[name]["sha256"]:
            raise VectorFileError(f"{wanted}: {path.name} is not the file that {INDEX} lists; ask its owner")
    if before is not None:
        _warn_of_move(wanted, before / path.name, path)
    return path


def _cached(wanted: HubName) -> Path | None:
    """The folder of the Hub's cache that a name meant last; None where it is new here."""
    import huggingface_hub as hub

    for file in (INDEX, f"{wanted.name}.safetensors"):
        found = hub.try_to_load_from_cache(wanted.repo, file, revision=wanted.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def read_index(repo: str, revision: str | None = None) -> dict[str, Any]:
    """What a repository says of the vectors in it.

    Args:
        repo: `user/name`.
        revision: branch, tag or commit; None for the newest.

    Returns:
        Name of each vector to its facts, `sha256` among them; nothing where the repository has no such list.

    Raises:
        VectorFileError: there is no such repository or revision, or the list is no list.
    """
    wanted = HubName(repo, None, revision)
    index = _index_of(wanted)
    return {} if index is None else _listed(wanted, index)


def _index_of(wanted: HubName) -> Path | None:
    """The list of a repository's vectors, in the folder of the commit that it is of; None where it has none."""
    try:
        return _downloaded(wanted, INDEX, LARGEST_INDEX)
    except _NoSuchFile:
        return None


def _listed(wanted: HubName, index: Path) -> dict[str, Any]:
    """What such a list says.

    Raises:
        VectorFileError: it is none.
    """
    try:
        content = json.loads(index.read_bytes())
        listed = content["vectors"]
        is_ours = content["format"] == INDEX_FORMAT and all(
            _NAME.fullmatch(name) and re.fullmatch("[0-9a-f]{64}", facts["sha256"]) for name, facts in listed.items()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise VectorFileError(f"{wanted}: its {INDEX} is no list of vectors of format {INDEX_FORMAT}; ask its owner")
    return dict(listed)


def _chosen(wanted: HubName, listed: dict[str, Any]) -> str:
    """Which of the vectors of a repository is meant.

    Raises:
        UnknownNameError: none, or one of several.
    """
    if wanted.name is not None:
        if wanted.name not in listed:
            raise unknown_name(f"vector in {wanted.repo}", wanted.name, listed)
        return wanted.name
    own = wanted.repo.partition("/")[2]
    if len(listed) != 1 and own not in listed:
        shown = ", ".join(sorted(listed)[:12]) or "none"
        raise UnknownNameError(f"{wanted}: holds {len(listed)} vectors; name one, as in {wanted.repo}/NAME: {shown}")
    return own if own in listed else next(iter(listed))


def _downloaded(wanted: HubName, file: str, most: int) -> Path:
    """One file of a repository, from the cache where the Hub cannot be reached.

    Raises:
        VectorFileError: it cannot be had.
        _NoSuchFile: the repository has no list.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

    place: dict[str, Any] = {"repo_id": wanted.repo, "filename": file, "revision": wanted.revision}
    try:
        before = hub.try_to_load_from_cache(**place)
        if isinstance(before, str) and _COMMIT.fullmatch(wanted.revision or ""):
            return Path(before)  # a commit is the same for ever
        try:
            size = hub.get_hf_file_metadata(hub.hf_hub_url(**place)).size
        except RemoteEntryNotFoundError:
            if file == INDEX:
                raise _NoSuchFile(file) from None
            raise
        except Exception as error:
            # An answer below 500 is about this repository; all else is about the network.
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return Path(hub.hf_hub_download(**place, local_files_only=True))
        if size is not None and size > most:
            raise VectorFileError(f"{wanted}: {file} is {size} bytes long (at most {most}); it is not downloaded")
        return Path(hub.hf_hub_download(**place, tqdm_class=_limited(most if size is None else size)))
    except (VectorFileError, _NoSuchFile):
        raise
    except Exception as error:  # noqa: BLE001 - several libraries raise below, with addresses and headers in their texts
        raise hub_error(wanted, error, file) from None


def _limited(size: int) -> Any:
    """A progress bar that shows nothing, and ends a download that goes on far beyond what was announced.

    The client itself refuses a file of another size, but only when all of it has come. Some of the Hub's storage counts
    what goes over the wire, which may be more than the file.
    """
    from huggingface_hub.utils import tqdm

    most = 2 * size + 2**24

    class Limited(tqdm):  # type: ignore[misc] # a class of a library without types
        came = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.came += int(n or 0)
            if self.came > most:
                raise OSError(f"{self.came} bytes came where {size} were announced")

    return Limited


def _warn_of_move(wanted: HubName, old: Path, new: Path) -> None:
    """Warn where a name gives another file than last time."""
    if old.parent.name != new.parent.name and old.exists() and old.read_bytes() != new.read_bytes():
        warnings.warn(
            f"{wanted}: {new.name} has changed since it was read here; the one before is @{old.parent.name}, this one "
            f"@{new.parent.name}",
            stacklevel=3,
        )


def hub_error(wanted: HubName, error: BaseException, file: str = "") -> VectorFileError:
    """The project's own error for what the Hub's client raised: no address, no header and no token is in it.

    Args:
        wanted: what was asked for.
        error: the client's.
        file: that was asked for.
    """
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    known: tuple[tuple[Any, str], ...] = (
        (errors.GatedRepoError, f"is gated; accept its terms on its page, and {login}"),
        (errors.RevisionNotFoundError, f"there is no revision {wanted.revision!r}; give a branch, a tag or a commit"),
        (errors.RepositoryNotFoundError, f"there is no such repository, or it is private: {login}"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached, and nothing of it is in the cache"),
        (errors.EntryNotFoundError, f"there is no {file} in it; see its page for what there is"),
        (errors.HFValidationError, "is no name of a repository; write user/repository"),
        (errors.LocalTokenNotFoundError, f"needs a token; {login}"),
    )
    for kind, text in known:
        if isinstance(error, kind):
            return VectorFileError(f"{wanted}: {text}")
    if status in (401, 403):
        return VectorFileError(f"{wanted}: is not open to you (HTTP {status}); {login} with the rights that it needs")
    if status == 412:
        return VectorFileError(f"{wanted}: it was changed by somebody else in between; push again")
    what = f"HTTP {status}" if status else type(error).__name__
    return VectorFileError(f"{wanted}: the hub did not do it ({what}); try again later")
