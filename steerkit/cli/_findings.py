"""Findings of checks, as a table and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerkit.cli._shared import stdout, table

if TYPE_CHECKING:
    from steerkit.checks.fitted_method import Finding

__all__ = ["print_findings"]


def print_findings(model: str, findings: Sequence[Finding], promise: str) -> None:
    """Print findings as a table, and what they come to.

    Args:
        model: that was checked.
        findings: of its checks.
        promise: what holds when all have passed.
    """
    from rich.text import Text

    console = stdout()
    shown = table("check", "", "seen")
    for finding in findings:
        word, colour = ("pass", "green") if finding.passed else ("fail", "red")
        shown.add_row(finding.check, Text(word, style=colour), finding.reason)
    console.print(shown)
    failed = [finding.check for finding in findings if not finding.passed]
    verdict = f"{', '.join(failed)} failed" if failed else promise
    console.print(f"{model}: {len(findings) - len(failed)} of {len(findings)} checks passed; {verdict}", soft_wrap=True)
