"""The reward function of `soak.py`, which misbehaves by the checksum of the text it scores.

A module of its own, without torch: each worker that is replaced imports it anew.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

# of 100,000 rollouts; a hang costs its time limit, so there are few
REWARD_FAULTS = {
    "hang": 50,
    "ignores SIGTERM and hangs": 50,
    "exit": 400,
    "segfault": 400,
    "flood": 400,
    "garbage": 200,
    "forks and exits": 400,
    "raises": 400,
}


def digits(prompts: list[str], completions: list[str], completion_ids: Any) -> Any:
    """The share of digits, and by the text's checksum one of REWARD_FAULTS."""
    (prompt,), (text,) = prompts, completions
    drawn = zlib.crc32(f"{prompt}|{text}".encode()) % 100_000
    for fault, share in REWARD_FAULTS.items():
        if drawn < share:
            _note("reward: " + fault)
            return _fail(fault)
        drawn -= share
    return [sum(c.isdigit() for c in text) / 24]


def _fail(fault: str) -> Any:
    if fault == "ignores SIGTERM and hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if fault in ("hang", "ignores SIGTERM and hangs"):
        time.sleep(600)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "forks and exits" and os.fork() == 0:
        os.setsid()
        time.sleep(600)
    if fault in ("exit", "forks and exits"):
        os._exit(3)
    if fault == "flood":
        for _ in range(200):
            os.write(1, b"o" * 10_000)
            os.write(2, b"e" * 10_000)
        return [0.0]
    if fault == "garbage":
        return [0.5] * 13_000_000  # 100 MB
    raise RuntimeError("this answer cannot be scored")


def _note(event: str) -> None:
    """One byte more in a file: a process that dies cannot keep a count."""
    descriptor = os.open(Path("control") / event, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, b".")
    os.close(descriptor)
