import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.triton_kernels.token_stats import _MAX_BLOCK_V, _NUM_WARPS

pytest.importorskip("triton")

TARGETS = {
    "sm_80": ["cuda", 80, 32],
    "sm_90": ["cuda", 90, 32],
    "sm_100": ["cuda", 100, 32],
    "gfx942": ["hip", "gfx942", 64],
}
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


def token_stats_jobs(target: list) -> list[dict]:
    scalars = {
        "stride_n": "i32",
        "V": "i32",
        "ignore_index": "i64",
        "inv_temperature": "fp32",
        "log_rho": "fp32",
    }
    stats = ["entropy_ptr", "sum_p2_ptr", "max_ptr", "log_sum_ptr"]
    forward = [*stats, "logp_ptr", "lse_ptr"]
    grads = ("logp", "entropy", "sum_p2", "lse")
    backward = [*stats, *(f"grad_{name}_ptr" for name in grads)]
    only_pruned = {
        "_forward_kernel": {"kept_mass_ptr": "*fp32", "count_ptr": "*i64", "inside_ptr": "*i1"},
        "_backward_kernel": {"kept_mass_ptr": "*fp32", "grad_kept_mass_ptr": "*fp32"},
    }
    jobs = []
    for dtype in ("bf16", "fp32"):
        logits = {"z_ptr": f"*{dtype}", "y_ptr": "*i64"}
        for pruned in (False, True):
            constants = {"PRUNED": pruned, "BLOCK_V": _MAX_BLOCK_V}
            for kernel, pointers in (("_forward_kernel", forward), ("_backward_kernel", backward)):
                signature = logits | dict.fromkeys(pointers, "*fp32") | scalars
                if kernel == "_backward_kernel":
                    signature["grad_z_ptr"] = f"*{dtype}"
                optional = only_pruned[kernel]
                jobs.append(
                    {
                        "module": "trimtab.triton_kernels.token_stats",
                        "kernel": kernel,
                        "target": target,
                        "signature": signature | (optional if pruned else {}),
                        "constexprs": constants | ({} if pruned else dict.fromkeys(optional)),
                        "num_warps": _NUM_WARPS,
                    }
                )
    return jobs


@pytest.fixture(scope="module")
def compiled() -> list[tuple[dict, dict]]:
    jobs = [job for target in TARGETS.values() for job in token_stats_jobs(target)]
    return list(zip(jobs, compile_all(jobs), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target, compiled):
    rows = [(job, row) for job, row in compiled if job["target"] == TARGETS[target]]
    assert rows
    for job, row in rows:
        case = f"{job['kernel']} {job['signature']['z_ptr']} {job['constexprs']}"
        assert row["spilled"] == 0, f"{case}: spills {row['spilled']}"
        assert row["registers"] <= MAX_REGISTERS, f"{case}: {row['registers']} registers"
