"""Stability monitors in a transformers Trainer: alarms and an early stop.

    StabilityMonitorCallback([GradientNormMonitor(), ClipEntropyMonitor()], on_alarm="stop")

`grad_norm` (before clipping) is in the Trainer's own logs, `entropy` and `clip_ratio/region_mean`
in TRL's; other numbers are read as the trainer logs them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..stability import StabilityWatch, Verdict
from ..stability.readings import Monitor
from .transformers_callback import (
    StatefulCallback,
    add_to_logs,
    mean_over_ranks,
    overflow_was_skipped,
)

_logger = logging.getLogger(__name__)

OnAlarm = Literal["log", "stop"]


class StabilityMonitorCallback(StatefulCallback):
    """Judges every log of the Trainer by monitors, adds what they find, and may stop.

    One verdict a log: with `logging_steps=1` that is one a step, else `patience` and the monitors'
    windows count logs. Numbers are means over the processes, so that all of them act alike. What
    monitors derive (`grad_norm/relative`, ...) and `stability/state` (0 healthy, 1 watch, 2 alarm)
    go into the log and the history. The state is in every checkpoint, and resuming needs no flag.
    The gradient norm of a step that fp16's scaler has skipped is not judged.

        callback.add_to(trainer)    instead of callbacks=[callback]: W&B and TensorBoard log it, too

    Args:
        monitors: of trimtab.stability, one of a class.
        on_alarm: "log" only, or "stop" the training, without a checkpoint.
        patience: logs in alarm, without a break, after which to stop; at least 1.
        names: what the trainer logs a monitor's number as, see StabilityWatch.

    Attributes:
        verdict: of the last log; None before the first.

    Raises:
        ValueError: an argument out of range; when training begins, a second such callback; when
            it is added during training.

    Source: practice; each monitor names its own.
    """

    state_key = "trimtab.StabilityMonitor"

    def __init__(
        self,
        monitors: Sequence[Monitor],
        *,
        on_alarm: OnAlarm = "log",
        patience: int = 1,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.watch = StabilityWatch(monitors, patience=patience, names=names)
        if on_alarm not in get_args(OnAlarm):
            raise ValueError(
                f"on_alarm: expected one of {get_args(OnAlarm)}, found {on_alarm!r}; to go back, "
                "stop and resume from the last healthy checkpoint "
                "(train(resume_from_checkpoint=...)), or use Lightning's callback"
            )
        self.on_alarm = on_alarm
        self.verdict: Verdict | None = None
        self._seen: dict[str, Any] = {}  # logged since the last verdict

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.expect_logs(args, state)
        self.verdict = None
        self._seen.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> TrainerControl:
        self._seen.update(logs)
        if "loss" not in logs:  # an evaluation, or what a loss function logs on its way
            return control
        self.refuse_late(state)
        self.verdict = self.watch.judge(self._numbers(args, state, kwargs.get("optimizer")))
        self._seen.clear()
        reading = self.verdict.reading
        if reading.state == "alarm":
            _logger.warning("step %d: %s", state.global_step, reading.reason)
        if self.verdict.tripped and self.on_alarm == "stop":
            _logger.warning("step %d: stopping: %s", state.global_step, reading.reason)
            control.should_training_stop = True
        derived = self.watch.finite(self.verdict)
        add_to_logs(state, logs, {k: v for k, v in derived.items() if k not in logs})
        self.store()
        return control

    def _numbers(
        self, args: TrainingArguments, state: TrainerState, optimizer: Any
    ) -> dict[str, float]:
        """What the monitors read, the same on every process."""
        found = self.watch.select(self._seen)
        skipped = overflow_was_skipped(optimizer, found.get("grad_norm"))
        if skipped:
            self.warn_once(
                "skipped",
                "step %d: its gradients overflowed and fp16's scaler skipped it; the gradient norm "
                "of such a step is not judged",
                state.global_step,
            )
            del found["grad_norm"]
        means = mean_over_ranks(args, [found.get(name) for name in self.watch.inputs])
        numbers = dict(zip(self.watch.inputs, means, strict=True))
        numbers = {name: value for name, value in numbers.items() if value is not None}
        silent = [
            type(m).__name__ for m in self.watch.monitors if not set(m.inputs) & numbers.keys()
        ]
        if silent and not skipped:
            self.warn_once(
                "missing",
                "%s found none of its numbers in the logs (%s) and judges nothing: log them, or "
                "say what they are called (names)",
                ", ".join(silent),
                ", ".join(self._seen),
            )
        return numbers

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state)
