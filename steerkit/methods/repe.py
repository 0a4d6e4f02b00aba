"""Representation reading and control: mean vectors, mean differences and pair-centred principal directions.

    mean:        c = mean over positive items of h                        (a reading vector, not contrastive)
    difference:  c = mean over pairs of (h+ - h-)
    pca:         c = first right singular vector of the rows h+ - h-, uncentred, oriented along their mean
    h' = h + strength * c        and, with `restore_norm`,        h' <- h' * |h| / |h'|    per token

Zou et al. (2023), "Representation Engineering", arXiv 2310.01405; Hojer, Jarvis, Heinrich (2025), "Improving Reasoning
Performance in Large Language Models via Representation Engineering", arXiv 2504.19483.

Where this file departs. Published code takes scikit-learn's PCA of the differences, which centres them first: that
removes the mean difference, the very direction wanted, and leaves an arbitrary sign. Here differences are never
centred, and the direction points along their mean. A principal direction has length 1; by default it gets the length
of the mean difference, so that strength 1 means about the same for all three (`scaling="unit"` leaves it at 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from steerkit.activations.recording import Activations
from steerkit.errors import StrengthError
from steerkit.maths import edits
from steerkit.maths.directions import mean_difference, pair_differences, principal_direction
from steerkit.methods._addition import AddDirection
from steerkit.methods._protocols import Params, Prepared, WeightUpdate
from steerkit.methods._subject import Subject
from steerkit.network.sites import Site
from steerkit.tokens.forward_pass import Tokens
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["RepresentationControl"]


@dataclass(frozen=True)
class RepresentationControl(AddDirection):
    """Add a control vector read from the last token of each text.

    Example:
        >>> import torch
        >>> positive, negative = torch.tensor([[3.0, 1.0], [3.0, -1.0]]), torch.zeros(2, 2)
        >>> RepresentationControl(scaling="unit").fit_site(positive, negative)
        {'direction': tensor([1., 0.])}
    """

    name: ClassVar[str] = "repe"
    title: ClassVar[str] = "Representation reading and control vectors"
    paper: ClassVar[str] = "Zou et al. 2023, arXiv 2310.01405; Hojer et al. 2025, arXiv 2504.19483"
    readout: ClassVar[str | None] = "last"
    scope: ClassVar[str] = "all"

    reading: Literal["pca", "difference", "mean"] = "pca"
    """How the direction is read; `mean` ignores the negative side and holds the whole mean activation."""
    scaling: Literal["difference", "unit"] = "difference"
    """Length of a principal direction: that of the mean difference, or 1."""
    restore_norm: bool = False
    """Give every steered token the norm it had before."""

    @property
    def edit_name(self) -> str:
        """The operation that vector files of this method name."""
        return "add_keep_norm" if self.restore_norm else "add"

    def fit(self, acts: Activations | None, subject: Subject, sites: list[Site]) -> dict[str, Tensor]:
        """Read every site; pairs are taken as pairs only where the data says so.

        Args:
            acts: activations of both sides at every site.
            subject: unused.
            sites: where to read.

        Returns:
            ``"<site>/direction"`` to [d].
        """
        assert acts is not None
        return self._each(sites, lambda site: self._read(acts.positive[site], acts.negative[site], acts.paired))

    def fit_site(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Read the direction; the rows are pairs where there are as many of both.

        Args:
            positive: [n, d] float32.
            negative: [m, d] float32.

        Returns:
            ``{"direction": [d]}``

        Raises:
            FitError: the sides do not differ.
        """
        return self._read(positive, negative, positive.shape == negative.shape)

    def _read(self, positive: Tensor, negative: Tensor, paired: bool) -> dict[str, Tensor]:
        """One site's direction, by the reading and the scaling that the settings name."""
        if self.reading == "mean":
            return {"direction": positive.float().mean(dim=0)}
        difference = mean_difference(positive, negative)
        if self.reading == "difference":
            return {"direction": difference}
        direction = principal_direction(pair_differences(positive, negative, paired=paired))
        if self.scaling == "difference":
            direction = direction * torch.linalg.vector_norm(difference)
        return {"direction": direction}

    def length(self, params: Params) -> float | None:
        """Norm of the direction; None where norms are restored, because then no length is added."""
        return None if self.restore_norm else super().length(params)

    def prepare(self, params: Params, strength: Tensor, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """As for every addition; not in half precision where norms are restored."""
        return super().prepare(params, strength, _wide(dtype) if self.restore_norm else dtype, device)

    def edit(self, h: Tensor, prepared: Prepared, tokens: Tokens) -> Tensor:
        """`h + strength * direction`, rescaled to the norm of `h` where asked."""
        if not self.restore_norm:
            return super().edit(h, prepared, tokens)
        # Not in half precision: the sum may not fit, and rounding it before scaling brings the old rounding error back.
        return edits.keep_norm(edits.add(h.to(_wide(h.dtype)), prepared["direction"]), h)

    def weight_updates(self, model: nn.Module, vector: SteeringVector, strength: float) -> list[WeightUpdate]:
        """As for every addition.

        Raises:
            StrengthError: norms are restored, which no weight can do.
        """
        if self.restore_norm:
            raise StrengthError("repe: restoring norms has no exact weight form; steer with hooks instead")
        return super().weight_updates(model, vector, strength)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The wider of a dtype and float32."""
    return torch.promote_types(dtype, torch.float32)
