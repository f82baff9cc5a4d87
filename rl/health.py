"""Updates that are not healthy: what is looked at, and what is done: skip, go back, or stop.

Everything random in a run is a function of (seed, update, prompt), and so is what happens here: a
run that was killed and resumed skips and goes back where an undisturbed one does.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.tensor import DTensor

from .config import Action, HealthConfig
from .ranks import world_size
from .rollout import Request, RolloutEngine, Sample

logger = logging.getLogger(__name__)

_SEVERITY: tuple[Action | None, ...] = (None, "skip", "rollback", "stop")
_LOG_PROBS = "mismatch/abs_dlogp_mean"  # of the engine's and the trainer's, over all tokens


class Stopped(Exception):
    """A run that ends early and can be resumed; the text says why."""


def generate_again(engine: RolloutEngine, requests: Sequence[Request]) -> list[list[Sample]]:
    """What the engine samples; an engine that fails is asked once more.

    Args:
        engine: one of servers has retries of its own.
        requests: to sample.

    Returns:
        For each request its samples.

    Raises:
        Stopped: it has failed twice.
        ValueError, ConnectionError: as it raises them: the request is wrong, or no server is left.
    """
    try:
        return engine.generate(requests)
    except (ValueError, ConnectionError):
        raise
    except Exception as error:
        logger.warning("the rollout engine failed and is asked once more", exc_info=error)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the failed call held may be what was missing
    try:
        return engine.generate(requests)
    except (ValueError, ConnectionError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise Stopped(f"the rollout engine failed twice: {why}") from error


class HealthWatch:
    """Judges each update and acts on what is not healthy, alike on every process.

    Args:
        config: what to do.

    Attributes:
        checkpoint_before: (updates, n) -> the n-th newest checkpoint of up to so many updates, or
            None; whoever writes checkpoints sets it.
        went_back: whether the last update went back to a checkpoint.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.checkpoint_before: Callable[[int, int], Path | None] = lambda updates, back: None
        self.went_back = False
        self.skipped = self.rolled_back = self.in_a_row = 0
        self.last_reason = ""
        self._update = 0
        self._action: Action | None = None
        self._seen: dict[str, float] = {}  # of this update's first step
        self._before = {
            name: deque(maxlen=config.window) for name in ("grad_norm", _LOG_PROBS)
        }  # of the last healthy updates

    def begin(self, update: int) -> None:
        """Starts an update.

        Args:
            update: its number, from 0.
        """
        self._update, self._action, self._seen, self.went_back = update, None, {}, False

    def allows_step(self, metrics: Mapping[str, float]) -> bool:
        """Whether to take a step; every process must call.

        Args:
            metrics: of this step; `loss`, `grad_norm` and the mismatch are looked at.

        Returns:
            True if all is well. Otherwise why is logged, and `finish` acts.

        Raises:
            Stopped: by the configuration, or after too many such updates in a row.
        """
        if self._action is not None:
            return False  # an earlier step of this update was not healthy
        action, why = self._judge(metrics)
        self._act(action, why)
        if self._action is None and not self._seen:
            self._seen = {name: metrics[name] for name in self._before if name in metrics}
        return self._action is None

    def check_state(self, parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> bool:
        """Whether what a step has left is finite; every process must call.

        Args:
            parameters: of the policy.
            optimizer: that took the step.

        Returns:
            True if all is well. Otherwise `finish` goes back.

        Raises:
            Stopped: by the configuration, for lack of a checkpoint, or after too many such updates
                in a row.
        """
        state = [
            value
            for of_parameter in optimizer.state.values()
            for value in (of_parameter.values() if isinstance(of_parameter, dict) else ())
        ]
        broken = [
            what
            for what, tensors in (("a weight", parameters), ("the optimizer's state", state))
            if not all_finite(tensors)
        ]
        why = f"{broken[0]} is not finite after the step" if broken else ""
        action: Action = "stop" if self.config.nonfinite == "stop" else "rollback"
        self._act(action if broken else None, why)
        if self._action is not None and self._checkpoint() is None:
            raise Stopped(f"{self.last_reason}, and there is no checkpoint yet to go back to")
        return self._action is None

    def finish(self, trainer: pl.Trainer, module: Any) -> dict[str, float]:
        """Ends an update, going back if it must; every process must call.

        Args:
            trainer: has the optimizers and schedules.
            module: an RLModule; its counts of updates go on.

        Returns:
            What happened so far, for the metrics.
        """
        if self._action == "rollback":
            path = self._checkpoint()
            if path is None:  # as before the step: no weight has changed
                self._action = "skip"
            else:
                self._say(f"back to {path.stem}, on with the next problems")
                self._go_back(trainer, module, path)
        if self._action is None:
            self.in_a_row = 0
            for name, value in self._seen.items():
                self._before[name].append(value)
        else:
            self.in_a_row += 1
            module.skipped_updates += 1
            self.skipped += self._action == "skip"
            self.rolled_back += self._action == "rollback"
            if self._action == "skip":
                self._say("its step is skipped")
        return {
            "health/skipped": float(self.skipped),
            "health/rollbacks": float(self.rolled_back),
            "health/in_a_row": float(self.in_a_row),
        }

    def summary(self) -> dict[str, Any]:
        """Counts over the run and the last reason, for JSON."""
        return {
            "skipped": self.skipped,
            "rollbacks": self.rolled_back,
            "last_reason": self.last_reason or None,
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the medians' windows, and the counts."""
        return {
            "before": {name: list(values) for name, values in self._before.items()},
            "skipped": self.skipped,
            "rolled_back": self.rolled_back,
            "in_a_row": self.in_a_row,
            "last_reason": self.last_reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on as the run did that left this.

        Args:
            state: of `state_dict`.
        """
        for name, values in state["before"].items():
            self._before[name].clear()
            self._before[name].extend(values)
        for name in ("skipped", "rolled_back", "in_a_row", "last_reason"):
            setattr(self, name, state[name])

    def _judge(self, metrics: Mapping[str, float]) -> tuple[Action | None, str]:
        config = self.config
        for name, what in (
            (_LOG_PROBS, "a log-prob"),
            ("loss", "the loss"),
            ("grad_norm", "the gradient"),
        ):
            if not math.isfinite(metrics.get(name, 0.0)):
                return config.nonfinite, f"{what} is not finite"
        for name, factor, what in (
            ("grad_norm", config.grad_norm_factor, "the gradient's norm"),
            (_LOG_PROBS, config.mismatch_factor, "the mismatch"),
        ):
            before = self._before[name]
            if factor is None or len(before) < config.window or name not in metrics:
                continue
            if self._seen:
                continue  # the medians are of first steps; later ones are of another kind
            median = statistics.median(before)
            if metrics[name] > factor * median > 0:
                return config.spike, (
                    f"{what} {metrics[name]:.3g} is more than {factor:g} times the median "
                    f"{median:.3g} of the last {config.window} healthy updates"
                )
        return None, ""

    def _act(self, action: Action | None, why: str) -> None:
        """Notes the action, after the processes have agreed on the gravest of theirs."""
        own = _SEVERITY.index(action)
        if world_size() > 1:
            found: list[tuple[int, str]] = [(0, "")] * world_size()
            dist.all_gather_object(found, (own, why))
            own, why = max(found, key=lambda each: each[0])
        if not own:
            return
        self._action = _SEVERITY[own]
        self.last_reason = f"update {self._update + 1}: {why}"
        if self._action == "stop":
            raise Stopped(self.last_reason)
        if self.in_a_row >= self.config.max_in_a_row:
            raise Stopped(
                f"{self.last_reason}, after {self.in_a_row} such updates in a row "
                "(health.max_in_a_row)"
            )

    def _checkpoint(self) -> Path | None:
        """The first process's choice: one further back with each update in a row."""
        told = [self.checkpoint_before(self._update, self.in_a_row + 1)]
        if world_size() > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def _go_back(self, trainer: pl.Trainer, module: Any, path: Path) -> None:
        """Weights, optimizer, schedule and what the module keeps, as a resume restores them."""
        own = {name: getattr(self, name) for name in ("skipped", "rolled_back", "last_reason")}
        own["in_a_row"] = self.in_a_row
        strategy = trainer.strategy
        checkpoint = strategy.load_checkpoint(path, weights_only=True)
        module.go_back_to(checkpoint)
        strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
        strategy.load_optimizer_state_dict(checkpoint)
        for config, state in zip(
            trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=True
        ):
            config.scheduler.load_state_dict(state)
        for name, value in own.items():
            setattr(self, name, value)
        self.went_back = True

    @rank_zero_only
    def _say(self, what: str) -> None:
        logger.warning("%s: %s", self.last_reason, what)


def all_finite(tensors: Iterable[Any]) -> bool:
    """Whether no number in these tensors of this process is NaN or infinite.

    Args:
        tensors: what is no floating-point tensor is not looked at; of a DTensor its local part.
    """
    local = [t.detach() for t in tensors if isinstance(t, Tensor)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in local]
    kinds: dict[Any, list[Tensor]] = {}
    for t in local:
        if t.is_floating_point() and t.numel():
            kinds.setdefault((t.dtype, t.device), []).append(t)
    # the largest absolute number is NaN if one of them is
    norms = [torch.stack(torch._foreach_norm(group, math.inf)) for group in kinds.values()]
    return all(bool(norm.isfinite().all()) for norm in norms)
