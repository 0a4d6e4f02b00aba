"""Routed experts: which parameters hold their down projections, and what each of those reads.

A block's experts are one stack of matrices in one module, which sends every token through a few of them. No module
gives what a down projection reads, so both questions are put to baseline copies of the modules: the same parameters, no
hooks, the down projections replaced.

* Which. Matrices whose row 0 alone is not zero move number 0 of what the MLP gives, in proportion, and no other. Of an
  MLP's parameters only down projections do that, those of routed experts and that of one shared by all tokens.
* How far along a gate. With the gates g_e as rows 0, number 0 is `sum over a token's experts of weight_e (g_e . x_e)`.
* What is read. With the unit matrix in their place and weights of 1, the experts give x itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy
from steerkit.network.block_trace import argument_of, tensor_of
from steerkit.network.decoder import Decoder
from steerkit.network.sites import Site
from steerkit.network.tap import Tap

__all__ = ["Down", "Experts", "Routed", "experts_at"]

_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Down(NamedTuple):
    """A parameter that holds down projections.

    Attributes:
        name: its name inside the MLP.
        transposed: whether a matrix is stored [i, o], as in GPT-OSS, and not [o, i].
    """

    name: str
    transposed: bool

    @property
    def owner(self) -> str:
        """The name of the module that holds it."""
        return self.name.rpartition(".")[0]


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
        twin, (device, dtype) = _bare(self.tap.module), self.place
        _put(twin, self.stack.name, _first_rows(gates.to(device, dtype), self.tap.width, self.stack.transposed))
        for name in self.biases:
            _put(twin, name, torch.zeros_like(twin.get_parameter(name)))
        if self.shared is not None:
            old = twin.get_parameter(self.shared.name)
            row = old.new_zeros(old.shape[0 if self.shared.transposed else 1]) if shared is None else shared.to(old)
            _put(twin, self.shared.name, row[:, None].expand_as(old) if self.shared.transposed else row.expand_as(old))

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
        routing = _routing(args, kwargs)
        if routing is None:
            raise SiteError(f"{self.tap.site}: `{self.stack.owner}` is not told which experts are meant")
        hidden, index, weights = routing
        expert, token = index[chosen].reshape(-1), chosen.repeat_interleave(index.shape[1])
        new = {id(hidden): hidden[token], id(index): expert[:, None], id(weights): torch.ones_like(weights[token, :1])}
        asked = [new.get(id(one), one) for one in args]
        named = {name: new.get(id(one), one) for name, one in kwargs.items()}
        twin = _bare(self.tap.module)
        for name in self.biases:
            _put(twin, name, torch.zeros_like(twin.get_parameter(name)))
        old = twin.get_parameter(self.stack.name)
        width = old.shape[1 if self.stack.transposed else 2]
        pieces = []
        for start in range(0, width, self.tap.width):
            unit = old.new_zeros(self.tap.width, width)
            unit.diagonal(start).fill_(1.0)
            _put(twin, self.stack.name, (unit.mT if self.stack.transposed else unit).expand_as(old))
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
    found: _Found | str = "it is more than one module"
    if len(half.calls) == 1 and read is not None and gave is not None:
        found = _structure(half.first.module, read.tensor, gave.tensor)
    if isinstance(found, str) or gave is None:
        raise SiteError(f"{site}: {half} of {anatomy.owner} has routed experts that cannot be told apart: {found}")
    name, shape = f"{decoder.path}.{site.layer}.{half.first.name}", gave.tensor.shape
    tap = Tap(Site(site.layer, kind), half.first.module, name, "output", len(shape) == 2, shape[-1])
    return Experts(tap, *found)


# Found once for each module: which parameters write does not depend on their values.
_KNOWN: Any = WeakIdKeyDictionary()
_Found = tuple[Down, Down | None, tuple[str, ...]]


def _structure(module: nn.Module, read: Tensor, gave: Tensor) -> _Found | str:
    """The parameters of an MLP that write; or why this file does not know what to do with it."""
    if module not in _KNOWN:
        try:
            with torch.no_grad():
                _KNOWN[module] = _search(module, read, gave)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # offloaded, quantised
            reason = (str(error).splitlines() or [""])[0]
            return f"a copy of them does not run ({type(error).__name__}: {reason})"
    known: _Found | str = _KNOWN[module]
    return known


def _search(module: nn.Module, read: Tensor, gave: Tensor) -> _Found | str:
    twin, width = _bare(module), gave.shape[-1]
    stacks: list[Down] = []
    linears: list[Down] = []
    parameters = {name: value for name, value in twin.named_parameters() if value.is_floating_point()}
    for name, value in parameters.items():
        is_linear = _is_linear(twin.get_submodule(name.rpartition(".")[0]))
        for axis in (1, 2) if value.dim() == 3 else (0, 1) if value.dim() == 2 and is_linear else ():
            if value.shape[axis] == width and _writes(twin, read, name, axis):
                found, last = (stacks, 2) if value.dim() == 3 else (linears, 1)
                found.append(Down(name, axis == last))
                break
    if len(stacks) != 1 or len(linears) > 1:
        return (
            f"{len(stacks)} stacks of matrices and {len(linears)} linear layers write, where 1 and at most 1 are known"
        )
    if not _is_told(twin, read, stacks[0].owner):
        return f"`{stacks[0].owner}` is not told, token by token, which experts are meant"
    for down in (*stacks, *linears):  # a number that every row is multiplied with moves nothing any more: no bias
        _put(twin, down.name, torch.zeros_like(parameters[down.name]))
    matrices = {down.name for down in (*stacks, *linears)}
    biases = tuple(
        name
        for name, value in parameters.items()
        if name not in matrices and value.dim() in (1, 2) and value.shape[-1] == width
        if _writes(twin, read, name, value.dim() - 1)
    )
    for name in biases:
        _put(twin, name, torch.zeros_like(parameters[name]))
    left = tensor_of(twin(read)).abs().max()
    if float(left) > _ROUNDING.get(gave.dtype, 1e-4) * float(gave.abs().max()):
        return "something writes beside their matrices"
    return stacks[0], (linears[0] if linears else None), biases


def _is_told(twin: nn.Module, read: Tensor, owner: str) -> bool:
    """Whether a module is called with every token, and with which experts it goes to."""
    told = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = _routing(args, kwargs)
        told.append(routing is not None and len(routing[0]) == read.shape[:-1].numel())

    handle = twin.get_submodule(owner).register_forward_pre_hook(look, with_kwargs=True)
    twin(read)
    handle.remove()
    return told == [True]


def _writes(twin: nn.Module, read: Tensor, name: str, axis: int) -> bool:
    """Whether the part of a parameter at place 0 of an axis moves number 0 of what is given, linearly, and no other."""
    old = twin.get_parameter(name)
    shape = (1, *old.shape[1:]) if old.dim() == 3 else tuple(old.shape)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(shape, generator=generator).to(old).select(axis, 0) for _ in range(2))

    def given(part: Tensor) -> Tensor:
        value = old.new_zeros(shape)
        value.select(axis, 0).copy_(part)
        _put(twin, name, value.expand(old.shape))
        output: Tensor = tensor_of(twin(read))
        return output.float()

    try:
        for scale in (1.0, 1e3):  # a shared expert may be all but silent on these few tokens
            still = given(torch.zeros_like(one))
            first, second, both = (given(scale * part) - still for part in (one, other, one + other))
            near = _ROUNDING.get(old.dtype, 1e-4) * torch.stack([still, first, second, both]).abs().max()
            if bool(both[..., 0].abs().max() > 5 * near):
                apart = torch.maximum((both - first - second).abs().max(), both[..., 1:].abs().max())
                return bool(apart <= near)
    finally:
        _put(twin, name, old)
    return False


def _routing(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tokens [n, d], their experts [n, k] and the weights [n, k] of those, if that is what a module is called with."""
    hidden = argument_of(args, kwargs)
    rest = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one is not hidden]
    index = [one for one in rest if not one.is_floating_point() and one.dtype != torch.bool and one.dim() == 2]
    weights = [one for one in rest if one.is_floating_point() and len(index) == 1 and one.shape == index[0].shape]
    if not isinstance(hidden, Tensor) or len(weights) != 1 or hidden.shape[:-1] != index[0].shape[:1]:
        return None
    return hidden, index[0], weights[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matrix(stored: Tensor, down: Down) -> Tensor:
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


def _bare(module: nn.Module) -> nn.Module:
    """A copy of a module with the same parameters and without anybody's hooks, at rest."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for name, value in module.__dict__.items():
        if "_hooks" in name and isinstance(value, dict):
            twin.__dict__[name] = OrderedDict()
    if "_hf_hook" in twin.__dict__:  # accelerate's, whose `forward` runs the module and not its copy
        del twin.__dict__["_hf_hook"]
        twin.__dict__.pop("forward", None)
    twin.__dict__["_compiled_call_impl"] = None
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = {
        name: None if child is None else _bare(child) for name, child in module._modules.items()
    }
    return twin


def _put(twin: nn.Module, name: str, value: Tensor) -> None:
    """Put another parameter into an empty copy."""
    path, _, leaf = name.rpartition(".")
    kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)
    twin.get_submodule(path)._parameters[leaf] = kept
