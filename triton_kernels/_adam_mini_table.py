"""Which programs of adam_mini.py work on which pieces: its launches, and the table they read.

One launch serves all pieces of one regime, whatever tensors they are in: each has a row of 16 int64
in a table on the device, and a map from programs to rows. Both are kept from call to call; where
only gradients have moved, the table is sent again.

Sizes of tiles depend on shapes alone, not on the device or on what else is in a launch: a row has
the same sum, bit for bit, wherever it is (aligned rows and others may differ in the last bit).
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._adam_mini_reference import ELEMENTWISE_UNIT, Work
from ._launch import triton

TILE = 4096  # entries that a program works on at a time, and keeps in registers
MAX_ROW = 28672  # entries of a row that one program reads twice, then from a cache (112 KB of fp32)
CHUNK = 16384  # entries of a row that share one partial sum
CHUNK_ROWS = 256  # rows of a matrix that share one partial sum of each column
REDUCE_WIDTHS = (16, 1024)  # partial sums that are added up at a time
# Widths of tiles, which have TILE entries or one row. Few: each one in use is a launch.
_WIDTHS = (16, 64, 256, 512, 1024, 2048, TILE)
_COLUMN_SUM_WIDTH = 128
_COLUMN_WIDTH = 256  # the step sizes of a tile are read once
_FLAT_WIDTH = 1024

_ORDER = ("row_sums", "column_sums", "reduce", "one_pass", "apply")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_KEPT_TABLES = 32


class _Task(NamedTuple):
    """One row of the table, and the launch that reads it: one for all of equal kernel and options.

    units, pitch, unit, sums, parts, height: columns 6, 7 and 10 to 13, see adam_mini.py.
    """

    kernel: str
    options: dict[str, Any]
    work: int
    programs: int
    units: int = 0
    pitch: int = 0
    unit: int = 0
    sums: int = 0
    parts: int = 1
    height: int = 1


class Launch(NamedTuple):
    """`programs` programs of a kernel; `map`: their rows of the table, int32."""

    kernel: str
    options: dict[str, Any]
    programs: int
    map: Tensor


class Table:
    """Table and launches of one call, on works of the same pieces in the same memory.

    Only the gradients may move (`refresh`). Once a CUDA graph has read the table nothing of it may
    change any more.
    """

    def __init__(self, call: str, works: Sequence[Work], round_params: bool) -> None:
        _check(call, works)
        tasks, self.n_units, self.n_workspace = _tasks(call, works, round_params)
        device = works[0].grad.device
        buckets: dict[Any, list[_Task]] = {}
        for task in tasks:
            buckets.setdefault((task.kernel, *task.options.values()), []).append(task)
        rows, grad_offsets, aligned = [], [], []
        self.launches: list[Launch] = []
        for bucket in sorted(buckets.values(), key=lambda bucket: _ORDER.index(bucket[0].kernel)):
            kernel, options = bucket[0][:2]
            start, program = len(rows), 0
            for task in bucket:
                rows.append(_row(task, works[task.work], program))
                piece, _, grad, *_ = works[task.work]
                grad_offsets.append(piece.offset * grad.element_size())
                aligned.append(options.get("VECTOR", 1) > 1)
                program += task.programs
            if program >= 2**31:
                raise ValueError(f"works: expected fewer than 2^31 programs, found {program}")
            numbers = _cpu(range(start, len(rows))).int()
            rows_of = numbers.repeat_interleave(_cpu([task.programs for task in bucket]))
            self.launches.append(Launch(kernel, options, program, rows_of.to(device)))
        self.rounds = any(
            launch.options.get("ROUND_P") or launch.options.get("ROUND_M")
            for launch in self.launches
        )
        self.captured = False
        self.grads = _grad_addresses(works)
        self._rows = _cpu(rows).view(-1, 16)
        self._grad_offsets = _cpu(grad_offsets)
        self._aligned = _cpu(aligned).bool()
        self.rows = torch.empty_like(self._rows, device=device)
        # Two, so that one can be filled while the copy of the other is under way.
        pinned = device.type == "cuda"
        self._staged = [torch.empty_like(self._rows, pin_memory=pinned) for _ in range(2)]
        self._sent: list[Any] = [None, None]
        self._send()

    def refresh(self, works: Sequence[Work]) -> bool:
        """Takes the addresses of other gradients; False if they are aligned in another way."""
        grads = _grad_addresses(works)
        addresses = _cpu(grads)[self._rows[:, 4]] + self._grad_offsets
        if (addresses[self._aligned] % 16).any():
            return False
        for work in works:
            _check_tensor("grad", work.grad, work.piece.offset + work.piece.n_entries)
        self.grads = grads
        self._rows[:, 1] = addresses
        self._send()
        return True

    def _send(self) -> None:
        self._staged.reverse()
        self._sent.reverse()
        if self._sent[0] is not None:
            self._sent[0].synchronize()
        self._staged[0].copy_(self._rows)
        self.rows.copy_(self._staged[0], non_blocking=True)
        if self.rows.is_cuda:
            self._sent[0] = torch.cuda.current_stream(self.rows.device).record_event()


_kept: OrderedDict[Any, Table] = OrderedDict()
_captured: list[Table] = []  # graphs hold their addresses


def table_of(call: str, works: Sequence[Work], round_params: bool = False) -> Table:
    """The table of a call: the one kept, if it fits.

    Args:
        call: "one_pass", "unit_sums" or "apply".
        works: at least one.
        round_params: as in these calls.

    Returns:
        A Table on the device of the works.

    Raises:
        ValueError: works that the kernels cannot take.
        RuntimeError: a CUDA graph is being captured, and the table is not there yet.
    """
    key = (
        call,
        round_params,
        *(
            (piece, p.dtype, g.dtype, m.dtype, p.data_ptr(), m.data_ptr(), v.data_ptr())
            for piece, p, g, m, v, _ in works
        ),
    )
    table = _kept.get(key)
    if table is None or table.grads != _grad_addresses(works):
        if is_capturing(works[0].grad.device):
            raise RuntimeError(
                f"{call}: expected the tensors of the warm-up while a CUDA graph is captured, "
                "found others; do one step before, and keep the gradients where they are "
                "(zero_grad(set_to_none=False))"
            )
        if table is None or table.captured or not table.refresh(works):
            table = _kept[key] = Table(call, works, round_params)
    _kept.move_to_end(key)
    if len(_kept) > _KEPT_TABLES:
        _kept.popitem(last=False)
    if not table.captured and is_capturing(works[0].grad.device):
        table.captured = True
        _captured.append(table)
    return table


def why_not(works: Sequence[Work]) -> str | None:
    """Why the kernels cannot take these works.

    Args:
        works: of one device.

    Returns:
        A reason, or None if they can.
    """
    if triton is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for work in works:
        for tensor in work[1:5]:
            if tensor.device.type != ("cpu" if interpreted else "cuda"):
                return f"a tensor on {tensor.device}" + " under TRITON_INTERPRET=1" * interpreted
        for tensor in work[1:4]:
            if tensor.dtype not in DTYPES:
                return f"a tensor of {tensor.dtype}"
        if work.exp_avg_sq.dtype != torch.float32:
            return f"second moments of {work.exp_avg_sq.dtype}"
    return None


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _cpu(numbers: Sequence[Any]) -> Tensor:
    """int64, whatever the default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _grad_addresses(works: Sequence[Work]) -> list[int]:
    return [work.grad.data_ptr() for work in works]


def _check(call: str, works: Sequence[Work]) -> None:
    reason = why_not(works)
    if reason is not None:
        raise ValueError(f"works: expected tensors that a kernel can update, found {reason}")
    device = works[0].grad.device
    for work in works:
        piece = work.piece
        if call == "one_pass" and piece.kind == "column":
            raise ValueError("works: expected row or elementwise pieces, found column")
        stops = dict.fromkeys(("param", "grad", "exp_avg"), piece.offset + piece.n_entries)
        if call == "one_pass" or (call == "apply" and piece.kind == "elementwise"):
            stops["exp_avg_sq"] = piece.first + piece.shape[0]
        for name, stop in stops.items():
            _check_tensor(name, getattr(work, name), stop)
        for tensor in work[1:5]:
            if tensor.device != device:
                raise ValueError(f"works: expected one device, found {device} and {tensor.device}")


def _check_tensor(name: str, tensor: Tensor, stop: int) -> None:
    if not tensor.is_contiguous() or tensor.numel() < stop:
        found = f"{tuple(tensor.shape)} with strides {tensor.stride()}"
        raise ValueError(f"{name}: expected {stop} contiguous entries or more, found {found}")


def _tasks(call: str, works: Sequence[Work], round_params: bool) -> tuple[list[_Task], int, int]:
    """Tasks of a call, the units that it gives numbers to, and the size of its workspace."""
    whole = call == "one_pass"
    two_phase = [
        not whole or (work.piece.kind == "row" and work.piece.shape[1] > MAX_ROW) for work in works
    ]
    sizes = [work.piece.n_units * two for work, two in zip(works, two_phase, strict=True)]
    unit, free = 0, sum(sizes)
    tasks: list[_Task] = []
    for number, (work, two, size) in enumerate(zip(works, two_phase, sizes, strict=True)):
        if two and call != "apply":
            tasks += _sum_tasks(number, work, unit, free, moments=whole)
            free += size * tasks[-1].parts if tasks[-1].kernel == "reduce" else 0
        if call != "unit_sums":
            if two or work.piece.kind == "elementwise":
                tasks.append(_apply_task(number, work, unit, round_params))
            else:
                tasks.append(_one_pass_task(number, work, round_params))
        unit += size
    return [task for task in tasks if task.programs], unit, free


def _sum_tasks(number: int, work: Work, unit: int, free: int, *, moments: bool) -> list[_Task]:
    """Sums of the units of a piece; partial sums, where they are needed, go to `free`."""
    piece, units = work.piece, work.piece.n_units
    if piece.kind == "column":
        batch, height, pitch = piece.shape
        width = min(_width(pitch), _COLUMN_SUM_WIDTH)
        parts, chunk, step = _cdiv(height, CHUNK_ROWS), CHUNK_ROWS, pitch
        programs = batch * parts * _cdiv(pitch, width)
        vector = _vector(work, ("grad",), pitch)
    else:
        height = pitch = ELEMENTWISE_UNIT if piece.kind == "elementwise" else piece.shape[1]
        width = _width(pitch)
        parts, chunk, step = max(1, _cdiv(pitch, CHUNK)), CHUNK if pitch > TILE else width, 1
        programs = _cdiv(units, TILE // width) * parts
        vector = _vector(work, ("grad",), pitch, piece.n_entries)
    kernel = "column_sums" if piece.kind == "column" else "row_sums"
    options = {"GRAD": DTYPES[work.grad.dtype], "VECTOR": vector}
    options |= {"ROWS": TILE // width, "BLOCK": width, "CHUNK": chunk, "num_warps": 8}
    sums = unit if parts == 1 else free
    tasks = [_Task(kernel, options, number, programs, units, pitch, unit, sums, parts, height)]
    if parts != 1:
        narrow, wide = REDUCE_WIDTHS
        block = narrow if parts <= narrow else wide
        rows = wide // block
        options = {"MOMENTS": moments, "ROWS": rows, "BLOCK": block, "num_warps": 4}
        numbers = (units, step, unit, sums, parts, height)
        tasks.append(_Task("reduce", options, number, _cdiv(units, rows), *numbers))
    return tasks


def _one_pass_task(number: int, work: Work, round_params: bool) -> _Task:
    units, length = work.piece.shape
    width, looped = _width(length), length > TILE
    rows = TILE // width
    vector = _vector(work, ("param", "grad", "exp_avg"), length)
    options = {
        **_dtypes(work, round_params),
        "VECTOR": vector,
        "ROWS": rows,
        "BLOCK": width,
        "LOOPED": looped,
        # 16: few long rows at a time, which the cache has to hold; registers of many addresses
        "num_warps": 16 if looped or vector == 1 else 8,
    }
    programs = _cdiv(units, rows) if length else 0
    return _Task("one_pass", options, number, programs, units, length)


def _apply_task(number: int, work: Work, unit: int, round_params: bool) -> _Task:
    kind = work.piece.kind
    matrices, height, pitch = (1, 1, *work.piece.shape)[-3:]
    tile, width = TILE, _width(pitch)
    tensors = ("param", "grad", "exp_avg")
    if kind == "column":
        width = min(width, _COLUMN_WIDTH)
    elif kind == "elementwise":
        tile = width = _FLAT_WIDTH
        tensors += ("exp_avg_sq",)
    rows, vector = tile // width, _vector(work, tensors, pitch)
    options = {
        "KIND": kind,
        **_dtypes(work, round_params),
        "VECTOR": vector,
        "ROWS": rows,
        "BLOCK": width,
        "num_warps": 4 if kind == "elementwise" else 8 if vector > 1 else 16,
    }
    programs = matrices * _cdiv(height, rows) * _cdiv(pitch, width)
    return _Task("apply", options, number, programs, pitch=pitch, unit=unit, height=height)


def _dtypes(work: Work, round_params: bool) -> dict[str, Any]:
    return {
        "PARAM": DTYPES[work.param.dtype],
        "GRAD": DTYPES[work.grad.dtype],
        "EXP_AVG": DTYPES[work.exp_avg.dtype],
        "ROUND_P": round_params and work.param.dtype == torch.bfloat16,
        "ROUND_M": work.exp_avg.dtype == torch.bfloat16,
    }


def _vector(work: Work, tensors: Sequence[str], *lengths: int) -> int:
    """Entries that lie together in aligned 16 bytes of the narrowest of these tensors, or 1."""
    vector = 16 // min(getattr(work, name).element_size() for name in tensors)
    aligned = all(_address(work, name) % 16 == 0 for name in tensors)
    return vector if aligned and all(length % vector == 0 for length in lengths) else 1


def _address(work: Work, name: str) -> int:
    """Of the first entry of the piece."""
    tensor = getattr(work, name)
    at = work.piece.first if name == "exp_avg_sq" else work.piece.offset
    return tensor.data_ptr() + at * tensor.element_size()


def _row(task: _Task, work: Work, program: int) -> list[int]:
    piece = work.piece
    return [
        *(_address(work, name) for name in ("param", "grad", "exp_avg", "exp_avg_sq")),
        *(task.work, program, task.units, task.pitch, piece.index, piece.stride),
        *(task.unit, task.sums, task.parts, task.height, piece.n_entries, 0),
    ]


def _width(length: int) -> int:
    return next((width for width in _WIDTHS if width >= length), _WIDTHS[-1])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
