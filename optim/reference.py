"""Adam-mini by its definition, one tensor at a time; formulas are those of adam_mini.py.

Source: arXiv 2406.16793, the update rule.
"""

from typing import NamedTuple

from torch import Tensor

from .layouts import BlockLayout


class AdamMiniState(NamedTuple):
    """What an update returns: param and exp_avg as they came in, exp_avg_sq one entry per block."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def adam_mini_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    layout: BlockLayout,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdamMiniState:
    """One Adam-mini step by the definition: entries are gathered and spread by block number.

    Args:
        param, grad, exp_avg: `layout.shape`, one floating dtype, in which everything is computed.
        exp_avg_sq: `layout.state_shape`, the same dtype.
        layout: the blocks of `param`.
        step: t, 1 for the first step.
        lr, betas, eps, weight_decay: as in AdamMini.

    Returns:
        New tensors; the arguments are not changed.

    Source: arXiv 2406.16793, the update rule.
    """
    beta1, beta2 = betas
    block = layout.index(param.device)
    sums = param.new_zeros(layout.n_blocks).index_add(0, block.flatten(), (grad * grad).flatten())
    means = sums / block.flatten().bincount(minlength=layout.n_blocks)
    m = beta1 * exp_avg + (1 - beta1) * grad
    v = beta2 * exp_avg_sq + (1 - beta2) * means.view(layout.state_shape)
    denominator = (v / (1 - beta2**step)).sqrt() + eps
    decayed = param * (1 - lr * weight_decay)
    moved = lr * (m / (1 - beta1**step)) / denominator.flatten()[block]
    return AdamMiniState(decayed - moved, m, v)
