"""What each process feeds the network, forward pass by forward pass.

Imports torch, the other parts of the training data and the package's timestep quantiles; called by train.py.
"""

from typing import Any

import torch
from torch.utils.data import Dataset

from ddpm_pipeline.objectives import timestep_quantiles
from train_conditions import Conditions
from train_config import TrainingConfig
from train_data import ImageData
from train_random import Stream, image_indices, seeds, uniform


class MicroBatches(Dataset):
    """What this process feeds the network: item k is forward pass k, update k // accumulation of the run.

    An item is a function of (seed, step, position in the global batch) alone, so it does not matter who asks for it, or
    whether anybody asked for the ones before.
    """

    def __init__(
        self, data: ImageData, config: TrainingConfig, rank: int, world_size: int, conditions: Conditions | None = None
    ):
        self.data, self.config, self.conditions = data, config, conditions or Conditions()
        self.rank, self.world_size = rank, world_size
        self.size = config.batch_size // (world_size * config.gradient_accumulation_steps)

    def __getitem__(self, k: int) -> dict[str, Any]:
        """`indices` of the images int64 [b], `pixels` uint8 [b, C, H, W], `quantiles` of timesteps float64 [b],
        `noise_seeds` int64 [b], and their `condition`.
        """
        config = self.config
        step, pass_index = divmod(k, config.gradient_accumulation_steps)
        start = (pass_index * self.world_size + self.rank) * self.size
        mine = slice(start, start + self.size)
        indices = image_indices(config.seed, len(self.data), step, config.batch_size)[mine]
        flips = uniform(config.seed, Stream.FLIP, step, config.batch_size)[mine] < 0.5 if config.random_flip else None
        drawn = uniform(config.seed, Stream.TIMESTEP, step, config.batch_size)
        noise_seeds = seeds(config.seed, Stream.NOISE, step, config.batch_size)[mine]
        condition = self.conditions.draw(indices, step, mine)
        return {
            "indices": torch.from_numpy(indices),
            "pixels": self.data.pixels(indices, flips),
            "quantiles": torch.from_numpy(timestep_quantiles(drawn, config.timestep_sampling)[mine]),
            "noise_seeds": torch.from_numpy(noise_seeds),
            **({} if condition is None else {"condition": condition}),
        }
