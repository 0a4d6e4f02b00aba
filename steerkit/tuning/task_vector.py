"""`TaskVector`: what finetuning has added to the weights, as something to add, take away and combine.

    tau = theta_tuned - theta_base,    theta = theta_base + scale * tau

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi (2023), "Editing Models with Task Arithmetic",
arXiv 2212.04089; one coefficient for each tensor: Zhang, Albert, Rodriguez-Opazo, van den Hengel, Abbasnejad (2024),
"Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", arXiv 2407.02880. Where this file departs:
differences are float32, those on the disk are read when they are needed, tensors that are one count once, integers and
flags are left alone, and what a file lacks is told.

    negation       -tau                    forgets
    addition       tau_1 + tau_2           does both
    analogy        c + (b - a)             A is to B as C is to what is wanted
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerkit.errors import ModelError, StrengthError
from steerkit.monitor.adapters import ADAPTER, AdapterDifference
from steerkit.monitor.checkpoints import Checkpoint
from steerkit.network.decoder import inner_model
from steerkit.tuning.differences import CheckpointDifference, Difference, StateDifference

__all__ = ["Source", "TaskVector", "Term"]

Source = str | Path | nn.Module | Mapping[str, Tensor]
"""A checkpoint (folder, file, alias, name on the hub), a model, or a state dict."""


@dataclass(frozen=True, eq=False)
class Term:
    """One difference, with what it is multiplied by.

    Attributes:
        difference: of some tensors.
        scale: of all of them.
        by_name: of single ones beside that; those that are not named have 1.
    """

    difference: Difference
    scale: float = 1.0
    by_name: Mapping[str, float] = field(default_factory=dict)

    def factor(self, name: str) -> float:
        """What a tensor's difference is multiplied by.

        Args:
            name: of the tensor.
        """
        return self.scale * self.by_name.get(name, 1.0)


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A weighted sum of differences of weights. Differences on the disk stay there until they are needed.

    Attributes:
        terms: the differences.

    Example:
        tau = TaskVector.between("base", "polite") - 0.5 * TaskVector.between("base", "rude-lora")
    """

    terms: tuple[Term, ...]

    @classmethod
    def between(cls, base: Source, tuned: Source) -> TaskVector:
        """What finetuning has changed.

        Args:
            base: the model as it was.
            tuned: finetuned: of the same kind, or the folder of a LoRA, for which `base` may be anything.

        Raises:
            ModelError: a checkpoint cannot be read, the two share nothing or differ in shape, or one is on the disk and
                the other in memory.
        """
        if isinstance(tuned, str | Path) and (Path(tuned) / ADAPTER).is_file():
            return cls((Term(AdapterDifference(Path(tuned))),))
        if isinstance(base, str | Path) and isinstance(tuned, str | Path):
            return cls((Term(CheckpointDifference(Checkpoint.of(str(base)), Checkpoint.of(str(tuned)))),))
        if isinstance(base, str | Path) or isinstance(tuned, str | Path):
            raise ModelError("task vector: one of the two is on the disk and the other in memory; give both alike")
        return cls((Term(StateDifference(_state(base), _state(tuned))),))

    def __add__(self, other: TaskVector) -> TaskVector:
        return TaskVector((*self.terms, *other.terms))

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        if not math.isfinite(factor):
            raise StrengthError(f"task vector: the factor is {factor}; give a finite number")
        return TaskVector(tuple(replace(term, scale=term.scale * factor) for term in self.terms))

    __rmul__ = __mul__

    def weighted(self, coefficients: Mapping[str, float]) -> TaskVector:
        """The same with a coefficient for each tensor, such as `learn_coefficients` gives.

        Args:
            coefficients: name to factor; tensors that are not named keep 1.

        Raises:
            StrengthError: a coefficient is not finite.
            ModelError: it names a tensor that does not differ.
        """
        shapes = self.shapes
        for name, value in coefficients.items():
            if name not in shapes:
                raise ModelError(
                    f"task vector: {name} does not differ, so it has no coefficient; give one of {len(shapes)}"
                )
            if not math.isfinite(value):
                raise StrengthError(f"task vector: the coefficient of {name} is {value}; give a finite number")
        return TaskVector(
            tuple(
                replace(
                    term,
                    by_name={
                        name: term.by_name.get(name, 1.0) * coefficients.get(name, 1.0)
                        for name in term.difference.shapes
                    },
                )
                for term in self.terms
            )
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every tensor that differs."""
        return {name: shape for term in self.terms for name, shape in term.difference.shapes.items()}

    @property
    def left_out(self) -> dict[str, str]:
        """Name to why a tensor, or a part of it, does not count."""
        return {name: why for term in self.terms for name, why in term.difference.left_out.items()}

    def touches(self, name: str) -> bool:
        """Whether a tensor changes.

        Args:
            name: of the tensor.
        """
        return any(term.factor(name) != 0.0 for term in self._terms_of(name))

    def rows(self, name: str, old: Tensor, start: int) -> Tensor:
        """Rows of a tensor with the differences added.

        Args:
            name: of the tensor.
            old: [k, ...] float32, the rows as they are; a tensor without dimensions is [1].
            start: the first of them.

        Returns:
            [k, ...] float32.

        Raises:
            ModelError: the tensor has another width there.
        """
        made = old.clone()
        for term in self._terms_of(name):
            factor = term.factor(name)
            if factor == 0.0:
                continue
            shape = term.difference.shapes[name]
            stop = min(start + len(old), shape[0]) if shape else 1
            if shape[1:] != tuple(old.shape[1:]):
                raise ModelError(f"{name} has rows of {list(old.shape[1:])} and differs in ones of {list(shape[1:])}")
            if stop > start:
                rows = term.difference.rows(name, start, stop).to(old.device)
                made[: stop - start].add_(rows, alpha=factor)
        return made

    def difference(self, name: str) -> Tensor:
        """The whole difference of a tensor.

        Args:
            name: of the tensor.

        Returns:
            [...] float32, on the CPU.

        Raises:
            ModelError: the differences are of several shapes.
        """
        shape = self.shapes[name]
        zero = torch.zeros(shape or (1,), dtype=torch.float32)
        return self.rows(name, zero, 0).reshape(shape)

    def norms(self) -> dict[str, float]:
        """Name to the Frobenius norm of its difference; each is computed and forgotten."""
        return {name: float(torch.linalg.vector_norm(self.difference(name))) for name in self.shapes}

    def _terms_of(self, name: str) -> Iterator[Term]:
        return (term for term in self.terms if name in term.difference.shapes)


def _state(source: Any) -> Mapping[str, Tensor]:
    """The state dict of a model without its wrapper, or what is one already."""
    if isinstance(source, nn.Module):
        return dict(inner_model(source).state_dict())
    return dict(source)
