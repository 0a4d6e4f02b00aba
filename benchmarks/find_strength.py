"""How near `find_strength` comes, and whether its interval holds: `python -m benchmarks.find_strength [--write]`.

Simulated scores: a logistic curve from 1 to 0 that is 0.3 at a crossing anywhere in the middle four fifths of the
range, steep or flat, seen with normal noise, or as the share of one or of four yes-or-no answers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial

import numpy as np

from benchmarks.results import recorded
from steerkit.evaluate.bisection import find_strength

SEARCHES, TARGET, LEVEL, SPREAD = 200, 0.3, 0.9, 0.2
SLOPES, TRIES = (12, 40), (10, 20, 40)
WORDS = f"""Simulated: a logistic curve over the range from 0 to 1 (slope 12 falls from 0.9 to 0.1 over 0.37 of it,
slope 40 over 0.11), the crossing of {TARGET} anywhere in its middle four fifths, {SEARCHES} searches each. Errors and
widths are parts of the range. "Held" is how often a 90 % interval held the crossing: that of the density of the votes,
as published, and that of the curve through all tries, which `find_strength` gives."""

Score = Callable[[float, float], float]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.find_strength")
    parser.add_argument("--write", action="store_true", help="make the page in docs/results of it too")
    options = parser.parse_args()
    title = "Finding a strength: errors and intervals"
    with recorded("find-strength", title, "benchmarks.find_strength", wanted=options.write):
        print(f"{WORDS}\n")
        print("| slope | scores | tries | error: median | 95 % | held: votes | held: curve | its width |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for slope in SLOPES:
            for name, score in kinds(slope).items():
                for tries in TRIES:
                    print(f"| {slope} | {name} | {tries} | {' | '.join(row(score, tries))} |", flush=True)
        print()


def kinds(slope: float) -> dict[str, Score]:
    """Scores by what they are called, each with noise of its own."""
    draw = np.random.default_rng(0)

    def mean(x: float, crossing: float) -> float:
        return 1 / (1 + math.exp(slope * (x - crossing) + math.log((1 - TARGET) / TARGET)))

    def answers(count: int) -> Score:
        return lambda x, crossing: float((draw.random(count) < mean(x, crossing)).mean())

    def noisy(x: float, crossing: float) -> float:
        return float(np.clip(mean(x, crossing) + draw.normal(0, SPREAD), 0, 1))

    return {f"noise {SPREAD:g}": noisy, "one answer": answers(1), "four answers": answers(4)}


def _at(score: Score, crossing: float, strength: float) -> float:
    """A score at a strength, with the crossing first, so that it can be given beforehand."""
    return score(strength, crossing)


def row(score: Score, tries: int) -> list[str]:
    """Errors and how often both intervals held the crossing."""
    errors, votes, curve, widths = [], 0, 0, []
    for crossing in np.random.default_rng(1).uniform(0.1, 0.9, SEARCHES):
        at = float(crossing)
        found = find_strength(partial(_at, score, at), TARGET, high=1.0, tries=tries, points=2001)
        low, high = found.posterior.interval(LEVEL)
        errors.append(abs(found.strength - at))
        votes += low <= at <= high
        curve += found.low <= at <= found.high
        widths.append(found.high - found.low)
    middle, most = np.quantile(errors, [0.5, 0.95])
    return [
        f"{middle:.3f}",
        f"{most:.3f}",
        f"{votes / SEARCHES:.0%}",
        f"{curve / SEARCHES:.0%}",
        f"{np.median(widths):.3f}",
    ]


if __name__ == "__main__":
    main()
