"""`one_pass`, `unit_sums` and `apply` of triton_kernels/adam_mini.py for CPU tensors, in C++.

They agree with their `_reference` forms up to rounding: sums go on in double, products and sums are
fused. They use torch.get_num_threads() threads of the OpenMP pool that PyTorch runs on, or their
own where it has none; their number changes no bit of the result.

`load` compiles adam_mini_step.cpp at the first use with $CXX, c++, g++ or clang++ (three seconds)
and keeps the library in $XDG_CACHE_HOME/trimtab or ~/.cache/trimtab, under a hash of what it was
compiled from and for, and one of its contents. Where that fails `why_not` returns the reason.

Cost: the bytes that triton_kernels/adam_mini.py names; `one_pass` takes columns too, and reads the
gradient twice there and in rows of more than 2^19 entries. And about 2 us of Python a work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..triton_kernels.adam_mini import ELEMENTWISE_UNIT, HYPER, Work

_logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("adam_mini_step.cpp")
# Not -ffast-math: NaN and infinities come out as in PyTorch. The last two let roots and choices be
# vectorised.
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fopenmp-simd",
          "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")  # fmt: skip
# The first that the compiler accepts. GCC prefers half registers, for CPUs that AVX-512 slowed.
_FOR_THIS_CPU = (
    ["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], []
)  # fmt: skip

_ONE_PASS, _UNIT_SUMS, _APPLY = range(3)
_KINDS = {"elementwise": 0, "row": 1, "column": 2}
# Bits by (param, grad, exp_avg, exp_avg_sq): 1, 2, 4 if the first, second, third is bf16.
_F32, _F64, _BF16 = torch.float32, torch.float64, torch.bfloat16
_TYPES = {
    (p, g, m, _F32): (p == _BF16) + 2 * (g == _BF16) + 4 * (m == _BF16)
    for p, g, m in product((_F32, _BF16), repeat=3)
} | {(_F64, _F64, _F64, _F64): 0, (_F64, _F64, _BF16, _F64): 4}
_BF16_PARAM, _ROUND_PARAM = 1, 8
_ROW = struct.Struct("16q")


def one_pass(
    works: Sequence[Work],
    hyper: Tensor,
    *,
    round_params: bool = False,
    keys: Tensor | None = None,
) -> None:
    """What `one_pass` of triton_kernels/adam_mini.py does; ValueError if `why_not` has a reason."""
    table, _ = _table(works, _ONE_PASS, round_params, keys)
    _call(_ONE_PASS, works, table, hyper, None)


def unit_sums(works: Sequence[Work]) -> Tensor:
    """What `unit_sums` there does; fp64 if the works are."""
    table, n_units = _table(works, _UNIT_SUMS)
    sums = torch.zeros(n_units, dtype=_dtype(works), device="cpu")
    _call(_UNIT_SUMS, works, table, None, sums)
    return sums


def apply(
    works: Sequence[Work],
    hyper: Tensor,
    steps: Tensor,
    *,
    round_params: bool = False,
    keys: Tensor | None = None,
) -> None:
    """What `apply` there does."""
    table, n_units = _table(works, _APPLY, round_params, keys)
    _check_shape("steps", steps, (n_units,))
    _call(_APPLY, works, table, hyper, steps.to("cpu", _dtype(works)).contiguous())


def why_not(works: Sequence[Work]) -> str | None:
    """Why the functions of this file cannot take `works`; None if they can."""
    try:
        _table(works, _UNIT_SUMS)
    except ValueError as error:
        return str(error)
    return _library()[1]


def load() -> ctypes.CDLL | None:
    """The library, compiled if need be; None, with the reason in the log, if that failed."""
    return _library()[0]


def _call(
    op: int, works: Sequence[Work], table: bytes, hyper: Tensor | None, units: Tensor | None
) -> None:
    library, reason = _library()
    if library is None:
        raise ValueError(reason)
    if hyper is not None:
        _check_shape("hyper", hyper, (len(works), len(HYPER)))
        hyper = hyper.to("cpu", _F64).contiguous()
    failed = library.trimtab_adam_mini(
        op,
        table,
        len(works),
        None if hyper is None else hyper.data_ptr(),
        None if units is None else units.data_ptr(),
        _dtype(works) == _F64,
        torch.get_num_threads(),
        _pool(),
    )
    if failed:
        raise MemoryError("no memory to plan the Adam-mini step")
    if hyper is not None:  # autograd must see that a saved parameter is no longer what it was
        increment_version([t for w in works for t in (w.param, w.exp_avg, w.exp_avg_sq)])


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")


def _dtype(works: Sequence[Work]) -> torch.dtype:
    """What is computed in."""
    return _F64 if works and works[0].param.dtype == _F64 else _F32


def _table(
    works: Sequence[Work], op: int, round_params: bool = False, keys: Tensor | None = None
) -> tuple[bytes, int]:
    """`struct Piece` of the C++ file for every work, and the number of units."""
    if keys is not None:
        _check_shape("keys", keys, (len(works),))
        works = [w._replace(key=key) for w, key in zip(works, keys.tolist(), strict=True)]
    rows_of_table, n_units = [], 0
    wide = _dtype(works) == _F64
    # Written for speed: this is most of what a step of small tensors costs.
    for (kind, shape, offset, first, index, stride), p, g, m, v, key in works:
        dtypes = p.dtype, g.dtype, m.dtype, v.dtype
        types = _TYPES.get(dtypes)
        if types is None or (dtypes[0] == _F64) != wide:
            names = ("param", "grad", "exp_avg", "exp_avg_sq")
            found = ", ".join(
                f"{name} {str(dtype).removeprefix('torch.')}"
                for name, dtype in zip(names, dtypes, strict=True)
            )
            raise ValueError(f"works: no native form takes {found}, or fp64 beside another dtype")
        if kind == "row":
            batch, (rows, columns) = 1, shape
            unit, moments, units = columns, rows, rows
            n = rows * columns
        elif kind == "elementwise":
            batch, rows, columns, unit = 1, 1, shape[0], ELEMENTWISE_UNIT
            n = moments = columns
            units = -(-n // unit)
        else:
            batch, rows, columns = shape
            unit, moments = rows, batch * columns
            n, units = rows * moments, moments
        # Who reads and writes exp_avg_sq: the whole step, and of elementwise pieces any update.
        reads = op == _ONE_PASS or (op == _APPLY and kind == "elementwise")
        end = offset + n
        if not (
            p.is_cpu and g.is_cpu and m.is_cpu and v.is_cpu
            and p.is_contiguous() and g.is_contiguous()
            and m.is_contiguous() and v.is_contiguous()
            and p.numel() >= end and g.numel() >= end and m.numel() >= end
            and (not reads or v.numel() >= first + moments)
        ):  # fmt: skip
            raise ValueError("works: expected contiguous CPU tensors that hold their piece")
        if round_params and types & _BF16_PARAM:
            types |= _ROUND_PARAM
        rows_of_table.append(_ROW.pack(
            _KINDS[kind], batch, rows, columns, unit, units, offset, first, index, stride, key,
            types, p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr(),
        ))  # fmt: skip
        n_units += units
    return b"".join(rows_of_table), n_units


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason."""
    try:
        if os.name != "posix":
            raise RuntimeError(f"not made for {platform.system()}")
        try:
            return _loaded(_cache_folder()), None
        except OSError as error:
            _logger.warning(
                "every process compiles the native Adam-mini step anew, for want of a cache: %s; "
                "set XDG_CACHE_HOME to a folder of yours",
                error,
            )
            with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
                return _loaded(Path(folder)), None
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _logger.warning(
            "Adam-mini on the CPU stays in PyTorch, at about twice the time of its native step: %s",
            error,
        )
        return None, f"no native library: {error}"


@functools.cache
def _pool() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that PyTorch uses, if it has it."""
    function = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


def _compiler() -> list[str] | None:
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def _cache_folder() -> Path:
    """The folder for compiled files; OSError if it cannot be made or others may write to it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "trimtab")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to another user, or others may write to it")
    return folder


def _loaded(folder: Path) -> ctypes.CDLL:
    """The library for this machine in `folder`, compiled if it is not there intact."""
    made_of = (_SOURCE.read_bytes(), _FLAGS, _FOR_THIS_CPU, _machine())
    stem = f"adam_mini_step-{_hash(repr(made_of).encode())}"
    compiler = _compiler()
    if compiler:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=60).stdout
        stem += f"-{_hash(repr((compiler, version)).encode())}"
    for path in sorted(folder.glob(f"{stem}-*.so")):  # without a compiler: any that was here once
        contents = path.stem.rpartition("-")[2]
        if path.stat().st_uid == os.geteuid() and contents == _hash(path.read_bytes()):
            break
    else:
        if not compiler:
            raise RuntimeError("found no C++ compiler ($CXX, c++, g++, clang++)")
        path = _compiled(compiler, folder, stem)
        _logger.info("compiled %s with %s", path, shlex.join(compiler))
    library = ctypes.CDLL(str(path))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.trimtab_adam_mini.argtypes = [
        number, pointer, number, pointer, pointer, number, number, pointer
    ]  # fmt: skip
    return library


def _compiled(compiler: list[str], folder: Path, stem: str) -> Path:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        for flags in _FOR_THIS_CPU:
            command = [*compiler, *_FLAGS, *flags, str(_SOURCE), "-o", temporary]
            done = subprocess.run(command, capture_output=True, timeout=300)
            if done.returncode == 0:
                path = folder / f"{stem}-{_hash(Path(temporary).read_bytes())}.so"
                os.replace(temporary, path)  # another process finds it whole or not at all
                return path
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{shlex.join(command)}: {message[-1000:]}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _machine() -> str:
    """What a library compiled for this CPU depends on."""
    lines = {platform.machine(), platform.system()}
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    if os.path.exists("/proc/cpuinfo"):
        lines |= {x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(names)}
    return "\n".join(sorted(lines))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
