"""Images side by side, and diffusion step by step: the report's figures 3.3 and 3.4 as a PNG strip and a GIF."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures_alpha_ddpm import read_pictures
from .atomic import atomic_file

SMALLEST_SIDE = 48  # pixels that an image takes in a picture at least, so that a person sees it
GAP = 4
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def grid(images: Tensor | Sequence[Image.Image] | np.ndarray, columns: int | None = None) -> Image.Image:
    """Images in [0, 1], [N, C, H, W], or in any way that a pipeline returns them, as one picture on white, each enlarged by a
    whole factor to be seen.
    """
    images = images if isinstance(images, Tensor) else read_pictures(images, "images")
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    factor = max(1, math.ceil(SMALLEST_SIDE / max(height, width)))
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    picture = Image.new(MODES[channels], (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    arrays = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # [N, C, H, W] -> [N, H, W, C]
    for index, array in enumerate(arrays):
        cell = Image.fromarray(array[..., 0] if channels == 1 else array)
        cell = cell.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        picture.paste(cell, (GAP + column * cell_width, GAP + row * cell_height))
    return picture


def strip(trajectory: Tensor, count: int = 9) -> Image.Image:
    """A picture of `count` evenly spaced steps, the first and the last among them, of a trajectory [S, B, C, H, W] in [-1, 1],
    one row per image.
    """
    frames = _frames(trajectory, count)
    return grid(frames.transpose(0, 1).flatten(0, 1), columns=len(frames))  # [S, B, ...] -> [B·S, ...]


def save_strip(trajectory: Tensor, path: str | Path, count: int = 9) -> None:
    """`strip` as a PNG file."""
    save_picture(strip(trajectory, count), path)


def save_gif(trajectory: Tensor, path: str | Path, count: int = 50, seconds: float = 4.0, hold: float = 1.5) -> None:
    """A trajectory [S, B, C, H, W] in [-1, 1] as a GIF that plays for ever: `count` evenly spaced steps in `seconds`, the
    last of them held for another `hold`.
    """
    pictures = [grid(frame) for frame in _frames(trajectory, count)]
    milliseconds = max(20, round(1000 * seconds / len(pictures)))  # viewers slow down what is faster
    durations = [milliseconds] * (len(pictures) - 1) + [milliseconds + round(1000 * hold)]
    with atomic_file(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """A PNG file, whole or not at all."""
    with atomic_file(path) as file:
        picture.save(file, "PNG")


def _frames(trajectory: Tensor, count: int) -> Tensor:
    if trajectory.ndim != 5:
        raise ValueError(f"a trajectory is [steps, B, C, H, W], not {tuple(trajectory.shape)}.")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1.")
    chosen = np.unique(np.linspace(len(trajectory) - 1, 0, count).round().astype(int))  # one frame alone is the last
    return (trajectory[chosen].float() / 2 + 0.5).clamp(0, 1).cpu()
