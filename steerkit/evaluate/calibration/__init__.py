"""The layers and the strength that move a behaviour most inside a budget of costs.

`budget` says what is allowed, `problem` splits the items, `choosing` searches on one part of them and `confirming`
measures what was found on another; `search` is the entrance, `result` what comes out.
"""

from __future__ import annotations

from steerkit.evaluate.calibration.budget import Budget, Search
from steerkit.evaluate.calibration.result import Calibration
from steerkit.evaluate.calibration.search import calibrate
from steerkit.evaluate.layer_sets import default_candidates

__all__ = ["Budget", "Calibration", "Search", "calibrate", "default_candidates"]
