"""Which experts a method acts on: how much more often one side has them, and how much of that is mere chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from steerkit.activations.readout import Readout
from steerkit.activations.recording import Activations
from steerkit.errors import FitError
from steerkit.methods._protocols import PartsTable
from steerkit.methods._subject import Subject
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Limits", "chance_relevance", "chosen_experts", "experts_table", "matched_actions", "tokens_seen"]

_AT_ONCE = 64  # shuffles in one product
_NEAREST = 4
_LEVEL = 0.99


class Limits(NamedTuple):
    """How many experts of one layer may be acted on.

    Attributes:
        forced: at the most.
        dropped: at the most.
    """

    forced: int
    dropped: int


def chance_relevance(positive: Tensor, negative: Tensor, *, paired: bool, shuffles: int, seed: int) -> float:
    """The largest |R| of all experts that labels without meaning reach in one of a hundred draws.

    Of pairs the two sides are swapped at random, pair by pair; else all labels are dealt out anew.

    Args:
        positive: [n, all experts of all layers] float32.
        negative: [m, all experts of all layers].
        paired: row i of both sides belong together.
        shuffles: how many draws.
        seed: of the draws.

    Returns:
        The 99 % point of the largest |mean difference|.
    """
    generator = torch.Generator().manual_seed(seed)
    n, m = len(positive), len(negative)
    rows = positive - negative if paired else torch.cat([positive, negative])
    rows = rows.double() if paired else rows.double() - rows.double().mean(dim=0)
    largest = []
    for start in range(0, shuffles, _AT_ONCE):
        count = min(_AT_ONCE, shuffles - start)
        drawn = torch.rand(count, len(rows), generator=generator, dtype=torch.float64)
        if paired:
            weights = torch.where(drawn < 0.5, -1.0, 1.0).double() / n
        else:
            place = drawn.argsort(dim=1).argsort(dim=1)
            weights = torch.where(place < n, 1.0 / n, -1.0 / m).double()
        largest.append((weights @ rows).abs().amax(dim=1))
    return float(torch.cat(largest).quantile(_LEVEL))


def chosen_experts(relevance: Mapping[Site, Tensor], count: int, side: str, limits: Limits) -> dict[Site, Tensor]:
    """The experts of largest |R| over all layers, and what is done to each.

    Args:
        relevance: by site [e].
        count: how many experts, in all layers together.
        side: ``"negative"`` drops only, ``"positive"`` forces only, ``"both"`` does both.
        limits: of each layer.

    Returns:
        By site [e] int64: -1 dropped, 1 forced, 0 left alone; sites with none are left out.
    """
    places = [(site, expert) for site, values in relevance.items() for expert in range(len(values))]
    values = torch.cat(list(relevance.values()))
    action = {site: torch.zeros(len(one), dtype=torch.long) for site, one in relevance.items()}
    left = count
    for place in values.abs().argsort(descending=True, stable=True).tolist():
        value, (site, expert) = float(values[place]), places[place]
        sign, most = (1, limits.forced) if value > 0 else (-1, limits.dropped)
        if left == 0 or value == 0:
            break
        if side == ("negative" if sign > 0 else "positive") or int((action[site] == sign).sum()) >= most:
            continue
        action[site][expert] = sign
        left -= 1
    return {site: one for site, one in action.items() if bool(one.any())}


def tokens_seen(acts: Activations, subject: Subject) -> dict[Site, Tensor]:
    """How many of the tokens read of both sides each expert had.

    Args:
        acts: shares of tokens, at routers.
        subject: whose data they are of.

    Returns:
        By site [e] float32.
    """
    plan, counts = Readout.parse(acts.readout), []
    for place, side in enumerate((subject.data.positive, subject.data.negative)):
        lengths = torch.tensor([len(plan.tokens(one)) for one in subject.rendered(side)], dtype=torch.float64)
        counts.append(lengths if acts.items is None else lengths[acts.items[place]])
    found = {}
    for site in acts.positive:
        positive, negative = (
            n @ side[site].double() for n, side in zip(counts, (acts.positive, acts.negative), strict=True)
        )
        found[site] = (positive + negative).float()
    return found


def matched_actions(vector: SteeringVector, generator: torch.Generator) -> dict[str, Tensor]:
    """The actions of a vector on other experts of the same layers, each drawn among those most like its own in usage.

    Args:
        vector: what the method fitted.
        generator: what draws.

    Returns:
        Tensor name to [e] int64.

    Raises:
        FitError: a layer has fewer experts that are left alone than ones that are not.
    """
    drawn = {}
    for site in vector.sites:
        params = vector.params(site)
        action, seen = params["action"], params["seen"]
        free = (action == 0).nonzero()[:, 0].tolist()
        own = action.nonzero()[:, 0]
        if len(free) < len(own):
            raise FitError(
                f"experts: {site} has {len(free)} experts that are left alone for {len(own)} that are not, so random "
                "ones could not be as many; fit with a smaller `count`"
            )
        new = torch.zeros_like(action)
        for place in torch.randperm(len(own), generator=generator).tolist():
            expert = int(own[place])
            near = sorted(free, key=lambda one: abs(float(seen[one] - seen[expert])))[:_NEAREST]
            taken = near[int(torch.randint(len(near), (1,), generator=generator))]
            free.remove(taken)
            new[taken] = action[expert]
        drawn[f"{site}/action"] = new
    return drawn


def experts_table(vector: SteeringVector, done: Mapping[int, str]) -> PartsTable:
    """The experts that are acted on, the largest |R| first.

    Args:
        vector: what the method fitted.
        done: what an action is called.
    """
    null = float(vector.tensors["shared/null"])
    rows: list[tuple[str | int | float, ...]] = []
    for site in vector.sites:
        params = vector.params(site)
        for expert in params["action"].nonzero()[:, 0].tolist():
            value = float(params["relevance"][expert])
            is_above = "yes" if abs(value) > null else "no"
            act = done[int(params["action"][expert])]
            rows.append((site.layer, expert, act, value, round(float(params["seen"][expert])), is_above))
    rows.sort(key=lambda row: -abs(float(row[3])))
    above = sum(row[-1] == "yes" for row in rows)
    note = f"{above} of {len(rows)} above {null:.3f}, which chance alone passes in 1 of 100 fits"
    silenced = float(vector.tensors["shared/silenced"])
    if silenced > 0:
        note += f"; at {silenced:.1%} of the tokens looked at every chosen expert is dropped, so none acts there"
    columns = ("layer", "expert", "is", "R", "tokens seen", "above null")
    return PartsTable(f"{len(rows)} experts", columns, rows, note)
