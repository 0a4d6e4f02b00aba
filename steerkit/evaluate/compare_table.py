"""Methods side by side as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerkit.evaluate.intervals import Estimate

if TYPE_CHECKING:
    from steerkit.evaluate.compare import Row

__all__ = ["markdown"]


def markdown(rows: Sequence[Row]) -> str:
    """The comparison as a Markdown table.

    Args:
        rows: one per method.
    """
    lines = [
        "| method | sites, strength | effect | controls | KL | ppl ratio | repetition | time | confirmed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        costs = row.costs or {}
        lines.append(
            f"| `{row.method}` | {row.place} | {_cell(row.effect, '+.2f')} "
            f"| {'-' if row.controls is None else f'{row.controls[0]:+.2f} to {row.controls[1]:+.2f}'} "
            f"| {_cell(costs.get('kl'), '.3f')} | {_cell(costs.get('perplexity_ratio'), '.2f')} "
            f"| {_cell(costs.get('repetition'), '+.2f')} | {_cell(row.overhead, '.2f')} "
            f"| {'yes' if row.works else 'no'}{', own costs' if row.own_costs else ''} |"
        )
    return "\n".join(lines) + "\n"


def _cell(found: Estimate | None, form: str) -> str:
    return "-" if found is None else f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"
