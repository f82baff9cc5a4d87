"""Checks and safe arithmetic shared by the files of this folder.

Shapes: B sequences, T tokens. A mask is [B, T] bool, True at a token the policy generated. What
stands at a masked position never matters, not even NaN: it is replaced, not multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

MAX_LOG_RATIO = 20.0  # e^20 = 4.9e8 is outside every trust region, and its square still fits fp32


def wide(x: Tensor) -> Tensor:
    """`x` in at least fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where `mask` is False, in value and in gradient, whatever stood there."""
    return torch.where(mask, x, x.new_zeros(()))


def ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), with the log-ratio clamped before the exp."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def excess(log_ratio: Tensor) -> Tensor:
    """ratio - 1 without cancellation near 1, clamped as `ratio` is."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).expm1()


def k3(log_ratio: Tensor) -> Tensor:
    """ratio - 1 - ln ratio >= 0, an estimate of the KL from samples; clamped as `ratio` is."""
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (clamped.expm1() - clamped).clamp_min(0)


def total(x: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """`x` summed over the ranks of a process group, in its dtype; as it is without one."""
    return _reduced(x, dist.ReduceOp.SUM, process_group)


def maximum(x: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Element-wise maximum of `x` over the ranks of a process group."""
    return _reduced(x, dist.ReduceOp.MAX, process_group)


def minimum(x: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Element-wise minimum of `x` over the ranks of a process group."""
    return _reduced(x, dist.ReduceOp.MIN, process_group)


def _reduced(x: Tensor, operation: dist.ReduceOp, process_group: ProcessGroup | None) -> Tensor:
    """In fp64 or int64, whatever the ranks' dtypes: a collective of unlike ones kills a process."""
    if process_group is None:
        return x
    same = x.double() if x.is_floating_point() else x.long()
    same = same.clone() if same is x else same
    dist.all_reduce(same, operation, group=process_group)
    return same.to(x.dtype)


def mean_over(x: Tensor, mask: Tensor, process_group: ProcessGroup | None = None) -> Tensor:
    """Mean of `x` where `mask` is True, over all ranks, 0 where nothing is; a 0-d tensor."""
    both = total(torch.stack([masked(x, mask).sum(), mask.sum().to(x.dtype)]), process_group)
    return both[0] / both[1].clamp_min(1)


def row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B] mean of `x` over the unmasked tokens of a row, 0 for an all-masked row."""
    return masked(x, mask).sum(1) / mask.sum(1).clamp_min(1)


@contextmanager
def agreed(process_group: ProcessGroup | None, like: Tensor) -> Iterator[None]:
    """Checks whose error one rank alone may see: every rank of the group raises, or none.

    Without it the others would wait in the next collective for a rank that has left.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    if process_group is not None:
        device = like.device if isinstance(like, Tensor) else None
        failed = torch.tensor(float(error is not None), device=device)
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=process_group)
        if failed and error is None:
            raise ValueError("expected sound input on every rank, got an error on another rank")
    if error is not None:
        raise error


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"expected {name} as a tensor, got {type(x).__name__}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    check_tensor(name, x)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"expected {name} {letters} = {tuple(shape)}, got {tuple(x.shape)}")


def check_mask(mask: Tensor) -> None:
    check_tensor("mask", mask)
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] == 0:
        raise ValueError(
            f"expected mask [B, T] of torch.bool, T >= 1, got {tuple(mask.shape)} of {mask.dtype}"
        )


def check_finite(name: str, x: Tensor, counted: Tensor | None = None) -> None:
    """Raise at the first NaN or inf of `x` where `counted` (bool as `x`; None: all) is True."""
    bad = ~x.isfinite() if counted is None else ~x.isfinite() & counted
    if bad.any():
        position = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"expected finite {name} where it counts, got {x[position].item()} at {position}"
        )


def check_tokens(name: str, x: Tensor, mask: Tensor) -> None:
    """`x` must be [B, T] as the mask is, and finite at every unmasked position."""
    check_shape(name, x, mask.shape, "[B, T]")
    check_finite(name, x, mask)


def check_groups(group_ids: Tensor, rows: int) -> None:
    check_shape("group_ids", group_ids, (rows,), "[B]")
    if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
        raise ValueError(f"expected group_ids of an integer dtype, got {group_ids.dtype}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {choices}, got {value!r}")


def valid_rows(valid: Tensor | None, like: Tensor, name: str = "valid") -> Tensor:
    """[B] bool: `valid`, or all True when it is None; `like` gives B and the device."""
    if valid is None:
        return torch.ones(like.shape[0], dtype=torch.bool, device=like.device)
    check_shape(name, valid, like.shape[:1], "[B]")
    if valid.dtype != torch.bool:
        raise ValueError(f"expected {name} of torch.bool, got {valid.dtype}")
    return valid
