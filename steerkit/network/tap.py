"""`Tap`: where a site's tensor is read and written in one model; `locate` finds it by running the model once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerkit.errors import SiteError
from steerkit.network.anatomy import Anatomy, Place
from steerkit.network.block_trace import argument_of, probe_blocks, tensor_of
from steerkit.network.decoder import find_decoder
from steerkit.network.residual_form import form_of, forms_noted, is_token_wise, plain_tokens
from steerkit.network.router_search import Chosen
from steerkit.network.routing import dense_weights, slotted
from steerkit.network.sites import Site, layers_text

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder

__all__ = ["RouterTap", "Tap", "anatomies", "locate", "routes_tokens", "sites_of_kind"]


@dataclass(frozen=True)
class Tap:
    """Where a site's tensor is read and written in one model.

    Attributes:
        site: the canonical site.
        module: the module to hook.
        name: its name inside the inner model.
        side: whether the tensor is what the module reads or what it gives.
        flat: whether the tensor is `[b*t, width]` there instead of `[b, t, width]` (OPT's MLP).
        width: its last dimension.
    """

    site: Site
    module: nn.Module
    name: str
    side: Literal["input", "output"]
    flat: bool
    width: int

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Tensor:
        """The tensor, from what a hook was given.

        Args:
            args: the module's positional arguments.
            kwargs: its keyword arguments.
            output: what it gave, for a tap on the output.

        Returns:
            `[b, t, width]`, or `[b*t, width]` where `flat`; the object itself, not a copy.

        Raises:
            SiteError: there is no tensor where one was found before.
        """
        tensor = argument_of(args, kwargs) if self.side == "input" else tensor_of(output)
        if not isinstance(tensor, Tensor):
            raise SiteError(f"{self.site}: the {self.side} of {self.name} is {type(tensor).__name__}, not a tensor")
        return tensor

    def write_input(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the tensor replaced; what was given is left alone.

        Args:
            args: the module's positional arguments.
            kwargs: its keyword arguments.
            value: the new tensor, [b, t, width] or [b*t, width] as the old one.

        Returns:
            What a pre-hook with keyword arguments returns.
        """
        if args:
            return (value, *args[1:]), dict(kwargs)
        return args, {**kwargs, "hidden_states": value}

    def attach(self, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
        """Put a function between the site and all that reads it.

        Args:
            change: from the tensor [b, t, width] (or [b*t, width] where `flat`) to one of its shape.

        Returns:
            The hook's handle.
        """

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.write_input(args, kwargs, change(self.read(args, kwargs)))

        def behind(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return self.write_output(output, change(self.read(args, {}, output)))

        if self.side == "input":
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(behind)

    def write_output(self, output: Any, value: Tensor) -> Any:
        """The output with the tensor replaced, of the same type; what was given is left alone.

        Args:
            output: a tensor, or a tuple, a list or a ModelOutput that starts with it.
            value: the new tensor, [b, t, width] or [b*t, width] as the old one.

        Returns:
            What a forward hook returns.
        """
        if isinstance(output, Mapping):
            changed = {**output, next(iter(output)): value}
            return type(output)(**changed) if dataclasses.is_dataclass(output) else type(output)(changed)  # type: ignore[call-arg]
        if isinstance(output, tuple) and hasattr(output, "_replace"):
            return output._replace(**{output._fields[0]: value})  # type: ignore[attr-defined]
        if isinstance(output, (tuple, list)):
            return type(output)((value, *output[1:]))
        return value


@dataclass(frozen=True)
class RouterTap(Tap):
    """Where a router's choice is read and written, in its dense form [b*t, e].

    Attributes:
        chosen: how the router's output is read.
        owner: the MLP that it belongs to; one that runs without its router would leave what is written out.
    """

    chosen: Chosen
    owner: nn.Module

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Tensor:
        """The dense form, from what a hook was given.

        Args:
            args: unused.
            kwargs: unused.
            output: what the router gave.

        Returns:
            [b*t, e] the weights, zero where an expert is not chosen.
        """
        return dense_weights(output[self.chosen.weights], output[self.chosen.index], self.chosen.experts)

    def write_output(self, output: Any, value: Tensor) -> Any:
        """The output with other weights, and other experts where these have become nonzero; the scores stay.

        Args:
            output: what the router gave.
            value: [b*t, e] the new dense form.

        Returns:
            What a forward hook returns.
        """
        parts = list(output)
        parts[self.chosen.weights], parts[self.chosen.index] = slotted(value, output[self.chosen.index])
        return tuple(parts)


def locate(model: nn.Module, sites: Iterable[Site]) -> dict[Site, Tap]:
    """Find the modules and tensors of some sites.

    The first time in a model's life, one forward pass over three tokens sees what form its residual stream has, and
    where the sites are that were asked. Later ones of a kind or a block that was not asked yet take another one, up to
    the deepest such block; what it finds is kept as long as the blocks are made of the same modules.

    Args:
        model: as for `find_decoder`.
        sites: the places asked for.

    Returns:
        Taps by canonical site, in the order asked; attn_raw and mlp_raw become attn_out and mlp_out where they are the
        same tensor.

    Raises:
        SiteError: a layer outside the model, or a kind that a block does not have; the message says what it has. Or the
            residual stream is not one vector [b, t, d] for each token, or a block runs several times in a pass.
    """
    decoder = find_decoder(model)
    asked = list(sites)
    owner = type(decoder.model).__name__
    for site in asked:
        if site.layer >= decoder.num_layers:
            last = decoder.num_layers - 1
            where = f"layer {site.layer} is outside 0..{last} of {owner} ({decoder.num_layers} layers)"
            raise SiteError(f"{site}: {where}")
    inside = [site for site in asked if not site.kind.startswith("resid_")]
    known = _known(decoder, inside)
    found = anatomies(decoder, {site.layer for site in inside if site.kind not in known[site.layer]})
    _refuse_other_forms(decoder, asked)
    _add_places(decoder, inside, known, found)
    taps = {}
    for site in asked:
        name = f"{decoder.path}.{site.layer}"
        if site.kind.startswith("resid_"):
            side: Literal["input", "output"] = "input" if site.kind == "resid_pre" else "output"
            tap = Tap(site, decoder.blocks[site.layer], name, side, flat=False, width=decoder.hidden_size)
        else:
            place = known[site.layer][site.kind]
            facts = (
                Site(site.layer, place.kind),
                place.module,
                f"{name}.{place.name}",
                place.side,
                place.flat,
                place.width,
            )
            tap = Tap(*facts)
            if place.chosen is not None and place.owner is not None:
                tap = RouterTap(*facts, place.chosen, place.owner)
        taps[tap.site] = tap
    return taps


# By block: what its modules and their hooks were, and where its kinds of sites are then.
_Makeup = tuple[tuple[Any, ...], ...]
_PLACES: WeakKeyDictionary[nn.Module, tuple[_Makeup, dict[str, Place]]] = WeakKeyDictionary()


def _known(decoder: Decoder, sites: Iterable[Site]) -> dict[int, dict[str, Place]]:
    """By layer the kinds that were found before in the blocks of some sites; nothing in a block made anew since."""
    known = {}
    for layer in sorted({site.layer for site in sites}):
        block = decoder.blocks[layer]
        makeup = _makeup(block)
        if block not in _PLACES or _PLACES[block][0] != makeup:
            _PLACES[block] = makeup, {}
        known[layer] = _PLACES[block][1]
    return known


def _add_places(
    decoder: Decoder, sites: Iterable[Site], known: dict[int, dict[str, Place]], found: Mapping[int, Anatomy]
) -> None:
    """Add to what is known of each block where the sites are that were not."""
    for site in sites:
        if site.kind not in known[site.layer]:
            try:
                known[site.layer][site.kind] = found[site.layer].find(site.kind)
            except SiteError as error:
                if site.kind != "router":
                    raise
                raise _elsewhere(decoder, site, error) from None


def _elsewhere(decoder: Decoder, site: Site, error: SiteError) -> SiteError:
    """The refusal of a router, with the blocks that have one."""
    try:
        layers = [one.layer for one in sites_of_kind(decoder, site.kind)]
    except SiteError:
        return error
    return SiteError(f"{error}; there are routers in blocks {layers_text(layers)}")


def _makeup(block: nn.Module) -> _Makeup:
    """Whatever may change which module gives what: the modules of a block, what they run, and the hooks on them.

    The modules themselves are kept, not their numbers in memory, which another module may get later.
    """
    return tuple(
        (name, module, module.forward, *module._forward_hooks, *module._forward_pre_hooks)
        for name, module in block.named_modules()
        if module is not block
    )


def sites_of_kind(decoder: Decoder, kind: str) -> list[Site]:
    """The sites of one kind, in every block that has one.

    Args:
        decoder: the model's decoder.
        kind: such as ``"mlp_post"``.

    Raises:
        SiteError: no block has it; the first one's reason.
    """
    found, reasons = [], []
    for layer, anatomy in anatomies(decoder, set(range(decoder.num_layers))).items():
        try:
            found.append(Site(layer, anatomy.find(kind).kind))
        except SiteError as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    return found


def routes_tokens(decoder: Decoder) -> bool:
    """Whether an MLP of some block has routed experts.

    Args:
        decoder: the model's decoder.

    Raises:
        SiteError: the body fails on plain token ids, or a block did not run.
    """
    found = anatomies(decoder, set(range(decoder.num_layers)))
    return any(half.experts for anatomy in found.values() for half in anatomy.mlps)


def anatomies(decoder: Decoder, layers: set[int]) -> dict[int, Anatomy]:
    """Run the decoder body over three tokens and read off the roles in some blocks.

    Args:
        decoder: the model's decoder.
        layers: the blocks, counted from 0.

    Returns:
        By layer what stands where in it.

    Raises:
        SiteError: the body fails on plain token ids, or a block did not run.
    """
    if not layers:
        return {}
    with plain_tokens(decoder) as input_ids, forms_noted(decoder) as to_the_end:
        blocks = {layer: decoder.blocks[layer] for layer in sorted(layers)}
        to_the_end |= decoder.entry is not decoder.body
        traces = probe_blocks(decoder.entry, blocks, input_ids, to_the_end=to_the_end)
    types = getattr(decoder.model.config.get_text_config(), "layer_types", None)
    owner = type(decoder.model).__name__
    return {
        layer: Anatomy(trace, layer, owner, decoder.hidden_size, types[layer] if types is not None else None)
        for layer, trace in traces.items()
    }


def _refuse_other_forms(decoder: Decoder, sites: Iterable[Site]) -> None:
    """Refuse sites whose tensor is not one vector of the model's width for each token.

    Raises:
        SiteError: what passes between the blocks has another form, or a block runs several times in a pass.
    """
    for site in sites:
        form = form_of(decoder, site.layer)
        if len(form.gave) > 1:
            what = f"runs {len(form.gave)} times in a pass, so a site of it would be several tensors"
            raise SiteError(f"{site}: block {site.layer} of {type(decoder.model).__name__} {what}")
        shapes = {"resid_pre": form.read, "resid_post": form.gave}.get(site.kind, [])
        if not all(is_token_wise(shape, decoder.hidden_size) for shape in shapes):
            raise anatomies(decoder, {site.layer})[site.layer].several_streams(site.kind)
