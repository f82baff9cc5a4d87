"""The run on a terminal: numbers with their history, time left, the last transcript, drawn live.

It stands where a progress bar would; what is printed meanwhile scrolls above it. It adapts to the
terminal's width (40 columns are enough) and writes plain characters where the encoding has no
others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .loop import RLModule
from .recording import ProgressLines, read_rows
from .run_record import token_rates

SHOWN = {
    "reward": "reward",
    "length": "length",
    "mismatch/abs_dlogp_mean": "mismatch",
    "entropy": "entropy",
    "lr": "lr",
    "groups/mixed": "mixed groups",
    "speed/rollout": "rollout tok/s",
    "speed/update": "update tok/s",
}
"""What is drawn: the metric's name and its short one."""
BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#@"
CELL = 38  # columns of a number with its history
KEPT = 400  # updates of history


def run_display(metrics: Path, total: int) -> Callback:
    """The dashboard on a terminal; elsewhere a line every few seconds, which a log can keep.

    Args:
        metrics: the run's metrics.jsonl, where a continued run has its past.
        total: updates of the run.

    Returns:
        A callback.
    """
    if sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        return Dashboard(metrics, total)
    return ProgressLines("RL")


class Dashboard(Callback):
    """Draws the run while it goes.

    Args:
        metrics: the run's metrics.jsonl.
        total: updates of the run.
        console: to draw on; None takes stdout.
    """

    def __init__(self, metrics: Path, total: int, console: Console | None = None) -> None:
        self.metrics, self.total, self.console = metrics, total, console
        self.done, self.skipped = 0, 0.0
        self.history: dict[str, list[float]] = {name: [] for name in SHOWN}
        self.transcript = ""
        self.seconds: list[float] = []  # of the last updates, as the wall clock has them
        self._started = self._last = time.monotonic()
        self._live: Live | None = None
        self._streams = contextlib.ExitStack()

    # ---------------------------------------------------------------- Lightning's hooks

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, module: RLModule) -> None:
        self.done = module.updates_done
        if self.done and self.metrics.is_file():
            for row in read_rows(self.metrics):
                self.add(row | token_rates(row))
        self._started = self._last = time.monotonic()
        self.start()

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: RLModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        self.seconds = [*self.seconds, now - self._last][-10:]
        self._last, self.done = now, module.updates_done
        self.add(module.last_metrics | token_rates(module.last_metrics))
        if module.last_groups:
            group = module.last_groups[0]
            if group.completions:
                self.transcript = transcript(
                    group.problem.id, group.completions[0], group.rewards[0]
                )

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, module: RLModule) -> None:
        self.stop()

    @rank_zero_only
    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.stop()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.stop()

    # ---------------------------------------------------------------- what is drawn

    def add(self, row: dict[str, Any]) -> None:
        """Takes an update's numbers.

        Args:
            row: its metrics with the token rates.
        """
        for name, values in self.history.items():
            value = row.get(name)
            if value is not None and math.isfinite(value):
                values.append(float(value))
                del values[:-KEPT]
        self.skipped = row.get("skipped_updates") or 0.0

    def start(self) -> None:
        """Begins to draw; what the process prints from now on goes above."""
        console = self.console or Console()
        self._live = Live(
            console=console,
            get_renderable=lambda: self.drawn(console),
            refresh_per_second=2,
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="crop",
        )
        self._live.start()
        self._streams.enter_context(_logging_above())

    def stop(self) -> None:
        """Draws once more and leaves it on the screen; harmless when nothing is drawn."""
        live, self._live = self._live, None
        if live is not None:
            self._streams.close()
            live.stop()

    def drawn(self, console: Console) -> RenderableType:
        """The dashboard as it is now.

        Args:
            console: gives width and encoding.

        Returns:
            Something rich prints.
        """
        width = console.width
        unicode = console.encoding.lower().startswith("utf")
        columns = max(1, width // CELL)
        cell = width // columns - 1
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(columns):
            grid.add_column(no_wrap=True, overflow="crop", width=cell)
        history = {name: list(self.history[name]) for name in SHOWN}  # another thread draws
        cells = [
            number_line(label, history[name], cell, BLOCKS if unicode else PLAIN)
            for name, label in SHOWN.items()
            if history[name]
        ]
        for first in range(0, len(cells), columns):
            grid.add_row(*cells[first : first + columns])
        parts: list[RenderableType] = [self._head(width, unicode), grid]
        if self.transcript:
            room = 2 * width - 1
            text = self.transcript
            if not unicode:
                text = text.encode("ascii", "replace").decode()
            parts.append(Text(text if len(text) <= room else f"{text[: room - 3]}...", style="dim"))
        return Group(*parts)

    def _head(self, width: int, unicode: bool) -> Text:
        share = self.done / max(1, self.total)
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else None
        left = "" if mean is None else f", {clock(mean * (self.total - self.done))} left"
        facts = f"{clock(time.monotonic() - self._started)}{left}"
        if self.skipped:
            facts += f", {self.skipped:.0f} skipped"
        text = Text(no_wrap=True, overflow="crop")
        text.append(f"RL {self.done}/{self.total} ", style="bold")
        room = min(40, width - len(text) - len(facts) - 2)
        if room >= 5:
            full = round(room * share)
            text.append(("━" if unicode else "#") * full, style="green")
            text.append(("━" if unicode else "-") * (room - full) + " ", style="dim")
        text.append(facts)
        return text


def number_line(label: str, values: Sequence[float], width: int, ramp: str = BLOCKS) -> Text:
    """A number, its name and its history.

    Args:
        label: its name.
        values: oldest first, at least one.
        width: columns.
        ramp: characters from low to high.

    Returns:
        One line; the history takes what room is left.
    """
    text = Text(f"{label:<14}", style="dim", no_wrap=True)
    text.append(f"{short_number(values[-1]):>8} ", style="not dim bold")
    room = min(24, width - len(text))
    if room >= 3:
        text.append(sparkline(values, room, ramp), style="not dim cyan")
    return text


def sparkline(values: Sequence[float], width: int, ramp: str = BLOCKS) -> str:
    """A history in one line of characters.

    Args:
        values: oldest first.
        width: characters at most; longer histories are averaged in equal stretches.
        ramp: characters from the least value to the greatest.

    Returns:
        Text; values that are all alike stand in the middle of the ramp.
    """
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if not high > low:
        return ramp[(len(ramp) - 1) // 2] * count
    return "".join(ramp[round((v - low) / (high - low) * (len(ramp) - 1))] for v in means)


def short_number(value: float) -> str:
    """A number in few characters.

    Args:
        value: finite.

    Returns:
        At most 8 characters, 9 with a sign.
    """
    if 100 <= abs(value) < 1e7:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.0f}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """A duration for people.

    Args:
        seconds: below 0 counts as 0.

    Returns:
        0:07, 1:02:03 or 2 d 3 h.
    """
    whole = max(0, round(seconds))
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def transcript(problem: str, completion: str, reward: float | None) -> str:
    """A rollout in one line that is safe to print: it may hold anything, escape codes too.

    Args:
        problem: its id.
        completion: its text.
        reward: None where it was lost.

    Returns:
        The line, its end kept where it is long: that is where answers stand.
    """
    shown = "lost" if reward is None else f"{reward:.3g}"
    if len(completion) > 400:
        completion = f"{completion[:80]} ... {completion[-300:]}"
    text = "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in completion)
    return f"{problem}, reward {shown}: {text}"


@contextlib.contextmanager
def _logging_above() -> Iterator[None]:
    """Log handlers on the terminal write to today's sys.stderr, which goes above the drawing."""
    moved = []
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
            moved.append((handler, handler.setStream(sys.stderr)))
    try:
        yield
    finally:
        for handler, before in moved:
            if before is not None:
                handler.setStream(before)
