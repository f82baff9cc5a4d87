"""Compiles kernels for GPUs that are not here: JSON jobs on stdin, JSON rows on stdout.

A process of its own, without TRITON_INTERPRET: @triton.jit reads it at decoration, and under it (as
pytest runs here) nothing compiles. A job is {"module", "kernel", "target": [backend, arch, warp],
"signature": {argument: type}, "constexprs": {argument: value}, "num_warps"}; its row has the
registers per thread, the bytes (NVIDIA) or registers (AMD) spilled, and the bytes of shared memory.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_kernel(job: dict) -> dict:
    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    types = job["signature"] | dict.fromkeys(job["constexprs"], "constexpr")
    types = {name: types[name] for name in kernel.arg_names}
    position = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    # as a launch does for pointers and sizes that are multiples of 16; else no load is a vector
    aligned = [name for name, kind in types.items() if kind.startswith("*") or kind == "i32"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={position[name]: value for name, value in job["constexprs"].items()},
        attrs={position[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {name: job[name] for name in ("num_warps", "num_stages") if name in job}
    compiled = triton.compile(source, target=GPUTarget(*job["target"]), options=options)
    resources = _nvidia_resources if job["target"][0] == "cuda" else _amd_resources
    return resources(compiled.asm) | {"shared": compiled.metadata.shared}


def _nvidia_resources(asm: dict) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "spilled": stack}


def _amd_resources(asm: dict) -> dict:
    found = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"])[1])
        for name in ("vgpr_count", "vgpr_spill_count")
    }
    return {"registers": found["vgpr_count"], "spilled": found["vgpr_spill_count"]}


if __name__ == "__main__":
    json.dump([compile_kernel(job) for job in json.load(sys.stdin)], sys.stdout)
