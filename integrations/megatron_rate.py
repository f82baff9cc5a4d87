"""The length-triggered rate in Megatron's `OptimizerParamScheduler`.

    scheduler = length_triggered(OptimizerParamScheduler(optimizer, ...), max_length=8192)
    for each step:
        ...
        scheduler.observe(mean_length, truncated_fraction)
        scheduler.step(increment)

    lr(group) = Megatron's lr(group) * factor    of optim/length_detector.py, in [floor, 1]

Megatron computes every group's rate anew at each `step`, by its warmup, decay style and the
`max_lr` and `min_lr` of the group: the factor goes on what it computed, nothing else changes.

Source: arXiv 2602.01826.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ..optim.length_detector import Detector, LengthDetector, Mode, Origin
from . import megatron_model  # noqa: F401, it refuses versions that were not tried

_STATE = "length_triggered"

logger = logging.getLogger(__name__)


class LengthTriggeredParamScheduler(OptimizerParamScheduler):
    """An OptimizerParamScheduler whose rates decay once the mean response length surges.

    `length_triggered` makes one. Steps of the detector are calls of `step` with an increment (one a
    training step, whatever Megatron counts by the increment: iterations or samples), from 0 when
    it was made one. Weight decay is Megatron's.
    """

    detector: LengthDetector
    updates: int
    _loading: bool

    @property
    def factor(self) -> float:
        """The factor now on every group's rate, in [floor, 1]; Megatron's `min_lr` is under it."""
        return self.detector.factor_at(self.updates)

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
            step=self.updates,
            mismatch=mismatch,
            grad_norm=grad_norm,
        )

    def rearm(self) -> None:
        """Undoes trigger and factor at once and takes a new baseline: the surge was healthy."""
        self.detector.rearm()
        self.step(0)

    def get_lr(self, param_group: dict) -> float:
        """Megatron's rate of a group, times the factor.

        Args:
            param_group: of the optimizer.

        Returns:
            The rate.
        """
        return super().get_lr(param_group) * self.factor

    def step(self, increment: int) -> None:
        """Advances Megatron's schedule and sets the rates of all groups.

        Args:
            increment: Megatron's; 0 sets the rates again and does not count as a step.
        """
        if increment and not self._loading:
            self.updates += 1
        super().step(increment)

    def state_dict(self) -> dict[str, Any]:
        """Megatron's state and the detector's, as plain numbers; loads without trimtab, too.

        Returns:
            A new dict.
        """
        own = {"updates": self.updates, "detector": self.detector.state_dict()}
        return super().state_dict() | {_STATE: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores both; of a checkpoint without the detector's state that one starts anew.

        Args:
            state_dict: of this scheduler, or of Megatron's own.

        Raises:
            ValueError: the detector's state has other keys; nothing is restored then.
            AssertionError: Megatron's own, of another schedule; nothing of ours is restored then.
        """
        own, before = state_dict.get(_STATE), (self.updates, self.detector.state_dict())
        if own is None:
            logger.warning(
                "checkpoint without the state of length_triggered: lengths are observed from here "
                "on, with a factor of 1 until they surge"
            )
            self.detector.rearm()
            self.updates = 0
        elif own.keys() != {"updates", "detector"}:
            raise ValueError(f"state_dict: expected updates and detector, found {sorted(own)}")
        else:
            self.detector.load_state_dict(own["detector"])
            self.updates = own["updates"]
        # it steps by all that the checkpoint has seen, and so sets the rates: the factor is there
        self._loading = True
        try:
            super().load_state_dict({k: v for k, v in state_dict.items() if k != _STATE})
        except BaseException:
            self.updates, detector = before
            self.detector.load_state_dict(detector)
            raise
        finally:
            self._loading = False


def length_triggered(
    scheduler: OptimizerParamScheduler,
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
) -> LengthTriggeredParamScheduler:
    """Makes Megatron's scheduler a length-triggered one, in place: who holds it, holds that.

    Call it before a checkpoint is loaded into the scheduler.

    Args:
        scheduler: OptimizerParamScheduler, or of a class derived from it.
        warmup, ratio, smoothing, period_factor, decay, floor, origin, mode, max_length, saturation:
            as in LengthDetector; steps are calls of the scheduler's `step`.
        detector, slow_smoothing, joint: likewise.

    Returns:
        The same scheduler, with `observe`, `rearm`, `factor` and `triggered_at`.

    Raises:
        ValueError: it is no OptimizerParamScheduler or a length-triggered one already, or an
            argument is out of range; nothing has changed then.

    Source: arXiv 2602.01826; see LengthDetector.
    """
    if isinstance(scheduler, LengthTriggeredParamScheduler):
        raise ValueError(
            "scheduler: expected one that is not length-triggered yet, got one that is: call "
            "length_triggered once"
        )
    if not isinstance(scheduler, OptimizerParamScheduler):
        raise ValueError(
            "scheduler: expected Megatron's OptimizerParamScheduler (for a torch scheduler: "
            f"trimtab.optim.LengthTriggeredLR), got {type(scheduler).__name__}"
        )
    observing = LengthDetector(
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
    own, ours = type(scheduler), LengthTriggeredParamScheduler
    scheduler.detector, scheduler.updates, scheduler._loading = observing, 0, False
    # a class of the user's keeps its own rate, under the factor
    derived = own is not OptimizerParamScheduler
    scheduler.__class__ = type(ours.__name__, (ours, own), {}) if derived else ours
    return scheduler
