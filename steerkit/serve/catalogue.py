"""`Catalogue`: which vectors requests may name. No name of a request is ever taken for a path."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerkit._support.shipped import named_file
from steerkit._support.shipped import vectors as shipped
from steerkit.composition.terms import Composition
from steerkit.errors import CompositionError
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Catalogue"]


class Catalogue:
    """Vectors by the name that requests use.

    Args:
        known: vectors in memory, by name; they come first.
        allowed: files of vectors, or names of shipped ones; a file is named without its folder and its ending.
        model: alias of the model; the vectors shipped for it are all allowed.

    Raises:
        CompositionError: two vectors of one name.
        SteerError: a file that is no vector.
    """

    def __init__(
        self, known: Mapping[str, SteeringVector] | None = None, allowed: Sequence[str] = (), model: str = ""
    ) -> None:
        self._loaded: dict[str, SteeringVector] = {}
        self._lock = threading.Lock()
        self._files: dict[str, Path] = {
            name.partition("/")[2]: path for name, path in shipped().items() if name.partition("/")[0] == model
        }
        given: dict[str, SteeringVector] = dict(known or {})
        for one in allowed:
            name = Path(one).stem if one.endswith(".safetensors") else one
            if name in given:
                raise CompositionError(f"two vectors are called {name!r}; rename one of the files")
            given[name] = SteeringVector.load(one)
        self._loaded.update(given)

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._loaded, *self._files})

    def vector(self, name: str) -> SteeringVector:
        """A vector by its name; a shipped one is read when it is first asked for.

        Args:
            name: of a request.

        Raises:
            UnknownNameError: nothing is called so.
        """
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = SteeringVector.load(named_file(name, self._files, also=self._loaded))
            return self._loaded[name]

    def vectors(self, steering: Composition | str) -> list[SteeringVector]:
        """The vectors of a composition, each as it is applied.

        Args:
            steering: a composition or its text.

        Raises:
            SteerError: a composition that is none, a name that is not allowed, or a term that its vector cannot do.
        """
        found = Composition.parse(steering)
        return found.vectors({name: self.vector(name) for term in found.terms for name in term.names})
