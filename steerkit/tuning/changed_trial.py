"""`ChangedTrial`: a model whose weights are changed, measured by any scorer beside the model as it is.

Scorers ask a `Trial` for all they measure, and here what a trial puts around its passes is `added`. The unchanged model
runs between these passes, in the same memory: no second model is needed, and what it says is asked once for all scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from steerkit.evaluate.setup import Setup
from steerkit.evaluate.trial import Answer, Trial
from steerkit.prompts.conversation import Conversation
from steerkit.prompts.rendering import Rendered
from steerkit.tuning.adding import added
from steerkit.tuning.task_vector import TaskVector

__all__ = ["ChangedTrial", "changed"]

T = TypeVar("T")


class _Changed:
    """A change of weights that is made once, however often it is entered from inside itself.

    It stands where a steering does, so it says what one says of itself: prompts do not stay as they are, and no block.

    Args:
        change: makes the context.
    """

    leaves_prompts, untouched = False, 0

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change, self._depth, self._undo = change, 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        if self._depth == 0:
            self._undo.enter_context(self._change())
        self._depth += 1

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._undo.close()


@dataclass(frozen=True, eq=False)
class ChangedTrial(Trial):
    """A setup under a change of its model's weights, made by `changed`."""

    change: _Changed = field(kw_only=True)

    @property
    def is_baseline(self) -> bool:
        """Never: others are compared with the unchanged model."""
        return False

    @property
    def leaves_prompts(self) -> bool:
        """Never: all tokens are read by the changed weights."""
        return False

    def steering(self, prompt_lengths: Any = None) -> AbstractContextManager[Any]:
        """The context in which the weights are changed.

        Args:
            prompt_lengths: not looked at.
        """
        return self.change

    def over_answers(
        self, rendered: Sequence[Rendered], of: Callable[[Answer], T], *, beside: Sequence[Rendered] | None = None
    ) -> list[T]:
        """As `Trial.over_answers`; weights are written once where the unchanged model need not run between passes.

        Args:
            rendered: texts with answers.
            of: a function of an answer.
            beside: the same answers as the unchanged model reads them.
        """
        is_known = all(text in self.setup.plain.predicted for text in beside or ())
        with self.change if is_known else contextlib.nullcontext():
            return super().over_answers(rendered, of, beside=beside)

    def answer(self, prompts: Sequence[Conversation], **options: Any) -> list[str]:
        """Generate texts by the changed weights.

        Args:
            prompts: what to answer.
            options: handed on to `steerkit.generate`.
        """
        with self.change:
            return super().answer(prompts, **options)


def changed(setup: Setup, vector: TaskVector, scale: float) -> ChangedTrial:
    """A setup under a task vector.

    Args:
        setup: whose model is changed while a scorer runs, and is bitwise itself before and after.
        vector: the task vector.
        scale: what it is multiplied by.

    Returns:
        The trial, for `steerkit.measure`.
    """
    change = _Changed(lambda: added(setup.model, vector, scale))
    return ChangedTrial(setup, None, None, None, None, change=change)
