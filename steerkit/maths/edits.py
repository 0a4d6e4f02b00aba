"""Pure functions that change activations, shared by the methods.

Shapes: `b` rows, `t` tokens of this pass, `d` width of the site. Nothing is changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerkit.errors import FitError
from steerkit.maths.directions import coordinates

__all__ = [
    "add",
    "add_gated",
    "add_window",
    "affine",
    "aim",
    "heading",
    "keep_norm",
    "plane",
    "project_out",
    "rotate_by",
    "rotate_to",
    "scale_units",
    "set_projection",
    "turn",
    "turning",
]


def add(h: Tensor, direction: Tensor) -> Tensor:
    """Add one direction to every token.

    Args:
        h: [b, t, d] activations.
        direction: [d], or [b, 1, d] where every row has its own, in the dtype of `h`.

    Returns:
        [b, t, d]
    """
    return h + direction


def add_gated(h: Tensor, read: Tensor, gate: Tensor, direction: Tensor, strength: Tensor) -> Tensor:
    """Add a direction as strongly as a gate says of what was read: `h + strength * (gate . read) * direction`.

    Args:
        h: [b, t, o] activations that are written.
        read: [b, t, i] activations that are read.
        gate: [i], in the dtype of `h`.
        direction: [o], in the dtype of `h`.
        strength: float32, [] or [b, 1, 1].

    Returns:
        [b, t, o] in the dtype of `h`.
    """
    amount = coordinates(read.to(gate), gate)
    return torch.addcmul(h, (amount[..., None].float() * strength).to(h.dtype), direction)


def add_window(h: Tensor, directions: Tensor, offset: Tensor) -> Tensor:
    """Add one direction per position inside a window, nothing outside of it.

    Args:
        h: [b, t, d] activations.
        directions: [w, d], or [b, w, d] where every row has its own, in the dtype of `h`.
        offset: [b, t] place of every token counted from the window's start; outside 0..w-1 nothing is added.

    Returns:
        [b, t, d]
    """
    width = directions.shape[-2]
    inside = (offset >= 0) & (offset < width)
    row = offset.clamp(0, width - 1)
    if directions.dim() == 2:
        added = directions[row]
    else:
        added = directions.gather(1, row[..., None].expand(-1, -1, directions.shape[-1]))
    return torch.where(inside[..., None], h + added, h)


def affine(h: Tensor, gain: Tensor, shift: Tensor, inside: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Stretch and shift every number of every token: `h + gain * h + shift` (activation transport, arXiv 2410.23054).

    Args:
        h: [..., d] activations.
        gain: [d], or [b, 1, d] where every row has its own: what each is multiplied by, less 1.
        shift: [d], or [b, 1, d].
        inside: [d] each: numbers that do not lie between them, both ends excluded, stay bitwise what they were.

    Returns:
        [..., d] in the dtype of `h`; computed in float32 at least, or in the wider dtype of gain and shift.
    """
    wide = h.to(torch.promote_types(torch.promote_types(h.dtype, torch.float32), gain.dtype))
    moved = (wide + torch.addcmul(shift.to(wide), gain.to(wide), wide)).to(h.dtype)
    if inside is None:
        return moved
    low, high = inside
    return torch.where((wide > low) & (wide < high), moved, h)


def keep_norm(edited: Tensor, h: Tensor) -> Tensor:
    """Give every edited token the norm it had before.

    Args:
        edited: [b, t, d] activations after an edit.
        h: [b, t, d] activations before it.

    Returns:
        [b, t, d] in float32, per token `edited * |h| / |edited|`; a token that the edit made zero stays zero.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    edited, before = edited.to(wide), torch.linalg.vector_norm(h.to(wide), dim=-1, keepdim=True)
    after = torch.linalg.vector_norm(edited, dim=-1, keepdim=True)
    return edited * torch.where(after > 0, before / after.clamp_min(torch.finfo(torch.float32).tiny), after)


def project_out(h: Tensor, direction: Tensor, *, share: float | Tensor = 1.0, is_unit: bool = False) -> Tensor:
    """Take the component along a direction out of every token: `h - share * (h . u) u`, with `u` of length 1.

    Args:
        h: [..., d] activations.
        direction: [d], of any length; one of length 0 takes nothing out.
        share: how much of the component is taken; a number, or a tensor such as [b, 1, 1] where rows differ.
        is_unit: the direction has length 1 and wide enough dtype already, so that no pass has to measure it.

    Returns:
        [..., d] in the dtype of `h`; computed in float32 at least.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    u = direction.to(wide) if is_unit else _unit(direction, wide)
    return torch.addcmul(wide, share * _along(wide, u), u, value=-1.0).to(h.dtype)


def set_projection(h: Tensor, direction: Tensor, target: float | Tensor, *, is_unit: bool = False) -> Tensor:
    """Give every token the same coordinate along a direction: `h + (target - h . u) u`, with `u` of length 1.

    Args:
        h: [..., d] activations.
        direction: [d], of any length; one of length 0 changes nothing.
        target: the coordinate, in activation units; a number, or a tensor such as [b, 1, 1] where rows differ.
        is_unit: the direction has length 1 and wide enough dtype already, so that no pass has to measure it.

    Returns:
        [..., d] in the dtype of `h`; computed in float32 at least.
    """
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    u = direction.to(wide) if is_unit else _unit(direction, wide)
    return torch.addcmul(wide, target - _along(wide, u), u).to(h.dtype)


def scale_units(h: Tensor, gamma: Tensor) -> Tensor:
    """Scale single units of every token by `1 + gamma` (AUSteer, arXiv 2602.04428).

    Args:
        h: [..., d] activations.
        gamma: [d], or [b, 1, d] where every row has its own, in the dtype of `h`; 0 for units that stay.

    Returns:
        The shape of `h`, `h + gamma * h` with the product and the sum each rounded to its dtype; units whose gamma is 0
        are bitwise what they were, infinite ones too.
    """
    return torch.where(gamma == 0, h, h + gamma * h)


def _along(h: Tensor, unit: Tensor) -> Tensor:
    """[..., 1] coordinate along a direction. Not by `@`: autocast would do that in half precision."""
    return (h * unit).sum(dim=-1, keepdim=True)


def _unit(direction: Tensor, like: Tensor) -> Tensor:
    """[d] of length 1; one of length 0 stays as it is. No look at the value: that would wait for the device."""
    exact = direction.to(
        like.device, _exact(like)
    )  # in float32 the square of a very short or long one is 0 or infinite
    length = torch.linalg.vector_norm(exact)
    return torch.where(length > 0, exact / length.clamp_min(torch.finfo(exact.dtype).tiny), exact).to(like.dtype)


def _exact(like: Tensor) -> torch.dtype:
    """Double precision wherever there is any."""
    return like.dtype if like.device.type == "mps" else torch.float64


def rotate_by(h: Tensor, b1: Tensor, b2: Tensor, degrees: float | Tensor) -> Tensor:
    """Turn every token inside a plane by an angle, from b1 towards b2 (Selective Steering, arXiv 2601.19375).

    With `c1 = h.b1` and `c2 = h.b2`, in the rank-2 form that needs no matrix of the model's width:

        h' = h + [(cos - 1) c1 - sin c2] b1 + [sin c1 + (cos - 1) c2] b2

    The angle is relative: a token's polar angle in the plane grows by it. Norms and distances between tokens stay.

    Args:
        h: [b, t, d] activations (or any [..., d]).
        b1: [d], first axis of the plane.
        b2: [d], second axis; both are made orthonormal again here.
        degrees: the angle; one number, or [b, 1, 1] where every row has its own.

    Returns:
        The shape and dtype of `h`, computed in float32 at least. At whole turns bitwise `h`.

    Raises:
        FitError: the two axes lie on one line, or one has no length.
    """
    basis = plane(b1, b2, h.dtype)
    angle = torch.as_tensor(degrees, dtype=_exact(basis), device=basis.device)
    return torch.where(torch.fmod(angle, 360.0) != 0, turn(h, basis, *turning(basis, angle)), h)


def rotate_to(h: Tensor, b1: Tensor, b2: Tensor, degrees: float | Tensor, threshold: float | None = None) -> Tensor:
    """Turn every token inside a plane to an angle, counted from b1 towards b2 (Angular Steering, arXiv 2510.26243).

    With `c1 = h.b1`, `c2 = h.b2` and `r = sqrt(c1^2 + c2^2)`:

        h' = h + (r cos - c1) b1 + (r sin - c2) b2

    The angle is absolute: every token's part in the plane ends up on one ray, whatever its polar angle was. Norms stay
    here too, because r stays; but tokens that differ in their polar angle alone become one, and no angle is the
    identity.

    Args:
        h: [b, t, d] activations (or any [..., d]).
        b1: [d], first axis of the plane.
        b2: [d], second axis; both are made orthonormal again here.
        degrees: the angle; one number, or [b, 1, 1] where every row has its own.
        threshold: turn only tokens with `c1` above it (adaptive angular steering has 0); None turns all.

    Returns:
        The shape and dtype of `h`, computed in float32 at least; tokens that are not turned are bitwise what they were.

    Raises:
        FitError: the two axes lie on one line, or one has no length.
    """
    basis = plane(b1, b2, h.dtype)
    return aim(h, basis, heading(degrees, basis), threshold)


def plane(b1: Tensor, b2: Tensor, dtype: torch.dtype) -> Tensor:
    """The orthonormal basis of a plane.

    Args:
        b1: [d], of any length.
        b2: [d], not on one line with b1.
        dtype: of the activations.

    Returns:
        [2, d], in float32 or the wider dtype of the activations; the first row along b1.

    Raises:
        FitError: the two axes lie on one line, or one has no length.
    """
    # The basis decides how well norms stay, and it is only 2 d numbers.
    first, second = b1.to(_exact(b1)), b2.to(_exact(b1))
    first = first / (first * first).sum().sqrt()
    second = second / (second * second).sum().sqrt()
    across = second - (second * first).sum() * first
    if not torch.compiler.is_compiling() and not float((across * across).sum()) > 1e-12:
        raise FitError("the two axes of a rotation lie on one line (or one has no length), so they span no plane")
    for _ in range(2):  # what rounding leaves of b1 after the first time goes the second time
        second = second - (second * first).sum() * first
        second = second / (second * second).sum().sqrt()
    return torch.stack([first, second]).to(torch.promote_types(dtype, torch.float32))


def turning(basis: Tensor, degrees: float | Tensor) -> tuple[Tensor, Tensor]:
    """What `turn` needs to know of an angle.

    Args:
        basis: gives dtype and device.
        degrees: the angle; one number, or one per row such as [b, 1, 1].

    Returns:
        Cosine less 1, and sine, in the shape of the angle.
    """
    angle = torch.fmod(torch.as_tensor(degrees, dtype=_exact(basis), device=basis.device), 360.0)
    half, full = torch.deg2rad(angle / 2), torch.deg2rad(angle)
    less = -2 * torch.sin(half) ** 2  # cos - 1, without cancellation at small angles
    return less.to(basis.dtype), torch.sin(full).to(basis.dtype)


def turn(h: Tensor, basis: Tensor, less: Tensor, sine: Tensor) -> Tensor:
    """Turn every token's part in the plane by an angle.

    Args:
        h: [b, t, d] activations.
        basis: [2, d], in float32 at least.
        less: cosine less 1, [] or [b, 1, 1].
        sine: [] or [b, 1, 1].

    Returns:
        The shape and dtype of `h`.
    """
    wide = h.to(basis.dtype)
    first, second = _coordinates(wide, basis)
    return _moved(wide, basis, less * first - sine * second, sine * first + less * second).to(h.dtype)


def heading(degrees: float | Tensor, basis: Tensor) -> Tensor:
    """The point of the unit circle at an angle.

    Args:
        degrees: the angle; one number, or [b, 1, 1].
        basis: gives dtype and device.

    Returns:
        Cosine and sine, [2] or [2, b, 1, 1].
    """
    angle = torch.deg2rad(torch.fmod(torch.as_tensor(degrees, dtype=_exact(basis), device=basis.device), 360.0))
    return torch.stack([torch.cos(angle), torch.sin(angle)]).to(basis.dtype)


def aim(h: Tensor, basis: Tensor, ray: Tensor, threshold: float | None = None) -> Tensor:
    """Put every token's part in the plane on one ray, its length kept.

    Args:
        h: [b, t, d] activations.
        basis: [2, d], in float32 at least.
        ray: what `heading` gave.
        threshold: see `rotate_to`.

    Returns:
        The shape and dtype of `h`.
    """
    wide = h.to(basis.dtype)
    first, second = _coordinates(wide, basis)
    length = torch.hypot(first, second)
    turned = _moved(wide, basis, length * ray[0] - first, length * ray[1] - second)
    if threshold is None:
        return turned.to(h.dtype)
    return torch.where(first > threshold, turned.to(h.dtype), h)


def _coordinates(wide: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Both coordinates of every token, [b, t, 1] each; products and sums, since matrix products may run in less."""
    return (wide * basis[0]).sum(dim=-1, keepdim=True), (wide * basis[1]).sum(dim=-1, keepdim=True)


def _moved(wide: Tensor, basis: Tensor, along: Tensor, across: Tensor) -> Tensor:
    """Every token moved along both axes. In place the second time: a large buffer more costs more than the sum."""
    return torch.addcmul(wide, along, basis[0]).addcmul_(across, basis[1])
