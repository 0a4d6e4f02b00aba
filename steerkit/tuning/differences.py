"""What finetuning has changed, tensor by tensor: between two checkpoints, and between state dicts.

Every difference is float32. Only floating-point tensors count; integers and flags are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from steerkit.errors import ModelError
from steerkit.monitor.checkpoints import Checkpoint

__all__ = ["CheckpointDifference", "Difference", "StateDifference"]


class Difference(Protocol):
    """Differences of some tensors, which are computed when they are asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of what differs."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Name to why a tensor, or a part of it, does not count."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a difference, float32.

        Args:
            name: one of `shapes`.
            start: the first row.
            stop: the row behind the last.

        Returns:
            [stop - start, ...]; of a tensor without dimensions [1].
        """


@dataclass(frozen=True, eq=False)
class CheckpointDifference:
    """Finetuned minus base, read from the disk as it is asked for.

    Args:
        base: the model as it was.
        tuned: the same architecture, finetuned.

    Raises:
        ModelError: they share no tensor, or one has another shape in more than the number of its rows.
    """

    base: Checkpoint
    tuned: Checkpoint
    shapes: Mapping[str, tuple[int, ...]] = field(init=False)
    left_out: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        shapes, left_out = dict[str, tuple[int, ...]](), dict[str, str]()
        for name in dict.fromkeys([*self.base.files, *self.tuned.files]):
            lacking = next((one.name for one in (self.base, self.tuned) if name not in one), None)
            if lacking is not None:
                left_out[name] = f"{lacking} lacks it"
                continue
            dtypes = [one.files[name].entries[name].dtype for one in (self.base, self.tuned)]
            if not all(dtype.is_floating_point for dtype in dtypes):
                left_out[name] = "its numbers are no floating-point numbers"
                continue
            old, new = self.base.shape(name), self.tuned.shape(name)
            if old != new:
                if len(old) < 2 or old[1:] != new[1:]:
                    raise ModelError(
                        f"{name} is {list(old)} in {self.base.name} and {list(new)} in {self.tuned.name}; give a model "
                        "and what was finetuned from it"
                    )
                left_out[name] = f"only the rows that both have count: {list(old)} became {list(new)}"
            shapes[name] = (min(old[0], new[0]), *old[1:]) if old else ()
        if not shapes:
            raise ModelError(f"{self.tuned.name} has no tensor of {self.base.name}; give its own base model")
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "left_out", left_out)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Difference`; [stop - start, ...]."""
        parts = []
        for one in (self.tuned, self.base):
            file = one.files[name]
            parts.append((file.rows(name, start, stop) if self.shapes[name] else file.read(name).reshape(1)).float())
        return parts[0].sub_(parts[1])


class StateDifference:
    """Finetuned minus base of state dicts, computed when it is made and kept in memory.

    Args:
        base: name to tensor of any shape, of the model as it was; tensors that are one count once.
        tuned: the same, finetuned.

    Raises:
        ModelError: they share no floating-point tensor, or one has another shape.
    """

    def __init__(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
        # Computed now: what is in memory may have other values by the time that it is asked for.
        self._parts: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        seen: dict[tuple[Any, ...], str] = {}
        for name in dict.fromkeys([*base, *tuned]):
            if name not in base or name not in tuned:
                self.left_out[name] = f"the {'base' if name not in base else 'finetuned model'} lacks it"
                continue
            old, new = base[name].detach(), tuned[name].detach()
            if not (old.is_floating_point() and new.is_floating_point()):
                self.left_out[name] = "its numbers are no floating-point numbers"
                continue
            place = tuple((one.data_ptr(), one.shape, one.stride(), one.device) for one in (old, new))
            if old.numel() and place in seen:
                self.left_out[name] = f"is {seen[place]}, which counts once"
                continue
            seen[place] = name
            if old.shape != new.shape:
                raise ModelError(
                    f"{name} is {list(old.shape)} before and {list(new.shape)} after; give its own base model"
                )
            self._parts[name] = new.to("cpu", torch.float32, copy=True).sub_(old.to("cpu", torch.float32))
        if not self._parts:
            raise ModelError("the two state dicts share no floating-point tensor; give a model and what it was made of")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape of what differs."""
        return {name: tuple(part.shape) for name, part in self._parts.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Difference`; [stop - start, ...]."""
        part = self._parts[name]
        return part[start:stop] if part.dim() else part.reshape(1)
