"""The data module: which problems each update trains on."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
from torch.utils.data import DataLoader, IterableDataset


class ProblemData(pl.LightningDataModule):
    """Which problems each update trains on, split over the processes.

    Args:
        prompts: problems an update, over all processes.
        updates: updates of the run.
    """

    def __init__(self, prompts: int, updates: int) -> None:
        super().__init__()
        self.prompts, self.updates = prompts, updates

    def train_dataloader(self) -> DataLoader:
        """One item per update that is left: (update, numbers of this process's problems)."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        return DataLoader(
            _Updates(self, module, self.trainer.global_rank, self.trainer.world_size),
            batch_size=None,
        )


class _Updates(IterableDataset):
    """Numbers only: Lightning's precision plugins rebuild what a batch holds."""

    def __init__(
        self, data: ProblemData, module: pl.LightningModule, rank: int, world: int
    ) -> None:
        self.data, self.module, self.rank, self.world = data, module, rank, world

    def __len__(self) -> int:
        return self.data.updates

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        share = self.data.prompts // self.world
        for update in range(self.module.updates_done, self.data.updates):
            first = update * self.data.prompts + self.rank * share
            yield update, list(range(first, first + share))
