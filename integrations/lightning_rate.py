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
    value counts again. Several processes decide together, on the mean over them.

    Args:
        metric: key in `trainer.callback_metrics`, mean response length in tokens.
        truncated_metric: key of the share of truncated responses, in [0, 1]; None if there is none.
        mismatch_metric: key of what `joint` calls "mismatch"; None without it.
        grad_norm_metric: key of what `joint` calls "grad_norm"; None without it.
        prog_bar: show the factor in the progress bar, too.
        **detector: arguments of LengthDetector; its steps are the Trainer's `global_step`.

    Raises:
        ValueError: an argument out of range, or a metric of `joint` without its key; on setup, a
            second such callback.

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
        self._step = 0
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

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._rate.attach(trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        others = [self._joint[name] for name in self.detector.joint]
        keys = (self.metric, self.truncated_metric, *others)
        found = [trainer.callback_metrics.get(key) for key in keys]
        found[:2] = [  # a length that is not finite is none; of the others it is a sign
            None if value is None or not math.isfinite(value) else value for value in found[:2]
        ]
        length, truncated, *numbers = mean_over_ranks(trainer, found)
        if length is not None and None not in numbers:
            joint = dict(zip(self.detector.joint, numbers, strict=True))
            self.detector.observe(length, truncated, step=self._step, **joint)
        elif not self._warned:
            self._warned = True
            _logger.warning(
                "expected finite metrics %s in trainer.callback_metrics, found: %s; lengths go "
                "unwatched: log them in training_step",
                ", ".join(repr(key) for key in (self.metric, *others)),
                ", ".join(trainer.callback_metrics) or "none",
            )
        pl_module.log("length_lr_factor", self.factor, prog_bar=self.prog_bar)

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
