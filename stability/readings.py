"""What monitors are made of: limits and trends that turn the numbers of a step into a reading.

A limit is a pair (watch, alarm) and belongs to one number, which also says whether large or small
is bad; a number at its limit has not passed it. Numbers that a trend compares with "at first" are
compared with their mean over the first `warmup` steps. A number that is judged, or whose trend is,
and is not finite is always an alarm; a trend does not take it in.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

State = Literal["healthy", "watch", "alarm"]
Pair = tuple[float, float]

_ORDER = ("healthy", "watch", "alarm")


class Reading(NamedTuple):
    """What a monitor says of one step.

    Args:
        state: "healthy", "watch" or "alarm".
        reason: which number passed which limit and what that means; of the worst ones, joined.
        metrics: every number it looked at.
    """

    state: State
    reason: str
    metrics: dict[str, float]


def overall(readings: Iterable[Reading]) -> Reading:
    """The worst state of several readings, the reasons for it, and all numbers.

    Args:
        readings: of several monitors at one step; at least one.

    Returns:
        One reading.

    Raises:
        ValueError: there is none.
    """
    readings = list(readings)
    if not readings:
        raise ValueError("expected at least one reading, got none")
    state = max((r.state for r in readings), key=_ORDER.index)
    reasons = dict.fromkeys(r.reason for r in readings if r.state == state)
    numbers = {name: value for r in readings for name, value in r.metrics.items()}
    return Reading(state, "; ".join(reasons), numbers)


class Limit:
    """One number's limits; `low` says that small is bad."""

    def __init__(
        self, name: str, pair: Pair, metric: str, meaning: str, *, low: bool = False
    ) -> None:
        try:
            watch, alarm = (float(x) for x in pair)
        except (TypeError, ValueError):
            watch = alarm = math.nan
        if not (watch >= alarm if low else watch <= alarm):
            order = "watch >= alarm" if low else "watch <= alarm"
            raise ValueError(f"expected {name} as a pair (watch, alarm) with {order}, got {pair}")
        self.watch, self.alarm, self.metric, self.meaning, self.low = (
            watch, alarm, metric, meaning, low,
        )  # fmt: skip

    def state(self, value: float) -> State:
        if not math.isfinite(value) or self._beyond(value, self.alarm):
            return "alarm"
        return "watch" if self._beyond(value, self.watch) else "healthy"

    def _beyond(self, value: float, limit: float) -> bool:
        return value < limit if self.low else value > limit

    def reason(self, value: float) -> str:
        if not math.isfinite(value):
            return f"{self.metric} is {value}"
        limit = self.alarm if self._beyond(value, self.alarm) else self.watch
        side = "below" if self.low else "above"
        return f"{self.metric} {value:.3g} {side} {limit:.3g}: {self.meaning}"


class Trend:
    """A smoothed number relative to its mean over the first `warmup` observations."""

    def __init__(self, warmup: int, smoothing: float) -> None:
        if warmup < 1 or not 0 <= smoothing < 1:
            raise ValueError(
                f"expected warmup >= 1 and smoothing in [0, 1), got {warmup} and {smoothing}"
            )
        self.warmup, self.smoothing = warmup, smoothing
        self.seen, self.first_sum, self.smoothed = 0, 0.0, 0.0

    def update(self, value: float) -> float | None:
        """Smoothed value over the first ones' mean; None before there is one, or if that is 0."""
        if not math.isfinite(value):
            return None
        past = self.smoothing if self.seen else 0.0
        self.smoothed = past * self.smoothed + (1 - past) * value
        if self.seen < self.warmup:
            self.first_sum += value
        self.seen += 1
        if self.seen < self.warmup or self.first_sum == 0:
            return None
        return self.smoothed / (self.first_sum / self.warmup)

    def state_dict(self) -> dict[str, float]:
        return {"seen": self.seen, "first_sum": self.first_sum, "smoothed": self.smoothed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.seen = int(state["seen"])
        self.first_sum, self.smoothed = float(state["first_sum"]), float(state["smoothed"])


class Monitor:
    """Judges named numbers by limits, after adding those of its trends.

    Attributes:
        inputs: names of the numbers that it judges or derives others from.
    """

    inputs: tuple[str, ...] = ()

    def __init__(
        self,
        limits: Iterable[Limit],
        trends: Mapping[str, str] | None = None,
        *,
        warmup: int = 1,
        smoothing: float = 0.0,
    ) -> None:
        self._limits = tuple(limits)
        self._trends = {
            source: (result, Trend(warmup, smoothing)) for source, result in (trends or {}).items()
        }

    def judge(self, metrics: Mapping[str, float | Tensor]) -> Reading:
        """State and reason from the numbers of one step; call it once a step, in order.

        Args:
            metrics: numbers by name; those that the monitor does not know are passed on, those that
                are missing are not judged.

        Returns:
            The reading, with the numbers of trends added.
        """
        numbers = {name: float(x) for name, x in metrics.items() if x is not None}
        self._extend(numbers)
        found: dict[State, list[str]] = {"healthy": [], "watch": [], "alarm": []}
        for source, (result, trend) in self._trends.items():
            if source in numbers and not math.isfinite(numbers[source]):
                found["alarm"].append(f"{source} is {numbers[source]}")
            relative = trend.update(numbers[source]) if source in numbers else None
            if relative is not None:
                numbers[result] = relative
        for limit in self._limits:
            if limit.metric in numbers:
                state = limit.state(numbers[limit.metric])
                found[state].append(limit.reason(numbers[limit.metric]))
        for state in ("alarm", "watch"):
            if found[state]:
                return Reading(state, "; ".join(dict.fromkeys(found[state])), numbers)
        if not found["healthy"]:
            return Reading("healthy", "no number to judge", numbers)
        return Reading("healthy", "every number is within its limits", numbers)

    def _extend(self, numbers: dict[str, float]) -> None:
        """Adds what a monitor derives from the numbers."""

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as plain numbers; limits are not part of it.

        Returns:
            A new dict.
        """
        return {source: trend.state_dict() for source, (_, trend) in self._trends.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: from a monitor of the same class.

        Raises:
            ValueError: other keys; nothing is restored then.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"expected state with keys {sorted(self.state_dict())}, got {sorted(state)}"
            )
        for source in self._trends:
            if not isinstance(state[source], Mapping) or state[source].keys() != {
                "seen", "first_sum", "smoothed",
            }:  # fmt: skip
                raise ValueError(f"expected state of {source} from state_dict, got {state[source]}")
        for source, (_, trend) in self._trends.items():
            trend.load_state_dict(state[source])
