"""Does it hold? `contract` checks a method, `doctor` a model and the libraries around it, `planning` says beforehand
what steering will touch, need and cost.
"""

from __future__ import annotations

from steerkit.checks.contract import CHECKS, conformance
from steerkit.checks.fitted_method import Finding
from steerkit.checks.planning import plan

__all__ = ["CHECKS", "Finding", "conformance", "plan"]
