"""MLPs of routed experts: their down projections, and what each of those reads.

In a mixture of experts no module gives what one expert's down projection reads, so no hook can see it. Both things that
are asked of experts are therefore put to a bare copy of the MLP (the same parameters, no hooks) in which other matrices
stand in the place of the down projections:

* What an expert reads. With the unit matrix there, and a weight of 1, the expert gives what its down projection reads.
* How far that lies along a vector g_e of its own for each expert. With g_e as row 0 of expert e's matrix and zeros
  elsewhere, number 0 of what the MLP gives is `sum over a token's experts of weight_e (g_e . x_e)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.bare_copy import bare_copy, put_parameter
from steerkit.network.block_trace import tensor_of
from steerkit.network.decoder import Decoder
from steerkit.network.expert_search import Down, Found, find_down_projections, routing_of
from steerkit.network.sites import Site
from steerkit.network.tap import Tap

__all__ = ["Experts", "Routed", "experts_at"]


class Routed(NamedTuple):
    """Tokens on their way into the experts, each as often as it has experts.

    Attributes:
        expert: [s] which expert.
        token: [s] which token, in the order of the MLP's input.
        inputs: [s, i] float32 what that expert's down projection reads.
    """

    expert: Tensor
    token: Tensor
    inputs: Tensor


@dataclass(frozen=True)
class Experts:
    """An MLP of routed experts, as what writes at a site.

    Attributes:
        tap: the MLP's output, where all of them together write.
        stack: the down projections of the routed experts.
        shared: that of an expert which takes every token, where there is one.
        biases: names inside the MLP of the biases of both.
    """

    tap: Tap
    stack: Down
    shared: Down | None
    biases: tuple[str, ...]

    # What a gate makes of what the experts read is one number for each token; see `reader`.
    inputs = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the matrices in the transformers model: the stack's, and the shared one's where there is one."""
        downs = (self.stack,) if self.shared is None else (self.stack, self.shared)
        return tuple(f"{self.tap.name}.{down.name}" for down in downs)

    def weight(self, expert: int) -> Tensor:
        """The matrix [o, i] of one routed expert, float32, on the CPU.

        Args:
            expert: which one.
        """
        return _matrix(self.tap.module.get_parameter(self.stack.name)[expert], self.stack)

    def shared_weight(self) -> Tensor:
        """The matrix [o, i] of the shared expert, float32, on the CPU.

        Raises:
            SiteError: there is none.
        """
        if self.shared is None:
            raise SiteError(f"{self.tap.site}: no expert of `{self.tap.name}` takes every token")
        return _matrix(self.tap.module.get_parameter(self.shared.name), self.shared)

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where the matrices are and in which precision."""
        weight = self.tap.module.get_parameter(self.stack.name)
        return weight.device, weight.dtype

    def reader(self, gates: Tensor, shared: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """What gates find in what the experts read. It costs as much as the MLP itself.

        Args:
            gates: [e, i], one row for each routed expert.
            shared: [j], the shared expert's; None is zero.

        Returns:
            From the MLP's input [..., d] to [..., 1]: each of a token's experts' inputs times its gate, weighted and
            added as the MLP weights and adds what they give.
        """
        twin, (device, dtype) = bare_copy(self.tap.module), self.place
        put_parameter(
            twin, self.stack.name, _first_rows(gates.to(device, dtype), self.tap.width, self.stack.transposed)
        )
        for name in self.biases:
            put_parameter(twin, name, torch.zeros_like(twin.get_parameter(name)))
        if self.shared is not None:
            old = twin.get_parameter(self.shared.name)
            row = old.new_zeros(old.shape[0 if self.shared.transposed else 1]) if shared is None else shared.to(old)
            put_parameter(
                twin, self.shared.name, row[:, None].expand_as(old) if self.shared.transposed else row.expand_as(old)
            )

        def read(h: Tensor) -> Tensor:
            given: Tensor = tensor_of(twin(h))
            return given[..., :1]

        return read

    def routed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], chosen: Tensor) -> Routed:
        """What the down projections of the routed experts read in one call of the module that holds them.

        Args:
            args: what that module (`stack.owner`) is called with.
            kwargs: its keyword arguments.
            chosen: [m] the tokens that are asked for.

        Raises:
            SiteError: the module is not told, token by token, which experts are meant.
        """
        routing = routing_of(args, kwargs)
        if routing is None:
            raise SiteError(f"{self.tap.site}: `{self.stack.owner}` is not told which experts are meant")
        hidden, index, weights = routing
        expert, token = index[chosen].reshape(-1), chosen.repeat_interleave(index.shape[1])
        new = {id(hidden): hidden[token], id(index): expert[:, None], id(weights): torch.ones_like(weights[token, :1])}
        asked = [new.get(id(one), one) for one in args]
        named = {name: new.get(id(one), one) for name, one in kwargs.items()}
        twin = bare_copy(self.tap.module)
        for name in self.biases:
            put_parameter(twin, name, torch.zeros_like(twin.get_parameter(name)))
        old = twin.get_parameter(self.stack.name)
        width = old.shape[1 if self.stack.transposed else 2]
        pieces = []
        for start in range(0, width, self.tap.width):
            unit = old.new_zeros(self.tap.width, width)
            unit.diagonal(start).fill_(1.0)
            put_parameter(twin, self.stack.name, (unit.mT if self.stack.transposed else unit).expand_as(old))
            given = tensor_of(twin.get_submodule(self.stack.owner)(*asked, **named))
            pieces.append(given.float()[:, : width - start])
        return Routed(expert, token, torch.cat(pieces, dim=1))


def experts_at(decoder: Decoder, anatomy: Anatomy, site: Site) -> Experts | None:
    """The routed experts that write at a site; None where the block's MLP routes nothing, or at other sites.

    Args:
        decoder: the model's decoder.
        anatomy: of the site's block.
        site: where is written.

    Raises:
        SiteError: tokens are routed there, but a norm comes after, or the matrices that write are not one stack and at
            most one linear layer beside it, or nothing says which tokens go where.
    """
    half = anatomy.mlps[0] if len(anatomy.mlps) == 1 else None
    if site.kind not in ("mlp_out", "mlp_raw") or half is None or not half.experts:
        return None
    kind = anatomy.find("mlp_raw").kind
    if anatomy.find(site.kind).kind != kind:
        raise SiteError(f"{site}: a norm comes after what {half} of {anatomy.owner} gives; ask for {kind}.{site.layer}")
    read, gave = half.first.read, half.first.gave
    found: Found | str = "it is more than one module"
    if len(half.calls) == 1 and read is not None and gave is not None:
        found = find_down_projections(half.first.module, read.tensor, gave.tensor)
    if isinstance(found, str) or gave is None:
        raise SiteError(f"{site}: {half} of {anatomy.owner} has routed experts that cannot be told apart: {found}")
    name, shape = f"{decoder.path}.{site.layer}.{half.first.name}", gave.tensor.shape
    tap = Tap(Site(site.layer, kind), half.first.module, name, "output", len(shape) == 2, shape[-1])
    return Experts(tap, *found)


def _matrix(stored: Tensor, down: Down) -> Tensor:
    """A stored matrix as [out, in], float32, on the CPU."""
    found = stored.detach().to("cpu", torch.float32, copy=True)
    return found.T if down.transposed else found


def _first_rows(rows: Tensor, width: int, transposed: bool) -> Tensor:
    """A stack of matrices [e, width, i] (or [e, i, width]) of which number e has row e of `rows` as its first.

    Matrix e begins at row e of one table, so that all of them take little more room than one. What stands in their
    other rows does not matter.
    """
    experts, inputs = rows.shape
    table = torch.cat([rows, rows.new_zeros(width - 1, inputs)])
    stack = table.as_strided((experts, width, inputs), (inputs, inputs, 1))
    return stack.mT if transposed else stack
