"""From an image file to training pixels: every PIL mode, orientation, transparency, resizing.

Pure functions on PIL images and numpy arrays. It imports neither `datasets` nor torch, changes no global state of PIL,
and is called by `mapped` and `streamed`, in worker processes too. Whatever is wrong with a file ends in `BadImage`,
so that a caller may skip that one row.

Colour management is not done: ICC profiles are ignored, as by every loader of this field. Of an animation or a
multi-page file the first frame is taken.
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
# An image of more is refused as a decompression bomb, whatever PIL's own limit is set to (by default 2.7 times this one). With
# it the worst file takes 1.3 GB for a moment, of which the decoded RGBA pixels are a fifth: a process can bear that.
MAX_PIXELS = 2**26
REFUSED_FORMATS = ("EPS",)  # PIL would start Ghostscript on it, and files may come from strangers

GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey beyond 8 bits; PIL's own conversion clips them
PALETTE_MODES = ("P", "PA")

ImageSource = bytes | str | Path


class BadImage(ValueError):
    """This image cannot be used; the message is the reason, without saying which file it was."""


def open_image(source: ImageSource) -> Image.Image:
    """The decoded image of a file's bytes or path, turned upright as its EXIF orientation says, in the file's mode.

    Raises `BadImage` for whatever keeps it from being decoded whole: missing, empty, truncated, not an image, absurdly
    large.
    """
    with _bad_image(), _opened(source) as image:
        _scale_transparent_value(image)
        image.load()
        return _upright(image)


def image_size_and_channels(source: ImageSource) -> tuple[int, int, int]:
    """(width, height, native channels) of a file's bytes or path, decoding it only if it has a palette.

    The size is the stored one, before an EXIF rotation. Raises `BadImage`.
    """
    with _bad_image(), _opened(source) as image:
        return *image.size, native_channels(image)


def native_channels(image: Image.Image) -> int:
    """1 if the image's mode, or the colours its pixels use of the palette, are all grey; else 3.

    Never 4: transparency counts only where it is asked for.
    """
    if image.mode in PALETTE_MODES:
        return 1 if _uses_only_grey(image) else 3
    return 1 if image.mode in GREY_MODES else 3


def to_array(image: Image.Image, resolution: int, channels: int) -> np.ndarray:
    """Pixels, uint8 [resolution, resolution, channels], of an image in any PIL mode and of any size.

    The shorter side is scaled to `resolution` (Lanczos, antialiased) and the centre is cut out; an image whose shorter
    side has that length is cut without resampling. Channels: 1 is grey (colours by ITU-R 601 luma), 3 is RGB, 4 is
    RGBA with straight alpha. Transparency is composited on white unless 4 channels are asked for; resizing weighs
    colours by alpha, so nothing hidden bleeds in.

    Grey beyond 8 bits is resized in floating point and rounded once. Its ranges: 16-bit modes and "I" are 0..65535
    ("I" outside that is refused); "F" is 0..1 if all its values are within that, else 0..255 (beyond it, refused).

    Raises ValueError for an impossible resolution or channel count, `BadImage` for pixels that have no meaning.
    """
    check_resolution(resolution)
    check_channels(channels)
    with _bad_image():
        if 0 in image.size:
            raise BadImage(f"the image has no pixels: its size is {image.width}x{image.height}")
        pixels = np.asarray(_resize_and_crop(_plain_mode(image, channels), resolution))  # [R, R] or [R, R, 3 or 4]
    return _with_channels(_to_uint8(pixels), channels)


def array_to_image(array: np.ndarray) -> Image.Image:
    """The PIL image of a uint8 array: [H, W] grey, [H, W, C] or else [C, H, W] with C of 1, 3 or 4.

    Raises `BadImage` for any other shape or type.
    """
    if array.dtype != np.uint8:
        raise BadImage(f"the array's type is {array.dtype}, not uint8")
    if array.ndim == 3 and array.shape[-1] not in CHANNELS and array.shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in CHANNELS)):
        raise BadImage(f"the array's shape is {array.shape}, not [H, W], [H, W, C] or [C, H, W] with C of {CHANNELS}")
    return Image.fromarray(np.ascontiguousarray(array))


def check_resolution(resolution: int) -> None:
    """Raises ValueError unless `resolution` is a positive whole number of pixels."""
    if isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution={resolution!r} is not a positive whole number; give pixels a side, such as 64.")


def check_channels(channels: int) -> None:
    """Raises ValueError unless `channels` is 1, 3 or 4."""
    if isinstance(channels, bool) or channels not in CHANNELS:
        raise ValueError(f"channels={channels!r} is not one of {CHANNELS}; use 1 for grey, 3 for RGB, 4 for RGBA.")


# Rows of a data set


def image_pixels(value: Any, kind: str, resolution: int, channels: int) -> np.ndarray:
    """One row's image as uint8 [resolution, resolution, channels]; `value` as the column of that kind stores it.

    Raises `BadImage`.
    """
    source = _stored_image(value, kind)
    image = array_to_image(source) if isinstance(source, np.ndarray) else open_image(source)
    return to_array(image, resolution, channels)


def image_shape(value: Any, kind: str) -> tuple[int, int, int]:
    """(width, height, native channels) of one row's image, by its header where that suffices. Raises `BadImage`."""
    source = _stored_image(value, kind)
    if isinstance(source, np.ndarray):
        image = array_to_image(source)
        return *image.size, native_channels(image)
    return image_size_and_channels(source)


def image_file(value: Any) -> str | None:
    """The file that one row's image came from, if the row names one."""
    return (value.get("path") if isinstance(value, dict) else None) or None


def _stored_image(value: Any, kind: str) -> bytes | str | np.ndarray:
    """What a row holds: the bytes of a file, its path, or an array."""
    if value is not None and kind == "array":
        try:
            return np.asarray(value, dtype=np.uint8)
        except (ValueError, TypeError, OverflowError) as error:
            raise BadImage(f"the array is not regular: {error}") from error
    found = value
    if isinstance(value, dict):
        found = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if found is None:
        raise BadImage("there is no image in this row")
    return found


# Opening


@contextmanager
def _bad_image() -> Iterator[None]:
    """Turns any exception into `BadImage`: on damaged files PIL's plugins raise almost every type there is."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # whose message has an address of memory, so that no two are alike
        raise BadImage("cannot identify its format: it is no image, or its beginning is damaged") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image with its header read, its file closed at the end."""
    if (len(source) if isinstance(source, bytes) else os.path.getsize(source)) == 0:
        raise BadImage("the file is empty (0 bytes)")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.format in REFUSED_FORMATS:
            raise BadImage(f"the format {image.format} is not accepted: decoding it would run another program")
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels: a decompression bomb?")
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; as it is stored where the EXIF cannot be read, for the pixels are sound."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image.copy()


def _scale_transparent_value(image: Image.Image) -> None:
    """Scales a PNG's transparent value as its pixels will be, which PIL (13.0) omits unless they have 1, 8 or 16 bits.

    Grey of 2 and 4 bits is spread over 0..255; 16-bit RGB keeps its high bytes.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    rawmode = image.tile[0][3]
    if rawmode in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]
    elif rawmode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _uses_only_grey(image: Image.Image) -> bool:
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)  # [entries, 3]
    if (palette == palette[:, :1]).all():
        return True
    used = np.unique(np.asarray(image.getchannel(0)))
    colours = palette[used[used < len(palette)]]  # an index beyond the palette is black
    return bool((colours == colours[:, :1]).all())


# Modes


def _plain_mode(image: Image.Image, channels: int) -> Image.Image:
    """The same picture in mode "F" (grey, 0..255) or "L" for grey, "RGB" for colour, "RGBA" if 4 channels want it."""
    if image.mode in DEEP_MODES:
        grey = _deep_grey(image)
        if "transparency" not in image.info:
            return Image.fromarray(grey)
        image = _grey_with_hole(grey, np.asarray(image) == image.info["transparency"])
    if image.has_transparency_data:
        image = _rgba(image)
        if channels == 4:
            return image
        image = _on_white(image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L") if channels == 1 or image.mode == "1" else image


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Grey levels on the scale 0..255, float32 [H, W]; `to_array` documents the ranges that are read."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise BadImage("its floating-point values are not all finite")
        top = 1 if high <= 1 else 255
    else:
        top = 65535
    if low < 0 or high > top:
        allowed = "0..1 or 0..255" if image.mode == "F" else "0..65535"
        raise BadImage(f"its values go from {low} to {high}, but an image of mode {image.mode} is read as {allowed}")
    return (values * (255 / top)).astype(np.float32)


def _grey_with_hole(grey: np.ndarray, hole: np.ndarray) -> Image.Image:
    """An "LA" image of grey levels [H, W] on 0..255, transparent where `hole` [H, W] is true."""
    return Image.merge("LA", [Image.fromarray(_to_uint8(grey)), Image.fromarray(np.where(hole, 0, 255).astype("u1"))])


def _rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


# Size and channels


def _resize_and_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at `resolution`. PIL's resize of "RGBA" multiplies by alpha before and divides after."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2  # whole pixels: no blur where no scaling is due
    box = (left, top, left + side, top + side)
    if side == resolution:
        return image.crop(box)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Rounded to the nearest level; Lanczos overshoots, so floats are clipped first."""
    return pixels if pixels.dtype == np.uint8 else np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """[H, W], [H, W, 3] or [H, W, 4] to [H, W, channels]: grey is repeated, missing alpha is opaque."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], min(channels, 3), axis=-1)
    if channels == 4 and pixels.shape[-1] == 3:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    return np.ascontiguousarray(pixels)
