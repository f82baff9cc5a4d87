"""Monitors: numbers of a step in, a state and a reason in words out, for any trainer.

    monitor = ClipEntropyMonitor()
    reading = monitor.observe(log_ratio, advantages, mask, logp, entropy, lr=1e-6)
    reading.state      "healthy", "watch" or "alarm"
    reading.reason     "clip/clipped_fraction 0.61 above 0.5: most of the gradient is clipped away"
    reading.metrics    every number, ready for a logger

`observe` measures tensors and judges; `judge` takes the numbers alone, so a log can be replayed.
How a number is judged is in readings.py. The limits' defaults are ours, to be set for the run at
hand. Monitors hold plain numbers only: put `state_dict()` into the checkpoint. Over ranks pass the
process group, so that every rank reads the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from .metrics import clip_metrics, entropy_metrics, sign_length_metrics
from .mismatch import MismatchReport
from .readings import Limit, Monitor, Pair, Reading
from .token_baseline import gradient_variance_proxy


class ClipEntropyMonitor(Monitor):
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

    inputs = (
        "clip/clipped_fraction",
        "clip/clipped_high",
        "clip/clipped_low",
        "clip/signal_ratio",
        "entropy/mean",
    )

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
            Limit("clipped", clipped, "clip/clipped_fraction", meaning),
            Limit("signal", signal, "clip/signal_ratio", meaning, low=True),
            Limit("entropy_fall", entropy_fall, relative, "entropy is collapsing", low=True),
            Limit("entropy_rise", entropy_rise, relative, "entropy is exploding"),
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


class VarianceMonitor(Monitor):
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

    inputs = ("variance/total_power", "variance/signal")

    def __init__(
        self, *, growth: Pair = (3.0, 10.0), warmup: int = 20, smoothing: float = 0.9
    ) -> None:
        limits = [Limit("growth", growth, "variance/growth", "gradients are getting noisier")]
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


class SignLengthMonitor(Monitor):
    """Whether the aggregation pushes responses to be longer or shorter, whatever they say.

    Args:
        share: limits on |coupling/share|, what lengths alone add over the weighted advantages.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2605.04077 (read in part); the limits are ours.
    """

    inputs = ("coupling/share",)

    def __init__(self, *, share: Pair = (0.1, 0.3)) -> None:
        meaning = "lengths alone move the loss, by the aggregation rule"
        super().__init__([Limit("share", share, "coupling/abs_share", meaning)])

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


class MismatchMonitor(Monitor):
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

    inputs = ("mismatch/k3", "mismatch/ess")

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
            Limit("k3", k3, "mismatch/k3", "the engine samples from another policy"),
            Limit("ess", ess, "mismatch/ess", few, low=True),
            Limit("growth", growth, "mismatch/growth", "the mismatch is growing"),
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


class GradientNormMonitor(Monitor):
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

    inputs = ("grad_norm",)

    def __init__(self, *, spike: Pair = (3.0, 10.0), window: int = 50) -> None:
        if window < 2:
            raise ValueError(f"expected window >= 2, got {window}")
        self._norms: deque[float] = deque(maxlen=window)
        super().__init__(
            [
                Limit("finite", (math.inf, math.inf), "grad_norm", ""),
                Limit("spike", spike, "grad_norm/relative", "the gradient is spiking"),
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
