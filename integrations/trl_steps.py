"""What a trainer with StabilityMixin does beside the loss: rate, monitors, and their checkpoints.

Once per optimizer step the lengths of its samples (and a mismatch) are reduced over all processes;
the factor that follows from them is on the optimizer while it steps (`StepFactor`), so TRL's
schedulers and its `learning_rate` do not see it: `length_lr_factor` is logged beside them.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import LengthDetector, StepFactor
from ..stability import MismatchReport
from .transformers_callback import overflow_was_skipped
from .transformers_monitor import StabilityMonitorCallback
from .trl_options import StabilityOptions

_logger = logging.getLogger(__name__)

_STATE_FILE = "trimtab_stability.json"


class StepsMixin:
    """The part of StabilityMixin that is about steps.

    Attributes:
        stability: what is on; set before GRPOTrainer's constructor runs.
    """

    stability: StabilityOptions
    _detector: LengthDetector | None = None

    def _start_steps(self) -> None:
        """After GRPOTrainer's constructor."""
        self._lengths: list[tuple[int, bool]] = []  # of a row: generated tokens, cut off
        self._window: Tensor | None = None  # of the step: tokens, truncated rows, rows
        self._mismatch: MismatchReport | None = None  # of the step
        self._fresh: dict[str, Any] | None = None  # states before the first train()
        self._rate = StepFactor(lambda: self._detector.factor_at(self.state.global_step))
        self._rated: Any = None
        if self.stability.length_trigger is not None:
            limit = {"max_length": self.max_completion_length}
            self._detector = LengthDetector(**limit | dict(self.stability.length_trigger))

    @property
    def _group(self) -> Any:
        """The processes of the run, for the functions of trimtab.stability."""
        return torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None

    def _report(self, metrics: dict[str, Tensor]) -> None:
        """Adds numbers to what TRL averages until its next log."""
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][name].append(float(value))

    def _generate(self, prompts: list) -> tuple:
        out = super()._generate(prompts)
        if self._detector is not None:
            completions, tools = out[1], out[2]
            own = [len(ids) for ids in completions] if tools is None else [sum(x) for x in tools]
            ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
            cut = [ids[-1] not in ends for ids in completions]  # as GRPOTrainer finds them
            self._lengths = list(zip(own, cut, strict=True))
        return out

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        if self._detector is not None:
            device = out["completion_ids"].device
            out["sampled_length"] = torch.tensor(self._lengths, device=device)  # [B, 2]
        return out

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        if self._detector is not None and self.model.training:
            self._count(inputs["sampled_length"])
        return inputs

    def _count(self, lengths: Tensor) -> None:
        found = torch.cat([lengths.sum(0), lengths.new_tensor([len(lengths)])]).double()
        self._window = found if self._window is None else self._window + found

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As GRPOTrainer; the length-triggered factor acts on the optimizer from here on."""
        if self._detector is not None and self._rated is not self.optimizer:
            self._rate.attach([getattr(self.optimizer, "optimizer", self.optimizer)])
            self._rated = self.optimizer
        return super().training_step(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kw: Any):
        if self._window is not None or self._mismatch is not None:  # not at an epoch's end again
            self._end_step(None if grad_norm is None else float(grad_norm))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kw)

    def _end_step(self, grad_norm: float | None) -> None:
        """After an optimizer step: its mismatch, and its lengths for the next steps' rate."""
        report, self._mismatch = self._mismatch, None
        numbers: dict[str, Tensor] = {}
        if report is not None:
            report = report if self._group is None else report.all_reduce(self._group)
            found = report.metrics()
            numbers = {n: found[n] for n in ("mismatch/k3", "mismatch/ess") if n in found}
            self._report(numbers)
        window, self._window = self._window, None
        if window is not None:
            step = self.state.global_step - 1  # of the step that has ended
            tokens, truncated, rows = self.accelerator.reduce(window, "sum").tolist()
            self._report({"length_lr_factor": torch.tensor(self._detector.factor_at(step))})
            self._detector.observe(
                tokens / rows,
                truncated / rows,
                step=step,
                mismatch=_number(numbers.get("mismatch/k3")),
                grad_norm=grad_norm,
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As GRPOTrainer; what rate and monitors have seen is of this run, or of its checkpoint.

        Afterwards, and after an error, the optimizer's rate is its own.

        Raises:
            ValueError: a StabilityMonitorCallback beside `monitors`.
        """
        callbacks = self.callback_handler.callbacks
        if self.stability.monitors is not None and any(
            isinstance(callback, StabilityMonitorCallback) for callback in callbacks
        ):
            raise ValueError(
                "monitors: expected one watch, found a StabilityMonitorCallback among the "
                "callbacks, too; leave one of the two out"
            )
        if self._fresh is None:
            self._fresh = {name: part.state_dict() for name, part in self._stateful().items()}
        for name, part in self._stateful().items():
            part.load_state_dict(self._fresh[name])
        try:
            return super().train(*args, **kwargs)
        finally:
            self._rate.release()
            self._rated = self._window = self._mismatch = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As GRPOTrainer, with the watch's numbers and its state in a log of training steps."""
        if self.stability.monitors is not None and self.model.training and "loss" in logs:
            self._watch(logs)
        super().log(logs, start_time)

    def _watch(self, logs: dict[str, float]) -> None:
        numbers = dict(logs)
        for name, values in self._metrics["train"].items():  # as GRPOTrainer averages them
            finite = [value for value in values if value == value]
            if finite:
                numbers[name] = sum(finite) / len(finite)
        if overflow_was_skipped(self.optimizer, logs.get("grad_norm")):
            del numbers["grad_norm"]  # fp16's scaler adapts
        elif "grad_norm" in logs:
            numbers["variance/signal"] = logs["grad_norm"] ** 2
        watch = self.stability.monitors
        verdict = watch.judge(numbers)
        logs.update(watch.finite(verdict))
        if verdict.reading.state == "alarm" and self.accelerator.is_main_process:
            _logger.warning("step %d: %s", self.state.global_step, verdict.reading.reason)
        if verdict.tripped and self.stability.stop_on_alarm:
            self.control.should_training_stop = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = {name: part.state_dict() for name, part in self._stateful().items()}
        if state and self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"
            )
            with open(os.path.join(folder, _STATE_FILE), "w", encoding="utf-8") as file:
                json.dump(state, file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._stateful():
            return
        path = os.path.join(checkpoint, _STATE_FILE)
        state = {}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
        for name, part in self._stateful().items():
            if name in state:
                part.load_state_dict(state[name])
            else:
                _logger.warning("%s has no state of %s, which starts anew", checkpoint, name)

    def _stateful(self) -> dict[str, Any]:
        parts = {"length_trigger": self._detector, "monitors": self.stability.monitors}
        return {name: part for name, part in parts.items() if part is not None}


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)
