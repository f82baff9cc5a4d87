import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from trimtab.triton_kernels._linear_token_stats_triton import TILES
from trimtab.triton_kernels._prefix_attention_triton import tiles_of
from trimtab.triton_kernels._rows import MAX_BLOCK_V, NUM_WARPS

pytest.importorskip("triton")

TARGETS = {
    "sm_80": ["cuda", 80, 32],
    "sm_90": ["cuda", 90, 32],
    "sm_100": ["cuda", 100, 32],
    "gfx942": ["hip", "gfx942", 64],
}
# of a program; a launch fails beyond
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}
MAX_REGISTERS = 128  # of 65536: two programs of 8 warps share a multiprocessor


def compile_all(jobs: list[dict]) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    worker = Path(__file__).parent / "compile_worker.py"
    done = subprocess.run(
        [sys.executable, worker],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def pointers(kind: str, *names: str) -> dict:
    return {f"{name}_ptr": f"*{kind}" for name in names}


def job(
    module: str, kernel: str, target: list, arguments: dict, constexprs: dict, **options
) -> dict:
    """None among the arguments is a pointer that this variant does not have."""
    absent = {name: value for name, value in arguments.items() if value is None}
    return {
        "module": f"trimtab.triton_kernels.{module}",
        "kernel": kernel,
        "target": target,
        "signature": {name: kind for name, kind in arguments.items() if name not in absent},
        "constexprs": constexprs | absent,
        **options,
    }


SCALING = {"inv_temperature": "fp32", "softcap": "fp32"}
ROW_STATS = pointers("fp32", "max", "log_sum", "kept_mass", "entropy", "sum_p2")
ROW_GRADS = pointers(
    "fp32", "grad_logp", "grad_entropy", "grad_sum_p2", "grad_lse", "grad_kept_mass"
)
NOT_PRUNED = {"kept_mass_ptr": None, "grad_kept_mass_ptr": None}


def token_stats_jobs(target: list) -> list[dict]:
    """Kernels over given logits, plain and pruned, with softcap (without it there is less)."""
    jobs = []
    for dtype in ("bf16", "fp32"):
        logits = {"z_ptr": f"*{dtype}", "y_ptr": "*i64"}
        sizes = {"stride_n": "i32", "V": "i32"} | SCALING
        options = {"num_warps": NUM_WARPS}
        fixed = {"SOFTCAP": True, "BLOCK_V": MAX_BLOCK_V}
        for pruned in (False, True):
            absent = {} if pruned else NOT_PRUNED
            outputs = pointers("fp32", "logp", "lse") | ROW_STATS | {"broken_ptr": "*i1"}
            counts = (
                {"count_ptr": "*i64", "inside_ptr": "*i1"}
                if pruned
                else {"kept_mass_ptr": None, "count_ptr": None, "inside_ptr": None}
            )
            forward = logits | outputs | counts | sizes | {"log_rho": "fp32"}
            backward = logits | ROW_STATS | ROW_GRADS | absent | sizes
            backward |= {"grad_z_ptr": f"*{dtype}", "stride_grad_n": "i32", "log_rho": "fp32"}
            sums = logits | {"sums_ptr": "*fp32", "N": "i32"} | sizes
            for kernel, arguments in (
                ("forward_kernel", forward),
                ("backward_kernel", backward),
                ("whole_sums_kernel", sums),
            ):
                constexprs = fixed | {"PRUNED": pruned}
                jobs.append(
                    job("_token_stats_kernels", kernel, target, arguments, constexprs, **options)
                )
        kept = sums | {"max_ptr": "*fp32", "log_rho": "fp32"}
        jobs.append(job("_token_stats_kernels", "kept_sums_kernel", target, kept, fixed, **options))
    return jobs


def linear_jobs(target: list) -> list[dict]:
    """Kernels over tiles of logits, with softcap and bias."""
    jobs = []
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        tiles = TILES[size]
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        dot = {"UPCAST": False, "PRECISION": "ieee"}
        head = pointers(dtype, "h", "w", "b") | {"y_ptr": "*i64"} | SCALING
        head |= dict.fromkeys(("N", "V", "D", "stride_hn", "stride_wv"), "i32")
        fixed = dot | {"SOFTCAP": True, "BIAS": True, "BLOCK_N": tiles.n, "BLOCK_D": tiles.d}
        whole = fixed | {"BLOCK_V": tiles.v}
        half = fixed | {"TILE_V": tiles.v, "BLOCK_V": tiles.v // 2}

        def add(kernel, arguments, constexprs, options=options):
            module = "_linear_kernels"
            jobs.append(job(module, kernel, target, arguments, constexprs, **options))

        for pruned, track in ((True, True), (False, True), (False, False)):
            bounds = pointers("fp32", "floor", "bound")
            bounds = bounds if track else dict.fromkeys(bounds)
            arguments = head | bounds | {"parts_ptr": "*fp32", "splits": "i32"}
            add("whole_kernel", arguments, whole | {"S1_ONLY": pruned, "TRACK": track})
        kept = pointers("fp32", "max", "bound", "parts") | {"live_ptr": "*i1", "splits": "i32"}
        add("kept_kernel", head | kept | {"log_rho": "fp32", "slack": "fp32"}, half)
        for pruned in (True, False):
            arguments = head | ROW_STATS | ROW_GRADS | ({} if pruned else NOT_PRUNED)
            arguments |= pointers("fp32", "bias_parts") | {"dz_ptr": f"*{dtype}"}
            arguments |= {"live_ptr": "*i1" if pruned else None, "log_rho": "fp32"}
            names = ("first_block", "first_tile", "stride_live", "stride_dz")
            arguments |= dict.fromkeys(names, "i32")
            constexprs = half | {"PRUNED": pruned, "SPARSE": pruned, "BIAS_GRAD": True}
            add("gradient_kernel", arguments, constexprs)
        for sparse in (True, False):
            operands = pointers(dtype, "a", "b") | {"out_ptr": "*fp32"}
            operands |= dict.fromkeys(("M", "K", "D", "stride_bk", "stride_tiles"), "i32")
            operands |= (
                pointers("i32", "tiles", "counts")
                if sparse
                else {"tiles_ptr": None, "counts_ptr": None}
            )
            block_d = {"BLOCK_K": tiles.d, "BLOCK_D": 128 if size == 2 else 64}
            constexprs = dot | block_d | {"ACCUMULATE": True, "SPARSE": sparse}
            add(  # for hidden: dz by rows
                "product_kernel",
                operands | {"row_ptr": None, "stride_am": "i32"},
                constexprs
                | {"stride_ak": 1, "MASK_ROWS": False, "BLOCK_M": tiles.n, "TILE_K": tiles.v},
            )
            add(  # for weight: dz by columns
                "product_kernel",
                operands | {"row_ptr": "*i64", "stride_ak": "i32"},
                constexprs
                | {"stride_am": 1, "MASK_ROWS": True, "BLOCK_M": tiles.v, "TILE_K": tiles.n},
            )
        label = {name: head[name] for name in ("h_ptr", "w_ptr", "b_ptr", "y_ptr", *SCALING)}
        label |= {
            "floor_ptr": "*fp32",
            "rounding": "fp32",
            "D": "i32",
            "stride_hn": "i32",
            "stride_wv": "i32",
        }
        add("label_kernel", label, {"SOFTCAP": True, "BIAS": True, "BLOCK_D": 1024})
    return jobs


def loss_jobs(target: list) -> list[dict]:
    """Kernels of divergence.py, gem.py and _exp_sums.py, with softcap."""
    jobs = []
    for dtype in ("bf16", "fp32"):
        options = {"num_warps": NUM_WARPS}
        fixed = {"SOFTCAP": True, "BLOCK_V": MAX_BLOCK_V}
        sizes = dict.fromkeys(("stride_n", "N", "V"), "i32")
        z, dz = pointers(dtype, "z"), pointers(dtype, "grad_z")
        both = z | pointers(dtype, "o") | {"live_ptr": "*i1", "other_stride_n": "i32"} | sizes
        both |= SCALING | {"other_inv_temperature": "fp32", "other_softcap": "fp32"}
        capped = fixed | {"OTHER_SOFTCAP": True}
        add = partial(job, "divergence", target=target, **options)
        sums = both | {"sums_ptr": "*fp32"}
        jobs.append(add("_sums_kernel", arguments=sums, constexprs=capped | {"SMALL": 0.5}))
        for absent in (None, "grad_z_ptr", "grad_o_ptr"):
            arguments = both | pointers("fp32", "stats", "upstream") | dz
            arguments |= pointers(dtype, "grad_o") | ({absent: None} if absent else {})
            jobs.append(add("_gradient_kernel", arguments=arguments, constexprs=capped))

        add = partial(job, "_exp_sums", target=target, **options)
        rows = z | {"live_ptr": "*i1", "stride_n": "i32", "V": "i32", "K": "i32"} | SCALING
        for listed in (True, False):
            lists = pointers("i64", "columns", "first") | pointers("fp32", "listed", "values")
            lists = lists if listed else dict.fromkeys(lists)
            shared = rows | {name: lists[name] for name in ("columns_ptr", "first_ptr")}
            sums = shared | pointers("fp32", "top", "total", "rest")
            sums |= {"listed_ptr": lists["listed_ptr"]}
            jobs.append(add("_sums_kernel", arguments=sums, constexprs=fixed))
            grads = shared | dz | pointers("fp32", "top", "log_total", "scale")
            grads |= {"values_ptr": lists["values_ptr"]}
            jobs.append(add("_gradient_kernel", arguments=grads, constexprs=fixed))

        add = partial(job, "gem", target=target, **options)
        rows = z | {"y_ptr": "*i64", "inv_beta": "fp32", "softcap": "fp32"} | sizes
        for logsigmoid in (True, False):
            constexprs = fixed | {"LOGSIGMOID": logsigmoid}
            sums = rows | pointers("fp32", "z_y", "sums")
            jobs.append(add("_sums_kernel", arguments=sums, constexprs=constexprs))
            grads = rows | dz | pointers("fp32", "stats", "upstream")
            jobs.append(add("_gradient_kernel", arguments=grads, constexprs=constexprs))
    return jobs


def strides(*names: str) -> dict:
    return {f"stride_{name}{axis}": "i32" for name in names for axis in "nh"}


def prefix_attention_jobs(target: list) -> list[dict]:
    """Kernels over a prefix and the own sequence, and at other widths than 64 over both after a
    launch for another segment; at width 128 also over each alone."""
    jobs = []
    numbers = {"heads": "i32", "scale": "fp32"}
    for dtype, width in (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128)):
        size = torch.bfloat16 if dtype == "bf16" else torch.float32

        def add(tiles, kernel, arguments, constexprs, size=size, width=width):
            tiles = tiles_of(tiles, size, width, target[0] == "hip")
            fixed = {"REPEATS": 4, "UPCAST": False, "PRECISION": "ieee", "D": width}
            fixed |= {"BLOCK_N": tiles.n, "BLOCK_S": tiles.s, "BLOCK_D": width} | constexprs
            arguments = {name: kind for name, kind in arguments.items() if name not in fixed}
            options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
            module = "_prefix_attention_kernels"
            jobs.append(job(module, kernel, target, arguments, fixed, **options))

        own = pointers(dtype, "q", "k", "v") | strides("q", "k", "v")
        prefix = pointers(dtype, "prefix_k", "prefix_v")
        grad = pointers(dtype, "grad") | pointers("fp32", "lse", "delta") | strides("g")
        grad |= {"unit": "fp32"} | numbers
        table = {"tiles_ptr": "*i32"}
        both = own | table | strides("pk", "pv") | {"lse_ptr": "*fp32", "P": "i32"} | numbers
        variants = [("PREFIX", "OWN")]
        if width > 64:
            variants.append(("CARRY", "PREFIX", "OWN"))
        if width == 128:
            variants += [("PREFIX",), ("OWN",)]
        for variant in variants:
            flags = {name: name in variant for name in ("CARRY", "PREFIX", "OWN")}
            arguments = both | (prefix if flags["PREFIX"] else dict.fromkeys(prefix))
            arguments |= {"carry_ptr": "*fp32" if flags["CARRY"] else None}
            result = f"*{dtype}" if flags["OWN"] else "*fp32"
            forward = arguments | {"out_ptr": result}
            add("forward", "forward_kernel", forward, flags)
            query = arguments | grad | pointers(dtype, "out") | {"grad_q_ptr": result}
            add("query", "query_gradient_kernel", query, flags)
        keys = own | grad | table | pointers(dtype, "grad_k", "grad_v")
        add("keys", "own_gradients_kernel", keys, {})
        if width == 64:  # a launch makes a size of 1 a constant
            ones = {"heads": 1, "REPEATS": 1}
            add("forward", "forward_kernel", forward, flags | ones | {"P": 1})
            add("query", "query_gradient_kernel", query, flags | ones | {"P": 1})
            add("keys", "own_gradients_kernel", keys, ones)
        buffers = pointers("fp32", "grad_k", "grad_v") | strides("gk", "gv")
        arguments = grad | prefix | buffers | pointers(dtype, "q") | strides("q", "pk", "pv")
        arguments |= dict.fromkeys(("N", "P", "stride_split"), "i32")
        for added in (True, False):
            add("keys", "prefix_gradients_kernel", arguments, {"ADD": added})
    return jobs


def case(job: dict) -> str:
    flags = {k: v for k, v in job["constexprs"].items() if isinstance(v, bool)}
    return f"{job['kernel']} {dtype_of(job)} {flags}"


def dtype_of(job: dict) -> str:
    signature = job["signature"]
    names = ("z_ptr", "h_ptr", "a_ptr", "q_ptr")
    return next(signature[name] for name in names if name in signature)


# sm_90 and, in bf16, gfx942 by default; the rest in `make test-slow`: three minutes more
SLOW = pytest.mark.slow
DEFAULT = (("sm_90", "bf16"), ("sm_90", "fp32"), ("gfx942", "bf16"))
CASES = [
    pytest.param(target, dtype, marks=[] if (target, dtype) in DEFAULT else SLOW)
    for target in TARGETS
    for dtype in ("bf16", "fp32")
]


@pytest.mark.parametrize(("target", "dtype"), CASES)
def test_kernels_compile_without_spills(target, dtype):
    """Those over tiles may have all 255 registers of a program of 8 warps, and where they multiply
    fp32 without tensor cores 16 bytes of stack."""
    over_logits = token_stats_jobs(TARGETS[target]) + loss_jobs(TARGETS[target])
    over_tiles = linear_jobs(TARGETS[target])
    jobs = [job for job in over_logits + over_tiles if dtype_of(job) == f"*{dtype}"]
    for job, row in zip(jobs, compile_all(jobs), strict=True):
        tiles = job in over_tiles
        allowed = 16 if tiles and dtype == "fp32" else 0
        assert row["spilled"] <= allowed, f"{case(job)}: spills {row['spilled']}"
        assert row["shared"] <= SHARED_MEMORY[target], f"{case(job)}: {row['shared']} bytes shared"
        if not tiles:
            assert row["registers"] <= MAX_REGISTERS, f"{case(job)}: {row['registers']} registers"


# one width on one target by default: all of them take minutes
PREFIX_CASES = [
    pytest.param(*case, marks=[] if case == ("sm_90", "bf16", 64) else SLOW)
    for target in TARGETS
    for case in [(target, "bf16", w) for w in (64, 128, 256)]
    + [(target, "fp32", w) for w in (64, 128)]
]


@pytest.mark.parametrize(("target", "dtype", "width"), PREFIX_CASES)
def test_prefix_attention_compiles_within_its_spills(target, dtype, width):
    jobs = [
        job
        for job in prefix_attention_jobs(TARGETS[target])
        if dtype_of(job) == f"*{dtype}" and job["constexprs"]["D"] == width
    ]
    for job, row in zip(jobs, compile_all(jobs), strict=True):
        name = f"{case(job)} width {width}"
        allowed = {64: 0, 128: 0 if target in ("sm_90", "gfx942") else 96, 256: 192}[width]
        if dtype == "fp32":  # without tensor cores
            allowed = 40
        elif width == 256 and job["constexprs"].get("CARRY"):
            allowed = 240  # the output of the segments before, read at the start
        elif width == 128 and job["constexprs"].get("ADD"):
            allowed = 104  # rows of the tile, kept from before the loop to after it
        assert row["spilled"] <= allowed, f"{name}: spills {row['spilled']}"
        assert row["shared"] <= SHARED_MEMORY[target], f"{name}: {row['shared']} bytes shared"
