"""What the losses over rows of logits share: checks of arguments, live rows, chunks of rows.

A row is live if its result is wanted; the others are not read. Chunks are for plain PyTorch: each
of its buffers [chunk, V] has at most 512 KB (but at least one row), so that a few of them stay in
an L2 cache of 2 MB.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp
from torch.distributed.tensor import DTensor

from ._launch import triton
from ._transform import transform_

BUFFER_BYTES = 2**19
MAX_BLOCK_V = 4096
NUM_WARPS = 8  # 16 entries of a block per thread
_LEAST_TEMPERATURE = 1e-38
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sum_dtype(logits: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def live_rows(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[N] bool, contiguous; all rows without a mask."""
    if mask is None:
        return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    return mask.contiguous()


def live_chunks(logits: Tensor, live: Tensor) -> tuple[Tensor, ...]:
    """Indices of the live rows, in chunks of one buffer each."""
    row_bytes = logits.shape[1] * sum_dtype(logits).itemsize
    return live.nonzero().squeeze(-1).split(max(1, BUFFER_BYTES // row_bytes))


def load_rows(logits: Tensor, rows: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """x [chunk, V], a buffer of its own."""
    return transform_(logits.index_select(0, rows).to(sum_dtype(logits)), temperature, softcap)


def block_of(columns: int) -> int:
    """Vocabulary entries that a program of a kernel holds at a time."""
    return min(MAX_BLOCK_V, triton.next_power_of_2(columns))


def shared_max(top: Tensor, group: ProcessGroup | None) -> Tensor:
    """Maximum over the shards of `group`; a tensor of its own."""
    top = top.clone()
    if group is not None:
        dist.all_reduce(top, ReduceOp.MAX, group)
    return top


def shared_sum(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the shards of `group`, in place."""
    if group is not None:
        dist.all_reduce(sums, ReduceOp.SUM, group)
    return sums


def check_logits(logits: Tensor, name: str = "logits") -> None:
    check_tensor(logits, name)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"expected {name} [N, V] with V > 0, got {tuple(logits.shape)}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"expected {name} of fp32, bf16, fp16 or fp64, got {logits.dtype}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"{name} must be contiguous along V, got strides {logits.stride()}")


def check_like(
    x: Tensor, logits: Tensor, name: str, shape: tuple, dtypes: tuple, of: str = "logits"
) -> None:
    """`x` has this shape (None: any size), one of these dtypes, and the device of the logits."""
    check_tensor(x, name)
    if x.ndim != len(shape) or any(b not in (None, a) for a, b in zip(x.shape, shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"expected {name} of shape [{wanted}], got {tuple(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"expected {name} of {wanted}, got {x.dtype}")
    if x.device != logits.device:
        raise ValueError(f"{of} on {logits.device}, but {name} on {x.device}")


def check_mask(mask: Tensor | None, logits: Tensor) -> None:
    if mask is not None:
        check_like(mask, logits, "mask", (logits.shape[0],), (torch.bool,))


def check_number(value: float, name: str, low: float, high: float) -> float:
    """`value` as a float, if it is a number in (low, high); tensors are none."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low < value < high:
        found = f"{type(value).__name__} {value}" if isinstance(value, str | Tensor) else value
        bounds = f"> {low:g}" if high == math.inf else f"in ({low:g}, {high:g})"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {found}")
    return float(value)


def check_temperature(value: float, name: str = "temperature") -> float:
    """A temperature whose inverse is finite in fp32."""
    return check_number(value, name, _LEAST_TEMPERATURE, math.inf)


def check_softcap(value: float | None, name: str = "softcap") -> float | None:
    return None if value is None else check_number(value, name, 0, math.inf)


def check_integer(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected an int, got {type(value).__name__} {value}")


def check_tensor(x: Tensor, name: str) -> None:
    """`x` is a plain tensor with data."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if isinstance(x, DTensor):
        raise ValueError(
            f"{name} is a DTensor, expected a plain tensor: full_tensor(), or to_local() with "
            "group= where the vocabulary is sharded"
        )
    if x.is_meta:
        raise ValueError(f"{name} is on meta, expected a device with data")


def check_group(group: ProcessGroup | None) -> None:
    if group is None:
        return
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            "group: expected a torch.distributed.ProcessGroup (of a DeviceMesh: "
            f"mesh.get_group()), got {type(group).__name__}"
        )
    if not dist.is_initialized():
        raise ValueError("group was given, but torch.distributed is not initialized")
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of group")
