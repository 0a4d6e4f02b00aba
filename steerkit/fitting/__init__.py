"""`fit`: a method, a contrast set and a model in, a vector out.

`discovering` gives several vectors of one fit, `subject` is what a method may ask of the model, `passes` the passes
that only some of them need, `held_out` measures the separation of items that the fit has not seen, `training` is the
one training loop.
"""

from __future__ import annotations

from steerkit.fitting.discovering import discover
from steerkit.fitting.fitting import fit, read
from steerkit.fitting.held_out import apart, record_steered, separation
from steerkit.fitting.subject import ModelSubject
from steerkit.fitting.training import minimise

__all__ = ["ModelSubject", "apart", "discover", "fit", "minimise", "read", "record_steered", "separation"]
