"""Fitting site by site in the order of a pass, each site on what those before it make of the texts.

    site 1       read, fit
    site 2       read under 1, fit
    site 3       read under 1 and 2, fit ...

Run from the start for each site that would be as many passes as there are sites. What leaves the blocks that are done
is kept instead, edits included, for all texts on the CPU, and the next site's pass goes on from there: each block runs
once to be done with, and once more up to each of its sites.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from steerkit._support.progress import bar
from steerkit.activations.reading import forward_body, read_passes
from steerkit.activations.readout import Readout, chosen_columns
from steerkit.activations.recording import check_finite
from steerkit.methods._subject import Read
from steerkit.network.block_trace import tensor_of
from steerkit.network.context import check_lengths, named
from steerkit.network.residual_form import plain_tokens
from steerkit.network.tap import locate
from steerkit.prompts.batching import Batch, batches, pad_token_id
from steerkit.steering.kept_blocks import can_spare, given, moved_to, noted
from steerkit.steering.steering import steer

if TYPE_CHECKING:
    from steerkit.network.decoder import Decoder
    from steerkit.network.sites import Site
    from steerkit.network.tap import Tap
    from steerkit.prompts.chat_roles import Roles
    from steerkit.prompts.rendering import Rendered
    from steerkit.vector.steering_vector import SteeringVector

__all__ = ["Advance", "in_order"]


class _Stream(NamedTuple):
    """How many blocks need not run again, what left the last of them, and the device that it belongs on."""

    blocks: int
    output: Any
    device: torch.device


class Advance:
    """Runs texts from site to site under all that has been fitted so far.

    Args:
        model: any decoder-only transformers model.
        tokenizer: its tokenizer.
        decoder: the model's decoder.
        roles: finds the role of each token, for scopes by role.
        rendered: the texts.
        batch_size: rows per pass.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        decoder: Decoder,
        roles: Roles,
        rendered: Sequence[Rendered],
        batch_size: int,
    ) -> None:
        check_lengths(decoder, rendered, named("text", rendered))
        self._model, self._decoder, self._roles, self._rendered = model, decoder, roles, rendered
        self._work = batches(rendered, batch_size, pad_id=pad_token_id(tokenizer))
        self._streams: dict[tuple[int, ...], _Stream] = {}

    def fitted(
        self,
        sites: Sequence[Site],
        fit_one: Callable[[Site, Read], Mapping[str, Tensor]],
        vector: Callable[[Mapping[str, Tensor], Sequence[Site]], SteeringVector],
        *,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Fit every site on the texts as the sites before it have changed them.

        Args:
            sites: where.
            fit_one: from a site, and what reads it, to the tensors of the site by name, of any shape; none where it is
                left as it is.
            vector: makes what steers of the tensors of some sites.
            progress: show a progress bar on stderr.

        Returns:
            ``"<site>/<name>"`` to tensor, in the order of the sites given.
        """
        taps = locate(self._model, sites)
        tensors: dict[str, Tensor] = {}
        done: list[Site] = []

        def under(first: int) -> SteeringVector | None:
            """What has been fitted from a block on."""
            some = [site for site in done if site.layer >= first]
            names = {f"{site}/" for site in some}
            mine = {name: one for name, one in tensors.items() if name.partition("/")[0] + "/" in names}
            return vector(mine, some) if some else None

        ordered = in_order(self._decoder, taps)
        with bar("fitting", len(ordered)) if progress else contextlib.nullcontext(lambda: None) as step:
            for site in ordered:
                found = fit_one(site, lambda readout, site=site: self._rows(taps[site], readout, under))  # type: ignore[misc]
                tensors |= {f"{site}/{name}": one for name, one in found.items()}
                done += [site] if found else []
                step()
        return {name: tensors[name] for site in taps for name in tensors if name.startswith(f"{site}/")}

    def _rows(self, tap: Tap, readout: Any, under: Callable[[int], SteeringVector | None]) -> Tensor:
        """What is read at a site, [n, d] float32 on the CPU, one row for each text."""
        plan, site = Readout.parse(readout), tap.site
        chosen = chosen_columns(plan, self._rendered, lambda row: f"row {row}")
        rows = torch.empty(len(self._rendered), tap.width, dtype=torch.float32)

        def take(_site: Site, found: Tensor, batch: Batch) -> None:
            rows[list(batch.rows)] = found.cpu()

        def around(batch: Batch) -> contextlib.AbstractContextManager[None]:
            return self._around(batch, site, under)

        read_passes(self._decoder, {site: tap}, self._work, chosen, take, False, plan, around=around)
        check_finite({site: rows})
        return rows

    @contextlib.contextmanager
    def _around(self, batch: Batch, site: Site, under: Callable[[int], SteeringVector | None]) -> Iterator[None]:
        """One pass up to a site, under what was fitted before it, from the last block whose output is known."""
        known, last = self._streams.get(batch.rows), self._decoder.blocks[site.layer - 1]
        start = 0 if known is None else known.blocks
        # Somebody else's hook on the last block would act again on what it has acted on.
        is_kept = start < site.layer and not last._forward_hooks and can_spare(self._decoder, site.layer)
        vector, seen = under(start), list[Any]()
        with contextlib.ExitStack() as stack:
            if known is not None:
                stack.enter_context(given(self._decoder, start, moved_to(known.device, known.output)))
            if vector is not None:
                lengths = batch.prompt_lengths
                stack.enter_context(steer(self._model, vector, prompt_lengths=lengths, tokenizer=self._roles))
            if is_kept:
                stack.enter_context(noted(last, seen, edited=True))
            yield
        if seen:
            self._streams[batch.rows] = _Stream(site.layer, moved_to("cpu", seen[0]), tensor_of(seen[0]).device)


def in_order(decoder: Decoder, taps: Mapping[Site, Tap]) -> list[Site]:
    """Sites in the order in which a pass comes by, found by one over three tokens.

    Args:
        decoder: the model's decoder.
        taps: by site.

    Raises:
        FitError: the model never ran one of the places.
    """
    met: list[Site] = []
    with plain_tokens(decoder) as ids:
        forward_body(decoder, taps, ids, torch.ones_like(ids), lambda site, _h: met.append(site))
    return met
