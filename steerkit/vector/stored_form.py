"""A vector as bytes and as a file: what `SteeringVector` inherits, apart from what it is and how it is applied."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from safetensors import SafetensorError

from steerkit._support.hub import PREFIX
from steerkit._support.shipped import vector_path
from steerkit.errors import SteerError, VectorFileError
from steerkit.vector.container import BLANK_DIGEST, FORMAT, LAYER_COUNTING, REQUIRED, lay_out, signed
from steerkit.vector.container_checks import check_digest, check_readable, metadata_of
from steerkit.vector.fields import CODECS, decoded
from steerkit.vector.tensors import Tensors
from steerkit.vector.vector_files import read_vector_file, write_vector_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StoredForm"]


class StoredForm:
    """A vector's stored form.

    Attributes:
        tensors: by name, as `SteeringVector` has them.
    """

    tensors: Mapping[str, Tensor]

    @cached_property
    def digest(self) -> str:
        """What identifies the stored vector: the sha256 of its file with 64 zeros in the digest's place."""
        return hashlib.sha256(self._unsigned()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file's content; the same vector gives the same bytes.

        Raises:
            VectorFileError: text that is no Unicode, or more metadata than a header may hold.
        """
        return signed(self._unsigned())

    def _unsigned(self) -> bytes:
        metadata = {"format": str(FORMAT), "layer_counting": LAYER_COUNTING, "digest": BLANK_DIGEST}
        for name, codec in CODECS.items():
            value = getattr(self, name)
            if name in REQUIRED or name == "settings" or (value is not None and value != {}):
                metadata[name] = codec.encode(value)
        assert isinstance(self.tensors, Tensors)
        return lay_out(metadata, self.tensors.stored)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "vector") -> Self:
        """Read a file's content. Nothing in it is executed.

        Args:
            data: the bytes.
            source: what to call them in messages.

        Raises:
            VectorFileError: anything about the bytes is not as `to_bytes` left it, or they are of a newer format.
        """
        try:
            metadata = metadata_of(data)
            check_readable(metadata)
            check_digest(data, metadata["digest"])
            values = {name: decoded(name, metadata[name]) for name in CODECS if name in metadata}
            # An older file without a version must not get the present one.
            values.setdefault("steerkit_version", None)
            made: Callable[..., Self] = cls
            return made(tensors=Tensors.of_file(data), **values)
        except (SteerError, SafetensorError) as error:
            raise VectorFileError(f"{source}: {error}") from None

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; folders on the way are made.

        Args:
            path: where; a file there is replaced only when the new one is complete on the disk.

        Returns:
            The path.

        Raises:
            VectorFileError: it cannot be written there, or the vector cannot be stored.
        """
        path = Path(path)
        write_vector_file(path, self.to_bytes())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a vector file, or one of the shipped vectors by its name.

        Args:
            path: a file that `save` wrote, or a name of `steerkit.shipped_vectors()`, such as ``"optimism-caa"``; a
                file of that name comes first. ``"hub:user/repository"`` is fetched, as `from_hub` does.

        Raises:
            VectorFileError: there is no such file, or it is not exactly what `save` wrote.
            UnknownNameError: a name without an ending that nothing shipped answers to.
        """
        path = vector_path(str(path))
        data = read_vector_file(path)
        return cls.from_bytes(data, source=str(path))

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None, name: str | None = None) -> Self:
        """Read a vector from a repository of the Hugging Face Hub; a second time it comes from the Hub's cache.

        Args:
            repo: ``"user/name"``; a private one needs a login of the Hub's (`hf auth login`, or HF_TOKEN).
            revision: a branch, a tag or a commit; None takes the newest. A commit gives the same file for ever.
            name: of one of several vectors in it.

        Raises:
            VectorFileError: there is no such repository, revision or file, it is not the one that the repository lists,
                or it is not exactly what `save` wrote.
            UnknownNameError: the repository holds several vectors, or none of that name.

        Warns:
            UserWarning: a branch or a tag names another file than when it was read here last.
        """
        wanted = f"{repo}/{name}" if name is not None else repo
        return cls.load(PREFIX + wanted + (f"@{revision}" if revision is not None else ""))

    def push_to_hub(
        self,
        repo: str,
        name: str | None = None,
        *,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
    ) -> str:
        """Upload the vector to a repository of the Hugging Face Hub, which is made where it is missing.

        A repository may hold several vectors, pushed one by one under different names. Its page lists them all.

        Args:
            repo: ``"user/name"``.
            name: what the vector is called there; None calls it as the repository.
            revision: a branch that is there; None takes the main one.
            private: whether a repository that is made anew is private; None leaves that to the account.
            license: as the Hub writes it, such as ``"apache-2.0"``; None says nothing.

        Returns:
            What it can be loaded by, the commit included: ``"hub:user/name/vector@commit"``.

        Raises:
            VectorFileError: the Hub does not take it, or somebody else has changed the repository in between.
        """
        from steerkit.vector.hub_pack import push
        from steerkit.vector.steering_vector import SteeringVector

        assert isinstance(self, SteeringVector)
        return push(self, repo, name, revision=revision, private=private, license=license)
