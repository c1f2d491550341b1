"""Everything random in training, as a function of (seed, step, position in the global batch).

Nothing here keeps a state: a resumed run, and a run on another number of processes with the same global batch, sees the same
images in the same order, the same flips, timesteps and noise. A position is 0..batch_size-1 within one optimizer update.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class RandomStream(IntEnum):
    """What is drawn; each has a stream of its own. Numbers are part of a run's identity and never change."""

    ORDER = 0
    FLIP = 1
    TIMESTEP = 2
    NOISE = 3
    CONDITION = 4
    CONDITION_DROPOUT = 5
    MODEL = 6
    PREVIEW = 7
    DROPOUT = 8
    WINDOW = 9
    AUGMENTATION = 10
    BLOCK = 20
    FIRST_DROPOUT = 30  # of the class or numbers beside a condition image
    IMAGE_DROPOUT = 31  # of that image
    INPAINTING_MASK = 32
    ATTRIBUTE_DROPOUT = 1000  # of the first of several numbers; those of the others follow


def _generator(seed: int, stream: RandomStream, step: int) -> np.random.Generator:
    """Philox counts draws in the low words of its counter, so that steps, in the high one, never overlap."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]))


def uniform(seed: int, stream: int, step: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) for positions 0..count-1, float64 [count]; the first n are the same for every count >= n."""
    return _generator(seed, stream, step).random(count)


def seeds(seed: int, stream: RandomStream, step: int, count: int) -> np.ndarray:
    """A 53-bit seed for each position 0..count-1, int64 [count]."""
    return (uniform(seed, stream, step, count) * 2**53).astype(np.int64)


@dataclass(frozen=True)
class BatchSlice:
    """Some positions of one update's global batch, and the random numbers that belong to them."""

    seed: int
    step: int  # the update
    batch_size: int  # of the global batch
    positions: slice

    def uniform(self, stream: RandomStream) -> np.ndarray:
        """Numbers in [0, 1), one per position, float64 [b]."""
        return uniform(self.seed, stream, self.step, self.batch_size)[self.positions]

    def uniforms(self, stream: RandomStream, count: int) -> np.ndarray:
        """Numbers in [0, 1), `count` per position, float64 [b, count]."""
        return uniform(self.seed, stream, self.step, self.batch_size * count).reshape(-1, count)[self.positions]

    def seeds(self, stream: RandomStream) -> np.ndarray:
        """A 53-bit seed per position, int64 [b]."""
        return seeds(self.seed, stream, self.step, self.batch_size)[self.positions]


@lru_cache(maxsize=2)
def _permutation(seed: int, num_images: int, epoch: int) -> np.ndarray:
    return _generator(seed, RandomStream.ORDER, epoch).permutation(num_images)


def image_indices(seed: int, num_images: int, step: int, batch_size: int) -> np.ndarray:
    """Which images update `step` sees, int64 [batch_size]: every image once per epoch, in an order of its own. A batch may
    reach over the end of an epoch, so no image is ever dropped.
    """
    ordinals = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(ordinals, num_images)
    orders = {epoch: _permutation(seed, num_images, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)], dtype=np.int64)


def shard_order(seed: int, num_shards: int, epoch: int) -> np.ndarray:
    """The order in which an epoch of a stream reads its shards, int64 [num_shards]."""
    return _permutation(seed, num_shards, epoch)


def block_order(seed: int, epoch: int, part: int, block: int, rows: int) -> np.ndarray:
    """The order of a block's rows, int64 [rows], for block `block` of one part of a stream in an epoch."""
    philox = np.random.Philox(key=[seed, RandomStream.BLOCK], counter=[0, epoch, part, block])
    return np.random.Generator(philox).permutation(rows)


def noise_of(image_seeds: Sequence[int] | np.ndarray | Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise, float32 [B, *shape], each image's from its own seed. Draws differ between device types."""
    generator = torch.Generator(device)
    noise = torch.empty(len(image_seeds), *shape, device=device)
    for image, image_seed in zip(noise, image_seeds, strict=True):
        image.normal_(generator=generator.manual_seed(int(image_seed)))
    return noise
