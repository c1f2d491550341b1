"""From an image file to training pixels: every PIL mode, orientation, transparency, resizing.

Pure functions on PIL images and numpy arrays; imports neither `datasets` nor torch. Whatever is wrong with a file is raised as
`BadImage`. ICC profiles are ignored, as by every loader of this field. Of several frames or pages, the first is used.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
# A larger image is refused as a decompression bomb, whatever PIL's own limit is set to (by default 2.7 times this one). Up to
# this limit, the worst file briefly takes 1.3 GB, of which the decoded RGBA pixels are a fifth; a process can afford that.
MAX_PIXELS = 2**26

DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey beyond 8 bits; PIL's own conversion clips them
GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)

# What PIL knows by name but gives no pixels of: stubs for formats of other libraries, and pages, for which it would run another
# program.
NO_PICTURES = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"})

ImageSource = bytes | str | Path


class BadImage(ValueError):
    """This image cannot be used. The message gives the reason, but not the file."""


def image_extensions() -> frozenset[str]:
    """The endings of the files that can be read as pictures, in lower case and with the dot, such as ".png" and ".avif"."""
    return frozenset(ending for ending, format in Image.registered_extensions().items() if format not in NO_PICTURES)


def open_image(source: ImageSource) -> Image.Image:
    """The decoded image of a file's bytes or path, in the file's mode, turned upright as its EXIF orientation says.

    Raises `BadImage` for a file that is missing, empty, truncated, not an image, or absurdly large.
    """
    with _bad_image(), _opened(source) as image:
        _scale_transparent_value(image)
        image.load()
        return _upright(image)


def image_size_and_channels(source: ImageSource) -> tuple[int, int, int]:
    """(width, height, native channels) of a file's bytes or path, before any EXIF rotation; only palettes need decoding."""
    with _bad_image(), _opened(source) as image:
        return *image.size, native_channels(image)


def native_channels(image: Image.Image) -> int:
    """1 if the image's mode, or every palette colour that its pixels use, is grey; else 3. Transparency does not count."""
    grey = _uses_only_grey(image) if image.mode in ("P", "PA") else image.mode in GREY_MODES
    return 1 if grey else 3


def to_array(image: Image.Image, resolution: int, channels: int) -> np.ndarray:
    """Pixels, uint8 [resolution, resolution, channels], of an image in any PIL mode and of any size.

    The shorter side is scaled to `resolution` (Lanczos, antialiased; not at all if it has that length) and the image is cropped
    to its centre. Channels: 1 is grey (ITU-R 601 luma of colours), 3 is RGB, 4 is RGBA with straight alpha. Transparency is
    composited on white unless `channels` is 4; resizing weights colours by alpha, so hidden colours do not bleed in. Grey
    beyond 8 bits is resized in floating point and rounded once: 16-bit modes and "I" range over 0..65535, "F" over 0..1 if all
    its values lie there, else over 0..255.

    Raises ValueError for an impossible resolution or channel count, `BadImage` for values outside these ranges.
    """
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution={resolution!r} is not a positive whole number of pixels; use one such as 64.")
    if isinstance(channels, bool) or channels not in CHANNELS:
        raise ValueError(f"channels={channels!r} is not one of {CHANNELS}; use 1 for grey, 3 for RGB, 4 for RGBA.")
    with _bad_image():
        if 0 in image.size:
            raise BadImage(f"the image has no pixels; its size is {image.width}x{image.height}")
        pixels = np.asarray(_resize_and_crop(_plain_mode(image, channels), resolution))  # [R, R] or [R, R, 3 or 4]
    pixels = _to_uint8(pixels)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], min(channels, 3), axis=-1)
    if channels == 4 and pixels.shape[-1] == 3:  # opaque
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    return np.ascontiguousarray(pixels)


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


def image_pixels(value: Any, kind: str, resolution: int, channels: int) -> np.ndarray:
    """One row's image, uint8 [resolution, resolution, channels], from its value in a column of that kind. Raises `BadImage`."""
    source = _stored_image(value, kind)
    image = array_to_image(source) if isinstance(source, np.ndarray) else open_image(source)
    return to_array(image, resolution, channels)


def image_shape(value: Any, kind: str) -> tuple[int, int, int]:
    """(width, height, native channels) of one row's image, from its header if that suffices. Raises `BadImage`."""
    source = _stored_image(value, kind)
    if isinstance(source, np.ndarray):
        image = array_to_image(source)
        return *image.size, native_channels(image)
    return image_size_and_channels(source)


def image_file(value: Any) -> str | None:
    """The file that a row's image came from, if the row names one."""
    return (value.get("path") if isinstance(value, dict) else None) or None


def _stored_image(value: Any, kind: str) -> bytes | str | np.ndarray:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise BadImage("there is no image in this row")
    try:
        return np.asarray(value, dtype=np.uint8) if kind == "array" else value
    except (ValueError, TypeError, OverflowError) as error:
        raise BadImage(f"the array is not regular: {error}") from error


@contextmanager
def _bad_image() -> Iterator[None]:
    """Turns any exception into `BadImage`: PIL's plugins raise almost every type there is on damaged files."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its own message has a memory address, so that no two are alike
        raise BadImage("cannot identify its format: it is not an image, or its beginning is damaged") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image with only its header read; its file is closed at the end."""
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise BadImage("the file is empty (0 bytes)")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.format == "EPS":  # PIL would run Ghostscript on a file that may come from a stranger
            raise BadImage("the format EPS is not accepted: decoding it would run another program")
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width}x{image.height} exceeds {MAX_PIXELS} pixels; it may be a decompression bomb")
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; as stored if the EXIF cannot be read, since the pixels are still sound."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


def _scale_transparent_value(image: Image.Image) -> None:
    """Scales a PNG's transparent value like its pixels, which PIL (13.0) omits for 2- and 4-bit grey and for 16-bit RGB."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    rawmode = image.tile[0][3]
    if rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]  # to 0..255
    elif rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)  # the high bytes


def _uses_only_grey(image: Image.Image) -> bool:
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)  # [entries, 3]
    if (palette == palette[:, :1]).all():
        return True
    used = np.unique(np.asarray(image.getchannel(0)))
    colours = palette[used[used < len(palette)]]  # an index beyond the palette is black
    return bool((colours == colours[:, :1]).all())


def _plain_mode(image: Image.Image, channels: int) -> Image.Image:
    """The same picture as "F" (0..255) or "L" if grey, "RGB" if colour, "RGBA" if transparent and `channels` is 4."""
    if image.mode in DEEP_MODES:
        grey = _deep_grey(image)
        if "transparency" not in image.info:
            return Image.fromarray(grey)
        alpha = np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(_to_uint8(grey)), Image.fromarray(alpha)])
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        if channels == 4:
            return image
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L") if channels == 1 or image.mode == "1" else image


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Grey levels scaled to 0..255, float32 [H, W]; `to_array` documents the ranges."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    top, allowed = 65535, "0..65535"
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise BadImage("its floating-point values are not all finite")
        top, allowed = (1 if high <= 1 else 255), "0..1 or 0..255"
    if low < 0 or high > top:
        raise BadImage(f"its values go from {low} to {high}, but mode {image.mode} must hold {allowed}")
    return (values * (255 / top)).astype(np.float32)


def _resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at `resolution`. PIL multiplies "RGBA" by alpha before it resizes and divides afterwards."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2  # whole pixels: no blur without scaling
    box = (left, top, left + side, top + side)
    if side == resolution:
        return image.crop(box)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Rounded to the nearest level, and clipped first because Lanczos overshoots."""
    return pixels if pixels.dtype == np.uint8 else np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
