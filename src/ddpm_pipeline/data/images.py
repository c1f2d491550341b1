"""From an image file to training pixels: what a file or row holds, resizing, channels, depth.

Pure functions on PIL images and numpy arrays. What the pixels of a picture are, in every mode and depth, is decided in
`pictures_alpha_ddpm.py`, for the pipelines too; files that are arrays of numbers are read in `arrays.py`. Whatever is wrong
with a file is raised as `BadImage`. Of several frames or pages, the first is used, unless pages are channels.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..pictures_alpha_ddpm import (
    DEEP_MODES,
    NO_PICTURES,
    BadImage,
    Pixels,
    as_bad_image,
    one_number,
    read_array,
    read_image,
    refuse_by_format,
    settled,
)
from ..ranges_alpha_ddpm import TOPS
from .arrays import found_array
from .options import CHANNELS, shown_size

# A larger image is refused as a decompression bomb, whatever PIL's own limit is set to (by default 2.7 times this one). Up to
# this limit, the worst file briefly takes 1.3 GB, of which the decoded RGBA pixels are a fifth; a process can afford that.
MAX_PIXELS = 2**26

GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)

ORIENTATION = 0x0112  # of EXIF; from 5 on, height and width are exchanged
SAY_RANGE = "say with --value_range which values are black and white"

ImageSource = bytes | str | Path | np.ndarray  # a file's content or path, or the values themselves


@dataclass(frozen=True)
class Form:
    """What every image becomes: an array [*size, channels] of one type."""

    size: tuple[int, int]  # height and width
    channels: int
    dtype: str = "uint8"  # one of DEPTHS; black and white are those of the type, unless
    raw: bool = False  # values are kept as they are stored, in units of their own
    resize: str = "crop"  # one of RESIZE
    nearest: bool = False  # for label maps, which are raw: no value between two others is made up; palettes keep their numbers


class Shape(NamedTuple):
    """What is known of an image before it is decoded."""

    width: int  # upright
    height: int
    channels: int
    pages: int  # of one channel each, which may be meant as channels; 1 if not
    low: float  # which its type can hold, infinite for floats; or, of raw integers beyond 16 bits, which it has
    high: float


class Bands(Pixels):
    """Pixels whose channels are no colours, and are not converted to others."""

    def with_channels(self, channels: int) -> Pixels:
        if channels != self.channels:
            raise BadImage(f"it has {self.channels} channels, which are no colours, where {channels} are needed")
        return self


def image_extensions() -> frozenset[str]:
    """The endings of the files that can be read as pictures, in lower case and with the dot, such as ".png" and ".avif"."""
    return frozenset(ending for ending, format in Image.registered_extensions().items() if format not in NO_PICTURES)


def open_image(source: ImageSource) -> Image.Image:
    """The decoded image, upright, in the file's mode and with the values that are meant.

    Raises `BadImage` for a file that is missing, empty, truncated, not an image, or absurdly large.
    """
    return _opened_image(source)[1]


def _opened_image(source: ImageSource) -> tuple[bool, Image.Image]:
    """(whether Pillow has left out bits of its colours, the image)."""
    with as_bad_image(), _opened(source) as image:
        return _is_deep_png(image), settled(image)


def native_channels(image: Image.Image) -> int:
    """1 if the image's mode, or every palette colour that its pixels use, is grey; else 3. Transparency does not count."""
    grey = _uses_only_grey(image) if image.mode in ("P", "PA") else image.mode in GREY_MODES
    return 1 if grey else 3


def to_array(image: Image.Image, size: tuple[int, int], channels: int, dtype: str = "uint8") -> np.ndarray:
    """Pixels [*size, channels] of an image in any PIL mode and of any size, in one of DEPTHS; floats are in [0, 1].

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
    return _formed(read_image(image), Form(size, channels, dtype))


def image_pixels(value: Any, kind: str, form: Form) -> np.ndarray:
    """One row's image, [*size, channels] in the type of the form, from its value in a column of that kind.

    Raises `BadImage`, and `MissingExtraError` for a file that needs a library which is not installed.
    """
    return _formed(_decoded(_stored_image(value, kind), form), form)


def image_shape(value: Any, kind: str, raw: bool = False, channels: int | None = None) -> Shape:
    """The shape of one row's image, from its header unless its type leaves open what it holds. Raises as `image_pixels` does.

    `channels` are those wanted, if they are known.
    """
    source = _stored_image(value, kind)
    array, pages = found_array(source, channels)
    if array is not None:
        height, width, native = array.shape
        native = 3 if native == 4 and 4 in array.colours and not raw else native
        return Shape(width, height, native, 1, *_span(array.dtype, raw, array.read))
    with as_bad_image(), _opened(source) as image:
        mapped = image.format == "TIFF" and image.mode in ("P", "PA")  # its palette may have to be settled
        native = native_channels(settled(image) if mapped else image)
        deep = {"F": "float32", "I": "int32" if raw else "uint16"}.get(image.mode, "uint16")
        dtype = np.dtype(deep if image.mode in DEEP_MODES or _is_deep_png(image) else "uint8")
        return Shape(*_upright_size(image), native, pages, *_span(dtype, raw, lambda: np.asarray(settled(image))))


def image_file(value: Any, alone: bool = False) -> str | None:
    """The file that a row's image came from, if the row names one; if asked for, only where it stands `alone` for the image."""
    named = isinstance(value, dict) and not (alone and value.get("bytes") is not None)
    return (value.get("path") if named else None) or None


def _stored_image(value: Any, kind: str) -> ImageSource:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise BadImage("there is no image in this row")
    if isinstance(value, np.ndarray):
        return value
    try:
        return np.asarray(value, dtype=np.uint8 if kind == "array" else None) if isinstance(value, list) else value
    except (ValueError, TypeError, OverflowError) as error:
        raise BadImage(f"the array is not regular: {error}") from error


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image with only its header read; its file is closed at the end."""
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


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as `settled` turns the image; of a PNG with its EXIF at its end, as it is stored."""
    with suppress(Exception):  # of EXIF that cannot be read
        if (image.format != "PNG" or "exif" in image.info) and image.getexif().get(ORIENTATION, 1) > 4:
            return image.height, image.width
    return image.size


def _span(dtype: np.dtype, raw: bool, read: Callable[[], np.ndarray]) -> tuple[float, float]:
    """The `low` and `high` of a `Shape`, for which values are read only if their type does not tell."""
    if (dtype.kind == "u" and dtype.itemsize <= 2) or (raw and dtype in (np.int8, np.int16)):
        return np.iinfo(dtype).min, np.iinfo(dtype).max
    values = _levels(read(), raw).values
    return (-np.inf, np.inf) if values.dtype.kind == "f" else (float(values.min()), float(values.max()))


def _decoded(source: ImageSource, form: Form) -> Pixels:
    """The image at its own depth, upright; as `Bands` if its channels are no colours, or not known to be such."""
    array, _ = found_array(source, form.channels)
    if array is None:
        deep, picture = _opened_image(source)
        return _deep_png(picture, source) if deep else _picture(picture, form)
    pixels, channels = _levels(array.read(), form.raw), array.shape[-1]
    converted = channels in array.colours and (not form.raw or {channels, form.channels} <= {1, 3})
    return pixels if converted else Bands(pixels.values, pixels.top)


def _is_deep_png(image: Image.Image) -> bool:
    """Whether an opened image has colours of 16 bits and no transparent one, of which Pillow (13.0) gives the upper 8 bits."""
    deep = any(tile.args in ("RGB;16B", "RGBA;16B") for tile in image.tile)
    return image.format == "PNG" and deep and "transparency" not in image.info


def _deep_png(upper: Image.Image, source: ImageSource) -> Pixels:
    """With the lower 8 bits, which Pillow gives if it is told the other order of bytes."""
    with as_bad_image(), _opened(source) as image:
        image.tile = [tile._replace(args=tile.args.replace("16B", "16L")) for tile in image.tile]
        lower = np.asarray(settled(image))
    return Pixels(np.asarray(upper).astype(np.uint16) << 8 | lower, 65535)


def _picture(image: Image.Image, form: Form) -> Pixels:
    deep = image.mode in DEEP_MODES
    if image.mode == "F" or (form.raw and deep) or (form.nearest and image.mode in ("1", "P")):
        return _levels(np.asarray(image)[..., None], form.raw)
    try:
        return read_image(image)
    except BadImage as error:
        raise BadImage(f"{error}; {SAY_RANGE}" if deep else str(error)) from error


def _levels(values: np.ndarray, raw: bool) -> Pixels:
    """The values of an array [H, W, C], as they are if they are wanted raw."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "buif":
        raise BadImage(f"its type is {values.dtype}; save numbers")
    if kind == "f" and not (abs(values) <= np.finfo(np.float32).max).all():
        raise BadImage("it holds nan or infinity, or a number beyond 32 bits")
    if raw:
        return Pixels(
            values.astype(np.uint8 if kind == "b" else values.dtype.newbyteorder("="), copy=False), 2 ** (8 * size) - 1
        )
    if kind == "i" and size <= 2:
        raise BadImage(f"it holds signed integers, {values.dtype}, whose white is unknown; {SAY_RANGE}")
    if kind in "iu" and size > 2 and values.max() == 1:
        raise BadImage(f"its largest value is 1 in {values.dtype}, which may be white or nearly black; {SAY_RANGE}")
    try:
        return read_array(values)
    except BadImage as error:
        raise BadImage(f"{error}; {SAY_RANGE}") from error


def _formed(pixels: Pixels, form: Form) -> np.ndarray:
    """The image in the form that is wanted."""
    with as_bad_image():
        if form.nearest and pixels.channels > form.channels:
            pixels = one_number(pixels)
        # grey is resized as such, and RGB without an opaque alpha
        seen = pixels.with_channels(form.channels) if form.channels == 1 or pixels.channels == 4 else pixels
        made = type(seen)(_fitted(seen, form), seen.top if form.raw else TOPS[form.dtype]).with_channels(form.channels)
        return made.values.copy()


def _fitted(pixels: Pixels, form: Form) -> np.ndarray:
    """At the size and in the type of the form. What is deeper than 8 bits is resized in floats, and rounded once."""
    values, top = pixels.values, TOPS.get(form.dtype)
    if form.raw and values.dtype.kind == "f" and form.dtype != "float32":
        raise BadImage(f"it holds {values.dtype}, and the data before it {form.dtype}; save all in one type")
    if values.dtype == np.uint8 or form.nearest:
        placed = _placed(values, form, colours=not isinstance(pixels, Bands))
        return _of_type(placed if form.raw or top == 255 else placed.astype(np.float32) * top / 255, form.dtype)
    levels = (values if form.raw else values * (top / pixels.top)).astype(np.float32)
    low, high = (levels.min((0, 1)), levels.max((0, 1))) if form.raw else (0, top)
    return _of_type(np.clip(_placed(levels, form), low, high), form.dtype)  # since Lanczos overshoots


def _of_type(values: np.ndarray, dtype: str) -> np.ndarray:
    if values.dtype == dtype or dtype == "float32":
        return values.astype(dtype, copy=False)
    low, high, limits = values.min(), values.max(), np.iinfo(dtype)
    if low < limits.min or high > limits.max:
        raise BadImage(f"its values go from {low:g} to {high:g}, and those of the data so far fit in {dtype}")
    return np.rint(values).astype(dtype)


def _placed(values: np.ndarray, form: Form, colours: bool = False) -> np.ndarray:
    """[H, W, C] at the size of the form, as its way of resizing says."""
    size, (height, width) = form.size, values.shape[:2]
    whole = (0, 0, width, height)
    if form.resize == "none" and (height, width) != size:
        raise BadImage(f"its size is {height}x{width}, not {shown_size(size)}; resize it, or choose another --resize")
    if form.resize == "pad":
        scale = min(size[0] / height, size[1] / width)
        inner = tuple(max(1, min(most, round(side * scale))) for side, most in zip((height, width), size, strict=True))
        before = [(most - side) // 2 for side, most in zip(inner, size, strict=True)]
        around = [(start, most - side - start) for start, side, most in zip(before, inner, size, strict=True)]
        return np.pad(_resized(values, whole, inner, form.nearest, colours), [*around, (0, 0)], mode="edge")
    window = _window((height, width), size) if form.resize == "crop" else whole
    return _resized(values, window, size, form.nearest, colours)


def _resized(
    values: np.ndarray, window: tuple[float, float, float, float], size: tuple[int, int], nearest: bool, colours: bool
) -> np.ndarray:
    """What is in a window (left, top, right, bottom), of uint8 or float32, at `size`. PIL weights RGBA by alpha."""
    left, top, right, bottom = window
    if (bottom - top, right - left) == size:
        return values[int(top) : int(top) + size[0], int(left) : int(left) + size[1]]
    if nearest:
        rows, columns = (
            np.minimum(start + (np.arange(count) + 0.5) * (end - start) / count, most - 1).astype(int)
            for start, end, count, most in zip((top, left), (bottom, right), size, values.shape, strict=False)
        )
        return values[rows][:, columns]
    how = {"size": size[::-1], "resample": Image.Resampling.LANCZOS, "box": window}
    if colours:
        return np.asarray(Pixels(values, 255).image().resize(**how)).reshape(*size, -1)
    channels = (Image.fromarray(np.ascontiguousarray(one)) for one in np.moveaxis(values, -1, 0))
    return np.stack([np.asarray(channel.resize(**how)) for channel in channels], axis=-1)


def _window(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest window of the shape `wanted` at the centre of an image of this size: left, top, right, bottom. It begins at
    whole pixels, so that nothing is blurred where nothing is scaled.
    """
    (height, width), (rows, columns) = size, wanted
    scale = min(height / rows, width / columns)
    rows, columns = min(height, rows * scale), min(width, columns * scale)
    left, top = (width - columns) // 2, (height - rows) // 2
    return left, top, left + columns, top + rows
