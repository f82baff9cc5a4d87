"""Stability monitors in a Lightning Trainer: alarms, an early stop, the way back.

    StabilityMonitorCallback(
        [GradientNormMonitor(), ClipEntropyMonitor()], on_alarm="roll_back", patience=3
    )

The norm of the gradient is measured here; the other numbers come from the module, which logs them
under the monitors' names: `self.log_dict(clip_metrics(...) | entropy_metrics(...))`.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..stability import StabilityWatch, Verdict
from ..stability.readings import Monitor
from .lightning_callback import Callback, mean_over_ranks, refuse_second, refuse_strategy

_logger = logging.getLogger(__name__)

OnAlarm = Literal["log", "stop", "roll_back"]


class StabilityMonitorCallback(Callback):
    """Judges every optimizer step by monitors, logs what they find, and acts when it is too much.

    Their numbers are read from `trainer.callback_metrics` at the end of each batch with a step, as
    means over the processes, so that all of them act alike; `grad_norm` is measured unless `names`
    says where it is: before clipping, over all optimizers, of several steps in a batch the largest.
    Logged are what monitors derive (`entropy/relative`,
    ...), `grad_norm`, `stability/state` (0 healthy, 1 watch, 2 alarm) and `stability/rollbacks`.

    A step that a GradScaler skips is none.

    "roll_back" writes a checkpoint after the first healthy step and then every `healthy_every`
    healthy ones. The gradient of the step after it says whether it was good: then it replaces the
    one before. An alarm goes back to it: weights, optimizers, schedulers, the monitors and what
    callbacks and the module keep by their hooks on_save_checkpoint and on_load_checkpoint are as
    they were, while data, `global_step`, the scaler and other state of callbacks go on, so that
    other batches follow. It stops instead where there is no good checkpoint yet (none is written
    under FSDP2 before every parameter in an optimizer has had a gradient), and after
    `max_rollbacks` without a new one in between. What watches a metric of each step, as
    EarlyStopping and ReduceLROnPlateau may, has seen those of the steps undone.

    Args:
        monitors: of trimtab.stability, one of a class.
        on_alarm: "log" only, "stop" the fit (as EarlyStopping does), or "roll_back".
        patience: steps in alarm, without a break, after which to act; at least 1.
        names: what the module logs a monitor's number as, see StabilityWatch. Where optimizers take
            turns, log their norms alike: the one measured is over those that stepped.
        healthy_every: steps, at least 1.
        dirpath: where each run makes a folder for its healthy checkpoint; None: "healthy" in the
            Trainer's root folder.
        max_rollbacks: at least 1.
        prog_bar: show `stability/state` in the progress bar.

    Attributes:
        verdict: of the last step; None before the first.
        rollbacks: since the last healthy checkpoint.

    Raises:
        ValueError: an argument out of range; on setup, "roll_back" with a strategy other than a
            single device, DDP and FSDP2. A second such callback is refused by the Trainer.

    Source: practice; each monitor names its own.
    """

    def __init__(
        self,
        monitors: Sequence[Monitor],
        *,
        on_alarm: OnAlarm = "log",
        patience: int = 1,
        names: Mapping[str, str] | None = None,
        healthy_every: int = 100,
        dirpath: str | Path | None = None,
        max_rollbacks: int = 3,
        prog_bar: bool = True,
    ) -> None:
        self.watch = StabilityWatch(monitors, patience=patience, names=names)
        if on_alarm not in get_args(OnAlarm):
            raise ValueError(f"on_alarm: expected one of {get_args(OnAlarm)}, found {on_alarm!r}")
        for name, value in (("healthy_every", healthy_every), ("max_rollbacks", max_rollbacks)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, found {value!r}")
        self._measures = "grad_norm" in self.watch.inputs and "grad_norm" not in (names or {})
        self.on_alarm = on_alarm
        self.healthy_every = healthy_every
        self.dirpath = dirpath
        self.max_rollbacks = max_rollbacks
        self.prog_bar = prog_bar
        self._fresh = self.watch.state_dict()
        self._hooks: list[Any] = []
        self._missing_said = False
        self._stateless_said = False
        self._start_anew()

    def _start_anew(self) -> None:
        self.watch.load_state_dict(self._fresh)
        self.verdict: Verdict | None = None
        self.rollbacks = 0
        self._folder: Path | None = None  # of this run
        self._healthy: Path | None = None
        self._candidate: Path | None = None  # not known yet to be good
        self._healthy_steps = 0
        self._stepped = False  # an optimizer, in this batch
        self._squared_norms: dict[int, float] = {}  # by optimizer, of this batch

    @property
    def state_key(self) -> str:
        return "trimtab.StabilityMonitor"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        refuse_second(self, trainer)
        if self.on_alarm == "roll_back":
            refuse_strategy(trainer.strategy, 'on_alarm="roll_back"')
        if trainer.global_step == 0:  # before a checkpoint is loaded: not what an earlier run saw
            self._start_anew()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._release()
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(self._note_step))
        if self.on_alarm == "roll_back" and self._folder is None:
            folder = Path(self.dirpath or Path(trainer.default_root_dir) / "healthy")
            self._folder = trainer.strategy.broadcast(folder / uuid.uuid4().hex[:8])

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stepped = False

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        if self._measures:
            before = self._squared_norms.get(id(optimizer), 0.0)
            now = _squared_norm(optimizer)
            self._squared_norms[id(optimizer)] = now if now > before or math.isnan(now) else before

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        numbers = self._numbers(trainer) if self._stepped else None
        self._squared_norms = {}
        if numbers is None:
            return  # gradients are being accumulated, or a GradScaler has skipped the step
        self.verdict = self.watch.judge(numbers)
        if self.verdict.reading.state == "alarm":
            _logger.warning("step %d: %s", trainer.global_step, self.verdict.reading.reason)
        self._act(trainer, pl_module)
        self._log(trainer, pl_module)

    def _numbers(self, trainer: Any) -> dict[str, float]:
        """What the monitors read, the same on every process."""
        found = self.watch.select(trainer.callback_metrics)
        if self._squared_norms:
            found["grad_norm"] = math.sqrt(sum(self._squared_norms.values()))
        means = mean_over_ranks(trainer, [found.get(name) for name in self.watch.inputs])
        numbers = dict(zip(self.watch.inputs, means, strict=True))
        numbers = {name: value for name, value in numbers.items() if value is not None}
        silent = [
            type(m).__name__ for m in self.watch.monitors if not set(m.inputs) & numbers.keys()
        ]
        if silent and not self._missing_said:
            self._missing_said = True
            _logger.warning(
                "%s found none of its numbers in trainer.callback_metrics (%s) and judges nothing: "
                "log them in training_step, or say what they are called (names)",
                ", ".join(silent),
                ", ".join(trainer.callback_metrics) or "none",
            )
        return numbers

    def _act(self, trainer: Any, pl_module: Any) -> None:
        if self.on_alarm == "roll_back" and self.verdict.reading.state == "healthy":
            self._healthy_steps += 1
            self._confirm(trainer)
            # not before the first step: torch makes AdamW's state for an FSDP2 checkpoint by a step
            # of its own, which counts
            due = self._healthy is None or self._healthy_steps % self.healthy_every == 0
            if due and self._restorable(trainer):
                self._candidate = self._folder / f"step={trainer.global_step}.ckpt"
                trainer.save_checkpoint(self._candidate)
        if not self.verdict.tripped or self.on_alarm == "log":
            return
        reason = self.verdict.reading.reason
        there = self._healthy is not None and self._healthy.exists()
        if trainer.strategy.broadcast(there) and self.rollbacks < self.max_rollbacks:
            _logger.warning("step %d: back to %s: %s", trainer.global_step, self._healthy, reason)
            self._roll_back(trainer, pl_module)
            return
        _logger.warning(
            "step %d: stopping after %d rollbacks: %s", trainer.global_step, self.rollbacks, reason
        )
        trainer.should_stop = True

    def _restorable(self, trainer: Any) -> bool:
        """Whether what a checkpoint holds now could be loaded, which is too late to find out then.

        torch (2.13, checkpoint/state_dict.py) refuses a sharded optimizer's state if a parameter
        that requires a gradient has none.
        """
        kinds = [base.__name__ for base in type(trainer.strategy).__mro__]
        if "ModelParallelStrategy" not in kinds:
            return True
        stateless = {
            parameter
            for optimizer in trainer.optimizers
            if optimizer.state  # one without any is fine: SGD
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter not in optimizer.state
        }
        if stateless and not self._stateless_said:
            self._stateless_said = True
            named = trainer.lightning_module.named_parameters()
            _logger.warning(
                "no healthy checkpoint under FSDP2 while parameters have had no gradient (%s), so "
                "that an alarm stops: freeze them, or leave them out of the optimizer",
                ", ".join(name for name, parameter in named if parameter in stateless),
            )
        return not stateless

    def _confirm(self, trainer: Any) -> None:
        """Of the weights in the candidate there is a healthy gradient: it is the one to go back to.

        An update may ruin the weights though its own gradient was healthy.
        """
        if self._candidate is None:
            return
        before, self._healthy, self._candidate = self._healthy, self._candidate, None
        self.rollbacks = 0
        if before is not None:
            trainer.strategy.remove_checkpoint(before)

    def _roll_back(self, trainer: Any, pl_module: Any) -> None:
        strategy = trainer.strategy
        # By pickle, as it may hold hyper-parameters of any class: this run has written it. Under
        # FSDP2 this loads weights and optimizers, too.
        checkpoint = strategy.load_checkpoint(self._healthy, weights_only=False)
        pl_module.on_load_checkpoint(checkpoint)
        strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        for callback in trainer.callbacks:  # WeightAveraging puts the average into the state dict
            callback.on_load_checkpoint(trainer, pl_module, checkpoint)
        strategy.load_optimizer_state_dict(checkpoint)
        for config, state in zip(
            trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True
        ):
            config.scheduler.load_state_dict(state)
        self.watch.load_state_dict(checkpoint["callbacks"][self.state_key]["watch"])
        if self._candidate is not None:
            strategy.remove_checkpoint(self._candidate)
            self._candidate = None
        self._healthy_steps = 0
        self.rollbacks += 1

    def _log(self, trainer: Any, pl_module: Any) -> None:
        numbers = self.watch.finite(self.verdict)
        pl_module.log("stability/state", numbers.pop("stability/state"), prog_bar=self.prog_bar)
        if self.on_alarm == "roll_back":
            numbers["stability/rollbacks"] = float(self.rollbacks)
        pl_module.log_dict(
            {
                name: x
                for name, x in numbers.items()
                if name not in self.watch.inputs or (self._measures and name == "grad_norm")
            }
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def state_dict(self) -> dict[str, Any]:
        paths = {"folder": self._folder, "healthy": self._healthy, "candidate": self._candidate}
        return {
            "watch": self.watch.state_dict(),
            "rollbacks": self.rollbacks,
            "healthy_steps": self._healthy_steps,
            **{name: None if path is None else str(path) for name, path in paths.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.watch.load_state_dict(state_dict["watch"])
        self.rollbacks = state_dict["rollbacks"]
        self._healthy_steps = state_dict["healthy_steps"]
        for name in ("folder", "healthy", "candidate"):
            path = state_dict[name]
            setattr(self, f"_{name}", None if path is None else Path(path))


def _squared_norm(optimizer: Optimizer) -> float:
    """Of the gradients of an optimizer's parameters, over all shards of DTensors."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    kinds: dict[str, list[Tensor]] = {}
    for gradient in gradients:
        if gradient is not None:
            kinds.setdefault(type(gradient).__name__, []).append(gradient)
    norms = [get_total_norm(each) for each in kinds.values()]  # they do not mix in one call
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return sum(float(norm * norm) for norm in whole)
