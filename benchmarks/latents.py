"""Vectors of latents for the timings: rows of a random dictionary at one block, as many as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steerkit.dictionary import Dictionary
from steerkit.methods._latent_reading import rows_tensors
from steerkit.methods.latent import Latent
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.vector.model_identity import model_facts
from steerkit.vector.steering_vector import SteeringVector

LATENTS = 2048


def of_latents(model: Any, op: str, count: int) -> SteeringVector:
    """So many latents at the middle block, of which few fire, moved by very little."""
    decoder = find_decoder(model)
    width, site = decoder.hidden_size, Site(decoder.num_layers // 2)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(LATENTS, width, generator=draw)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    zeros = torch.zeros
    one = Dictionary(rows, rows, zeros(LATENTS), zeros(width), "jumprelu", site, threshold=torch.full((LATENTS,), 5.0))
    chosen = list(range(count))
    own = one.rows(chosen)
    amounts = torch.full((count,), 0.01)
    method = Latent(dictionary="random", latents=tuple(chosen), op=op)  # type: ignore[arg-type]
    tensors = {
        "direction": amounts @ own.decoder,
        "latents": torch.tensor(chosen),
        "amounts": amounts,
        "peak": torch.tensor(0.01),
        "decoder": own.decoder,
        **rows_tensors(own),
    }
    return SteeringVector(
        method="latent",
        tensors={f"{site}/{name}": value for name, value in tensors.items()},
        sites=(site,),
        edit=method.edit_name,
        scope="response",
        unit="paper",
        settings=method.settings,
        **model_facts(decoder.model),
    )


def beside_plain(run: Callable[[Any], Any], model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Generation with one latent added, and with the same addition as a plain vector."""
    latent = of_latents(model, "add", 1)
    (site,) = latent.sites
    plain = SteeringVector.from_directions({site.layer: latent.params(site)["direction"]}, model)
    return lambda: run(latent.at(1.0)), lambda: run(plain.at(1.0))
