"""Pictures of what the model draws: previews during a run and the final grid.

Imports torch and the package.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ddpm_pipeline.support.draws import Stream, seeds
from ddpm_pipeline.support.pictures import GAP, grid, save_picture, strip

__all__ = ["GAP", "draw", "draw_process", "grid", "save_picture"]

PROCESS_ROWS, PROCESS_MOMENTS = 4, 10
PROCESS_STEPS = 100  # a trajectory of more would only take memory


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


@torch.no_grad()
def draw_process(
    pipe: Any, seed: int, condition: tuple[str, Sequence[Any]] | None = None, guidance_scale: float = 1.0
) -> Image.Image:
    """The reverse process as a strip: a few images, one a row, from noise to the result over PROCESS_STEPS steps."""
    name, values = condition or ("batch_size", range(PROCESS_ROWS))
    rows = min(PROCESS_ROWS, len(values))
    options = {name: rows} if condition is None else {name: list(values[:rows]), "guidance_scale": guidance_scale}
    image_seeds = seeds(seed, Stream.PREVIEW, 0, rows).tolist()
    generators = [torch.Generator(pipe.device).manual_seed(image_seed) for image_seed in image_seeds]
    steps = min(PROCESS_STEPS, pipe.scheduler.config.num_train_timesteps)
    drawn = pipe(generator=generators, num_inference_steps=steps, output_type="pt", output_trajectory=True, **options)
    return strip(drawn.trajectory, PROCESS_MOMENTS)
