"""Figures of a server in Prometheus' text form: counters and gauges, which need no library."""

from __future__ import annotations

from collections import Counter

from steerkit.serve.engine import Engine

__all__ = ["Metrics"]


class Metrics:
    """What a server tells of itself.

    Args:
        engine: whose figures.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._statuses: Counter[int] = Counter()

    def count(self, status: int) -> None:
        """Count a request that was answered.

        Args:
            status: with which of HTTP's.
        """
        self._statuses[status] += 1

    def text(self) -> str:
        """All figures."""
        worker = self._engine.worker
        lines = ["# HELP steerkit_requests_total Requests by status.", "# TYPE steerkit_requests_total counter"]
        lines += [f'steerkit_requests_total{{status="{one}"}} {n}' for one, n in sorted(self._statuses.items())]
        for name, kind, text, value in (
            ("prompt_tokens_total", "counter", "Tokens of prompts.", worker.counts["prompt_tokens"]),
            ("cached_tokens_total", "counter", "Those that had been read before.", worker.counts["cached_tokens"]),
            ("generated_tokens_total", "counter", "Tokens that were chosen.", worker.counts["tokens"]),
            ("passes_total", "counter", "Forward passes.", worker.passes.count),
            ("running", "gauge", "Rows under way.", self._engine.running),
            ("waiting", "gauge", "Rows that wait.", self._engine.waiting),
            ("prefix_bytes", "gauge", "Bytes of kept beginnings of texts.", worker.prefixes.used),
        ):
            lines += [f"# HELP steerkit_{name} {text}", f"# TYPE steerkit_{name} {kind}", f"steerkit_{name} {value}"]
        return "\n".join(lines) + "\n"
