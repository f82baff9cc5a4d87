"""Lightning: callbacks for Adam-mini and a length-triggered rate.

    Trainer(callbacks=[AdamMiniCallback(), LengthTriggeredLRCallback("mean_length")])

A callback of either namespace works in the Trainer of the other, so one base class serves both.
Both need a strategy that keeps parameters whole (one device, DDP).

`SharedPrefixMixin`, for modules that train on groups of rollouts, is in lightning_prefix.py.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from ..optim import AdamMini, BlockMap, LengthDetector, infer_blocks
from ..optim.blocks import Preset
from .lightning_prefix import SharedPrefixMixin

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise ImportError(
            "trimtab.integrations.lightning needs `lightning` or `pytorch-lightning`"
        ) from None

__all__ = ["AdamMiniCallback", "LengthTriggeredLRCallback", "SharedPrefixMixin"]

_logger = logging.getLogger(__name__)

# Of the whole optimizer, not of a group.
_OPTIONS = frozenset(
    ("momentum_dtype", "stochastic_rounding", "seed", "max_grad_norm", "error_if_nonfinite")
)


class AdamMiniCallback(Callback):
    """Replaces the optimizer of the LightningModule by AdamMini when a fit starts.

    The new optimizer takes over the group dicts with their lr and weight decay, and the schedulers.
    Checkpoints hold its state and its blocks; resuming with other blocks is refused.

    Args:
        preset: "snr", "rows" or "paper", see `infer_blocks`.
        betas: replaces the groups' betas; None keeps them (AdamMini's default if they have none).
        eps: likewise.
        strict: refuse parameters of unknown role, see `infer_blocks`.
        blocks: a map for the module, instead of that of `preset`.
        options: of AdamMini: momentum_dtype, stochastic_rounding, seed, max_grad_norm (instead of
            the Trainer's gradient_clip_val), error_if_nonfinite.

    Raises:
        TypeError: another option.
        ValueError: on fit start, for a second such callback, an optimizer that is an AdamMini
            already or that uses amsgrad, parameters that are not the module's, or a checkpoint with
            other blocks.

    Source: arXiv 2406.16793, the update rule.
    """

    def __init__(
        self,
        preset: Preset = "snr",
        *,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        strict: bool = False,
        blocks: BlockMap | None = None,
        **options: Any,
    ) -> None:
        unknown = options.keys() - _OPTIONS
        if unknown:
            raise TypeError(
                f"options: expected some of {sorted(_OPTIONS)}, found {sorted(unknown)}; for "
                "others return an AdamMini from configure_optimizers"
            )
        self.preset = preset
        self.betas = betas
        self.eps = eps
        self.strict = strict
        self.given_blocks = blocks
        self.options = options
        self.blocks: BlockMap | None = None
        self._checkpoint_blocks: BlockMap | None = None

    @property
    def state_key(self) -> str:
        return "trimtab.AdamMini"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        _refuse_second(self, trainer)
        self._checkpoint_blocks = None  # of an earlier fit or test

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Here the strategy has made optimizers and schedulers, and a checkpoint has not yet filled
        # them.
        self.blocks = self.given_blocks or infer_blocks(pl_module, self.preset, strict=self.strict)
        self._check_blocks()
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        old = list(trainer.strategy.optimizers)
        for optimizer in old:
            _check_replaceable(optimizer, names)
        new = [self._replacement(optimizer, names) for optimizer in old]
        trainer.strategy.optimizers = new
        for config in trainer.lr_scheduler_configs:
            for before, after in zip(old, new, strict=True):
                _rebind(config.scheduler, before, after)

    def _replacement(self, optimizer: Optimizer, names: dict[Tensor, str]) -> AdamMini:
        chosen = {"betas": self.betas, "eps": self.eps}
        for group in optimizer.param_groups:
            group["param_names"] = [names[parameter] for parameter in group["params"]]
            group.update({key: value for key, value in chosen.items() if value is not None})
            group.update(fused=None, foreach=None)  # the old optimizer's choice says nothing here
        # The constructor keeps the very dicts, so whoever holds on to one still sets the lr in use.
        new = AdamMini(optimizer.param_groups, blocks=self.blocks, **self.options)
        new.known_names = names
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            # Schedulers wrap `step` to see that it is called; this one does so too and leaves the
            # lr alone.
            ConstantLR(new, factor=1.0, total_iters=0)
        return new

    def _check_blocks(self) -> None:
        if self._checkpoint_blocks is None:
            return
        for name in sorted(self.blocks.keys() | self._checkpoint_blocks.keys()):
            expected, found = (
                blocks[name].layout if name in blocks else None
                for blocks in (self._checkpoint_blocks, self.blocks)
            )
            if expected != found:
                raise ValueError(
                    f"blocks of parameter {name!r}: the checkpoint has {expected}, found {found}"
                )
        self._checkpoint_blocks = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.blocks is None else {"blocks": self.blocks.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._checkpoint_blocks = BlockMap.from_dict(state_dict["blocks"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._check_blocks()  # some strategies restore callbacks after on_fit_start


class LengthTriggeredLRCallback(Callback):
    """Decays the learning rate of every optimizer once the mean response length surges.

    The factor is on the groups only while `optimizer.step` runs, so it is exact with every
    scheduler; what schedulers and LearningRateMonitor show is the rate without it. It is logged as
    `length_lr_factor`. Log the metric in every training step (`self.log(metric, value)`): an old
    value counts again. Several processes decide together, on the mean over them.

    Args:
        metric: key in `trainer.callback_metrics`, mean response length in tokens.
        truncated_metric: key of the share of truncated responses, in [0, 1]; None if there is none.
        **detector: arguments of LengthDetector; its steps are the Trainer's `global_step`.

    Raises:
        ValueError: an argument out of range; on setup, a second such callback.

    Source: arXiv 2602.01826; see LengthDetector.
    """

    def __init__(
        self, metric: str = "mean_length", *, truncated_metric: str | None = None, **detector: Any
    ) -> None:
        self.metric = metric
        self.truncated_metric = truncated_metric
        self.detector = LengthDetector(**detector)
        self._step = 0
        self._handles: list[Any] = []
        self._unscaled: list[tuple[dict[str, Any], Any]] = []
        self._warned = False

    @property
    def state_key(self) -> str:
        return "trimtab.LengthTriggeredLR"

    @property
    def factor(self) -> float:
        """The factor in use for the current step, in [floor, 1]."""
        return self.detector.factor_at(self._step)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        _refuse_second(self, trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._release()
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        length = self._mean_over_ranks(trainer, self.metric)
        truncated = self._mean_over_ranks(trainer, self.truncated_metric)
        if length is not None:
            self.detector.observe(length, truncated, step=self._step)
        elif not self._warned:
            self._warned = True
            _logger.warning(
                "no finite metric %r in trainer.callback_metrics (found: %s), so lengths go "
                "unwatched: log it in training_step",
                self.metric,
                ", ".join(trainer.callback_metrics) or "none",
            )
        pl_module.log("length_lr_factor", self.factor)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def rearm(self) -> None:
        """Undoes the trigger and its factor, and collects a new baseline: the surge was healthy."""
        self.detector.rearm()

    def state_dict(self) -> dict[str, Any]:
        return self.detector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.detector.load_state_dict(state_dict)

    def _mean_over_ranks(self, trainer: Any, metric: str | None) -> float | None:
        """The metric's mean over the ranks that have it; None if none has a finite value."""
        if metric is None:
            return None
        value = float(trainer.callback_metrics.get(metric, math.nan))
        present = math.isfinite(value)
        # One collective on every rank, whether it has the metric or not.
        pair = torch.tensor(
            [value if present else 0.0, float(present)], device=trainer.strategy.root_device
        )
        total, ranks = trainer.strategy.reduce(pair, reduce_op="mean").tolist()
        return total / ranks if ranks else None

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()  # after a step that raised, the post hook has not run
        for group in optimizer.param_groups:
            lr = group["lr"]
            self._unscaled.append((group, lr.clone() if isinstance(lr, Tensor) else lr))
            if isinstance(lr, Tensor):
                lr.mul_(self.factor)
            else:
                group["lr"] = lr * self.factor

    def _restore(self, *_: Any) -> None:
        while self._unscaled:
            group, lr = self._unscaled.pop()
            if isinstance(lr, Tensor):
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr

    def _release(self) -> None:
        self._restore()
        while self._handles:
            self._handles.pop().remove()


def _refuse_second(callback: Callback, trainer: Any) -> None:
    count = sum(isinstance(other, type(callback)) for other in trainer.callbacks)
    if count > 1:
        raise ValueError(f"callbacks: expected one {type(callback).__name__}, found {count}")


def _check_replaceable(optimizer: Optimizer, names: dict[Tensor, str]) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, AdamMini):
        raise ValueError(
            "optimizer: configure_optimizers returns an AdamMini already; drop AdamMiniCallback"
        )
    for i, group in enumerate(optimizer.param_groups):
        if group.get("amsgrad"):
            raise ValueError(
                f"optimizer: group {i} of {kind} uses amsgrad, which AdamMini does not have"
            )
        foreign = [tuple(p.shape) for p in group["params"] if p not in names]
        if foreign:
            raise ValueError(
                f"optimizer: group {i} of {kind} has parameters not in the module, shapes {foreign}"
            )
    coupled = isinstance(optimizer, Adam) and not isinstance(optimizer, AdamW)
    if coupled or not isinstance(optimizer, Adam):
        _logger.warning(
            "AdamMini replaces %s: same lr, and weight decay decoupled as in AdamW", kind
        )


def _rebind(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Points a scheduler, and those nested in it, to the new optimizer."""
    if getattr(scheduler, "optimizer", None) is old:
        scheduler.optimizer = new
    nested = [getattr(scheduler, "base", None), *getattr(scheduler, "_schedulers", ())]
    for inner in nested:
        if inner is not None:
            _rebind(inner, old, new)
