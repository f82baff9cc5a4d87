"""Monitors: numbers of a step in, a state and a reason in words out, for any trainer.

    monitor = ClipEntropyMonitor()
    reading = monitor.observe(log_ratio, advantages, mask, logp, entropy, lr=1e-6)
    reading.state      "healthy", "watch" or "alarm"
    reading.reason     "clip/clipped_fraction 0.61 above 0.5: most of the gradient is clipped away"
    reading.metrics    every number, ready for a logger

`observe` measures tensors and judges; `judge` takes the numbers alone, so a log can be replayed.
A limit is a pair (watch, alarm) and belongs to one number, which also says whether large or small
is bad. Numbers that a trend compares with "at first" are compared with their mean over the first
`warmup` steps. The limits' defaults are ours, to be set for the run at hand; a number that is
judged, or whose trend is, and is not finite is always an alarm; a trend does not take it in.
Monitors hold plain numbers only: put `state_dict()` into the checkpoint. Over ranks pass the
process group, so that every rank reads the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from .metrics import clip_metrics, entropy_metrics, sign_length_metrics
from .mismatch import MismatchReport
from .token_baseline import gradient_variance_proxy

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


class _Limit:
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
        return value <= limit if self.low else value >= limit

    def reason(self, value: float) -> str:
        if not math.isfinite(value):
            return f"{self.metric} is {value}"
        limit = self.alarm if self._beyond(value, self.alarm) else self.watch
        side = "below" if self.low else "above"
        return f"{self.metric} {value:.3g} {side} {limit:.3g}: {self.meaning}"


class _Trend:
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


class _Monitor:
    """Judges named numbers by limits, after adding those of its trends."""

    def __init__(
        self,
        limits: Iterable[_Limit],
        trends: Mapping[str, str] | None = None,
        *,
        warmup: int = 1,
        smoothing: float = 0.0,
    ) -> None:
        self._limits = tuple(limits)
        self._trends = {
            source: (result, _Trend(warmup, smoothing)) for source, result in (trends or {}).items()
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


class ClipEntropyMonitor(_Monitor):
    """What PPO's clipping removes, and whether entropy collapses or explodes.

    Args:
        clip_low: the loss's range is [1 - clip_low, 1 + clip_high].
        clip_high: >= 0.
        clipped: limits on `clip/clipped_fraction`, the share of tokens without a gradient.
        signal: limits on `clip/signal_ratio`, the raw signal over the clipped-away part (about 17
            is healthy by the paper).
        entropy_fall: limits on `entropy/relative`, smoothed entropy over that at first.
        entropy_rise: upper limits on the same.
        warmup: steps that count as "at first", at least 1.
        smoothing: weight of the past, in [0, 1).

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2512.16912 (read in part); the limits are ours.
    """

    def __init__(
        self,
        *,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        clipped: Pair = (0.2, 0.5),
        signal: Pair = (5.0, 2.0),
        entropy_fall: Pair = (0.5, 0.2),
        entropy_rise: Pair = (2.0, 4.0),
        warmup: int = 20,
        smoothing: float = 0.9,
    ) -> None:
        self.clip_low, self.clip_high = clip_low, clip_high
        self._last_entropy: float | None = None
        meaning = "clipping removes much of the gradient"
        relative = "entropy/relative"
        limits = (
            _Limit("clipped", clipped, "clip/clipped_fraction", meaning),
            _Limit("signal", signal, "clip/signal_ratio", meaning, low=True),
            _Limit("entropy_fall", entropy_fall, relative, "entropy is collapsing", low=True),
            _Limit("entropy_rise", entropy_rise, relative, "entropy is exploding"),
        )
        trends = {"entropy/mean": "entropy/relative"}
        super().__init__(limits, trends, warmup=warmup, smoothing=smoothing)

    def observe(
        self,
        log_ratio: Tensor,
        advantages: Tensor,
        mask: Tensor,
        logp: Tensor,
        entropy: Tensor,
        *,
        lr: float = 1.0,
        process_group: ProcessGroup | None = None,
    ) -> Reading:
        """Measures and judges one step.

        Args:
            log_ratio: [B, T] lp - lp_old of the sampled tokens, nats.
            advantages: [B, T].
            mask: [B, T] bool.
            logp: [B, T] of the sampled tokens, nats.
            entropy: [B, T] of the policy at each position, nats.
            lr: learning rate in front of the predicted change of entropy.
            process_group: the ranks whose rows form the batch. None: this process alone.

        Returns:
            A reading with the numbers of `clip_metrics` and `entropy_metrics`,
            `clip/clipped_fraction`, `entropy/change` since the last step, to hold against the last
            step's `entropy/predicted_change`, and `entropy/relative`.

        Raises:
            ValueError: as `clip_metrics` and `entropy_metrics`; nothing is recorded then.
        """
        clip = clip_metrics(
            log_ratio, advantages, mask, self.clip_low, self.clip_high, process_group=process_group
        )
        found = entropy_metrics(entropy, logp, advantages, mask, lr=lr, process_group=process_group)
        return self.judge(clip | found)

    def _extend(self, numbers: dict[str, float]) -> None:
        if {"clip/clipped_high", "clip/clipped_low"} <= numbers.keys():
            high, low = numbers["clip/clipped_high"], numbers["clip/clipped_low"]
            numbers["clip/clipped_fraction"] = high + low
        entropy = numbers.get("entropy/mean", math.nan)
        if math.isfinite(entropy):
            if self._last_entropy is not None:
                numbers["entropy/change"] = entropy - self._last_entropy
            self._last_entropy = entropy

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as plain numbers; limits are not part of it.

        Returns:
            A new dict.
        """
        return super().state_dict() | {"last_entropy": self._last_entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: from a monitor of the same class.

        Raises:
            ValueError: other keys; nothing is restored then.
        """
        super().load_state_dict(state)
        self._last_entropy = state["last_entropy"]


class VarianceMonitor(_Monitor):
    """Power of the policy gradient at the logits against its signal, and where it is going.

    Args:
        growth: limits on `variance/growth`, smoothed total power over that at first.
        warmup: steps that count as "at first", at least 1.
        smoothing: weight of the past, in [0, 1).

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2602.07078 (the authors' variance monitor); the limits are ours.
    """

    def __init__(
        self, *, growth: Pair = (3.0, 10.0), warmup: int = 20, smoothing: float = 0.9
    ) -> None:
        limits = [_Limit("growth", growth, "variance/growth", "gradients are getting noisier")]
        trends = {
            "variance/total_power": "variance/growth",
            "variance/signal": "variance/signal_growth",
        }
        super().__init__(limits, trends, warmup=warmup, smoothing=smoothing)

    def observe(
        self,
        advantages: Tensor,
        logp: Tensor,
        sum_p2: Tensor,
        mask: Tensor,
        *,
        grad_norm: Tensor | float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Reading:
        """Measures and judges one step.

        Args:
            advantages: [B, T].
            logp: [B, T], nats.
            sum_p2: [B, T].
            mask: [B, T] bool.
            grad_norm: norm of the batch's gradient; with it also `variance/signal` and
                `variance/power_to_signal`.
            process_group: the ranks whose rows form the batch. None: this process alone.

        Returns:
            A reading with the numbers of `gradient_variance_proxy`, `variance/growth` and, with
            grad_norm, `variance/signal_growth`.

        Raises:
            ValueError: as `gradient_variance_proxy`; nothing is recorded then.
        """
        return self.judge(
            gradient_variance_proxy(
                advantages, logp, sum_p2, mask, grad_norm=grad_norm, process_group=process_group
            )
        )

    def _extend(self, numbers: dict[str, float]) -> None:
        if numbers.get("variance/signal", 0.0) > 0 and "variance/total_power" in numbers:
            ratio = numbers["variance/total_power"] / numbers["variance/signal"]
            numbers["variance/power_to_signal"] = ratio


class SignLengthMonitor(_Monitor):
    """Whether the aggregation pushes responses to be longer or shorter, whatever they say.

    Args:
        share: limits on |coupling/share|, what lengths alone add over the weighted advantages.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2605.04077 (read in part); the limits are ours.
    """

    def __init__(self, *, share: Pair = (0.1, 0.3)) -> None:
        meaning = "lengths alone move the loss, by the aggregation rule"
        super().__init__([_Limit("share", share, "coupling/abs_share", meaning)])

    def observe(
        self,
        weights: Tensor,
        outcome_advantages: Tensor,
        mask: Tensor,
        group_ids: Tensor,
        *,
        process_group: ProcessGroup | None = None,
    ) -> Reading:
        """Measures and judges one step.

        Args:
            weights: [B, T], from `aggregation_weights`.
            outcome_advantages: [B].
            mask: [B, T] bool.
            group_ids: [B] of an integer dtype.
            process_group: the ranks whose rows form the batch. None: this process alone.

        Returns:
            A reading with the numbers of `sign_length_metrics`.

        Raises:
            ValueError: as `sign_length_metrics`.
        """
        return self.judge(
            sign_length_metrics(
                weights, outcome_advantages, mask, group_ids, process_group=process_group
            )
        )

    def _extend(self, numbers: dict[str, float]) -> None:
        if "coupling/share" in numbers:
            numbers["coupling/abs_share"] = abs(numbers["coupling/share"])


class MismatchMonitor(_Monitor):
    """Whether rollout engine and trainer drift apart.

    Args:
        k3: limits on `mismatch/k3`, nats a token.
        ess: limits on `mismatch/ess`, the effective share of the tokens.
        growth: limits on `mismatch/growth`, smoothed k3 over that at first.
        warmup: steps that count as "at first", at least 1.
        smoothing: weight of the past, in [0, 1).

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2512.23075 and 2512.23087 (abstract read) for the numbers; the limits are ours (0.001
        is the default mean bound of trust-region masking).
    """

    def __init__(
        self,
        *,
        k3: Pair = (1e-3, 1e-2),
        ess: Pair = (0.9, 0.5),
        growth: Pair = (3.0, 10.0),
        warmup: int = 20,
        smoothing: float = 0.9,
    ) -> None:
        few = "a few tokens carry the importance weights"
        limits = (
            _Limit("k3", k3, "mismatch/k3", "the engine samples from another policy"),
            _Limit("ess", ess, "mismatch/ess", few, low=True),
            _Limit("growth", growth, "mismatch/growth", "the mismatch is growing"),
        )
        trends = {"mismatch/k3": "mismatch/growth"}
        super().__init__(limits, trends, warmup=warmup, smoothing=smoothing)

    def observe(self, report: MismatchReport) -> Reading:
        """Judges one step.

        Args:
            report: of the whole batch: the sum over micro-batches, reduced over ranks.

        Returns:
            A reading with the report's metrics and `mismatch/growth`.
        """
        return self.judge(report.metrics())


class GradientNormMonitor(_Monitor):
    """Spikes of the gradient norm against the median of the last steps.

    Args:
        spike: limits on `grad_norm/relative`, the norm over that median.
        window: steps in the median, at least 2; before half of them are there nothing but a norm
            that is not finite is judged.

    Raises:
        ValueError: an argument is out of range.

    Source:
        practice; arXiv 2602.01826 (read in part) names the gradient norm beside the length. The
        limits are ours.
    """

    def __init__(self, *, spike: Pair = (3.0, 10.0), window: int = 50) -> None:
        if window < 2:
            raise ValueError(f"expected window >= 2, got {window}")
        self._norms: deque[float] = deque(maxlen=window)
        super().__init__(
            [
                _Limit("finite", (math.inf, math.inf), "grad_norm", ""),
                _Limit("spike", spike, "grad_norm/relative", "the gradient is spiking"),
            ]
        )

    def observe(self, grad_norm: Tensor | float) -> Reading:
        """Judges one step.

        Args:
            grad_norm: before clipping, of the whole batch over all ranks.

        Returns:
            A reading with `grad_norm`, `grad_norm/median` and `grad_norm/relative`.
        """
        return self.judge({"grad_norm": grad_norm})

    def _extend(self, numbers: dict[str, float]) -> None:
        norm = numbers.get("grad_norm")
        if norm is None:
            return
        if len(self._norms) >= (self._norms.maxlen or 0) / 2:
            median = statistics.median(self._norms)
            numbers["grad_norm/median"] = median
            if median > 0:
                numbers["grad_norm/relative"] = norm / median
        if math.isfinite(norm):  # what is not must not become the measure of the next
            self._norms.append(norm)

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as plain numbers; limits are not part of it.

        Returns:
            A new dict.
        """
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Args:
            state: from a monitor of the same class; of a longer window the last ones are kept.

        Raises:
            ValueError: other keys; nothing is restored then.
        """
        if state.keys() != {"norms"} or not isinstance(state["norms"], list):
            raise ValueError(f"expected state with keys ['norms'] and a list, got {dict(state)}")
        self._norms = deque(map(float, state["norms"]), maxlen=self._norms.maxlen)
