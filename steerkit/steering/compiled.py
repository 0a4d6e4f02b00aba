"""What compiled code reads of a strength: tensors whose shapes say nothing of it, so that it is compiled once for all.

Compiled code is made anew for every Python value that it has looked at. A strength is therefore a table on the device,
of one form whether there is one number or one per row; what a method prepares of it is part of the compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from steerkit.methods._protocols import Params
    from steerkit.tokens.forward_pass import Pass

__all__ = ["CompiledStrength"]

_LEAST = 64  # rows of a table: a longer one is another shape, for which is compiled again


class CompiledStrength:
    """The strengths of one vector at one site, on the device.

    Args:
        params: the vector's tensors at the site, of any shape.
        values: one strength, or one per row, in the method's own unit.
        active: which of them are not neutral.
        device: where the site is; `meta` where nobody knows before the first pass.
    """

    def __init__(self, params: Params, values: Sequence[float], active: Sequence[bool], device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "meta" else device
        self._params = params
        self._placed: dict[torch.device, Params] = {}
        with torch.inference_mode(mode=False):
            self.params_on(device)
            size = max(_LEAST, 1 << (len(values) - 1).bit_length())
            self._values = torch.zeros(size, dtype=torch.float32, device=device)
            self._active = torch.zeros(size, dtype=torch.bool, device=device)
            self._count = torch.zeros((), dtype=torch.long, device=device)
        self.set(values, active)

    def set(self, values: Sequence[float], active: Sequence[bool]) -> bool:
        """Take other strengths, in place.

        Args:
            values: as many as fit into the table.
            active: which of them are not neutral.

        Returns:
            Whether they fitted.
        """
        count = len(values)
        if count > len(self._values):
            return False
        with torch.inference_mode(mode=False), torch.no_grad():
            self._values[:count] = torch.tensor(values, dtype=torch.float32)
            self._active[:count] = torch.tensor(active, dtype=torch.bool)
            self._count.fill_(count)
        return True

    def params_on(self, device: torch.device) -> Params:
        """The vector's tensors on a device, brought there once; single whole numbers stay, for methods that read them.

        Args:
            device: of the activations.
        """
        if device not in self._placed:
            self._placed[device] = {
                name: value if value.dim() == 0 and not value.is_floating_point() else value.to(device)
                for name, value in self._params.items()
            }
        return self._placed[device]

    def of_rows(self, facts: Pass, device: torch.device) -> tuple[Tensor, Tensor]:
        """The strength of each row of a pass, and whether it is not neutral.

        Adjacent rows of one item (beams, returned sequences) have one strength. That the number of strengths goes into
        the number of rows is seen to on the device, where the number is.

        Args:
            facts: the pass.
            device: of the activations.

        Returns:
            [b, 1, 1] float32 and bool.
        """
        count = self._count.to(device)
        if facts.rows is None:
            row = torch.arange(facts.batch, device=device) * count // facts.batch
            fits = facts.batch % count == 0
        else:
            row = torch.tensor(facts.rows, dtype=torch.long, device=device)
            fits = row.max() < count
        torch._assert_async(fits | (count == 1), "strength: give one number, or one per row of the batch")
        row = row.clamp(max=count - 1)
        return self._values.to(device)[row][:, None, None], self._active.to(device)[row][:, None, None]
