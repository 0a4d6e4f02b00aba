"""How much of a direction the projection behind it sees: its part in the projection's row space.

At the heads (`z`) and the neurons (`mlp_post`) one matrix W reads everything. A direction v there splits in two,

    v = v_row + v_null,     W v_null = 0,     seen share = |v_row|^2 / |v|^2

Adding v does what adding v_row does. But an edit that reads the coordinate along v, as ablation and set-projection do,
measures v_null as well, which nothing behind it sees: it works through a dormant part (Makelov, Lange, Nanda (2023),
"Is This the Subspace You Are Looking For?", arXiv 2311.17030). The test is to run it again with v_row alone. A random
direction has a share of about rows / columns of W, a quarter to two fifths at the neurons of today's models. At the
residual stream many matrices read, and there is no such kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steerkit.errors import SiteError
from steerkit.network.decoder import Decoder
from steerkit.network.linears import Linear, linears_at
from steerkit.network.sites import Site

__all__ = ["PROJECTED", "projection", "seen_part", "seen_shares"]

PROJECTED: Mapping[str, str] = {"z": "attn_raw", "mlp_post": "mlp_raw"}
"""What a projection reads, and what it gives."""


def projection(decoder: Decoder, site: Site) -> Linear:
    """The linear layer that reads a site, alone.

    Args:
        decoder: the model's decoder.
        site: of kind z or mlp_post.

    Raises:
        SiteError: no one linear layer reads there, as with routed experts.
    """
    (linear,) = linears_at(decoder, [Site(site.layer, PROJECTED[site.kind])]).values()
    if linear.read != site:
        raise SiteError(f"{site}: the projection of this block reads {linear.read} and not this")
    return linear


def seen_part(matrix: Tensor, directions: Tensor) -> Tensor:
    """The part of directions that a matrix sees: their projection on its row space.

    Args:
        matrix: [o, i].
        directions: [..., i].

    Returns:
        [..., i] float64, on the device of the matrix, or the CPU where that has no float64.
    """
    exact = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    columns = directions.to(exact.device).double().reshape(-1, exact.shape[1]).T
    # The least squares of W^T c = v, by an orthogonal basis: the Gram matrix would square what is nearly dependent.
    basis, triangle = torch.linalg.qr(exact.T)
    rank = triangle.diagonal().abs() > torch.finfo(torch.float32).eps * triangle.abs().max()
    if not bool(rank.all()):  # rows that depend on each other: a basis that tells them apart
        left, sizes, _ = torch.linalg.svd(exact.T, full_matrices=False)
        basis = left[:, sizes > torch.finfo(torch.float32).eps * sizes.max()]
    seen: Tensor = (basis @ (basis.T @ columns)).T.reshape(directions.shape)
    return seen


def seen_shares(decoder: Decoder, directions: Mapping[Site, Tensor]) -> dict[Site, float]:
    """The share of each direction that the projection behind its site sees.

    Args:
        decoder: the model's decoder.
        directions: [i] by site, of any kind.

    Returns:
        From 0 to 1, of the sites at `z` and `mlp_post` that one linear layer reads.
    """
    found = {}
    for site, given in directions.items():
        direction = given.detach().cpu().double()
        length = float(direction.square().sum())
        if site.kind not in PROJECTED or not length > 0:
            continue
        try:
            matrix = projection(decoder, site).weight(decoder.model.dtype)
        except SiteError:  # routed experts, or a weight that cannot be read
            continue
        found[site] = min(1.0, float(seen_part(matrix, direction).square().sum()) / length)
    return found
