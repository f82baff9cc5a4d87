"""Adam-mini as the optimizer of a transformers Trainer.

    Trainer(model, args, optimizer_cls_and_kwargs=adam_mini(args))
    use_adam_mini(trainer)      a trainer that is there already, TRL's

Of the Trainer (read and tried at 5.24.0; not before 5.2): a class in `optimizer_cls_and_kwargs`
that is no torch optimizer is made without arguments and called with the model, whose modules say
what the blocks are. It is called where an optimizer is missing: before DDP or FSDP2 wrap the model,
never under DeepSpeed with an optimizer in its config.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from ..optim import AdamMini, BlockMap
from ..optim.blocks import Preset, refuse_without_blocks
from ._versions import require
from .transformers_callback import distribution

# Of the whole optimizer, not of a group.
_OPTIONS = frozenset(
    ("momentum_dtype", "stochastic_rounding", "seed", "max_grad_norm", "error_if_nonfinite")
)


class AdamMiniFactory:
    """Makes an AdamMini for a model: what the Trainer calls."""

    def __call__(
        self, model: nn.Module, *, args: TrainingArguments, betas: Any, eps: Any, **options: Any
    ) -> AdamMini:
        host = distribution()
        if host not in ("", "FSDP2"):
            raise _refusal(host)
        optimizer = _optimizer(model, args, betas, eps, **options)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        refuse_without_blocks(optimizer.blocks, names)
        if host == "FSDP2":
            _expect_shards(optimizer)
        return optimizer


def adam_mini(
    args: TrainingArguments,
    preset: Preset = "snr",
    *,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    strict: bool = False,
    blocks: BlockMap | None = None,
    **options: Any,
) -> tuple[type[AdamMiniFactory], dict[str, Any]]:
    """`optimizer_cls_and_kwargs` of a Trainer that trains with AdamMini.

    Learning rate and weight decay are those of `args`, and so are betas and eps unless given: as
    they are when an optimizer is made, so a hyperparameter search may set them. `args.optim` no
    longer counts. Norms, biases and other vectors are not decayed. Alone, with DDP and with FSDP2;
    under gradient accumulation, bf16, and fp16 with its scaler; for PEFT models what is trainable.
    Checkpoints hold its state and its blocks; resuming with other blocks is refused.

    Args:
        args: of the Trainer, the same object.
        preset: "snr", "rows" or "paper", see `infer_blocks`.
        betas: None for adam_beta1 and adam_beta2.
        eps: None for adam_epsilon.
        strict: refuse parameters of unknown role, see `infer_blocks`.
        blocks: a map for the model, instead of that of `preset`.
        options: of AdamMini: momentum_dtype, stochastic_rounding, seed, max_grad_norm (instead of
            that of `args`, which must be 0), error_if_nonfinite.

    Returns:
        A class and its keyword arguments. The optimizer is made when training begins; it raises
        ValueError then for a model without a matrix to train, DeepSpeed and FSDP1.

    Raises:
        ImportError: transformers before 5.2, whose Trainer makes no optimizer of a model.
        TypeError: another option, or `args` that are none.
        ValueError: an argument out of range, DeepSpeed, which brings its own optimizer, or two
            limits on the gradients' norm.

    Source: arXiv 2406.16793, the update rule.
    """
    require("transformers", transformers.__version__, "5.2", "6")
    if not isinstance(args, TrainingArguments):
        raise TypeError(
            f"args: expected TrainingArguments, found {type(args).__name__}; for a trainer that is "
            "there already, use_adam_mini(trainer)"
        )
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise TypeError(
            f"options: expected some of {sorted(_OPTIONS)}, found {sorted(unknown)}; lr and weight "
            "decay are those of args, for others give the Trainer an AdamMini (optimizers=)"
        )
    if args.deepspeed or getattr(args, "deepspeed_plugin", None):
        raise _refusal("DeepSpeed")
    if not isinstance(blocks, BlockMap | None):
        raise TypeError(f"blocks: expected a BlockMap or None, found {type(blocks).__name__}")
    # Refuses what is out of range now instead of when training begins; draws no random numbers.
    _optimizer(nn.LayerNorm(1), args, betas, eps, preset=preset, **options)
    return AdamMiniFactory, {
        "args": args,
        "betas": betas,
        "eps": eps,
        "preset": preset,
        "strict": strict,
        "blocks": blocks,
        **options,
    }


def _optimizer(
    model: nn.Module, args: TrainingArguments, betas: Any, eps: Any, **options: Any
) -> AdamMini:
    if options.get("max_grad_norm") is not None and args.max_grad_norm:
        raise ValueError(
            "max_grad_norm: expected one limit, found that of AdamMini and args.max_grad_norm="
            f"{args.max_grad_norm}; set max_grad_norm=0 in TrainingArguments"
        )
    return AdamMini.for_model(
        model,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2) if betas is None else betas,
        args.adam_epsilon if eps is None else eps,
        args.weight_decay,
        **options,
    )


def use_adam_mini(trainer: Trainer, preset: Preset = "snr", **options: Any) -> None:
    """Makes a trainer that is there already train with AdamMini; TRL's have no argument for it.

    Args:
        trainer: before `train()`.
        preset: as in `adam_mini`.
        options: as in `adam_mini`.

    Raises:
        ImportError: as `adam_mini`.
        TypeError: as `adam_mini`, or no Trainer.
        ValueError: as `adam_mini`; the trainer has an optimizer, which it would go on to use, or
            another class for one.

    Source: arXiv 2406.16793, the update rule.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer: expected a Trainer, found {type(trainer).__name__}")
    if trainer.optimizer is not None:
        raise ValueError(
            "trainer: expected one without an optimizer, found "
            f"{type(trainer.optimizer).__name__}; call use_adam_mini before train(), and pass no "
            "optimizers="
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "trainer: expected no optimizer_cls_and_kwargs, found "
            f"{trainer.optimizer_cls_and_kwargs[0].__name__}; leave one of the two out"
        )
    trainer.optimizer_cls_and_kwargs = adam_mini(trainer.args, preset, **options)


def _refusal(found: str) -> ValueError:
    return ValueError(
        f"args: expected one process, DDP or FSDP2 for AdamMini, found {found}; use fsdp=True with "
        'fsdp_config={"version": 2}'
    )


def _expect_shards(optimizer: AdamMini) -> None:
    """Lets go of the whole parameters, which accelerate is about to replace by shards.

    It takes care that the optimizer's groups do not keep them in memory. Before that it loads the
    optimizer's own state, which looks at every parameter; so this waits for that.
    """

    def forget(_: Any) -> None:
        optimizer.forget_parameters()
        hook.remove()

    hook = optimizer.register_load_state_dict_post_hook(forget)
