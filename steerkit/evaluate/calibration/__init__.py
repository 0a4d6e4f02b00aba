"""The strength and layers that move a behaviour most inside a budget: `budget` says what is allowed and what was found,
`search` looks for it and confirms it on items that nothing was chosen on.
"""

from __future__ import annotations

from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.search import calibrate
from steerkit.evaluate.layer_sets import default_candidates

__all__ = ["Budget", "Calibration", "Search", "calibrate", "default_candidates"]
