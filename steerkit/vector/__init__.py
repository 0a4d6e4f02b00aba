"""What a fit leaves behind: a frozen `SteeringVector`.

`fields`, `frozen` and `tensors` keep what it holds, `container` and `container_checks` are its bytes, `stored_form` and
`vector_files` put them on the disk, `hub_pack` onto the Hub, `model_identity` and `model_check` tell which model it
belongs to, `description` shows it, `foreign` reads the files of other programs.
"""

from __future__ import annotations

from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["SteeringVector", "model_facts"]
