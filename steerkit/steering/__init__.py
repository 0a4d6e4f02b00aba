"""Applying vectors to a model that runs; no file here knows a method.

`steer` plans and attaches, `edits_at_sites` are the edits, `dispatch` hangs them on modules, `replay` feeds a pass
again where a gate knows too late, `when_gates` decide by `readings` of any vectors and `holding` finds strengths by
them, `weights` edits weights instead, and `callback` steers while a model is finetuned.
"""

from __future__ import annotations

from steerkit.steering.readings import with_neutral
from steerkit.steering.steering import Steering, steer
from steerkit.steering.strengths import Strength, Vectors, strength_value, vectors_of
from steerkit.steering.weights import edited

__all__ = ["Steering", "Strength", "Vectors", "edited", "steer", "strength_value", "vectors_of", "with_neutral"]
