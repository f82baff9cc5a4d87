"""What our callbacks of the transformers Trainer share: state in checkpoints, one mind over ranks.

Of the Trainer (read and tried at 5.24.0, trainer.py and trainer_callback.py):
* `ExportableState` restores callbacks only under `restore_callback_states_from_checkpoint=True`,
  and then replaces them by new objects, so that whoever holds on to one (a reward function) talks
  to nobody. But TrainerState keeps `stateful_callbacks` in every checkpoint's trainer_state.json
  and brings them back at every resume. So state goes there, under a key of our own, and the object
  stays the same.
* Callbacks of the constructor come after those that report to wandb or TensorBoard, which therefore
  never see what is added to the logs; see `add_to`. No event shows a callback the others.
* Every `train()` has a TrainerState of its own, so an entry of ours in it says that this callback
  was there when it began.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

_logger = logging.getLogger(__name__)


class _Saved(dict):
    """An entry of `stateful_callbacks`; one that comes from a checkpoint is a plain dict."""

    owner: StatefulCallback | None = None


class StatefulCallback(TrainerCallback, ABC):
    """A callback whose state is in every checkpoint and comes back at every resume.

    Subclasses have a `state_key`, `state_dict()` of JSON, `load_state_dict(state)`, and call
    `store()` after each change.
    """

    state_key: str

    def __init__(self) -> None:
        self._fresh: dict[str, Any] | None = None
        self._saved: _Saved | None = None  # of the `train()` that runs, or of the last one
        self._ahead = False
        self._said: set[str] = set()

    def add_to(self, trainer: Trainer) -> None:
        """Adds this callback ahead of those that report, so that they log its numbers, too.

        Args:
            trainer: before `train()`.

        Raises:
            ValueError: it has a callback of this class.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(type(other) is type(self) for other in callbacks):
            raise self._second()
        callbacks.insert(0, self)
        self._ahead = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        saved = state.stateful_callbacks.get(self.state_key)
        if isinstance(saved, _Saved) and saved.owner is not self:
            raise self._second()
        if self._fresh is None:
            self._fresh = self.state_dict()
        if saved is None:
            self.load_state_dict(self._fresh)  # not what an earlier train() has seen
            if state.global_step:
                _logger.warning("%s: the checkpoint has no state of it; it starts anew", name)
        elif not isinstance(saved, _Saved):
            self.load_state_dict(saved)
            if args.restore_callback_states_from_checkpoint:
                _logger.warning(
                    "%s: restored from the checkpoint; that the Trainer ignores %r means only that "
                    "it leaves this to the callback",
                    name,
                    self.state_key,
                )
        self._saved = state.stateful_callbacks[self.state_key] = _Saved()
        self._saved.owner = self
        self.store()
        if args.report_to and not self._ahead:
            self.warn_once(
                "order",
                "%s: %s, which report_to asks for, come before it and do not see its numbers; give "
                "it to the trainer by add_to(trainer) instead of callbacks=[...]",
                name,
                ", ".join(args.report_to),
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self.refuse_late(state)

    def refuse_late(self, state: TrainerState) -> None:
        """Raises ValueError if this `train()` began without this callback."""
        if self._saved is None or state.stateful_callbacks.get(self.state_key) is not self._saved:
            raise ValueError(
                f"callbacks: expected {type(self).__name__} before train() begins, found it added "
                "during training; give it to the Trainer, or add_to(trainer) before train()"
            )

    def expect_logs(self, args: TrainingArguments, state: TrainerState) -> None:
        """Says so once if no step of this `train()` will be logged."""
        every, strategy = state.logging_steps, IntervalStrategy(args.logging_strategy)
        first = args.logging_first_step and state.global_step == 0
        none = strategy == IntervalStrategy.NO or (
            strategy == IntervalStrategy.STEPS
            and state.max_steps // every == state.global_step // every
        )
        if none and not first:
            self.warn_once(
                "logs",
                "%s reads the Trainer's logs, of which there will be none (logging_strategy %r, "
                "logging_steps %s, max_steps %s): it does nothing; set logging_strategy='steps', "
                "logging_steps=1",
                type(self).__name__,
                strategy.value,
                every,
                state.max_steps,
            )

    def warn_once(self, about: str, message: str, *values: Any) -> None:
        """Logs a warning, unless this callback has logged one `about` the same before."""
        if about not in self._said:
            self._said.add(about)
            _logger.warning(message, *values)

    def store(self) -> None:
        """Puts the state where the next checkpoint takes it from; none outside of `train()`."""
        if self._saved is not None:
            self._saved.clear()
            self._saved.update(self.state_dict())

    def _second(self) -> ValueError:
        return ValueError(
            f"callbacks: expected one {type(self).__name__}, found a second; leave one in"
        )

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, as JSON; the constructor's arguments are not part of it."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned; the Trainer's resume does so by itself."""


def distribution() -> str:
    """How the Trainer distributes: "DeepSpeed", "FSDP1", "FSDP2", or "" for anything else.

    Returns:
        A name for error messages; "" on one process and under DDP.
    """
    if not is_initialized():  # an optimizer made without a Trainer
        return ""
    state = AcceleratorState()  # one for all; the Trainer has made it by then
    if state.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed"
    if state.distributed_type == DistributedType.FSDP:
        return f"FSDP{getattr(state.fsdp_plugin, 'fsdp_version', 1)}"
    return ""


def overflow_was_skipped(optimizer: Any, grad_norm: float | None) -> bool:
    """Whether `grad_norm` is that of a step which the scaler of fp16 has left out.

    Args:
        optimizer: of the last step, as Accelerate wraps it.
        grad_norm: of the last step, if there is one.

    Returns:
        True if it is not finite and the step was skipped: normal now and then, as the scale adapts.
    """
    if grad_norm is None or math.isfinite(grad_norm):
        return False
    # Fused optimizers skip within their step, where Accelerate does not see it.
    within = getattr(getattr(optimizer, "optimizer", None), "_step_supports_amp_scaling", False)
    scales = getattr(optimizer, "scaler", None) is not None
    return bool(getattr(optimizer, "step_was_skipped", False) or (scales and within))


def mean_over_ranks(args: TrainingArguments, values: Sequence[float | None]) -> list[float | None]:
    """Of each number its mean over the ranks that have it; None where none has.

    One collective on every rank, whichever numbers it has. A NaN of one rank is one of all.

    Args:
        args: for the device.
        values: of this rank.

    Returns:
        A list as long.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    sums = [0.0 if value is None else float(value) for value in values]
    there = [float(value is not None) for value in values]
    pairs = torch.tensor([sums, there], dtype=torch.float64, device=args.device)
    dist.all_reduce(pairs)
    return [total / ranks if ranks else None for total, ranks in pairs.t().tolist()]


def add_to_logs(state: TrainerState, logs: dict[str, float], numbers: dict[str, float]) -> None:
    """Adds numbers to a log, for the callbacks after this one, and to the history.

    Args:
        state: whose history ends with that log: the Trainer appends before it calls callbacks.
        logs: of `on_log`.
        numbers: to add.
    """
    logs.update(numbers)
    state.log_history[-1].update(numbers)
