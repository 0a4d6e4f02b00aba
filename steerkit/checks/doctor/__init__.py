"""Checks of a user's own model: `case` prepares it, `checks` are run one by one."""

from __future__ import annotations

from steerkit.checks.doctor.checks import doctor

__all__ = ["doctor"]
