"""What a run leaves behind: its folder, metrics as JSON lines, transcripts, a line per update."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from .durable import append_text, check_whole, clear_unfinished, raise_on_all, replace_text
from .loop import SHOWN, RLModule
from .tasks import Prompt

logger = logging.getLogger(__name__)

_ROOM = 1 << 20  # free bytes with which TensorBoard tries again


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Ctrl-C within the block acts at its end; only the main thread gets one, and may ask so."""
    before = signal.getsignal(signal.SIGINT)  # None: a handler that is not Python's
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)  # whatever acts on it: a handler, or the system


@functools.cache
def _quieten_writer_thread() -> None:
    """TensorBoard's thread hands its errors over to whoever writes next, and prints them, too."""
    before = threading.excepthook

    def unless_told(failed: Any) -> None:
        told = type(failed.thread).__name__ == "_AsyncWriterThread"
        if not (told and isinstance(failed.exc_value, OSError)):
            before(failed)

    threading.excepthook = unless_told


class TensorBoard(TensorBoardLogger):
    """Lightning's, and neither Ctrl-C nor a full disk does harm.

    Ctrl-C ends the run: within its writer's queue, it left the queue's lock taken or its count
    wrong, and the writer's end waited for ever. A disk that is full costs the events of that time:
    the run goes on, and so does TensorBoard, in a new file, once there is room again.
    """

    _complained = False
    _failed = False  # since then no event was written

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _quieten_writer_thread()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._failed and shutil.disk_usage(self.save_dir).free < _ROOM:
            return
        with interrupts_deferred(), self._costs_only_events():
            super().log_metrics(metrics, step)
            self.experiment.flush()  # the writer would hold events back for two minutes
            self._failed = False

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        with interrupts_deferred(), self._costs_only_events():
            super().log_hyperparams(*args, **kwargs)

    @rank_zero_only
    def save(self) -> None:
        with interrupts_deferred(), self._costs_only_events():
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with interrupts_deferred(), self._costs_only_events():
            super().finalize(status)

    @contextmanager
    def _costs_only_events(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as raised:
            # Lightning says ValueError of whatever the writer raised (2.6.6)
            failed = raised if isinstance(raised, OSError) else raised.__cause__
            if not isinstance(failed, OSError):
                raise
            broken, self._experiment, self._failed = self._experiment, None, True
            with contextlib.suppress(OSError):
                if broken is not None:
                    broken.close()  # its thread has ended, and what it holds cannot be written
            if not self._complained:
                self._complained = True
                logger.warning(
                    "TensorBoard's events are lost while this lasts (said once; the run goes on, "
                    "and metrics.jsonl has every update): %s",
                    failed,
                )


class RunFolder:
    """Names of everything in a run's folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.transcripts = path / "transcripts.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.png"
        self.page = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.policy = path / "policy"
        self.adapter = path / "adapter"

    @classmethod
    def fresh(cls, run_dir: str | None, name: str) -> RunFolder:
        """A folder for a new run; nothing is created yet.

        Args:
            run_dir: as configured; None makes runs/NAME-TIME.
            name: of the recipe.

        Raises:
            ValueError: the folder holds another run, or is a file.
        """
        path = Path(run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"run_dir: {path} already holds files; continue that run with --resume {path}, "
                "or name another folder"
            )
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        try:
            with tempfile.TemporaryDirectory(dir=there):
                pass
        except OSError as error:
            raise ValueError(f"run_dir: cannot write in {there}: {error.strerror}") from error
        return cls(path)

    @classmethod
    def existing(cls, path: str) -> RunFolder:
        """The folder of a run to resume.

        Args:
            path: the folder.

        Raises:
            ValueError: it is no run's folder.
        """
        folder = cls(Path(path))
        if not folder.config.is_file():
            raise ValueError(f"{path} is no run folder (no config.yaml in it)")
        return folder

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Holds the folder, which must exist; the system lets go of it if the process is killed.

        Raises:
            SystemExit: 2, after a line, where another process trains in it.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(
                f"trimtab-rl: error: run_dir: {self.path} is in use by another process, which "
                "trains in it",
                file=sys.stderr,
            )
            raise SystemExit(2) from None
        try:
            yield
        finally:
            lock.release()

    def checkpoint(self, updates: int) -> Path:
        """The checkpoint after so many updates."""
        return self.checkpoints / f"update={updates:06d}.ckpt"

    def finished(self, updates: int) -> bool:
        """Whether a run of so many updates has left all it leaves: the summary says so last."""
        if not self.summary.is_file():
            return False
        return json.loads(self.summary.read_text()).get("updates") == updates

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that can be read whole; broken ones are named in the log."""
        for path in sorted(self.checkpoints.glob("update=*.ckpt"), reverse=True):
            try:
                torch.load(path, map_location="meta", weights_only=True)
                check_whole(path)
            except Exception as broken:
                logger.warning("%s cannot be read (%s); taking the one before it", path, broken)
            else:
                return path
        return None

    def clear_unfinished(self) -> None:
        """Removes what killed writes have left."""
        for folder in (self.path, self.checkpoints):
            clear_unfinished(folder)
        shutil.rmtree(_unfinished(self.policy), ignore_errors=True)

    def forget_after(self, updates: int) -> None:
        """Drops the metric and transcript lines of updates beyond a checkpoint."""
        for path in (self.metrics, self.transcripts):
            if path.is_file():
                kept = [json.dumps(row) for row in read_rows(path) if row["update"] <= updates]
                replace_text(path, "".join(f"{line}\n" for line in kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a last line cut off by a crash is left out.

    Args:
        path: the file.

    Returns:
        One dict per whole line.

    Raises:
        ValueError: a line other than the last is not JSON (file and line).
    """
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:  # not JSON, or a character that was cut
            if number < len(lines):
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
    return rows


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Fills a folder so that a crash leaves the old or the new one, whole.

    Args:
        path: of the folder in the end.

    Yields:
        The folder to fill.
    """
    unfinished = _unfinished(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)  # it takes room that others may need
        raise
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


def _unfinished(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.unfinished")


class OnUpdate(Callback):
    """Calls a function with each update's metrics, in every process.

    Args:
        function: of a dict by name; apart from the times all processes have the same.
    """

    def __init__(self, function: Callable[[dict[str, Any]], object]) -> None:
        self.function = function

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: RLModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.function(module.last_metrics | {"update": module.updates_done})


class MetricsWriter(Callback):
    """Writes the metrics of each update: a line of metrics.jsonl, and whatever the loggers make.

    A callback, not a logger: Lightning hands metrics to loggers after the checkpoint callbacks, so
    a run killed between the two would lose the line of an update that its checkpoint holds.

    Args:
        path: of metrics.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: RLModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        failed = None
        try:
            self._append(module)
        except OSError as error:
            failed = error
        raise_on_all(failed)
        for log in trainer.loggers:
            log.log_metrics(module.last_metrics, step=module.updates_done)

    @rank_zero_only
    def _append(self, module: RLModule) -> None:
        values = {k: v if math.isfinite(v) else None for k, v in module.last_metrics.items()}
        row = {"update": module.updates_done, **values}
        append_text(self.path, json.dumps(row) + "\n")


class TranscriptWriter(Callback):
    """Appends some rollouts to transcripts.jsonl.

    Args:
        path: the file.
        every: updates between writes.
        count: rollouts each time, spread over the prompts.
        total: updates of the run; the last one is always written.
    """

    def __init__(self, path: Path, every: int, count: int, total: int) -> None:
        self.path, self.every, self.count, self.total = path, every, count, total
        self._complained = False

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: RLModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        update = module.updates_done
        if not self.count or not (update == 1 or update % self.every == 0 or update == self.total):
            return
        rows = []
        for i in range(self.count):
            group = module.last_groups[i % len(module.last_groups)]
            sample = i // len(module.last_groups) % len(group.samples)
            rows.append(
                {
                    "update": update,
                    "problem": group.problem.id,
                    "prompt": prompt_text(group.problem.prompt),
                    "completion": group.completions[sample],
                    "reward": group.rewards[sample],
                    "tokens": len(group.samples[sample].token_ids),
                    "finish_reason": group.samples[sample].finish_reason,
                }
            )
        try:
            append_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        except OSError as failed:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "transcripts are lost while this lasts (said once; the run goes on): %s", failed
                )


def prompt_text(prompt: Prompt) -> str:
    """A prompt for people: a text as it is, messages one a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def progress_display(label: str) -> Callback:
    """A bar on a terminal; elsewhere a line every few seconds, which a log can keep.

    Args:
        label: what is going on.
    """
    return ProgressBar(label) if sys.stdout.isatty() else ProgressLines(label)


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar under another label.

    Args:
        label: stands before the bar.
    """

    def __init__(self, label: str) -> None:
        super().__init__(leave=True)
        self.label = label

    def _get_train_description(self, current_epoch: int) -> str:
        return self.label

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """What is shown behind the bar."""
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        names = [name for name in SHOWN if name in metrics]
        names += [name for name in metrics if name not in SHOWN]
        return {SHOWN.get(name, name): f"{metrics[name]:.3g}" for name in names}


class ProgressLines(Callback):
    """Prints the shown metrics every few seconds.

    Args:
        label: stands before each line.
        seconds: between lines.
    """

    def __init__(self, label: str, seconds: float = 5.0) -> None:
        self.label, self.seconds = label, seconds
        self._last = 0.0

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        total = trainer.num_training_batches
        done = getattr(module, "updates_done", batch_idx + 1)
        now = time.monotonic()
        if now - self._last < self.seconds and done != total:
            return
        self._last = now
        metrics = trainer.progress_bar_metrics
        names = [name for name in SHOWN if name in metrics]
        names += [name for name in metrics if name not in SHOWN]
        shown = "  ".join(f"{SHOWN.get(n, n)} {metrics[n]:.3g}" for n in names)
        print(f"{self.label} {done}/{total}  {shown}", flush=True)
