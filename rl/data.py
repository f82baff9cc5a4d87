"""The data module: which problems each update trains on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset

from .config import RLConfig


def problems_of_update(config: RLConfig, update: int) -> list[int]:
    """Numbers of the problems of one update, over all processes: a function of its arguments.

    Args:
        config: of the run.
        update: from 0.

    Returns:
        `rollout.prompts` numbers, without a repeat. Where `problems` is given, each round over them
        has an order of its own, and what is left at its end, too little for an update, is left out.
    """
    prompts = config.rollout.prompts
    if config.problems is None:
        return list(range(update * prompts, (update + 1) * prompts))
    updates = config.problems // prompts
    order = list(range(config.problems))
    random.Random(f"{config.seed}/order/{update // updates}").shuffle(order)
    first = update % updates * prompts
    return order[first : first + prompts]


def share_of(numbers: list[int], rank: int, world: int) -> list[int]:
    """The problems of one process among those of an update.

    Args:
        numbers: of the update; as many for each process.
        rank: of the process.
        world: processes.

    Returns:
        Its share, in order.
    """
    share = len(numbers) // world
    return numbers[rank * share : (rank + 1) * share]


class ProblemData(pl.LightningDataModule):
    """Which problems each update trains on, split over the processes.

    Args:
        config: of the run.
    """

    def __init__(self, config: RLConfig) -> None:
        super().__init__()
        self.config = config

    def train_dataloader(self) -> DataLoader:
        """One item per update that is left: (update, numbers of this process's problems)."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        return DataLoader(
            _Updates(self.config, module, self.trainer.global_rank, self.trainer.world_size),
            batch_size=None,
        )


class _Updates(IterableDataset):
    """Numbers only: Lightning's precision plugins rebuild what a batch holds."""

    def __init__(self, config: RLConfig, module: pl.LightningModule, rank: int, world: int) -> None:
        self.config, self.module, self.rank, self.world = config, module, rank, world

    def __len__(self) -> int:
        return self.config.updates

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for update in range(self.module.updates_done, self.config.updates):
            numbers = problems_of_update(self.config, update)
            yield update, share_of(numbers, self.rank, self.world)
