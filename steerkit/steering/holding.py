"""The strength of `hold`: what brings a reading to its target, token by token.

    strength = (target - reading) * deviation / (u . v), kept within its limits        h' = h + strength * v

u is the direction of length 1 that is read along, v the one that is added, both at one site; deviation that of neutral
texts, in which readings count. The reading changes by (u . v) / deviation for each unit of strength, so this one step
reaches the target exactly: no gain has to be chosen, and nothing is remembered. Every token is held by what is read of
itself at each site that is written, before it is written there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerkit.errors import SiteError, StrengthError
from steerkit.methods._base import Method
from steerkit.methods._protocols import Params
from steerkit.network.sites import Site
from steerkit.steering.readings import SiteReading, VectorReading
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.hold import Hold

__all__ = ["HeldStrength"]

_ALONG = 1e-3  # of the added direction's length


class HeldStrength:
    """Finds the strength at one site.

    Args:
        hold: target and limits.
        reading: what is held.
        site: that is written.
        method: applies the vector.
        params: its tensors at the site.
        factor: what a strength is multiplied with to be in the method's own unit.

    Raises:
        StrengthError: the method does not add one direction, or what it adds does not move the reading.
        SiteError: the reading has no direction at the site.
    """

    def __init__(
        self, hold: Hold, reading: VectorReading, site: Site, method: Method, params: Params, factor: float
    ) -> None:
        direction, length = method.direction(params), method.length(params)
        if direction is None or length is None:
            raise StrengthError(f"hold: {method.name} does not add one direction, so no strength holds a reading")
        if site not in reading.sites:
            raise SiteError(
                f"hold: {reading.name} has no direction at {site}, where is written; hold a vector that is read there "
                f"(this one: {', '.join(map(str, reading.sites))})"
            )
        self._reading: SiteReading = reading.at(site)
        slope = float(self._reading.unit.double() @ direction.double())
        if not abs(slope) > _ALONG * length:
            raise StrengthError(f"hold: what is added at {site} does not move the reading of {reading.name}")
        self._slope, self._target = slope, hold.at
        self._low, self._high = sorted(one * factor for one in hold.within)
        self._neutral = 0.0 if method.neutral_strength is None else method.neutral_strength

    def place(self, device: torch.device) -> None:
        """Bring what is needed to a device.

        Args:
            device: of the activations.
        """
        self._reading.place(device)

    def at(self, h: Tensor, tokens: Tokens) -> Tensor:
        """The strength of every token of a pass.

        Args:
            h: [b, t, d] activations, before they are written.
            tokens: of the pass.

        Returns:
            [b, t, 1] float32, in the method's own unit; neutral at tokens that choose no generated one.

        Raises:
            ScopeError: nobody can tell where the prompt ends.
        """
        chosen = tokens.chosen("a reading is held from the prompt's end on")
        strength = (self._reading.missing(h, chosen, self._target) / self._slope).clamp(self._low, self._high)
        if chosen is not None:
            strength = torch.where((chosen >= 0).to(h.device), strength, self._neutral)
        return strength[..., None]
