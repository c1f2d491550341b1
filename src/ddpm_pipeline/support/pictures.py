"""Images side by side, and diffusion step by step: the report's figures 3.3 and 3.4 as a strip and as a GIF."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pictures_alpha_ddpm import PIL_MODES, Images, read_pictures
from .atomic import atomic_file

SMALLEST_SIDE = 48  # pixels that an image takes in a picture at least, so that a person sees it
GIF_SIDE = 144  # the same in a GIF, which mostly shows few images
GAP = 4
TEXT_HEIGHT = 14


def grid(images: Images, columns: int | None = None, size: int = SMALLEST_SIDE, labels: Sequence[Any] = ()) -> Image.Image:
    """Images as one picture on white, each enlarged by a whole factor to be seen.

    Args:
        images: tensor [N, C, H, W] or array [N, H, W, C] in [0, 1] (integers: 0..255), or a list of PIL images of one size.
        columns: images in a row; by default about as many as there are rows.
        size: pixels that the longer side of an image takes at least.
        labels: what is written above the columns, one for each.

    Raises ValueError for what are no such images, and for other than 1, 3 or 4 channels.
    """
    pixels = read_pictures(images, "images")
    count, channels, height, width = pixels.shape
    if channels not in PIL_MODES:
        raise ValueError(f"images have {channels} channels; pictures have 1 (grey), 3 (RGB) or 4 (RGBA).")
    columns = columns or math.ceil(math.sqrt(count))
    if len(labels) not in (0, columns):
        raise ValueError(f"{len(labels)} labels for {columns} columns; give one for each column.")
    factor, top = max(1, math.ceil(size / max(height, width))), TEXT_HEIGHT if len(labels) else 0
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    extent = (columns * cell_width + GAP, math.ceil(count / columns) * cell_height + GAP + top)
    picture = Image.new(PIL_MODES[channels], extent, "white")
    arrays = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # [N, C, H, W] -> [N, H, W, C]
    for index, array in enumerate(arrays):
        cell = Image.fromarray(array[..., 0] if channels == 1 else array)
        cell = cell.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        picture.paste(cell, (GAP + column * cell_width, GAP + top + row * cell_height))
    font = ImageFont.load_default(TEXT_HEIGHT - 2)
    for column, label in enumerate(labels):
        ImageDraw.Draw(picture).text((GAP + column * cell_width, 0), str(label), "black", font)
    return picture


def strip(
    trajectory: Tensor | np.ndarray, count: int = 9, size: int = SMALLEST_SIDE, labels: Sequence[Any] = ()
) -> Image.Image:
    """A picture of `count` evenly spaced steps, the first and the last among them, of a trajectory [S, B, C, H, W] in [-1, 1],
    one row per image. `labels`, one for each of the S steps, such as its t, are written above those shown; `size` as in `grid`.
    """
    frames, chosen = _frames(trajectory, count, labels)
    return grid(frames.transpose(0, 1).flatten(0, 1), len(frames), size, chosen)  # [S, B, ...] -> [B·S, ...]


def save_strip(
    trajectory: Tensor | np.ndarray, path: str | Path, count: int = 9, size: int = SMALLEST_SIDE, labels: Sequence[Any] = ()
) -> None:
    """`strip` as a file of the format that the path ends in, such as .png."""
    save_picture(strip(trajectory, count, size, labels), path)


def save_gif(
    trajectory: Tensor | np.ndarray,
    path: str | Path,
    count: int = 50,
    seconds: float = 4.0,
    hold: float = 1.5,
    size: int = GIF_SIDE,
    labels: Sequence[Any] = (),
) -> None:
    """A trajectory [S, B, C, H, W] in [-1, 1] as a GIF that plays for ever: `count` evenly spaced steps in `seconds`, the
    last of them held for another `hold`. `size` and `labels` are as in `strip`. Raises ValueError for another ending than .gif.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"{path} must end in .gif; save_strip saves single pictures.")
    frames, chosen = _frames(trajectory, count, labels)
    columns = math.ceil(math.sqrt(frames.shape[1]))
    captions = [[label, *[""] * (columns - 1)] for label in chosen] or [()] * len(frames)
    pictures = [grid(frame, columns, size, caption) for frame, caption in zip(frames, captions, strict=True)]
    milliseconds = max(20, round(1000 * seconds / len(pictures)))  # viewers slow down what is faster
    durations = [milliseconds] * (len(pictures) - 1) + [milliseconds + round(1000 * hold)]
    with atomic_file(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """A file of the format that the path ends in, whole or not at all. Raises ValueError if that is none for this picture."""
    suffix = Path(path).suffix.lower()
    format = Image.registered_extensions().get(suffix)
    if format not in Image.SAVE or (format == "JPEG" and picture.mode == "RGBA"):
        what = f"{suffix} has no transparency" if format == "JPEG" else f"no format of pictures ends in {suffix!r}"
        raise ValueError(f"{path}: {what}; use .png.")
    with atomic_file(path) as file:
        picture.save(file, format)


def _frames(trajectory: Tensor | np.ndarray, count: int, labels: Sequence[Any]) -> tuple[Tensor, list[Any]]:
    """Evenly spaced steps [S, B, C, H, W] in [0, 1], and their labels. Raises TypeError or ValueError for no trajectory."""
    if not isinstance(trajectory, Tensor | np.ndarray):
        hint = "pass output.trajectory of a call with output_trajectory=True" if trajectory is None else "stack its steps"
        raise TypeError(f"a trajectory is a tensor or array [steps, B, C, H, W], not {type(trajectory).__name__}; {hint}.")
    trajectory = torch.as_tensor(trajectory)
    if trajectory.ndim != 5 or 0 in trajectory.shape:
        raise ValueError(f"a trajectory is [steps, B, C, H, W], not {tuple(trajectory.shape)}.")
    if count < 1:
        raise ValueError(f"count={count} must be at least 1.")
    if len(labels) not in (0, len(trajectory)):
        raise ValueError(f"{len(labels)} labels for {len(trajectory)} steps; give one for each.")
    chosen = np.unique(np.linspace(len(trajectory) - 1, 0, count).round().astype(int))  # one frame alone is the last
    frames = (trajectory[chosen].detach().float() / 2 + 0.5).clamp(0, 1).cpu()
    return frames, [labels[index] for index in chosen] if len(labels) else []
