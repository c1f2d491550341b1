"""Images side by side, and diffusion step by step: the report's figures 3.3 and 3.4 as a strip and as a GIF.

Images of any depth and number of channels are shown by a `Display`, which also says in words how.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
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
NAME_WIDTH = 24  # characters of a line of a row's name
BEYOND_FONT = "\u0250"  # the first character after those of Latin alphabets, which Pillow's font has
PERCENTILES = 1, 99  # of a channel: shown as black and as white


@dataclass(frozen=True)
class Display:
    """How images of any depth and number of channels are shown as grey, RGB or RGBA.

    Channels count from 1: one is shown as grey, three as RGB. By default they are all, or the first three, or the first, for
    images of 1, 3 or 4 channels, more, or 2. Images of more than 8 bits are stretched: one percentile of each channel is shown
    as black and another as white. Raises ValueError for channels that cannot be shown.
    """

    channels: tuple[int, ...] = ()
    stretch: bool = False

    @classmethod
    def parse(cls, channels: str | None, stretch: bool = False) -> "Display":
        """That of channels as an option names them, such as "3,2,1"."""
        words = channels.split(",") if channels else []
        if len(words) not in (0, 1, 3) or not all(word.strip().isdecimal() and int(word) for word in words):
            raise ValueError(f"{channels} must be one channel, or three such as 3,2,1, counted from 1")
        return cls(tuple(map(int, words)), stretch)

    def show(self, images: Tensor, reference: Tensor | None = None) -> Tensor:
        """Pictures [..., 1, 3 or 4, H, W] of images [..., C, H, W], both in [0, 1]. The percentiles are those of `reference`,
        or of the images themselves.
        """
        shown = [channel - 1 for channel in self._shown(images.shape[-3])]
        pictures = images[..., shown, :, :]
        if not self.stretch:
            return pictures
        values = pictures if reference is None else reference[..., shown, :, :]
        low, high = np.percentile(values.movedim(-3, 0).flatten(1).numpy(), PERCENTILES, axis=1)  # [c] each
        low, high = (torch.from_numpy(bound).to(pictures).view(-1, 1, 1) for bound in (low, high))
        return ((pictures - low) / (high - low).clamp_min(1e-8)).clamp(0, 1)

    def words(self, channels: int) -> str:
        """What differs in the pictures from images of so many channels; "" if nothing does."""
        shown, parts = self._shown(channels), []
        if shown != tuple(range(1, channels + 1)):
            parts.append(f"channel{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))} of {channels}")
        if self.stretch:
            parts.append(f"contrast stretched from percentile {PERCENTILES[0]} to {PERCENTILES[1]}, for viewing only")
        return ", ".join(parts)

    def _shown(self, channels: int) -> tuple[int, ...]:
        if max(self.channels, default=1) > channels:
            raise ValueError(f"{','.join(map(str, self.channels))} must be channels of the images, which are 1 to {channels}")
        whole = channels in (1, 3) or (channels == 4 and not self.stretch)  # deep ones are bands rather than RGBA
        return self.channels or tuple(range(1, 1 + (channels if whole else 3 if channels > 3 else 1)))


BY_DEFAULT = Display()


def grid(
    images: Images,
    columns: int | None = None,
    size: int = SMALLEST_SIDE,
    labels: Sequence[Any] = (),
    display: Display = BY_DEFAULT,
    left: Images | None = None,
    rows: Sequence[str] = (),
) -> Image.Image:
    """Images as one picture on white, each enlarged by a whole factor to be seen.

    Args:
        images: tensor [N, C, H, W] or array [N, H, W, C] in [0, 1] (integers: 0..255), or a list of PIL images of one size.
        columns: images in a row; by default about as many as there are rows.
        size: pixels that the longer side of an image takes at least.
        labels: what is written above the columns, one for each.
        display: how images of 2 or more than 4 channels, or of more than 8 bits, are shown.
        left: pictures of the same size in a column of their own before the others, one per row, such as what the row shows.
        rows: what is written left of the rows, one for each. What does not fit is cut, and texts in other alphabets than Latin
            become numbers: row 1.

    Raises ValueError for what are no such images.
    """
    pixels = display.show(read_pictures(images, "images"))
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    if left is not None:
        pixels, columns = _beside(read_pictures(left, "left"), pixels, columns), columns + 1
    count, channels, height, width = pixels.shape
    if len(labels) not in (0, columns):
        raise ValueError(f"{len(labels)} labels for {columns} columns; give one for each column.")
    if len(rows) not in (0, math.ceil(count / columns)):
        raise ValueError(f"{len(rows)} names for {math.ceil(count / columns)} rows; give one for each row.")
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
    return _with_names(picture, rows, top, cell_height) if len(rows) else picture


def _with_names(picture: Image.Image, names: Sequence[str], top: int, height: int) -> Image.Image:
    """The picture with names left of its rows, which begin at `top` and are `height` pixels apart."""
    font = ImageFont.load_default(TEXT_HEIGHT - 2)
    fitting = {"width": NAME_WIDTH, "max_lines": height // TEXT_HEIGHT, "placeholder": " …"}
    known = [name if max(name, default="") < BEYOND_FONT else f"row {row}" for row, name in enumerate(names, start=1)]
    texts = ["\n".join(textwrap.wrap(name, **fitting)) for name in known]
    width = math.ceil(max(font.getlength(line) for text in texts for line in text.split("\n"))) + 2 * GAP
    wider = Image.new(picture.mode, (picture.width + width, picture.height), "white")
    wider.paste(picture, (width, 0))
    for row, text in enumerate(texts):
        place = (GAP, top + row * height + height / 2)
        ImageDraw.Draw(wider).text(place, text, "black", font, anchor="lm", spacing=0)
    return wider


def _beside(left: Tensor, pixels: Tensor, columns: int) -> Tensor:
    """Each row of `columns` pictures after its one of `left`, all with as many channels."""
    channels = max(left.shape[1], pixels.shape[1])
    rows = read_pictures(pixels, "images", channels).split(columns)
    return torch.cat([part for pair in zip(read_pictures(left, "left", channels).split(1), rows, strict=True) for part in pair])


def strip(
    trajectory: Tensor | np.ndarray,
    count: int = 9,
    size: int = SMALLEST_SIDE,
    labels: Sequence[Any] = (),
    display: Display = BY_DEFAULT,
    rows: Sequence[str] = (),
) -> Image.Image:
    """A picture of `count` evenly spaced steps, the first and the last among them, of a trajectory [S, B, C, H, W] in [-1, 1],
    one row per image. `labels`, one for each of the S steps, such as its t, are written above those shown; `size`, `display`
    and `rows` as in `grid`, with the percentiles of the last step.
    """
    frames, chosen = _frames(trajectory, count, labels, display)
    images = frames.transpose(0, 1).flatten(0, 1)  # [S, B, ...] -> [B·S, ...]
    return grid(images, len(frames), size, chosen, rows=rows)


def save_strip(
    trajectory: Tensor | np.ndarray, path: str | Path, count: int = 9, size: int = SMALLEST_SIDE, **options: Any
) -> None:
    """`strip` as a file of the format that the path ends in, such as .png."""
    save_picture(strip(trajectory, count, size, **options), path)


def save_gif(
    trajectory: Tensor | np.ndarray,
    path: str | Path,
    count: int = 50,
    seconds: float = 4.0,
    hold: float = 1.5,
    size: int = GIF_SIDE,
    labels: Sequence[Any] = (),
    display: Display = BY_DEFAULT,
) -> None:
    """A trajectory [S, B, C, H, W] in [-1, 1] as a GIF that plays for ever: `count` evenly spaced steps in `seconds`, the
    last of them held for another `hold`; the others as in `strip`. Raises ValueError for another ending than .gif.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"{path} must end in .gif; save_strip saves single pictures.")
    frames, chosen = _frames(trajectory, count, labels, display)
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


def _frames(trajectory: Tensor | np.ndarray, count: int, labels: Sequence[Any], display: Display) -> tuple[Tensor, list[Any]]:
    """Evenly spaced steps as pictures [S, B, 1, 3 or 4, H, W], and their labels. Raises TypeError or ValueError for no
    trajectory.
    """
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
    return display.show(frames, frames[-1]), [labels[index] for index in chosen] if len(labels) else []
