"""What a fit leaves behind: a frozen `SteeringVector`, its fields (`fields`), its bytes (`container`), and the facts
that tell which model it belongs to (`model_identity`).
"""

from __future__ import annotations

from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["SteeringVector", "model_facts"]
