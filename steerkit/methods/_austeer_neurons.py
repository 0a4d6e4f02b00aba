"""The neurons that an AUSteer vector scales: as a table for people, and as rows or columns of weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from steerkit.errors import SiteError
from steerkit.methods._protocols import PartsTable, WeightUpdate
from steerkit.network.sites import Site
from steerkit.network.tap import Tap, locate
from steerkit.vector.steering_vector import SteeringVector

__all__ = ["neurons_table", "scaled_weights"]


def neurons_table(vector: SteeringVector) -> PartsTable:
    """The chosen neurons, the largest share first.

    Args:
        vector: a vector of AUSteer.
    """
    found = []
    for site in vector.sites:
        params = vector.params(site)
        found += [(site, *one) for one in zip(params["units"].tolist(), params["beta"].tolist(), strict=True)]
    found.sort(key=lambda one: (-abs(one[2]), one[0].layer, one[1]))
    params = vector.params(vector.sites[0])
    head = int(params["head_width"]) if "head_width" in params else 0
    rows = [
        (site.layer, *((neuron // head, neuron % head) if head else (neuron,)), "+" if beta > 0 else "-", abs(beta))
        for site, neuron, beta in found
    ]
    where = ("head", "dimension") if head else ("row" if vector.sites[0].kind.startswith("mlp") else "dimension",)
    tied = params["tied"].tolist() if "tied" in params else None
    note = f"{tied[0]} neurons have the smallest of these shares; {tied[1]} of them were chosen" if tied else ""
    return PartsTable(f"{len(rows)} neurons", ("layer", *where, "sign", "share"), rows, note)


def scaled_weights(model: nn.Module, site: Site, neurons: Tensor, gains: Tensor) -> list[WeightUpdate]:
    """Scale the columns of attention's output projection, or the rows and bias entries of the MLP's down projection.

    Args:
        model: the transformers model.
        site: whose neurons are scaled.
        neurons: [j] their places at the site.
        gains: [j] by how much more than 1.

    Raises:
        SiteError: no one plain linear layer gives or reads them.
    """
    tap, is_input = _projection(model, site)
    scaled = _scaled(neurons, gains)
    # An nn.Linear holds its weight [outputs, inputs], GPT-2's Conv1D [inputs, outputs].
    axis = int(is_input) if isinstance(tap.module, nn.Linear) else int(not is_input)
    updates = [WeightUpdate(f"{tap.name}.weight", scaled(axis), 1 - axis)]
    if not is_input and tap.module.bias is not None:
        updates.append(WeightUpdate(f"{tap.name}.bias", scaled(0)))
    return updates


def _projection(model: nn.Module, site: Site) -> tuple[Tap, bool]:
    """The linear layer whose columns (it reads the neurons) or rows (it gives them) are the neurons of a site.

    Raises:
        SiteError: there is none.
    """
    try:
        raw = next(iter(locate(model, [Site(site.layer, "mlp_raw")]))) if site.kind.startswith("mlp_") else None
        if site.kind != "z" and site != raw:
            what = "what a post-norm gives" if site.kind == "mlp_out" else "no linear layer's input or output alone"
            raise SiteError(f"{what} is scaled here")
        (tap,) = locate(model, [site if raw is None else Site(site.layer, "mlp_post")]).values()
    except SiteError as error:
        raise SiteError(f"{site}: scaling its neurons has no exact weight form ({error}); steer with hooks") from None
    if hasattr(tap.module, "base_layer"):
        raise SiteError(f"{site}: `{tap.name}` has an adapter beside it; merge it first, or steer with hooks")
    if not isinstance(tap.module, nn.Linear) and type(tap.module).__name__ != "Conv1D":
        raise SiteError(f"{site}: `{tap.name}` is {type(tap.module).__name__}, no plain linear layer; steer with hooks")
    return tap, raw is None


def _scaled(neurons: Tensor, gains: Tensor) -> Callable[[int], Callable[[Tensor | None], Tensor]]:
    """By the dimension along which the neurons stand, what scales them there."""

    def along(axis: int) -> Callable[[Tensor | None], Tensor]:
        def update(old: Tensor | None) -> Tensor:
            assert old is not None
            places, gamma = neurons.to(old.device), gains.to(old)
            part = old.index_select(axis, places).movedim(axis, -1)
            return old.index_copy(axis, places, (part + gamma * part).movedim(-1, axis))

        return update

    return along
