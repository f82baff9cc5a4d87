"""x = softcap(z) / temperature, in PyTorch and in Triton, with its derivative.

softcap(z) = c tanh(z / c). -inf (a masked vocabulary entry), +inf and NaN (a broken row) stay what
they are, so that a capped logit hides neither. Derivative: dx/dz = (1 - tanh(z/c)^2) / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import jit, tl


def transform(z: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """x of z, of any shape; differentiable; in the dtype of z."""
    if softcap is not None:
        z = torch.where(z.isinf(), z, softcap * (z / softcap).tanh())
    return z / temperature


def transform_(z: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """`transform` over z in place."""
    if softcap is not None:
        infinite = z.isinf()
        capped = z.div(softcap).tanh_().mul_(softcap)
        z.copy_(torch.where(infinite, z, capped) if infinite.any() else capped)
    return z if temperature == 1 else z.div_(temperature)


def transform_gradient_(grad: Tensor, x: Tensor, temperature: float, softcap: float | None):
    """Gradient for z, over the gradient for x; x as `transform` gave it."""
    if softcap is not None:
        t = x.mul(temperature / softcap).clamp_(-1, 1)  # -inf, where grad is 0
        grad.mul_(t.square_().neg_().add_(1))
    return grad if temperature == 1 else grad.div_(temperature)


@jit
def tanh(u):
    # The exponential form cancels near 0; there the series is exact to fp32.
    a = tl.abs(u)
    t = tl.exp(-2 * a)
    far = tl.where(u < 0, -1.0, 1.0) * (1 - t) / (1 + t)
    s = tl.where(a < 0.25, u * u, 0.0)
    near = u * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(a < 0.25, near, far)


@jit
def transformed(z, inv_temperature, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        z = tl.where(tl.abs(z) == float("inf"), z, softcap * tanh(z / softcap))
    return z * inv_temperature


@jit
def transformed_gradient(grad, x, inv_temperature, softcap, SOFTCAP: tl.constexpr):
    masked = x == -float("inf")  # no gradient reaches these entries
    grad *= inv_temperature
    if SOFTCAP:
        t = tl.where(masked, 0.0, x / (inv_temperature * softcap))
        grad *= 1 - t * t
    return tl.where(masked, 0.0, grad)
