"""What is exact over several processes, and what is refused because it would not be."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from pytorch_lightning.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from .config import LoraConfig
from .update_config import UpdateConfig


def refuse_strategy(
    strategy: Strategy, update: UpdateConfig, lora: LoraConfig | None = None
) -> None:
    """Raises for a strategy under which the update would not equal that of one process.

    Args:
        strategy: the trainer's: a single device, DDP, or ModelParallelStrategy for FSDP2.
        update: its head, reference and loss.
        lora: adapters of the policy, or None.

    Raises:
        ValueError: another strategy, or one that shards in two dimensions or writes sharded
            checkpoints, or FSDP2 with a fused head, adapters, a reference or a teacher.
    """
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return
    if not isinstance(strategy, ModelParallelStrategy):
        raise ValueError(
            "trainer.strategy: expected a single device, ddp or ModelParallelStrategy (FSDP2), got "
            f"{type(strategy).__name__}; others are refused until they are exact"
        )
    if strategy._tensor_parallel_size != 1 or strategy._save_distributed_checkpoint:
        raise ValueError(
            "trainer.strategy: expected ModelParallelStrategy with data_parallel_size = devices, "
            "tensor_parallel_size = 1 and save_distributed_checkpoint = false"
        )
    if lora is not None:
        raise ValueError(
            "policy.lora: expected null under FSDP2, whose shards are not merged for the rollouts, "
            f"got {lora}; use ddp, where only the adapters have gradients and an optimizer's state"
        )
    if update.head == "fused":
        raise ValueError(
            "update.head: expected logits under FSDP2, which shards the head's weight, got fused"
        )
    if update.reference is not None or update.loss == "imitation":
        name = "update.loss" if update.reference is None else "update.reference"
        raise ValueError(
            f"{name}: expected none with a reference or a teacher under FSDP2, which would shard "
            "the policy alone; use ddp"
        )


def refuse_precision(precision: str) -> None:
    """Raises for a precision under which the trainer's log-probs would not be the model's.

    Args:
        precision: of the trainer.

    Raises:
        ValueError: a whole model in half precision (its rotary frequencies are rounded too, and the
            error grows with the position), or fp16 with loss scaling.
    """
    if precision not in ("32-true", "64-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision: expected 32-true, 64-true or bf16-mixed, got {precision}"
        )


def check_shares(prompts: int, world_size: int) -> None:
    """Raises unless every process gets the same number of prompts.

    Args:
        prompts: of an update.
        world_size: processes.

    Raises:
        ValueError: prompts is no multiple of world_size.
    """
    if prompts % world_size:
        raise ValueError(
            f"rollout.prompts: expected a multiple of the {world_size} processes, got {prompts}"
        )


def world_size() -> int:
    """Processes of the run; 1 outside torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of each process as one set, for display; every process must call.

    Args:
        metrics: of this process; another may have other names.

    Returns:
        For each name its mean over the processes that have it; but the greatest of `*_max`, the
        least of `*_min`, and the sum of `loss` and `*/count`. What the update itself needs is
        summed exactly, not here.
    """
    own = {name: float(value) for name, value in metrics.items()}
    if world_size() == 1:
        return own
    gathered: list[dict[str, float]] = [{} for _ in range(world_size())]
    dist.all_gather_object(gathered, own)
    return combined(gathered)


def combined(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What `mean_over_ranks` makes of the processes' metrics."""
    names = dict.fromkeys(name for metrics in found for name in metrics)
    values = {name: [metrics[name] for metrics in found if name in metrics] for name in names}
    return {name: _rule(name)(present) for name, present in values.items()}


def _rule(name: str) -> Callable[[list[float]], float]:
    for ending, rule in (("_max", max), ("_min", min), ("/count", sum)):
        if name.endswith(ending):
            return rule
    return sum if name == "loss" else statistics.fmean
