"""What an extraction of a persona vector gave, and how its progress is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerkit.persona.filtering import Filtered
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Bar", "Extraction", "Line", "by_ones", "no_bar", "no_line"]

Bar = Callable[[str, int], AbstractContextManager[Callable[[], None]]]
"""From a title and a total to a context that gives what advances a progress bar by one."""
Line = Callable[[str], AbstractContextManager[Callable[[str], None]]]
"""From a first note to a context that gives what shows the next ones."""


@dataclass(frozen=True)
class Extraction:
    """What an extraction gave.

    Attributes:
        vector: the persona vector, with a suggested strength; `works` tells whether it is confirmed.
        file: where it is.
        monitor: the vector to watch the trait with, before any answer; see `steerkit.persona.watchpoint`.
        monitor_file: where that is.
        card: of both.
        filtered: which pairs were kept, and why the others were not.
        pairs: kept pairs to extract from, to choose on and to confirm on.
        verdict: how the layer was chosen and whether it is confirmed, in one line.
        works: whether the effect is confirmed on held-out questions.
        judge: who rated; None where probabilities did.
        seconds: what each stage took this time.
    """

    vector: SteeringVector
    file: Path
    monitor: SteeringVector
    monitor_file: Path
    card: Path
    filtered: Filtered
    pairs: tuple[int, int, int]
    verdict: str
    works: bool
    judge: str | None
    seconds: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "file": str(self.file),
            "card": str(self.card),
            "rows": self.filtered.rows,
            "kept": len(self.filtered.kept),
            "dropped": dict(self.filtered.reasons),
            "pairs": dict(zip(("extraction", "choosing", "confirming"), self.pairs, strict=True)),
            "judge": self.judge,
            "works": self.works,
            "verdict": self.verdict,
            "seconds": {stage: round(seconds, 1) for stage, seconds in self.seconds.items()},
            "vector": self.vector.describe(),
            "monitor": {
                "file": str(self.monitor_file),
                "site": str(self.monitor.sites[0]),
                "auc": {kind: dict(self.monitor.extra["watchpoint"][kind]) for kind in ("neutral", "negative")},
            },
        }


@contextlib.contextmanager
def no_bar(_title: str, _total: int) -> Iterator[Callable[[], None]]:
    """Show no progress bar."""
    yield lambda: None


@contextlib.contextmanager
def no_line(_first: str) -> Iterator[Callable[[str], None]]:
    """Show no progress line."""
    yield lambda _note: None


def by_ones(advance: Callable[[], None]) -> Callable[[int], None]:
    """Advance a progress bar by several, one by one.

    Args:
        advance: moves it by one.
    """

    def step(rows: int) -> None:
        for _ in range(rows):
            advance()

    return step
