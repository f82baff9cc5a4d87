"""A pseudo-terminal for a process: what it draws, and keys typed into it."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor


class Terminal:
    """`python -m trimtab.rl` on a terminal of its own, in `folder`; tests/ is importable."""

    def __init__(self, arguments: list[str], folder: Path, columns: int, rows: int = 40) -> None:
        self.ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        environment |= {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "OMP_NUM_THREADS": "1",
            "TERM": "xterm-256color",
            "PYTHONIOENCODING": "utf-8",
        }
        environment.pop("TRITON_INTERPRET", None)

        def take_terminal() -> None:  # so that Ctrl-C reaches the process and its children
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimtab.rl", *arguments],
            cwd=folder,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        self.raw = b""

    def read(self, until: str | None = None, seconds: float = 240) -> str:
        """All output so far, until it holds a text, or to the end of the process."""
        end = time.monotonic() + seconds
        while until is None or until not in self.text:
            assert time.monotonic() < end, f"{until} did not come: {self.text[-3000:]}"
            if not select.select([self.ours], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(self.ours, 65536)
            except OSError:  # the other end is closed
                data = b""
            if not data:
                assert until is None, f"{until} did not come: {self.text[-3000:]}"
                break
            self.raw += data
        return self.text

    def type(self, keys: bytes) -> None:
        """Types keys."""
        os.write(self.ours, keys)

    def wait(self) -> int:
        """The exit status, once everything has been read."""
        self.read()
        os.close(self.ours)
        return self.process.wait(timeout=60)

    @property
    def text(self) -> str:
        return self.raw.decode("utf-8", "replace")

    def lines(self) -> list[str]:
        """Every line that was ever drawn, without codes."""
        pieces = re.split(r"\r\n|\r|\n|\x1b\[\d*[AK]", self.text)
        return [CODES.sub("", piece) for piece in pieces if CODES.sub("", piece).strip()]
