"""The machine a run is on: how many threads to use now, and what to write down about it."""

from __future__ import annotations

import contextlib
import logging
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


def fastest_threads(cores: int) -> int:
    """All cores or one, whichever is faster right now.

    Threads of torch wait for each other by spinning: on a machine that is busy with something else
    two of them can be many times slower than one.

    Args:
        cores: that this process may use.

    Returns:
        `cores` if they are clearly faster on a small layer's forward, else 1.
    """
    if cores <= 1:
        return 1
    x, weight = torch.randn(128, 256), torch.randn(1024, 256)
    seconds: dict[int, list[float]] = {1: [], cores: []}
    for _ in range(5):
        for threads, found in seconds.items():
            torch.set_num_threads(threads)
            started = time.perf_counter()
            for _ in range(60):
                torch.nn.functional.silu(torch.nn.functional.linear(x, weight))
            found.append(time.perf_counter() - started)
    one, all_cores = (sorted(found)[2] for found in seconds.values())
    if all_cores < 0.9 * one:
        return cores
    logger.info("the cores are busy: one thread is as fast as %d, so one is used", cores)
    return 1


def environment() -> dict[str, Any]:
    """Where a run started and with what: the directory its relative paths mean, and versions.

    Returns:
        Plain values, for JSON.
    """
    names = ("trimtab", "torch", "transformers", "pytorch-lightning", "reasoning-gym")
    versions = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "started_in": str(Path.cwd()),
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
