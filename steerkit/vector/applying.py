"""What `SteeringVector.at` changes: how a vector is to be applied this time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steerkit.errors import StrengthError
from steerkit.tokens.fade import Fade
from steerkit.tokens.scope import Scope
from steerkit.vector.hold import Hold
from steerkit.vector.when import When

if TYPE_CHECKING:
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["changes_of", "varying"]


def changes_of(
    vector: SteeringVector, *, strength: Any, scope: Any, unit: Any, fade: Any, when: Any, hold: Any
) -> dict[str, Any]:
    """The fields that change; None leaves a thing as it is.

    Args:
        vector: as it is.
        strength: one number, or one per row [b].
        scope: which tokens are written.
        unit: what the strength counts in.
        fade: how it goes on.
        when: on which readings the vector is applied.
        hold: which reading the strength is found by.

    Raises:
        SteerError: see `SteeringVector.at`.
    """
    changes: dict[str, Any] = {}
    if strength is not None:
        changes["strength"] = strength
    if scope is not None:
        changes.update(scope=str(Scope.parse(scope)), own_scope=True)
    if unit is not None:
        changes.update(unit=unit, own_unit=True)
    if fade is not None:
        changes["fade"] = Fade.parse(fade)
    load = type(vector).load
    if when is not None:
        changes["when"] = When.parse(when).bound(load)
    if hold is not None:
        changes["hold"] = Hold.parse(hold).bound(load)
    if unit not in (None, vector.unit) and vector.suggested_strength is not None:
        if strength is None and vector.strength is None and hold is None:
            raise StrengthError(
                f"unit {unit!r}: the suggested strength {vector.suggested_strength:g} counts in unit {vector.unit!r}; "
                "give a strength too"
            )
        changes["suggested_strength"] = None
    held, strength, fade = (changes.get(name, getattr(vector, name)) for name in ("hold", "strength", "fade"))
    if held is not None and (strength is not None or fade is not None):
        raise StrengthError("hold finds the strength itself; leave strength and fade out, and give its limits")
    return changes


def varying(vector: SteeringVector) -> str:
    """What of a vector differs from token to token or from prompt to prompt, in words; empty where nothing does.

    Args:
        vector: as it is to be applied.
    """
    said = {"fade": vector.fade, "when": vector.when, "hold": vector.hold}
    return " ".join(f"{name}({one})" for name, one in said.items() if one is not None)
