"""Hyper-parameters of a group: their ranges, and the numbers of a step that the kernels read."""

from collections.abc import Sequence
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_hyperparameters(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: expected a tensor of one element, found shape {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        known = is_number(value) or isinstance(value, Tensor)
        if not known or not 0 <= value < inf:
            raise ValueError(f"{name}: expected a finite number, at least 0, found {value!r}")
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), found {betas!r}")
    if group["fused"] and group["foreach"]:
        raise ValueError("fused: expected False or None with foreach=True, found True")


def hyper_row(group: dict[str, Any], step: float, grad_scale: float) -> tuple[float, ...]:
    """A row of HYPER."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    return (
        lr / (1 - beta1**step),
        1 - lr * group["weight_decay"],
        1 - beta1,
        1 - beta2,
        (1 - beta2**step) ** -0.5,
        group["eps"],
        -grad_scale if group["maximize"] else grad_scale,
        0.0,
    )


def hyper_rows_on_device(
    group: dict[str, Any], steps: Tensor, scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor, ...]:
    """Rows of HYPER, one per step count; nothing waits for the device."""
    beta1, beta2 = group["betas"]
    lr, t = group["lr"], steps.double()
    if isinstance(lr, Tensor):
        lr = lr.to(t.device, t.dtype).reshape(())
    columns = [
        lr / (1 - beta1**t),
        1 - lr * group["weight_decay"],
        1 - beta1,
        1 - beta2,
        (1 - beta2**t) ** -0.5,
        group["eps"],
        (-1.0 if group["maximize"] else 1.0) / (1.0 if scale is None else scale.reshape(())),
        0.0 if found_inf is None else found_inf.reshape(()),
    ]
    dtype = torch.float64 if t.device.type == "cpu" else torch.float32
    rows = torch.zeros(len(t), len(columns), dtype=dtype, device=t.device)
    for i, column in enumerate(columns):
        rows[:, i] = column
    return rows.unbind()
