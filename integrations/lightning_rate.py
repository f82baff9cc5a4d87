"""A length-triggered learning rate under any scheduler of a Lightning Trainer."""

from __future__ import annotations

import logging
import math
from typing import Any

from ..optim import LengthDetector, StepFactor
from .lightning_callback import Callback, mean_over_ranks, refuse_second

_logger = logging.getLogger(__name__)


class LengthTriggeredLRCallback(Callback):
    """Decays the learning rate of every optimizer once the mean response length surges.

    The factor is on the groups only while `optimizer.step` runs, so it is exact with every
    scheduler; what schedulers and LearningRateMonitor show is the rate without it. It is logged as
    `length_lr_factor`. Log the metric in every training step (`self.log(metric, value)`): an old
    value counts again. An optimizer step is one observation, the mean over its batches and over the
    processes, which so decide together. A training step runs within `optimizer.step` and sees the
    rate with the factor; set a rate by hand ahead of it (on_train_batch_start).

    Args:
        metric: key in `trainer.callback_metrics`, mean response length in tokens.
        truncated_metric: key of the share of truncated responses, in [0, 1]; None if there is none.
        mismatch_metric: key of what `joint` calls "mismatch"; None without it.
        grad_norm_metric: key of what `joint` calls "grad_norm"; None without it.
        prog_bar: show the factor in the progress bar, too.
        **detector: arguments of LengthDetector; its steps are the Trainer's `global_step`.

    Raises:
        ValueError: an argument out of range, or a metric of `joint` without its key. A second such
            callback is refused by the Trainer.

    Source: arXiv 2602.01826; see LengthDetector.
    """

    def __init__(
        self,
        metric: str = "mean_length",
        *,
        truncated_metric: str | None = None,
        mismatch_metric: str | None = None,
        grad_norm_metric: str | None = None,
        prog_bar: bool = False,
        **detector: Any,
    ) -> None:
        self.metric = metric
        self.truncated_metric = truncated_metric
        self.prog_bar = prog_bar
        self.detector = LengthDetector(**detector)
        self._joint = {"mismatch": mismatch_metric, "grad_norm": grad_norm_metric}
        for name, key in self._joint.items():
            if (key is None) == (name in self.detector.joint):
                expected = "None without" if key is not None else "the key of the metric with"
                raise ValueError(
                    f"{name}_metric: expected {expected} {name!r} in joint, found {key!r}"
                )
        self._fresh = self.detector.state_dict()
        self._step = 0
        self._batches: list[list[float | None]] = []  # of the optimizer step under way
        self._rate = StepFactor(lambda: self.factor)
        self._warned = False

    @property
    def state_key(self) -> str:
        return "trimtab.LengthTriggeredLR"

    @property
    def factor(self) -> float:
        """The factor in use for the current step, in [floor, 1]."""
        return self.detector.factor_at(self._step)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        refuse_second(self, trainer)
        if trainer.global_step == 0:  # before a checkpoint is loaded: not what an earlier run saw
            self.detector.load_state_dict(self._fresh)
            self._step = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._batches.clear()
        self._rate.attach(trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        keys = (self.metric, self.truncated_metric, *map(self._joint.get, self.detector.joint))
        found = [trainer.callback_metrics.get(key) for key in keys]
        found[:2] = [  # a length that is not finite is none; of the others it is a sign
            None if value is None or not math.isfinite(value) else value for value in found[:2]
        ]
        self._batches.append([None if value is None else float(value) for value in found])
        if trainer.global_step > self._step:
            self._observe(trainer, keys)
        pl_module.log("length_lr_factor", self.factor, prog_bar=self.prog_bar)

    def _observe(self, trainer: Any, keys: tuple[str | None, ...]) -> None:
        """Of the step that has ended: means over its batches and the ranks."""
        means = mean_over_ranks(trainer, [_mean(values) for values in zip(*self._batches)])
        self._batches.clear()
        length, truncated, *numbers = means
        if length is not None and None not in numbers:
            joint = dict(zip(self.detector.joint, numbers, strict=True))
            self.detector.observe(length, truncated, step=self._step, **joint)
        missing = [repr(key) for key, x in zip(keys, means) if key is not None and x is None]
        if missing and not self._warned:
            self._warned = True
            _logger.warning(
                "expected finite metrics %s in trainer.callback_metrics, found: %s; what they say "
                "goes unwatched: log them in training_step",
                ", ".join(missing),
                ", ".join(trainer.callback_metrics) or "none",
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._rate.release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._rate.release()

    def rearm(self) -> None:
        """Undoes the trigger and its factor, and collects a new baseline: the surge was healthy."""
        self.detector.rearm()

    def state_dict(self) -> dict[str, Any]:
        return self.detector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.detector.load_state_dict(state_dict)


def _mean(values: tuple[float | None, ...]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
