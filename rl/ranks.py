"""What is exact over several processes, and what is refused because it would not be."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from pytorch_lightning.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor


def refuse_strategy(strategy: Strategy, optimizer: str) -> None:
    """Raises for a strategy under which the update would not equal that of one process.

    Args:
        strategy: the trainer's: a single device, DDP, or ModelParallelStrategy for FSDP2.
        optimizer: `adam_mini` or `adamw`.

    Raises:
        ValueError: another strategy, one that shards in two dimensions or writes sharded
            checkpoints, or adam_mini on a sharded policy, whose blocks may straddle processes.
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
    if optimizer == "adam_mini":
        raise ValueError(
            "update.optimizer: expected adamw under FSDP2, got adam_mini, which is refused there "
            "until its sharded step is exact"
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


def merge_parts(parts: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Metrics of the parts of a batch as those of the whole.

    Args:
        parts: (tokens, metrics) of each part.

    Returns:
        For each name its mean weighted by tokens; but the greatest of `*_max`, the least of `*_min`
        and the sum of `loss`, whose parts add up.
    """
    return _combined([(n, {k: float(v) for k, v in found.items()}) for n, found in parts])


def mean_over_ranks(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics of each process as those of all; every process must call.

    Args:
        metrics: of this process; another may have other names.

    Returns:
        As `merge_parts`, each process with the same weight. For display only: what the update
        itself needs is summed exactly.
    """
    own = {name: float(value) for name, value in metrics.items()}
    if world_size() == 1:
        return own
    gathered: list[dict[str, float]] = [{} for _ in range(world_size())]
    dist.all_gather_object(gathered, own)
    return _combined([(1, found) for found in gathered])


def _combined(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for _, found in parts for name in found):
        present = [(n, found[name]) for n, found in parts if name in found]
        values = [value for _, value in present]
        if name.endswith("_max"):
            combined[name] = max(values)
        elif name.endswith("_min"):
            combined[name] = min(values)
        elif name == "loss":
            combined[name] = sum(values)
        else:
            combined[name] = sum(n * v for n, v in present) / sum(n for n, _ in present)
    return combined
