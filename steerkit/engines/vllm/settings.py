"""`Settings`: what whoever starts vLLM decides, in its `additional_config` under ``"steerkit"``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from steerkit.errors import CompositionError, near_miss

__all__ = ["KINDS", "Settings"]

KINDS = ("resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True)
class Settings:
    """What is decided when vLLM starts.

    Attributes:
        folder: whose vector files requests name, without ending, before shipped vectors; None has shipped ones only. No
            request names a path, in a program neither.
        hub: whether requests may name vectors on the Hub.
        default: composition of requests that name none.
        kinds: kinds of sites that can be written, at every block; each costs a little in every step.
        levels: vectors that may write one site for one request, one after the other.
        terms: vectors of one request.
        vectors: that are steered with at one time, each at every block, before room has to be made in slower steps.

    Raises:
        CompositionError: an unknown kind, or a number below 1.
    """

    folder: str | None = None
    hub: bool = False
    default: str | None = None
    kinds: tuple[str, ...] = ("resid_post",)
    levels: int = 2
    terms: int = 8
    vectors: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        for kind in self.kinds:
            if kind not in KINDS:
                raise CompositionError(f"steerkit: unknown kind {kind!r}; {near_miss(kind, KINDS)}")
        for name in ("levels", "terms", "vectors"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CompositionError(f"steerkit: {name} {value!r}; give a whole number of at least 1")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise CompositionError(f"steerkit: folder {self.folder!r} is none")

    @classmethod
    def of(cls, config: Any) -> Settings:
        """The settings in vLLM's `additional_config`.

        Args:
            config: the mapping; anything else has none.

        Raises:
            CompositionError: a key that is none, or a value that cannot be.
        """
        given = config.get("steerkit", {}) if isinstance(config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise CompositionError(f"steerkit: got {given!r}; give an object such as {{'levels': 2}}")
        known = [entry.name for entry in fields(cls)]
        for name in given:
            if name not in known:
                raise CompositionError(f"steerkit: unknown setting {name!r}; {near_miss(str(name), known)}")
        return cls(**given)
