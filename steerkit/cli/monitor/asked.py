"""What all three readings of `steerkit monitor` get: the model, the vector, how it is read and where the items go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from steerkit.cli._model import ModelChoice
    from steerkit.cli.monitor.items import Item
    from steerkit.prompts.conversation import Conversation
    from steerkit.prompts.files.columns import Columns
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """One call of the command, with model and vector loaded.

    Attributes:
        model: the model.
        choice: which model it is, and how it was loaded.
        tokenizer: its tokenizer.
        vector: what is read along.
        read: which tokens.
        options: keyword arguments that every reading takes.
        unit: of the numbers.
        columns: names of columns that are not the usual ones.
        is_table: items are rows of a table.
        column: name of the new column; None is the reading's own.
        out: where the items go; None prints them.
        as_json: print one JSON object.
    """

    model: Any
    choice: ModelChoice
    tokenizer: Any
    vector: SteeringVector
    read: Literal["prompt_last", "response_mean"]
    options: dict[str, Any]
    unit: str
    columns: Columns
    is_table: bool
    column: str | None
    out: Path | None
    as_json: bool

    def texts(self, rows: Iterable[Item], *, raw: bool = False) -> list[Conversation]:
        """What is read of items.

        Args:
            rows: the items.
            raw: leave prompts as they are, without the chat template.

        Raises:
            DataError: one of them is no item.
        """
        from steerkit.monitor.items import conversation_of

        return [conversation_of(row, self.columns, raw=raw, is_table=self.is_table) for row in rows]
