"""From an image file to training pixels: what a file or row holds, resizing and cropping, 8 bits.

Pure functions on PIL images and numpy arrays. What the pixels of a picture are, in every mode and depth, is decided in
`pictures_alpha_ddpm.py`, for the pipelines too. Whatever is wrong with a file is raised as `BadImage`. Of several frames or
pages, the first is used.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..pictures_alpha_ddpm import DEEP_MODES, NO_PICTURES, BadImage, Pixels, as_bad_image, read_image, refuse_by_format, settled
from .options import CHANNELS

# A larger image is refused as a decompression bomb, whatever PIL's own limit is set to (by default 2.7 times this one). Up to
# this limit, the worst file briefly takes 1.3 GB, of which the decoded RGBA pixels are a fifth; a process can afford that.
MAX_PIXELS = 2**26

GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)

ImageSource = bytes | str | Path | np.ndarray  # a file's content or path, or pixels, uint8


def image_extensions() -> frozenset[str]:
    """The endings of the files that can be read as pictures, in lower case and with the dot, such as ".png" and ".avif"."""
    return frozenset(ending for ending, format in Image.registered_extensions().items() if format not in NO_PICTURES)


def open_image(source: ImageSource) -> Image.Image:
    """The decoded image, upright, in the file's mode and with the values that are meant.

    Raises `BadImage` for a file that is missing, empty, truncated, not an image, or absurdly large.
    """
    with as_bad_image(), _opened(source) as image:
        return settled(image)


def native_channels(image: Image.Image) -> int:
    """1 if the image's mode, or every palette colour that its pixels use, is grey; else 3. Transparency does not count."""
    grey = _uses_only_grey(image) if image.mode in ("P", "PA") else image.mode in GREY_MODES
    return 1 if grey else 3


def to_array(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Pixels, uint8 [*size, channels], of an image in any PIL mode and of any size.

    The image is scaled until it just covers `size`, (height, width), and cropped to its centre (Lanczos, antialiased; not
    scaled if it covers it as it is). Channels: 1 is grey (ITU-R 601 luma of colours), 3 is RGB, 4 is RGBA with straight alpha.
    Transparency is composited on white unless `channels` is 4; resizing weights colours by alpha, so hidden colours do not
    bleed in. Grey beyond 8 bits is resized in floating point and rounded once.

    Raises ValueError for an impossible size or channel count, `BadImage` for what cannot be read as it was meant.
    """
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 and not isinstance(side, bool) for side in size):
        raise ValueError(f"size={size!r} is not a height and a width in pixels; use two such as (64, 64).")
    if isinstance(channels, bool) or channels not in CHANNELS:
        raise ValueError(f"channels={channels!r} is not one of {CHANNELS}; use 1 for grey, 3 for RGB, 4 for RGBA.")
    pixels = read_image(image)
    with as_bad_image():
        # grey is resized as such, and RGB without an opaque alpha
        seen = pixels.with_channels(channels) if channels == 1 or pixels.channels == 4 else pixels
        fitted = Pixels(_fitted(seen, size), 255).with_channels(channels)
    return fitted.values.copy()


def array_to_image(array: np.ndarray) -> Image.Image:
    """The PIL image of a uint8 array [H, W], [H, W, C] or else [C, H, W], where C is 1, 3 or 4. Raises `BadImage`."""
    if array.dtype != np.uint8:
        raise BadImage(f"the array's type is {array.dtype}, not uint8")
    if array.ndim == 3 and array.shape[-1] not in CHANNELS and array.shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in CHANNELS)):
        allowed = f"[H, W], [H, W, C] or [C, H, W] where C is one of {CHANNELS}"
        raise BadImage(f"the array's shape is {array.shape}, not {allowed}")
    return Image.fromarray(np.ascontiguousarray(array))


def image_pixels(value: Any, kind: str, size: tuple[int, int], channels: int) -> np.ndarray:
    """One row's image, uint8 [*size, channels], from its value in a column of that kind. Raises `BadImage`."""
    return to_array(open_image(stored_image(value, kind)), size, channels)


def image_shape(value: Any, kind: str) -> tuple[int, int, int]:
    """(width, height, native channels) of one row's image, before any EXIF rotation; only palettes need more than the header.

    Raises `BadImage`.
    """
    with as_bad_image(), _opened(stored_image(value, kind)) as image:
        mapped = image.format == "TIFF" and image.mode in ("P", "PA")  # its palette may have to be settled
        return *image.size, native_channels(settled(image) if mapped else image)


def image_file(value: Any, alone: bool = False) -> str | None:
    """The file that a row's image came from, if the row names one; if asked for, only where it stands `alone` for the image."""
    named = isinstance(value, dict) and not (alone and value.get("bytes") is not None)
    return (value.get("path") if named else None) or None


def stored_image(value: Any, kind: str) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise BadImage("there is no image in this row")
    try:
        return np.asarray(value, dtype=np.uint8) if kind == "array" else value
    except (ValueError, TypeError, OverflowError) as error:
        raise BadImage(f"the array is not regular: {error}") from error


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image with only its header read; its file is closed at the end."""
    if isinstance(source, np.ndarray):
        yield array_to_image(source)
        return
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise BadImage("the file is empty (0 bytes)")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        refuse_by_format(image)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width}x{image.height} exceeds {MAX_PIXELS} pixels; it may be a decompression bomb")
        yield image


def _uses_only_grey(image: Image.Image) -> bool:
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)  # [entries, 3]
    if (palette == palette[:, :1]).all():
        return True
    used = np.unique(np.asarray(image.getchannel(0)))
    colours = palette[used[used < len(palette)]]  # an index beyond the palette is black
    return bool((colours == colours[:, :1]).all())


def _fitted(pixels: Pixels, size: tuple[int, int]) -> np.ndarray:
    """The centre at `size`, uint8 [*size, C]. PIL weights "RGBA" by alpha as it resizes."""
    height, width = pixels.values.shape[:2]
    left, top, right, bottom = window((height, width), size)
    if (bottom - top, right - left) == size:
        cut = pixels.values[int(top) : int(top) + size[0], int(left) : int(left) + size[1]]
        return Pixels(cut, pixels.top).in_8_bits().values
    how = {"size": size[::-1], "resample": Image.Resampling.LANCZOS, "box": (left, top, right, bottom)}
    if pixels.values.dtype == np.uint8:
        return np.asarray(pixels.image().resize(**how)).reshape(*size, -1)
    levels = Image.fromarray((pixels.values[..., 0] * (255 / pixels.top)).astype(np.float32))
    overshooting = np.asarray(levels.resize(**how))[..., None]  # as Lanczos does
    return np.rint(np.clip(overshooting, 0, 255)).astype(np.uint8)


def window(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest window of the shape `wanted` at the centre of an image of this size: left, top, right, bottom. It begins at
    whole pixels, so that nothing is blurred where nothing is scaled.
    """
    (height, width), (rows, columns) = size, wanted
    scale = min(height / rows, width / columns)
    rows, columns = min(height, rows * scale), min(width, columns * scale)
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows
