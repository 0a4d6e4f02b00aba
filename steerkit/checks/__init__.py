"""Whether steering holds what it promises, and what it would do.

`contract` checks a method on any model, `doctor` a model and the libraries around it, `planning` says beforehand which
modules would be written, how strongly, and what memory and time that takes.
"""

from __future__ import annotations

from steerkit.checks.contract import CHECKS, conformance
from steerkit.checks.fitted_method import Finding
from steerkit.checks.planning import plan

__all__ = ["CHECKS", "Finding", "conformance", "plan"]
