"""Several monitors over the numbers that a trainer logs: one verdict a step.

    watch = StabilityWatch([GradientNormMonitor(), ClipEntropyMonitor()], patience=3)
    verdict = watch.judge({"grad_norm": 0.7, "actor/entropy": 1.2})
    verdict.reading    the worst state of all, the reasons for it, every number
    verdict.alarms     steps in alarm without a break
    verdict.tripped    they have reached `patience`: stop, or go back to the last healthy state

Trainers name their numbers as they like; `HOST_NAMES` has those of TRL, verl and our loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .readings import Monitor, Reading, overall

# The monitors' names, and what hosts log the same number as; the first that is there counts.
HOST_NAMES: dict[str, tuple[str, ...]] = {
    "entropy/mean": ("actor/entropy", "entropy"),  # verl, TRL
    "grad_norm": ("actor/grad_norm",),  # verl
    "clip/clipped_fraction": ("actor/pg_clipfrac", "clip_ratio/region_mean"),  # verl, TRL
    "mismatch/k3": ("rollout_corr/k3_kl",),  # verl
}


class Verdict(NamedTuple):
    """What a watch says of one step.

    Args:
        reading: the worst state, the reasons for it, and every number.
        alarms: steps in alarm up to this one, without a break.
        tripped: `alarms` has reached the watch's patience.
    """

    reading: Reading
    alarms: int
    tripped: bool


class StabilityWatch:
    """Feeds monitors from one log of numbers and says when it has been too bad for too long.

    Args:
        monitors: at least one, of different classes.
        patience: steps in alarm, without a break, until it trips; at least 1.
        names: for a monitor's number, what the trainer logs it as: {"entropy/mean": "my_entropy"};
            before HOST_NAMES and the monitors' own names.

    Raises:
        ValueError: no monitors, two of a class, a patience below 1, or `names` of a number that
            none of the monitors reads.

    Source: practice; each monitor names its own.
    """

    def __init__(
        self,
        monitors: Sequence[Monitor],
        *,
        patience: int = 1,
        names: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(monitors, Monitor):
            raise ValueError(
                f"monitors: expected a list of monitors, found one {type(monitors).__name__}"
            )
        monitors = list(monitors)
        classes = [type(monitor).__name__ for monitor in monitors]
        if not monitors or not all(isinstance(monitor, Monitor) for monitor in monitors):
            raise ValueError(f"monitors: expected monitors of trimtab.stability, found {classes}")
        if len(set(classes)) < len(classes):
            raise ValueError(f"monitors: expected one of a class, found {classes}")
        if not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience: expected a whole number of at least 1, found {patience!r}")
        self.monitors = monitors
        self.patience = patience
        self.alarms = 0
        self.inputs = tuple(dict.fromkeys(name for m in monitors for name in m.inputs))
        unknown = set(names or ()) - set(self.inputs)
        if unknown:
            raise ValueError(
                f"names: expected some of {list(self.inputs)}, which these monitors read, found "
                f"{sorted(unknown)}"
            )
        self._logged_as = {
            name: ((names or {}).get(name, name), name, *HOST_NAMES.get(name, ()))
            for name in self.inputs
        }

    def select(self, metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
        """What the monitors read, out of a trainer's log.

        Args:
            metrics: numbers, or tensors of one element, by the trainer's names.

        Returns:
            Numbers by the monitors' names; those that are not there are left out.
        """
        found = {}
        for name, logged_as in self._logged_as.items():
            there = next((key for key in logged_as if metrics.get(key) is not None), None)
            if there is not None:
                found[name] = float(metrics[there])
        return found

    def judge(self, metrics: Mapping[str, float | Tensor]) -> Verdict:
        """Judges one step; call it once a step, in order, with the same numbers on every rank.

        Args:
            metrics: as in `select`.

        Returns:
            The verdict. A monitor that finds none of its numbers is healthy.
        """
        numbers = self.select(metrics)
        reading = overall(
            monitor.judge({name: numbers[name] for name in monitor.inputs if name in numbers})
            for monitor in self.monitors
        )
        self.alarms = self.alarms + 1 if reading.state == "alarm" else 0
        return Verdict(reading, self.alarms, self.alarms >= self.patience)

    def finite(self, verdict: Verdict) -> dict[str, float]:
        """A verdict's numbers for a logger: the finite ones, and the state as 0, 1 or 2.

        Args:
            verdict: from `judge`.

        Returns:
            A new dict; `stability/state` is 0 healthy, 1 watch, 2 alarm.
        """
        state = ("healthy", "watch", "alarm").index(verdict.reading.state)
        numbers = {k: v for k, v in verdict.reading.metrics.items() if math.isfinite(v)}
        return {**numbers, "stability/state": float(state)}

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as plain numbers.

        Returns:
            A new dict, by the monitors' classes.
        """
        monitors = {type(m).__name__: m.state_dict() for m in self.monitors}
        return {"alarms": self.alarms, "monitors": monitors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; a monitor that is not in it starts anew.

        Args:
            state: from a watch with these monitors, or some of them.

        Raises:
            ValueError: it has no such state, or a monitor's does not fit.
        """
        if state.keys() != {"alarms", "monitors"}:
            raise ValueError(f"state: expected keys alarms and monitors, found {sorted(state)}")
        for monitor in self.monitors:
            if type(monitor).__name__ in state["monitors"]:
                monitor.load_state_dict(state["monitors"][type(monitor).__name__])
        self.alarms = int(state["alarms"])
