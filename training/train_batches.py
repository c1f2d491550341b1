"""What each process feeds the network, forward pass by forward pass.

Imports torch, the other parts of the training data and the package's timestep quantiles; called by train.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ddpm_pipeline.objectives import timestep_quantiles
from train_conditions import Conditions
from train_config import TrainingConfig
from train_data import ImageData
from train_random import Stream, image_indices, seeds, uniform
from train_stop import ignore_signals_in_worker


@dataclass(frozen=True)
class Share:
    """Which rows of which update's global batch a process's forward pass k is of: update k // accumulation of the run."""

    config: TrainingConfig
    rank: int
    world_size: int

    @property
    def size(self) -> int:
        """Images in a forward pass."""
        return self.config.batch_size // (self.world_size * self.config.gradient_accumulation_steps)

    def of(self, k: int) -> tuple[int, slice]:
        """(update, positions in its global batch)."""
        step, pass_index = divmod(k, self.config.gradient_accumulation_steps)
        start = (pass_index * self.world_size + self.rank) * self.size
        return step, slice(start, start + self.size)

    def flips(self, k: int) -> np.ndarray | None:
        """Which images are mirrored, bool [b]; None where none is."""
        step, mine = self.of(k)
        if not self.config.random_flip:
            return None
        return uniform(self.config.seed, Stream.FLIP, step, self.config.batch_size)[mine] < 0.5

    def draws(self, k: int, conditions: Conditions, values: Any) -> dict[str, Any]:
        """What a batch holds beside its images; functions of (seed, step, position), and conditions of the values too."""
        config, (step, mine) = self.config, self.of(k)
        drawn = uniform(config.seed, Stream.TIMESTEP, step, config.batch_size)
        noise_seeds = seeds(config.seed, Stream.NOISE, step, config.batch_size)[mine]
        condition = conditions.draw(values, step, mine)
        return {
            "quantiles": torch.from_numpy(timestep_quantiles(drawn, config.timestep_sampling)[mine]),
            "noise_seeds": torch.from_numpy(noise_seeds),
            **({} if condition is None else {"condition": condition}),
        }


class MicroBatches(Dataset):
    """What this process feeds the network: item k is forward pass k of the run.

    An item is a function of (seed, step, position in the global batch) alone, so it does not matter who asks for it, or
    whether anybody asked for the ones before.
    """

    def __init__(
        self, data: ImageData, config: TrainingConfig, rank: int, world_size: int, conditions: Conditions | None = None
    ):
        self.data, self.config, self.conditions = data, config, conditions or Conditions()
        self.share = Share(config, rank, world_size)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """`pixels` uint8 [b, C, H, W], `indices` of their rows in the data int64 [b], `quantiles` of timesteps float64 [b],
        `noise_seeds` int64 [b] and their `condition`.
        """
        step, mine = self.share.of(k)
        indices = image_indices(self.config.seed, len(self.data), step, self.config.batch_size)[mine]
        column = self.conditions.column
        return {
            "pixels": self.data.pixels(indices, self.share.flips(k)),
            "indices": torch.from_numpy(self.data.rows_of(indices)),
            **self.share.draws(k, self.conditions, self.data.column(column, indices) if column else None),
        }


class BatchLoader(Iterator[dict[str, Any]]):
    """The batches of one process in their order, read ahead by its workers where it has some."""

    def __init__(self, loader: DataLoader):
        self._batches = iter(loader)

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any] | None:
        """What the batches after those that were taken follow from, beside the number of the pass; nothing."""
        return None

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Rows that could not be used, of the batches taken since this was last asked; `load_images` has left them out."""
        return []

    def close(self) -> None:
        """End the workers; no batch can be taken afterwards."""
        self._batches = iter(())


def batch_loader(
    data: ImageData,
    config: TrainingConfig,
    device_type: str,
    rank: int,
    world_size: int,
    conditions: Conditions | None,
    first_pass: int,
    last_pass: int,
    state: dict[str, Any] | None = None,
) -> BatchLoader:
    """The batches of passes `first_pass` to `last_pass` - 1 of the run, for process `rank` of `world_size`.

    `state` is what this process's `state_dict` gave after pass `first_pass` - 1.
    """
    return BatchLoader(
        DataLoader(
            MicroBatches(data, config, rank, world_size, conditions),
            batch_size=None,
            sampler=range(first_pass, last_pass),
            num_workers=config.dataloader_num_workers,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=device_type == "cuda",
        )
    )
