"""What a scorer is: a class that turns a trial into numbers, one per item, so that intervals exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from steerkit._support.plugins import Configured
from steerkit.evaluate.trial import Answer, Trial

if TYPE_CHECKING:
    from steerkit.evaluate.setup import Setup
    from steerkit.prompts.rendering import Rendered

__all__ = ["Column", "Differentiable", "Scorer", "Weighted"]


class Column(NamedTuple):
    """One figure that a scorer gives.

    Attributes:
        title: a few words, for tables and pictures.
        unit: what the numbers count in.
        better: which way is better, where one is.
        scale: on the `log` scale values are logarithms: means are shown as exp(mean), changes as ratios.
        share: whether items are yes-or-no scores (0 or 1); None takes them for such where all of them are 0 or 1.
        neutral: the value that says that steering changed nothing, where the scorer compares with the unsteered model.
        worst: what an item counts that could be scored without steering and not with it, such as an empty answer; None
            where no number is bad enough: the interval then has no end at the bad side.
        steered: whether steering means to move it: up at strengths above the neutral one, down at those below. Then the
            share of items that move the other way is told.
    """

    title: str
    unit: str
    better: Literal["higher", "lower", "neither"] = "neither"
    scale: Literal["linear", "log"] = "linear"
    share: bool | None = None
    neutral: float = 0.0
    worst: float | None = None
    steered: bool = False


class Weighted(NamedTuple):
    """Values of items that do not all count alike.

    Attributes:
        values: [n].
        weights: [n], such as the items' tokens.
    """

    values: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Scorer(Configured):
    """Base of all scorers. The dataclass fields of a subclass are its settings.

    A user's own scorer is such a class; `steerkit.evaluate.measure` takes it as it is.

    Class attributes:
        name: what it is called on the command line; the file's name.
        title: one line on what it says.
        source: the paper, where there is one.
        columns: the figures it gives. The first is the one meant by the scorer's name alone.
        by_item: the items of the data are scored one by one from answers that the model is shown, so that a part of
            them costs a part of the passes.
        of_pairs: both answers to each prompt are scored, so other data is refused before anything is fitted for it.
        against_baseline: the numbers already compare with the unsteered model (such as KL), so that it is not
            scored beside it.

    Example:
        >>> import torch
        >>> class Shouting(Scorer):
        ...     name, title = "shouting", "share of capital letters"
        ...     columns = {"shouting": Column("capitals", "share of characters")}
        ...     def score(self, trial):
        ...         return {"shouting": torch.tensor([sum(map(str.isupper, t)) / max(len(t), 1) for t in trial.texts])}
    """

    title: ClassVar[str]
    source: ClassVar[str] = ""
    columns: ClassVar[Mapping[str, Column]]
    by_item: ClassVar[bool] = False
    of_pairs: ClassVar[bool] = False
    against_baseline: ClassVar[bool] = False

    def worst(self, column: str) -> float | None:
        """What an item counts that could be scored without steering and not with it; see `Column.worst`.

        Args:
            column: one of `columns`.
        """
        return self.columns[column].worst

    def check(self, setup: Setup) -> None:
        """Refuse data that lacks what the scorer needs, before anything is fitted for it.

        Args:
            setup: where the items stand.

        Raises:
            DataError: items are no pairs of answers, where pairs are scored.
        """
        if self.of_pairs:
            _ = setup.pairs

    def score(self, trial: Trial) -> Mapping[str, Tensor | Weighted]:
        """Score every item.

        Args:
            trial: the model under steering, or the baseline, and its items.

        Returns:
            For each of `columns` [n] numbers; nan where an item could not be scored. The items are the same, in the
            same order, for every trial of one setup.
        """
        raise NotImplementedError


@runtime_checkable
class Differentiable(Protocol):
    """A scorer whose first column is a fixed sum of what it says of single texts, so that gradients go through it."""

    def texts(self, setup: Setup) -> Sequence[Rendered]:
        """The texts with answers that are scored.

        Raises:
            DataError: the data lacks what the scorer needs.
        """

    def of_text(self, answer: Answer) -> Tensor:
        """[] what is said of one text, float32, with gradients to `answer.logits`."""

    def of_items(self, values: Tensor) -> Tensor:
        """The items' scores [..., n] from what is said of the texts [..., t]; linear in these."""
