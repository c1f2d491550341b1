"""Pictures of what the model draws: previews during a run and the final grid.

Imports torch and the package.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ddpm_pipeline.pictures import GAP, grid, save_picture
from train_random import Stream, seeds

__all__ = ["GAP", "draw", "grid", "save_picture"]


@torch.no_grad()
def draw(
    pipe: Any,
    count: int,
    steps: int | None,
    seed: int,
    batch_size: int,
    condition: tuple[str, Sequence[Any]] | None = None,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """`count` images in [0, 1], [count, C, H, W] on the CPU; image i comes from its own seed, a function of (seed, i).

    `condition` is the name of an argument of the pipeline's call and its value for each image.
    """
    image_seeds = seeds(seed, Stream.PREVIEW, 0, count)
    device = pipe.device
    images = []
    for start in range(0, count, batch_size):
        batch = slice(start, min(start + batch_size, count))
        generators = [torch.Generator(device).manual_seed(image_seed) for image_seed in image_seeds[batch].tolist()]
        if condition is None:
            options: dict[str, Any] = {"batch_size": len(generators)}
        else:
            name, values = condition
            options = {name: list(values[batch]), "guidance_scale": guidance_scale}
        drawn = pipe(generator=generators, num_inference_steps=steps, output_type="pt", **options)
        images.append(drawn.images.cpu())
    return torch.cat(images)
