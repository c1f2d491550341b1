"""Pictures of what the model draws: previews during a run and the final grid.

Imports torch, PIL and the package.
"""

import math
import os
from pathlib import Path

import torch
from PIL import Image

from ddpm_pipeline import AlphaDDPMPipeline
from train_random import Stream, seeds

SMALLEST_SIDE = 48  # pixels that an image takes in a grid at least, so that a person sees it
GAP = 4


@torch.no_grad()
def draw(pipe: AlphaDDPMPipeline, count: int, steps: int | None, seed: int, batch_size: int) -> torch.Tensor:
    """`count` images in [0, 1], [count, C, H, W] on the CPU; image i comes from its own seed, a function of (seed, i)."""
    image_seeds = seeds(seed, Stream.PREVIEW, 0, count)
    device = pipe.device
    images = []
    for start in range(0, count, batch_size):
        batch = image_seeds[start : start + batch_size].tolist()
        generators = [torch.Generator(device).manual_seed(image_seed) for image_seed in batch]
        images.append(pipe(len(batch), generators, num_inference_steps=steps, output_type="pt").images.cpu())
    return torch.cat(images)


@torch.no_grad()
def draw_process(pipe: AlphaDDPMPipeline, seed: int, columns: int = 10, rows: int = 4) -> Image.Image:
    """The reverse process as a strip: `rows` images, one a row, at `columns` moments from noise to the result."""
    image_seeds = seeds(seed, Stream.PREVIEW, 0, rows).tolist()
    generators = [torch.Generator(pipe.device).manual_seed(image_seed) for image_seed in image_seeds]
    states: list[torch.Tensor] = []

    def keep(pipe: AlphaDDPMPipeline, index: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
        states.append((tensors["image"] / 2 + 0.5).clamp(0, 1).cpu())
        return {}

    pipe(rows, generators, output_type="pt", callback_on_step_end=keep)
    shown = torch.linspace(0, len(states) - 1, min(columns, len(states))).round().long().tolist()
    strip = torch.stack([states[index] for index in shown], dim=1)  # moments x [B, C, H, W] -> [B, moments, C, H, W]
    return grid(strip.flatten(0, 1), len(shown))


def grid(images: torch.Tensor, columns: int | None = None) -> Image.Image:
    """Images in [0, 1], [N, C, H, W], as one picture on white, each enlarged by a whole factor to be seen."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(SMALLEST_SIDE / max(height, width)))
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    picture = Image.new(mode, (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    arrays = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # [N, C, H, W] -> [N, H, W, C]
    for index, array in enumerate(arrays):
        cell = Image.fromarray(array[..., 0] if channels == 1 else array)
        cell = cell.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        picture.paste(cell, (GAP + column * cell_width, GAP + row * cell_height))
    return picture


def save_picture(picture: Image.Image, path: Path) -> None:
    """Whole or not at all: written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)
