"""What the benchmarks share: memory of a call, and where a row comes from."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Waits for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def extra_bytes(step: Callable[[], None]) -> int | None:
    """By how much memory rises above what is held before a step, the least of three; or None."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - held
    if platform.system() != "Linux":
        return None
    rises = []
    for _ in range(3):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
        held = peak_resident_bytes()
        step()
        rises.append(peak_resident_bytes() - held)
    return min(rises)


def peak_resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status: expected VmHWM, found none")


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"CPU, {os.cpu_count()} cores, {name}"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of Python and these packages; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit(*folders: str) -> str:
    """The commit, marked where these folders differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", *folders], capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout else "")
