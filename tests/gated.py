"""Gated vectors made by hand, and what each row of a run should be: steered plainly where it is open, else baseline."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import steerkit
from steerkit.methods._thresholds import score
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector
from tests import modes
from tests.modes import LONG, SHORT

READ, WRITE = Site(3), Site(1)
REPEATED = (5, 17, 44, 9, 5, 17, 44, 9, 5, 17)


def activation(model: Any, prompt: Sequence[int], site: Site = READ, *, readout: str = "last") -> Tensor:
    """[d] what a gate reads of a prompt on its own, from the baseline model, by hooks written out by hand."""
    found: list[Tensor] = []
    block = find_decoder(model).blocks[site.layer]
    handle = block.register_forward_hook(
        lambda _module, _args, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    handle.remove()
    return found[0][0, -1].float() if readout == "last" else found[0][0, 1:].float().mean(0)


def gated_vector(
    model: Any,
    *,
    read: Site = READ,
    write: Site | Sequence[Site] = WRITE,
    scope: str = "response",
    readout: str = "last",
    opens: Sequence[Sequence[int]] = (SHORT, REPEATED),
    closes: Sequence[Sequence[int]] = (LONG, SHORT[:4]),
    size: float = 3.0,
) -> SteeringVector:
    """A conditional vector whose gate opens for some prompts and stays closed for others."""
    plus = [activation(model, prompt, read, readout=readout) for prompt in opens]
    minus = [activation(model, prompt, read, readout=readout) for prompt in closes]
    condition = separating(torch.stack(plus), torch.stack(minus))
    scores = [[float(score(h[None], condition)) for h in side] for side in (plus, minus)]
    assert min(scores[0]) > max(scores[1]), scores
    sites = (write,) if isinstance(write, Site) else tuple(write)
    plain = modes.vector_for(model, scope="response", site=sites[0], size=size)
    direction = plain.tensors[f"{sites[0]}/direction"]
    return SteeringVector(
        suggested_strength=1.0,
        method="conditional",
        tensors={
            "shared/condition": condition[None],
            "shared/layer": torch.tensor([read.layer]),
            "shared/threshold": torch.tensor([(min(scores[0]) + max(scores[1])) / 2], dtype=torch.double),
            "shared/above": torch.tensor([True]),
            **{f"{site}/direction": direction for site in sites},
        },
        sites=sites,
        fitted_at=None if sites == (read,) else (read,),
        edit="add_where",
        scope=scope,
        unit="paper",
        readout=readout,
        model_type=plain.model_type,
        hidden_size=plain.hidden_size,
        num_layers=plain.num_layers,
    )


def separating(plus: Tensor, minus: Tensor) -> Tensor:
    """A direction whose cosine parts a few rows surely: least squares on rows of length 1."""
    rows = torch.nn.functional.normalize(torch.cat([plus, minus]).double(), dim=-1)
    wanted = torch.cat([torch.ones(len(plus)), -torch.ones(len(minus))]).double()
    return torch.linalg.lstsq(rows, wanted[:, None], driver="gelsd").solution[:, 0].float()


def plain_of(vector: SteeringVector) -> SteeringVector:
    """The same addition without a gate."""
    return SteeringVector(
        suggested_strength=1.0,
        method="caa",
        tensors={name: tensor for name, tensor in vector.tensors.items() if name.endswith("/direction")},
        sites=vector.sites,
        edit="add",
        scope=vector.scope,
        unit="paper",
        model_type=vector.model_type,
        hidden_size=vector.hidden_size,
        num_layers=vector.num_layers,
    )


def as_decided(model: Any, vector: SteeringVector, prompt: Sequence[int], *, opens: bool, strength: float = 1.0) -> Any:
    """The context in which a row of a gated run is to be compared."""
    if not opens:
        return contextlib.nullcontext()
    return steerkit.steer(model, plain_of(vector), strength, prompt_lengths=[len(prompt)])
