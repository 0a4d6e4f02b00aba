"""Which commit of steerkit this is, where it runs from a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str | None:
    """The commit that is checked out, with ``+`` where code or data were changed since; None where there is none."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def told(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.strip()

    try:
        return told("rev-parse", "HEAD")[:12] + ("+" if told("status", "--porcelain", "-uno", "steerkit") else "")
    except (OSError, subprocess.SubprocessError):
        return None
