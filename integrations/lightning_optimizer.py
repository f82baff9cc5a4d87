"""Adam-mini in place of the optimizer that a LightningModule configures."""

import logging
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR

from ..optim import AdamMini, BlockMap, infer_blocks
from ..optim.blocks import Preset, refuse_without_blocks
from .lightning_callback import Callback, refuse_second, refuse_strategy

_logger = logging.getLogger(__name__)

# Of the whole optimizer, not of a group.
_OPTIONS = frozenset(
    ("momentum_dtype", "stochastic_rounding", "seed", "max_grad_norm", "error_if_nonfinite")
)

# Where torch (2.13, Optimizer) keeps the hooks that a user has registered.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class AdamMiniCallback(Callback):
    """Replaces the optimizer of the LightningModule by AdamMini when a fit starts.

    The new optimizer takes over the group dicts with their lr and weight decay, the hooks, and the
    schedulers.
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
        ValueError: an argument out of range; on fit start, for a strategy other than a single
            device, DDP and FSDP2 (ModelParallelStrategy), two limits on the norm, an optimizer that
            is an AdamMini already, that has made steps, that is cut over ranks or that uses
            amsgrad, parameters that are not the module's, a module without a matrix, or a
            checkpoint with other blocks. A second such callback is refused by the Trainer.

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
        if preset not in get_args(Preset):
            raise ValueError(f"preset: expected one of {get_args(Preset)}, found {preset!r}")
        chosen = {name: x for name, x in (("betas", betas), ("eps", eps)) if x is not None}
        AdamMini([torch.zeros(1)], **chosen, **options)  # refuses what is out of range
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
        refuse_second(self, trainer)
        self._checkpoint_blocks = None  # of an earlier fit or test

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Here the strategy has made optimizers and schedulers, and a checkpoint has not yet filled
        # them.
        refuse_strategy(trainer.strategy, "AdamMiniCallback")
        if self.options.get("max_grad_norm") is not None and trainer.gradient_clip_val:
            raise ValueError(
                "max_grad_norm: expected one limit, found that of AdamMiniCallback and "
                f"gradient_clip_val={trainer.gradient_clip_val}; leave out the Trainer's"
            )
        self.blocks = self.given_blocks or infer_blocks(pl_module, self.preset, strict=self.strict)
        self._check_blocks()
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        old = list(trainer.strategy.optimizers)
        for optimizer in old:
            _check_replaceable(optimizer, names)
        refuse_without_blocks(self.blocks, {name for p, name in names.items() if p.requires_grad})
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
        for hooks in _HOOKS:  # the very dicts, so that who added one can still remove it
            setattr(new, hooks, getattr(optimizer, hooks))
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


def _check_replaceable(optimizer: Optimizer, names: dict[Tensor, str]) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, AdamMini):
        raise ValueError(
            "optimizer: configure_optimizers returns an AdamMini already; drop AdamMiniCallback"
        )
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):
        raise ValueError(
            "optimizer: expected one that holds all parameters of its rank, found "
            "ZeroRedundancyOptimizer, which is cut over ranks already; give it functools.partial("
            "AdamMini, blocks=parameter_layouts(model, blocks)) instead and drop AdamMiniCallback"
        )
    if optimizer.state:
        raise ValueError(
            f"optimizer: expected {kind} before its first step, found one with state of "
            f"{len(optimizer.state)} parameters: training began; make AdamMini from its state by "
            "trimtab.optim.from_adamw_state, or return a new optimizer from configure_optimizers"
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
