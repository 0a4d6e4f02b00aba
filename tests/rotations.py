"""Golden numbers of the rotations, and their slow, obvious forms with dense matrices, for both methods' tests."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import steerkit
from steerkit.activations.recording import Activations
from steerkit.maths.directions import orthonormalise
from steerkit.methods._plane import RotateInPlane
from steerkit.network.decoder import find_decoder
from steerkit.network.sites import Site
from steerkit.vector.steering_vector import SteeringVector

FOLDER = Path(__file__).parent / "golden"
DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
KINDS = {"input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in"}


@functools.cache
def arrays() -> dict[str, Tensor]:
    return load_file(FOLDER / "selective.safetensors")


@functools.cache
def facts() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "selective.json").read_text(encoding="utf-8"))
    return loaded


TOLERANCE = facts()["tolerance"]


def site_of(name: str) -> Site:
    """`model.layers.3.input_layernorm` as a site."""
    _, _, layer, norm = name.split(".")
    return Site(int(layer), KINDS[norm])


def sites_of(names: Sequence[str]) -> list[Site]:
    return [site_of(name) for name in names]


def sides(group: str, dtype: torch.dtype = torch.float32) -> Activations:
    """The golden activations of both sides, `cal` or `tiny`."""
    count = arrays()[f"{group}.pos"].shape[0]
    sites = sites_of(facts()["layer_names"][:count])
    positive, negative = (
        {site: rows.to(dtype) for site, rows in zip(sites, arrays()[f"{group}.{side}"], strict=True)}
        for side in ("pos", "neg")
    )
    return Activations(positive=positive, negative=negative)


def gap(got: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of every row, relative to the largest entry of what was expected."""
    difference = (got.double() - expected.double()).abs().amax(dim=-1)
    return difference / expected.double().abs().amax(dim=-1).clamp_min(1e-12)


def dense_rotation(h: Tensor, b1: Tensor, b2: Tensor, degrees: float) -> Tensor:
    """h - P h + V h, row by row, with matrices of the model's width."""
    angle = math.radians(degrees)
    plane = torch.outer(b1, b1) + torch.outer(b2, b2)
    turned = math.cos(angle) * plane + math.sin(angle) * (torch.outer(b2, b1) - torch.outer(b1, b2))
    rows = [row - plane @ row + turned @ row for row in h.reshape(-1, h.shape[-1])]
    return torch.stack(rows).reshape(h.shape)


def dense_aim(h: Tensor, b1: Tensor, b2: Tensor, degrees: float, threshold: float | None = None) -> Tensor:
    """h - P h + |P h| (cos b1 + sin b2), row by row."""
    angle = math.radians(degrees)
    plane = torch.outer(b1, b1) + torch.outer(b2, b2)
    ray = math.cos(angle) * b1 + math.sin(angle) * b2
    rows = []
    for row in h.reshape(-1, h.shape[-1]):
        spared = threshold is not None and float(row @ b1) <= threshold
        rows.append(row if spared else row - plane @ row + (plane @ row).norm() * ray)
    return torch.stack(rows).reshape(h.shape)


def bases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Axes as wide as a real model's: a clean pair, and pairs as far from orthonormal as the published ones."""
    width, found = 3584, {}
    wanted = {"clean": {"n1-1": 0.0, "n2-1": 0.0, "b1.b2": 0.0}, **facts()["published_bases"]}
    for seed, (name, off) in enumerate(wanted.items()):
        draw = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
        first, second = orthonormalise(draw).double()
        lengths = 1 + off["n1-1"], 1 + off["n2-1"]
        cosine = off["b1.b2"] / (lengths[0] * lengths[1])
        b2 = cosine * first + math.sqrt(1 - cosine**2) * second
        found[name] = (
            (first * lengths[0]).to(torch.float32 if name == "clean" else torch.bfloat16),
            (b2 * lengths[1]).to(torch.float32 if name == "clean" else torch.bfloat16),
        )
    return found


def half_in_plane(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """[64, d] rows with, on average, half of their energy in the plane."""
    generator = torch.Generator().manual_seed(7)
    width = first.shape[0]
    axes = orthonormalise(torch.stack([first, second]).float())
    rest = torch.randn(64, width, generator=generator)
    rest = rest - rest @ axes.T @ axes
    inside = torch.randn(64, 2, generator=generator) * math.sqrt(width / 2)
    return (rest + inside @ axes).to(dtype)


@functools.cache
def tiny() -> Any:
    """The golden Llama, in float64."""
    config = tf.LlamaConfig(**facts()["tiny_config"], pad_token_id=None, bos_token_id=None, eos_token_id=None)
    model = tf.LlamaForCausalLM(config).eval()
    weights = {name.removeprefix("tiny.w."): value for name, value in arrays().items() if name.startswith("tiny.w.")}
    model.load_state_dict(weights)
    return model.double()


def tiny_vector(method: RotateInPlane) -> tuple[SteeringVector, float]:
    """What a method makes of the golden activations of the tiny model, and the sign of its b2 against the golden one.

    The reference leaves b2's sign to the decomposition; the methods fix it by the data. With the opposite sign an angle
    of the reference is the negative angle here.
    """
    acts = sides("tiny")
    places = list(acts.positive)
    subject: Any = None
    tensors = method.fit(acts, subject, places)
    decoder = find_decoder(tiny())
    vector = SteeringVector(
        method=method.name,
        tensors=tensors,
        sites=tuple(method.written(places, tensors, decoder)),
        edit=method.edit_name,
        scope="all",
        unit="paper",
        settings=method.settings,
        model_type="llama",
        hidden_size=32,
        num_layers=6,
    )
    return vector, float((tensors["shared/second"] @ arrays()["tiny.cal.b2"]).sign())


def tiny_logits(ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = tiny()(input_ids=torch.tensor([list(ids)])).logits[0]
    return found


def tiny_tokens(ids: Sequence[int]) -> list[int]:
    """Eight greedy tokens with a cache."""
    given = torch.tensor([list(ids)])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = tiny().generate(given, attention_mask=torch.ones_like(given), **options)
    tokens: list[int] = out[0, given.shape[1] :].tolist()
    return tokens


def check_tiny(method: RotateInPlane, group: str) -> None:
    """Logits and tokens of the golden model at every golden angle."""
    vector, sign = tiny_vector(method)
    for test in ("test0", "test1"):
        ids = facts()["tiny_prompts"][test]
        logits, greedy = arrays()[f"tiny.logits.{group}.{test}"], arrays()[f"tiny.greedy.{group}.{test}"]
        for index, degrees in enumerate(facts()["tiny_angles"]):
            with steerkit.steer(tiny(), vector, sign * degrees):
                found = tiny_logits(ids)
                tokens = tiny_tokens(ids)
            assert float(gap(found.flatten(), logits[index].flatten())) < TOLERANCE["tiny_logits"], (group, degrees)
            assert tokens == greedy[index].tolist(), (group, degrees)


def planted(model: Any, method: RotateInPlane, *, seed: int = 0, layers: Sequence[int] | None = None) -> SteeringVector:
    """A vector of a random plane at the method's own sites, big enough an edit at any angle."""
    decoder = find_decoder(model)
    sites = method.sites(decoder) if layers is None else method.sites_at(decoder, layers)
    draw = torch.randn(2, decoder.hidden_size, generator=torch.Generator().manual_seed(seed))
    first, second = orthonormalise(draw)
    tensors = {"shared/direction": first, "shared/second": second}
    return SteeringVector(
        method=method.name,
        tensors={**tensors, **{f"{site}/projections": torch.tensor([1.0, -1.0]) for site in sites}},
        sites=tuple(sites),
        edit=method.edit_name,
        scope="all",
        unit="paper",
        settings=method.settings,
        model_type=decoder.model.config.get_text_config().model_type,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
    )


def at_sites(vector: SteeringVector, sites: Sequence[Site]) -> SteeringVector:
    """The same plane at other sites."""
    shared = {name: tensor for name, tensor in vector.tensors.items() if name.startswith("shared/")}
    own = {f"{site}/projections": torch.tensor([1.0, -1.0]) for site in sites}
    return replace(vector, sites=tuple(sites), tensors={**shared, **own})
