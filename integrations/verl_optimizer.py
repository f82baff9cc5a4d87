"""AdamMini as the optimizer of verl's FSDP engine.

    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.optimizer_impl=trimtab.integrations.verl
    actor_rollout_ref.actor.optim.optimizer=adam_mini
    +actor_rollout_ref.actor.optim.override_optimizer_config={momentum_dtype:bfloat16}

verl clips gradients and steps its schedule as with AdamW, and saves moments in its checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..optim import AdamMini
from ..optim.blocks import Preset

_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def adam_mini(
    parameters: Iterable[Tensor],
    lr: float,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.999),
    *,
    eps: float = 1e-8,
    preset: Preset = "snr",
    strict: bool = False,
    no_decay_1d: bool = True,
    momentum_dtype: str | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    fused: bool | None = None,
) -> AdamMini:
    """AdamMini.for_model of the module whose parameters verl passes.

    Args:
        parameters: `module.parameters()` as it comes; the blocks are read from the module.
        lr, weight_decay, betas: from verl's section `optim`.
        eps, preset, strict, no_decay_1d, stochastic_rounding, seed, fused: as in
            AdamMini.for_model, from `optim.override_optimizer_config`.
        momentum_dtype: "float32", "bfloat16" or None.

    Returns:
        The optimizer, of the parameters that require a gradient.

    Raises:
        ValueError: parameters that are no generator of a module's, a module under FSDP1
            (strategy=fsdp), or as AdamMini.for_model.

    Source: arXiv 2406.16793, the update rule.
    """
    if momentum_dtype not in _DTYPES:
        raise ValueError(
            f"momentum_dtype: expected float32, bfloat16 or null, found {momentum_dtype!r}"
        )
    module = _module_of(parameters)
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise ValueError(
            "strategy: expected fsdp2, found fsdp, whose flat parameters span several weights; "
            "set actor_rollout_ref.actor.strategy=fsdp2"
        )
    return AdamMini.for_model(
        module, lr, (betas[0], betas[1]), eps, weight_decay,
        preset=preset, strict=strict, no_decay_1d=no_decay_1d,
        momentum_dtype=_DTYPES[momentum_dtype], stochastic_rounding=stochastic_rounding,
        seed=seed, fused=fused,
    )  # fmt: skip


def _module_of(parameters: Any) -> nn.Module:
    """The module whose `parameters()` this generator is.

    verl 0.9 (FSDPEngine._build_optimizer) passes no names and nothing else of the module, but it
    passes the generator itself, whose frame knows the module. So no engine has to be patched, and
    the module path in `optimizer_impl` is all that a worker needs.
    """
    found = inspect.getgeneratorlocals(parameters) if inspect.isgenerator(parameters) else {}
    module = found.get("self")
    if not isinstance(module, nn.Module):
        raise ValueError(
            "parameters: expected the generator module.parameters(), as verl's FSDP engine passes "
            f"it, found {type(parameters).__name__}; with a module at hand use "
            "trimtab.optim.AdamMini.for_model(module)"
        )
    return module
