"""What a router would choose if experts were forbidden or forced before it takes the largest scores.

The router itself is asked: a copy of it is run on its scores with those of some experts replaced, so that the weights
of what it then chooses are made by the family's own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steerkit.errors import SiteError
from steerkit.network.bare_copy import bare_copy, put_parameter
from steerkit.network.router_search import RouterFound, routes_by_scores
from steerkit.network.routing import dense_weights
from steerkit.network.sites import Site
from steerkit.network.tap import RouterTap, locate

__all__ = ["AskedRouter", "routers_at", "with_priority", "without"]

STEP = 0.01
"""How far SteerMoE puts a forced expert above the largest score of its token, and a forbidden one below the least."""


def without(scores: Tensor, action: Tensor) -> Tensor:
    """Scores in which forbidden experts are out of the question.

    Args:
        scores: [n, e] float32.
        action: [e], -1 for forbidden ones.
    """
    return scores.masked_fill(action < 0, torch.finfo(scores.dtype).min / 4)  # infinity times zero is no number


def with_priority(scores: Tensor, action: Tensor) -> Tensor:
    """Scores in which forced experts stand just above all others, and forbidden ones just below (SteerMoE).

    Args:
        scores: [n, e] float32.
        action: [e], 1 for forced and -1 for forbidden ones.

    Example:
        >>> import torch
        >>> with_priority(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0, 0, 0, 1]))
        tensor([[2.0000, 1.0000, 0.0000, 2.0100]])
    """
    high, low = scores.amax(dim=-1, keepdim=True) + STEP, scores.amin(dim=-1, keepdim=True) - STEP
    return torch.where(action > 0, high, torch.where(action < 0, low, scores))


class AskedRouter:
    """What one router would choose by other scores; a `LayerInput` of the method that asks.

    Args:
        tap: the router.
        action: [e] what is done to each expert.
        change: from the scores [n, e] and the action to other scores.

    Raises:
        SiteError: the router chooses by more than its scores.
    """

    def __init__(self, tap: RouterTap, action: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.tap, self.width = tap, tap.width
        self._action, self._change = action, change
        self.refresh()

    def refresh(self) -> None:
        """Make the copies anew, where the router lies now.

        Raises:
            SiteError: the router chooses by more than its scores.
        """
        tap = self.tap
        self._by_scores, problem = routes_by_scores(RouterFound(tap.name, tap.module, tap.chosen))
        if problem is not None:
            raise SiteError(
                f"{tap.site}: `{tap.name}` {problem}, so nothing can be put in a dropped expert's place; use op='drop'"
            )
        parameters = [*self._by_scores.named_parameters()]
        for name, value in parameters:  # .01 above a score is no more in half precision
            put_parameter(self._by_scores, name, value.detach().float())
        self._reads = max(value.shape[-1] for _, value in parameters)
        self._plain: nn.Module = bare_copy(tap.module)
        self._action = self._action.to(parameters[0][1].device)

    def __call__(self, read: Tensor) -> Tensor:
        """The weights that the router would give.

        Args:
            read: [..., d] what the router was called with.

        Returns:
            [n, e] in dense form, float32.
        """
        chosen = self.tap.chosen
        scores = self._change(self._plain(read)[chosen.scores].float(), self._action)
        with torch.autocast(scores.device.type, enabled=False):  # it would round the scores
            given = self._by_scores(pad(scores, (0, self._reads - chosen.experts)))
        return dense_weights(given[chosen.weights], given[chosen.index], chosen.experts)


def routers_at(model: nn.Module, sites: Sequence[Site]) -> dict[Site, RouterTap]:
    """The routers at some sites.

    Args:
        model: the model.
        sites: of kind router.

    Raises:
        SiteError: a site is of another kind, or its block has no router.
    """
    wrong = [site for site in sites if site.kind != "router"]
    if wrong:
        raise SiteError(f"{wrong[0]}: experts are steered where they are chosen; ask for router.{wrong[0].layer}")
    taps: dict[Site, RouterTap] = {}
    for site, tap in locate(model, sites).items():
        assert isinstance(tap, RouterTap)
        taps[site] = tap
    return taps
