"""Sees the surge of response lengths that comes before a collapse, and says what to do to the rate.

Until it comes, at step S, the factor is 1; then, with a period of P = period_factor * S steps,
    factor(step) = max(floor, decay ^ floor((step - origin) / P))    in [floor, 1]
With the defaults the rate halves every 1.8 * S steps, down to a tenth.

Source: arXiv 2602.01826. The detector (a smoothed length against the mean of the first steps) is a
reproduction's.
"""

import logging
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, get_args

Origin = Literal["trigger", "warmup"]
Mode = Literal["decay", "alert"]
Detector = Literal["baseline", "growth"]

_JOINT = ("mismatch", "grad_norm")

_logger = logging.getLogger(__name__)


class _Signal:
    """Averages of one watched number: of its first observations, of the last few, of many."""

    def __init__(self) -> None:
        self.seen = 0
        self.first_sum = 0.0
        self.smoothed: float | None = None
        self.slow: float | None = None

    def observe(self, value: float, detector: "LengthDetector") -> None:
        if self.seen < detector.warmup:
            self.first_sum += value
        for name, past in (("smoothed", detector.smoothing), ("slow", detector.slow_smoothing)):
            before = value if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, past * before + (1 - past) * value)
        self.seen += 1

    def rises(self, ratio: float, detector: "LengthDetector") -> bool:
        if self.smoothed is None:
            return False
        first = self.first_sum / min(self.seen, detector.warmup)
        return self.smoothed > ratio * (self.slow if detector.detector == "growth" else first)


class LengthDetector:
    """Decides from response lengths when, and by what factor, to lower a learning rate.

    Nothing triggers during the first `warmup` observations. After them, a surge is a smoothed
    length above `ratio` times a reference. A length stuck at the maximum is not "no surge": it
    cannot rise any more, so it counts as one, also when it was stuck from the start. The first
    surge triggers; later ones do nothing until `rearm`.

    Args:
        warmup: observations in the baseline, at least 1.
        ratio: above 1.
        smoothing: weight of the past in the exponential averages, in [0, 1); they start at the
            first observation.
        period_factor: steps between two decays, in units of S, above 0.
        decay: factor of each decay, in (0, 1).
        floor: smallest factor, in [0, 1].
        origin: "trigger" counts periods from S, "warmup" from the step at which the baseline was
            complete (a late trigger then takes several decays at once).
        mode: "decay", or "alert": logs the surge and leaves the factor at 1.
        max_length: tokens, the limit of a response; None if there is none.
        saturation: in (0, 1]; a smoothed length of this share of `max_length`, or this smoothed
            share of truncated responses, counts as stuck at the maximum.
        detector: the reference of a rise: "baseline", the mean of the first `warmup` observations;
            or "growth", a slower exponential average, so that only a fast rise is a surge.
        slow_smoothing: weight of the past in that slower average, in [smoothing, 1).
        joint: other numbers that must have risen with the length, by the same detector, before it
            triggers: "mismatch" and "grad_norm", each with its own ratio above 1, say {"mismatch":
            1.5, "grad_norm": 2.0}. With "growth" that is their slope. None: the length alone
            decides.

    Raises:
        ValueError: an argument out of range.

    Source: arXiv 2602.01826; smoothing, ratio and warmup are a reproduction's; saturation, growth
        and joint triggers are ours.
    """

    def __init__(
        self,
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
        numbers = dict(
            warmup=warmup, ratio=ratio, smoothing=smoothing, period_factor=period_factor,
            decay=decay, floor=floor, saturation=saturation, slow_smoothing=slow_smoothing,
            max_length=0 if max_length is None else max_length,
        )  # fmt: skip
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
                raise ValueError(f"{name}: expected a number, found {value!r}")
        joint = {} if joint is None else joint
        known = isinstance(joint, Mapping) and all(
            name in _JOINT and 1 < value < math.inf for name, value in joint.items()
        )
        for name, valid, expected, found in (
            ("warmup", warmup == int(warmup) >= 1, "a whole number of at least 1", warmup),
            ("ratio", 1 < ratio < math.inf, "finite and above 1", ratio),
            ("smoothing", 0 <= smoothing < 1, "a number in [0, 1)", smoothing),
            ("period_factor", 0 < period_factor < math.inf, "finite and above 0", period_factor),
            ("decay", 0 < decay < 1, "a number in (0, 1)", decay),
            ("floor", 0 <= floor <= 1, "a number in [0, 1]", floor),
            ("origin", origin in get_args(Origin), f"one of {get_args(Origin)}", origin),
            ("mode", mode in get_args(Mode), f"one of {get_args(Mode)}", mode),
            ("max_length", max_length is None or max_length > 0, "a number above 0", max_length),
            ("saturation", 0 < saturation <= 1, "a number in (0, 1]", saturation),
            ("detector", detector in get_args(Detector), f"one of {get_args(Detector)}", detector),
            (
                "slow_smoothing",
                smoothing <= slow_smoothing < 1,
                f"a number in [smoothing = {smoothing}, 1)",
                slow_smoothing,
            ),
            ("joint", known, f"a mapping of names of {_JOINT} to ratios above 1", joint),
        ):
            if not valid:
                raise ValueError(f"{name}: expected {expected}, found {found!r}")
        self.warmup = warmup
        self.ratio = ratio
        self.smoothing = smoothing
        self.period_factor = period_factor
        self.decay = decay
        self.floor = floor
        self.origin = origin
        self.mode = mode
        self.max_length = max_length
        self.saturation = saturation
        self.detector = detector
        self.slow_smoothing = slow_smoothing
        self.joint = dict(joint)
        self.rearm()

    def rearm(self) -> None:
        """Forgets the trigger, so that the factor is 1 again, and collects a new baseline.

        For a surge that was healthy learning: the length it reached becomes the new normal.
        """
        self._signals = {name: _Signal() for name in ("length", *self.joint)}
        self.smoothed_truncated = 0.0
        self.triggered_at: int | None = None
        self._warmup_ended_at: int | None = None

    @property
    def observations(self) -> int:
        """Lengths observed since the start or the last `rearm`."""
        return self._signals["length"].seen

    @property
    def smoothed(self) -> float | None:
        """Smoothed mean length, tokens; None before the first observation."""
        return self._signals["length"].smoothed

    @property
    def baseline(self) -> float | None:
        """Mean length, in tokens, of the first `warmup` observations; None until they are there."""
        length = self._signals["length"]
        return length.first_sum / self.warmup if length.seen >= self.warmup else None

    def observe(
        self,
        mean_length: float,
        truncated_fraction: float | None = None,
        *,
        step: int,
        mismatch: float | None = None,
        grad_norm: float | None = None,
    ) -> bool:
        """Records the mean response length of one training step.

        Args:
            mean_length: tokens, finite and at least 0.
            truncated_fraction: share of responses cut off at the limit, in [0, 1]; None if unknown.
            step: the step it was seen in, counted from 0.
            mismatch: a measure of it that is at least 0, say `mismatch/k3`; needed if it is in
                `joint`. A value that is not finite counts as risen and stays out of the averages.
            grad_norm: likewise, before clipping.

        Returns:
            Whether this observation triggered.

        Raises:
            ValueError: an argument out of range; nothing is recorded then.
        """
        mean_length = float(mean_length)
        if not 0 <= mean_length < math.inf:
            raise ValueError(
                f"mean_length: expected a finite number of at least 0, found {mean_length}"
            )
        if truncated_fraction is not None and not 0 <= truncated_fraction <= 1:
            raise ValueError(
                f"truncated_fraction: expected a number in [0, 1], found {truncated_fraction}"
            )
        given = {"mismatch": mismatch, "grad_norm": grad_norm}
        others = {name: given[name] for name in self.joint}
        for name, value in others.items():
            if value is None:
                raise ValueError(f"{name}: expected a number, because it is in joint, found None")
            if value < 0:
                raise ValueError(f"{name}: expected a number of at least 0, found {value}")
        broken = {name for name, value in others.items() if not math.isfinite(value)}
        past = self.smoothing if self.observations else 0.0
        if truncated_fraction is not None:
            share = (1 - past) * float(truncated_fraction)
            self.smoothed_truncated = past * self.smoothed_truncated + share
        self._signals["length"].observe(mean_length, self)
        for name in others.keys() - broken:
            self._signals[name].observe(float(others[name]), self)
        if self.observations <= self.warmup:
            self._warmup_ended_at = step if self.observations == self.warmup else None
            return False
        if self.triggered_at is not None or not self._surges(broken):
            return False
        self.triggered_at = step
        _logger.warning(
            "mean response length surged at step %d: smoothed %.1f, baseline %.1f tokens (mode %s)",
            step, self.smoothed, self.baseline, self.mode,
        )  # fmt: skip
        return True

    def _surges(self, broken: set[str]) -> bool:
        stuck = self.max_length is not None and self.smoothed >= self.saturation * self.max_length
        truncated = self.smoothed_truncated >= self.saturation
        long = self._signals["length"].rises(self.ratio, self) or stuck or truncated
        return long and all(
            name in broken or self._signals[name].rises(ratio, self)
            for name, ratio in self.joint.items()
        )

    def factor_at(self, step: int) -> float:
        """The factor at `step`, in [floor, 1]; 1 before the trigger and in mode "alert"."""
        if self.triggered_at is None or self.mode == "alert":
            return 1.0
        origin = self.triggered_at if self.origin == "trigger" else self._warmup_ended_at
        # In fractions: as floats 1.1 * 50 exceeds 55, which would delay a decay by one step.
        period = Fraction(str(self.period_factor)) * max(self.triggered_at, 1)
        return max(self.floor, self.decay ** max(0, (step - origin) // period))

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as plain numbers; the constructor's arguments are not part of it."""
        return {
            "signals": {name: dict(vars(signal)) for name, signal in self._signals.items()},
            "smoothed_truncated": self.smoothed_truncated,
            "triggered_at": self.triggered_at,
            "warmup_ended_at": self._warmup_ended_at,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; arguments stay, so that mode "alert" can follow.

        Args:
            state: from `state_dict`; a signal of `joint` that is not in it starts anew.

        Raises:
            ValueError: other keys than those of `state_dict`; nothing is restored then.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"state: expected keys {sorted(self.state_dict())}, found {sorted(state)}"
            )
        fields = vars(_Signal()).keys()
        if "length" not in state["signals"] or any(
            signal.keys() != fields for signal in state["signals"].values()
        ):
            raise ValueError(f"state: expected signals with {sorted(fields)}, found {state}")
        for name, signal in self._signals.items():
            vars(signal).update(state["signals"].get(name, vars(_Signal())))
        self.smoothed_truncated = state["smoothed_truncated"]
        self.triggered_at = state["triggered_at"]
        self._warmup_ended_at = state["warmup_ended_at"]
