"""A length-triggered learning rate under any scheduler of a transformers Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerState, TrainingArguments

from ..optim import LengthDetector, StepFactor
from .transformers_callback import (
    StatefulCallback,
    add_to_logs,
    distribution,
    mean_over_ranks,
)


class LengthTriggeredLRCallback(StatefulCallback):
    """Decays the learning rate once the mean response length surges.

    The factor is on the groups only while `optimizer.step` runs, so it is exact with every
    lr_scheduler_type; what schedulers and logs show as the rate is without it. It is logged as
    `length_lr_factor`. Several processes decide together, on the mean over them.

    Lengths come from the Trainer's logs, one observation a log: with `logging_steps=1` that is one
    a step, else `warmup` counts logs. Whoever computes lengths otherwise (in a reward function)
    calls `observe` in each step, with `metric=None`.

    The state is in every checkpoint, and resuming needs no flag. After a `train()` that raised, the
    factor is still on its optimizer until `release`, or the next `train()` with this callback.

        callback.add_to(trainer)    instead of callbacks=[callback]: W&B and TensorBoard log it, too

    Args:
        metric: key in the logs, mean response length in tokens; the default is that of TRL. None
            for `observe`.
        truncated_metric: key of the share of truncated responses, in [0, 1]; None if there is none
            (TRL: "completions/clipped_ratio").
        mismatch_metric: key of what `joint` calls "mismatch"; None without it.
        grad_norm_metric: key of what `joint` calls "grad_norm"; None without it.
        **detector: arguments of LengthDetector; its steps are the Trainer's `global_step`.

    Raises:
        TypeError: a metric that is no string.
        ValueError: an argument out of range, or a metric of `joint` without its key; when training
            begins, a second such callback, or DeepSpeed; when it is added during training.

    Source: arXiv 2602.01826; see LengthDetector.
    """

    state_key = "trimtab.LengthTriggeredLR"

    def __init__(
        self,
        metric: str | None = "completions/mean_length",
        *,
        truncated_metric: str | None = None,
        mismatch_metric: str | None = None,
        grad_norm_metric: str | None = None,
        **detector: Any,
    ) -> None:
        super().__init__()
        for name, key in (
            ("metric", metric),
            ("truncated_metric", truncated_metric),
            ("mismatch_metric", mismatch_metric),
            ("grad_norm_metric", grad_norm_metric),
        ):
            if key is not None and not isinstance(key, str):
                raise TypeError(f"{name}: expected a key of the logs or None, found {key!r}")
        self.metric = metric
        self.truncated_metric = truncated_metric
        self.detector = LengthDetector(**detector)
        self._joint = {"mismatch": mismatch_metric, "grad_norm": grad_norm_metric}
        for name, key in self._joint.items():
            wanted = metric is not None and name in self.detector.joint
            if (key is not None) != wanted:
                expected = "the key of the metric with" if wanted else "None without a metric and"
                raise ValueError(
                    f"{name}_metric: expected {expected} {name!r} in joint, found {key!r}"
                )
        if metric is None and truncated_metric is not None:
            raise ValueError(
                "truncated_metric: expected None without a metric, as `observe` is given the "
                f"share, found {truncated_metric!r}"
            )
        self._step = 0
        self._rate = StepFactor(lambda: self.factor)
        self._seen: dict[str, Any] = {}  # logged since the last observation
        self._observed: list[tuple[float | None, ...]] = []  # in this step
        self._unseen: list[str] = []  # of the keys, what no observation of this run had

    @property
    def factor(self) -> float:
        """The factor in use for the current step, in [floor, 1]."""
        return self.detector.factor_at(self._step)

    def observe(
        self,
        mean_length: float,
        truncated_fraction: float | None = None,
        *,
        mismatch: float | None = None,
        grad_norm: float | None = None,
    ) -> None:
        """Records lengths of the current step, on this process; several calls are averaged.

        What was observed by the end of the step, over all processes, counts as its observation.
        What is observed between steps does not: an evaluation calls the loss function, too.

        Args:
            mean_length: tokens.
            truncated_fraction: share of responses cut off at the limit, in [0, 1]; None if unknown.
            mismatch: needed if it is in `joint`.
            grad_norm: likewise.

        Raises:
            ValueError: this callback reads a metric, and would count twice.
        """
        if self.metric is not None:
            raise ValueError(
                f"metric: expected None with `observe`, found {self.metric!r}; make the callback "
                "with metric=None"
            )
        given = {"mismatch": mismatch, "grad_norm": grad_norm}
        others = [given[name] for name in self.detector.joint]
        self._observed.append((mean_length, truncated_fraction, *others))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if distribution() == "DeepSpeed":
            raise ValueError(
                "optimizer: expected one that makes its steps itself, found "
                f"{type(optimizer).__name__}; train with DDP or FSDP2 instead of DeepSpeed"
            )
        super().on_train_begin(args, state, control, **kwargs)
        if self.metric is not None:
            self.expect_logs(args, state)
        self._seen.clear()
        self._unseen = [key for key in self._keys if key is not None]
        self._rate.attach([getattr(optimizer, "optimizer", optimizer)])  # not Accelerate's wrapper

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        self._step = state.global_step
        self._observed.clear()  # of an evaluation

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if self.metric is None:
            columns = zip(*self._observed, strict=True)
            means = [_mean(column) for column in columns] or [None] * (2 + len(self.detector.joint))
            self._observed.clear()
            self._record(args, means)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        self._seen.update(logs)
        if "loss" not in logs:  # an evaluation, or what a loss function logs on its way
            return
        self.refuse_late(state)
        if self.metric is not None:
            self._record(args, [self._seen.get(key) for key in self._keys])
            self._warn(self._unseen)
        elif not self.detector.observations:
            self._warn(["observe(...) in each step"])
        self._seen.clear()
        add_to_logs(state, logs, {"length_lr_factor": self.factor})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Takes the factor off the optimizer: after a `train()` that raised, for another callback.

        At the end of a `train()` that did not, it is off already.
        """
        self._rate.release()

    @property
    def _keys(self) -> list[str | None]:
        """Of the logs: the length, the truncated share, and what `joint` reads."""
        return [
            self.metric,
            self.truncated_metric,
            *(self._joint[name] for name in self.detector.joint),
        ]

    def _record(self, args: TrainingArguments, found: list[float | None]) -> None:
        """Observes the means over the ranks, if there is a length, and all of `joint`."""
        # a length that is not finite is none; of the others it is a sign
        found[:2] = [
            None if value is None or not math.isfinite(value) else value for value in found[:2]
        ]
        means = mean_over_ranks(args, found)
        length, truncated, *numbers = means
        if length is None or None in numbers:
            return
        there = [key for key, mean in zip(self._keys, means, strict=True) if mean is not None]
        self._unseen = [key for key in self._unseen if key not in there]
        joint = dict(zip(self.detector.joint, numbers, strict=True))
        self.detector.observe(length, truncated, step=self._step, **joint)
        self.store()

    def _warn(self, missing: list[str]) -> None:
        if missing:
            what = "truncation goes" if missing == [self.truncated_metric] else "lengths go"
            self.warn_once(
                what,
                "expected finite %s in the logs, found: %s; %s unwatched",
                ", ".join(missing),
                ", ".join(self._seen),
                what,
            )

    def rearm(self) -> None:
        """Undoes the trigger and its factor, and collects a new baseline: the surge was healthy."""
        self.detector.rearm()
        self.store()

    def state_dict(self) -> dict[str, Any]:
        return self.detector.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.detector.load_state_dict(dict(state))


def _mean(values: tuple[float | None, ...]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
