"""What flows at each kind of site, seen by plain hooks, and where a model has such sites."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from steerkit.checks.doctor.case import Case
from steerkit.errors import SiteError
from steerkit.network.sites import KINDS, Site
from steerkit.network.tap import Tap, locate

__all__ = ["available", "flat", "watched"]


def available(model: nn.Module, layers: Sequence[int]) -> tuple[dict[Site, Tap], dict[str, str]]:
    """The taps of every kind of site in some blocks, each place once; and why the other kinds are nowhere there.

    Args:
        model: the model.
        layers: blocks counted from 0.
    """
    found: dict[tuple[int, str], tuple[Site, Tap]] = {}
    missing = {}
    for kind in KINDS:
        taps: dict[Site, Tap] = {}
        for layer in layers:
            try:
                taps |= locate(model, [Site(layer, kind)])
            except SiteError as error:
                # Less the place: the same words hold at all these blocks.
                missing[kind] = re.sub(r"^\S+: | \(block \d+ of \w+\)$", "", str(error))
        if taps:
            missing.pop(kind, None)
        for site, tap in taps.items():
            found.setdefault((id(tap.module), tap.side), (site, tap))
    return dict(found.values()), missing


def watched(case: Case, taps: dict[Site, Tap], ids: Sequence[int]) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """What stands at each site before and after all other hooks, in one full pass over one row.

    Args:
        case: the model.
        taps: the sites.
        ids: of the row.

    Returns:
        The values before and after, [1, t, d] each, or [t, d] where the module has rows and tokens in one dimension.
    """
    before: dict[Site, Tensor] = {}
    after: dict[Site, Tensor] = {}

    def keep(found: dict[Site, Tensor], site: Site, value: Tensor) -> None:
        found[site] = value.detach().clone()  # Falcon changes one in place afterwards

    with contextlib.ExitStack() as stack:
        for site, tap in taps.items():
            for found, first in ((before, True), (after, False)):

                def hook(
                    _: Any, args: Any, kwargs: Any, out: Any = None, *, to: Any = found, at: Site = site, tap: Tap = tap
                ) -> None:
                    keep(to, at, tap.read(args, kwargs, out))

                attach = (
                    tap.module.register_forward_pre_hook if tap.side == "input" else tap.module.register_forward_hook
                )
                stack.callback(attach(hook, prepend=first, with_kwargs=True).remove)
        case.logits(*case.row(ids), None)
    return before, after


def flat(value: Tensor) -> Tensor:
    """Bring a value of one row to [t, width].

    Args:
        value: [1, t, width] or [t, width].
    """
    return value.reshape(-1, value.shape[-1])
