"""A learning rate that decays once the mean response length surges.

    lr(step) = base(step) * factor(step)    the factor of length_detector.py, in [floor, 1]

Source: arXiv 2602.01826.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .length_detector import Detector, LengthDetector, Mode, Origin


class LengthTriggeredLR(LRScheduler):
    """Any learning rate schedule, decayed once the mean response length surges.

    Call `observe` with each step's mean response length, then `step`, as with every torch
    scheduler. The composed rate is exactly the base schedule's times the factor, also for schedules
    that compute a rate from the last one. An `lr` set by hand lasts until the next `step`: change
    the base schedule instead.

    Args:
        optimizer: whose `lr` is set.
        base: a scheduler of the same optimizer, which this one steps (do not step it yourself);
            None holds the rate.
        warmup, ratio, smoothing, period_factor, decay, floor, origin, mode, max_length, saturation:
            as in LengthDetector; steps are calls of `step`.
        detector, slow_smoothing, joint: likewise.

    Raises:
        ValueError: `base` belongs to another optimizer, or an argument is out of range.

    Source: arXiv 2602.01826; see LengthDetector.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base: LRScheduler | None = None,
        *,
        warmup: int = 50,
        ratio: float = 3.0,
        smoothing: float = 0.9,
        period_factor: float = 1.8,
        decay: float = 0.5,
        floor: float = 0.1,
        origin: Origin = "trigger",
        mode: Mode = "decay",
        max_length: float | None = None,
        saturation: float = 0.95,
        detector: Detector = "baseline",
        slow_smoothing: float = 0.99,
        joint: Mapping[str, float] | None = None,
    ) -> None:
        if base is not None and base.optimizer is not optimizer:
            raise ValueError("base: expected a scheduler of `optimizer`, found another optimizer's")
        self.detector = LengthDetector(
            warmup=warmup,
            ratio=ratio,
            smoothing=smoothing,
            period_factor=period_factor,
            decay=decay,
            floor=floor,
            origin=origin,
            mode=mode,
            max_length=max_length,
            saturation=saturation,
            detector=detector,
            slow_smoothing=slow_smoothing,
            joint=joint,
        )
        self.base = base
        self._unscaled: list[float] | None = None  # what the base schedule alone would use
        super().__init__(optimizer)

    @property
    def factor(self) -> float:
        """The factor now applied to the base schedule, in [floor, 1]."""
        return self.detector.factor_at(self.last_epoch)

    @property
    def triggered_at(self) -> int | None:
        """S, the step of the trigger, counted from 0; None before it."""
        return self.detector.triggered_at

    def observe(
        self,
        mean_length: float,
        truncated_fraction: float | None = None,
        *,
        mismatch: float | None = None,
        grad_norm: float | None = None,
    ) -> bool:
        """Records the mean response length of the current training step; call it before `step`.

        Args:
            mean_length: tokens, finite and at least 0; the same on all ranks.
            truncated_fraction: share of responses cut off at the limit, in [0, 1]; None if unknown.
            mismatch: see LengthDetector.observe.
            grad_norm: see LengthDetector.observe.

        Returns:
            Whether this observation triggered.

        Raises:
            ValueError: an argument out of range; nothing is recorded then.
        """
        return self.detector.observe(
            mean_length,
            truncated_fraction,
            step=self.last_epoch,
            mismatch=mismatch,
            grad_norm=grad_norm,
        )

    def step(self, metrics: float | None = None) -> None:
        """Advances the base schedule by one and sets the composed rate.

        Args:
            metrics: for a base of ReduceLROnPlateau, the value it watches; else None.

        Raises:
            ValueError: `metrics` is missing, or given to another base; nothing has changed then.
        """
        watches = isinstance(self.base, ReduceLROnPlateau)
        # It is None in the call by the constructor: the base has made its first step already.
        if self._unscaled is not None:
            if watches != (metrics is not None):
                expected = "a number for ReduceLROnPlateau" if watches else "None"
                raise ValueError(f"metrics: expected {expected}, found {metrics}")
            for group, lr in zip(self.optimizer.param_groups, self._unscaled, strict=False):
                _set_lr(group, lr)
            if self.base is not None:
                self.base.step(*(metrics,) if watches else ())
        self.last_epoch += 1
        self._step_count += 1
        self._unscaled = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._apply()

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=False):
            _set_lr(group, lr)
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def get_lr(self) -> list[float]:
        """The composed rate of every group, as floats."""
        return [lr * self.factor for lr in self._unscaled]

    def rearm(self) -> None:
        """Undoes trigger and factor at once and takes a new baseline: the surge was healthy."""
        self.detector.rearm()
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the base scheduler's state included."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "last_lr": list(self._last_lr),
            "base_lrs": list(self.base_lrs),
            "unscaled": list(self._unscaled),
            "detector": self.detector.state_dict(),
            "base": None if self.base is None else self.base.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; the groups' `lr` comes with the optimizer's state.

        Args:
            state_dict: from a LengthTriggeredLR with a base of the same kind.

        Raises:
            ValueError: a base is missing or not expected; nothing is restored then.
        """
        if (state_dict["base"] is None) != (self.base is None):
            expected = "none" if self.base is None else type(self.base).__name__
            found = "none" if state_dict["base"] is None else "one"
            raise ValueError(f"state_dict: expected base {expected}, found {found}")
        self.detector.load_state_dict(state_dict["detector"])
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self._last_lr = list(state_dict["last_lr"])
        self.base_lrs = list(state_dict["base_lrs"])
        self._unscaled = list(state_dict["unscaled"])
        if self.base is not None:
            self.base.load_state_dict(state_dict["base"])


def _set_lr(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)  # in place: compiled optimizers hold on to the tensor
    else:
        group["lr"] = lr
