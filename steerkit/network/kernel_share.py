"""How much of a direction the projection behind it sees: its part in the projection's row space.

At the heads (`z`) and the neurons (`mlp_post`) one matrix W reads everything. A direction v there splits in two,

    v = v_row + v_null,     W v_null = 0,     seen share = |v_row|^2 / |v|^2

Adding v does what adding v_row does. But an edit that reads the coordinate along v, as ablation and set-projection do,
measures v_null as well, which nothing behind it sees: it works through a dormant part (Makelov, Lange, Nanda (2023), "Is
This the Subspace You Are Looking For?", arXiv 2311.17030). The test is to run it again with v_row alone. A random direction has a
share of about rows / columns of W, a quarter to two fifths at the neurons of today's models. At the residual stream many
matrices read, and there is no such kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from steerkit.errors import SiteError
from steerkit.network.decoder import Decoder
from steerkit.network.linears import linears_at
from steerkit.network.sites import Site

__all__ = ["PROJECTED", "projections", "seen_part", "seen_shares"]

PROJECTED: Mapping[str, str] = {"z": "attn_raw", "mlp_post": "mlp_raw"}
"""What a projection reads, and what it gives."""


def projections(decoder: Decoder, sites: Iterable[Site]) -> dict[Site, Tensor]:
    """The matrices that read at some sites.

    Args:
        decoder: the model's decoder.
        sites: of any kind.

    Returns:
        By site [o, i] float32, of those that one linear layer and nothing else reads.
    """
    found = {}
    for site in sites:
        if site.kind not in PROJECTED:
            continue
        try:
            (linear,) = linears_at(decoder, [Site(site.layer, PROJECTED[site.kind])]).values()
            if linear.read == site:
                found[site] = linear.weight(decoder.model.dtype)
        except SiteError:  # routed experts, or a weight that cannot be read
            continue
    return found


def seen_part(matrix: Tensor, directions: Tensor) -> Tensor:
    """The part of directions that a matrix sees: their projection on its row space.

    Args:
        matrix: [o, i].
        directions: [..., i].

    Returns:
        [..., i] float64, on the device of the matrix.
    """
    exact = matrix.double()
    columns = directions.to(exact.device).double().reshape(-1, exact.shape[1]).T
    # The least squares of W^T c = v, by an orthogonal basis: the Gram matrix would square what is nearly dependent.
    basis, triangle = torch.linalg.qr(exact.T)
    rank = triangle.diagonal().abs() > torch.finfo(torch.float32).eps * triangle.abs().max()
    if not bool(rank.all()):  # rows that depend on each other: a basis that tells them apart
        left, sizes, _ = torch.linalg.svd(exact.T, full_matrices=False)
        basis = left[:, sizes > torch.finfo(torch.float32).eps * sizes.max()]
    return (basis @ (basis.T @ columns)).T.reshape(directions.shape)


def seen_shares(decoder: Decoder, directions: Mapping[Site, Tensor]) -> dict[Site, float]:
    """The share of each direction that the projection behind its site sees.

    Args:
        decoder: the model's decoder.
        directions: [i] by site, of any kind.

    Returns:
        From 0 to 1, of the sites at `z` and `mlp_post`.
    """
    found = {}
    for site, matrix in projections(decoder, [one for one in directions if one.kind in PROJECTED]).items():
        direction = directions[site].double().to(matrix.device)
        length = float(direction.square().sum())
        if length > 0:
            found[site] = min(1.0, float(seen_part(matrix, direction).square().sum()) / length)
    return found
