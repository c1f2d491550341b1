"""Images that are arrays of numbers: NumPy files, and TIFF files of more channels or depth than Pillow reads.

Called by `images`, which reads every other file with Pillow. What is wrong with a file is raised as `BadImage`.
"""

import io
import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

from ..pictures_alpha_ddpm import BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, SAMPLE_FORMAT, SIGNED, BadImage, as_bad_image
from ..support.extras import needs_extra
from .options import CHANNELS, MAX_CHANNELS

ARRAY_FILES = (".npy", ".npz")
MAX_BYTES = 2**30  # of one decoded array, whatever its compressed file claims
NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
NAMED = "image"  # the array that is read of several in a .npz file
SAMPLES, EXTRA_SAMPLES, ORIENTATION, WIDTH, HEIGHT, PREDICTOR = 277, 338, 274, 256, 257, 317  # tags of TIFF
COLOURS = {1: 1, 2: 3}  # channels by photometric interpretation, of those whose values are levels as they are stored
ALPHA = 2  # straight, as an extra sample
FLOAT, FLOAT_PREDICTOR = 3, 3  # values of SAMPLE_FORMAT and PREDICTOR
BIG = 43  # third byte of BigTIFF
DECODED_ALONE = (1, 8, 32946)  # compressions that tifffile needs no other library for: none and deflate

ArraySource = bytes | str | Path  # a file's content or path


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, whose values are not read yet."""

    shape: tuple[int, int, int]  # [H, W, C], upright
    dtype: np.dtype
    colours: tuple[int, ...]  # which numbers of channels are grey (1), RGB (3) or RGBA (4); others are bands
    read: Callable[[], np.ndarray]  # raises `BadImage`, or `MissingExtraError` if a library is missing


@contextmanager
def _opened(source: ArraySource) -> Iterator[BinaryIO]:
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        yield file


def _numpy_array(source: ArraySource) -> np.ndarray | None:
    """The array of a .npy or .npz file, which is told by its first bytes; None for any other file. Raises `BadImage`."""
    with as_bad_image(), _opened(source) as file:
        magic = file.read(len(NPY))
        file.seek(0)
        if magic == NPY:
            return _npy(file)
        if not magic.startswith(ZIP):
            return None
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            chosen = names if len(names) == 1 else [name for name in names if name == f"{NAMED}.npy"]
            if not chosen:
                raise BadImage(f"it holds {len(names)} arrays, none of which is called {NAMED!r}; keep one, or name it so")
            _check_bytes(archive.getinfo(chosen[0]).file_size)
            return _npy(io.BytesIO(archive.read(chosen[0])))


def _npy(file: BinaryIO) -> np.ndarray:
    """Never unpickles, and reads nothing before it knows how much there is."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in headers:
        raise BadImage(f"its version of the .npy format is {version}; save it with numpy.save as an array of numbers")
    shape, _, dtype = headers[version](file)
    if dtype.hasobject or dtype.names:
        raise BadImage("it holds Python objects or records, which are not read; save numbers")
    _check_bytes(math.prod(shape) * dtype.itemsize)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise BadImage(f"it has {size:,} bytes; at most {MAX_BYTES:,} are read")


def channels_last(values: np.ndarray, channels: int | None = None) -> np.ndarray:
    """An array [H, W], [H, W, C] or [C, H, W] as [H, W, C].

    Of three axes, the first or the last holds the channels: the one of as many entries as `channels`, if one alone has them.
    Else the only one with at most 64 entries; of two such, the only one with 1, 3 or 4; else that beside a square image.
    Raises `BadImage` where this does not decide.
    """
    if values.ndim == 2:
        return values[..., None]
    if values.ndim == 3:
        first, middle, last = values.shape
        rules = (
            lambda count, others: count == channels,
            lambda count, others: count <= MAX_CHANNELS,
            lambda count, others: count <= MAX_CHANNELS and count in (1, 3, 4),
            lambda count, others: count <= MAX_CHANNELS and others[0] == others[1] != count,
        )
        for rule in rules:
            fitting = [rule(first, (middle, last)), rule(last, (first, middle))]
            if sum(fitting) == 1:
                return np.moveaxis(values, 0, -1) if fitting[0] else values
    allowed = f"[H, W], [H, W, C] or [C, H, W] with at most {MAX_CHANNELS} channels"
    fix = "; --channels tells which axis they are on" if values.ndim == 3 and min(first, last) <= MAX_CHANNELS else ""
    raise BadImage(f"the array's shape is {values.shape}, which is not clearly one of {allowed}{fix}")


def found_array(source: ArraySource | np.ndarray, channels: int | None) -> tuple[StoredArray | None, int]:
    """(the array that a file holds, or None if Pillow has to read it; how many pages of one channel the latter has).

    `channels` are those wanted, if they are known: they tell which axis they are on, and whether pages are channels. Raises
    `BadImage`.
    """
    values = source if isinstance(source, np.ndarray) else _numpy_array(source)
    if values is not None:
        values = channels_last(values, channels)
        if not values.size:
            raise BadImage(f"it has no pixels; its shape is {values.shape}")
        return StoredArray(values.shape, values.dtype, CHANNELS if values.dtype == np.uint8 else (1, 3), lambda: values), 1
    tiff = _tiff_header(source)
    if tiff is None:
        return None, 1
    by_page = tiff.samples == 1 and channels == tiff.pages
    if not tiff.beyond_pillow and (channels == 1 or not by_page):
        return None, tiff.pages
    shape = (*tiff.size, tiff.pages if by_page else tiff.samples)
    return StoredArray(shape, tiff.dtype, (1,) if tiff.bands else CHANNELS, partial(_read_tiff, source, tiff, shape)), 1


@dataclass(frozen=True)
class _Tiff:
    """What the header of a TIFF file says."""

    size: tuple[int, int]  # height and width, upright
    samples: int  # per pixel
    dtype: np.dtype
    pages: int  # up to one more than there may be channels
    bands: bool  # its samples are not those of a picture in grey or RGB, with or without straight alpha
    beyond_pillow: bool  # which would leave out channels or bits, or read none
    codecs: bool  # tifffile needs imagecodecs to decode it


def _tiff_header(source: ArraySource) -> _Tiff | None:
    """None for other files, for what only Pillow converts (CMYK, palettes, 0 as white, ...), and for damaged headers."""
    with suppress(Exception), _opened(source) as file:  # Pillow will say what is wrong
        start = file.read(8)
        if not start.startswith(tuple(PREFIXES)):
            return None
        tags = ImageFileDirectory_v2(start + (file.read(8) if start[2] == BIG else b""))
        file.seek(tags.next)
        tags.load(file)
        samples, bits, kind = tags.get(SAMPLES, 1), max(tags.get(BITS_PER_SAMPLE, (1,))), tags.get(SAMPLE_FORMAT, (1,))[0]
        colours = COLOURS[tags[PHOTOMETRIC]]
        bands = samples != colours and (samples != colours + 1 or tags.get(EXTRA_SAMPLES) != (ALPHA,))
        beyond = bands or (bits > 8 and samples > 1) or (kind == SIGNED and bits < 32) or (kind == FLOAT and bits != 32)
        dtype = np.dtype({SIGNED: "i", FLOAT: "f"}.get(kind, "u") + str(max(bits, 8) // 8))
        size = (tags[HEIGHT], tags[WIDTH])[:: -1 if tags.get(ORIENTATION, 1) > 4 else 1]
        codecs = tags.get(COMPRESSION, 1) not in DECODED_ALONE or tags.get(PREDICTOR, 1) == FLOAT_PREDICTOR
        pages = 1
        while samples == 1 and tags.next and pages <= MAX_CHANNELS:
            file.seek(tags.next)
            tags.load(file)
            pages += 1
        return _Tiff(size, samples, dtype, pages, bands, beyond, codecs)
    return None


def _read_tiff(source: ArraySource, header: _Tiff, shape: tuple[int, int, int]) -> np.ndarray:
    """The values of a TIFF file as they are stored, upright. Raises `BadImage`, and `MissingExtraError` without tifffile."""
    with needs_extra("tiff", "A TIFF file of several bands, or of signed, float or 16-bit colour values,"):
        import tifffile

        if header.codecs:
            import imagecodecs  # noqa: F401 (by tifffile)
    _check_bytes(math.prod(shape) * header.dtype.itemsize)
    with as_bad_image(), _opened(source) as file, tifffile.TiffFile(file) as tiff:
        pages = tiff.pages[: shape[2] if header.samples == 1 else 1]
        found = [np.moveaxis(page.asarray(), 0, -1) if page.axes == "SYX" else page.asarray() for page in pages]
        values = _upright(np.stack(found, -1) if header.samples == 1 else found[0], pages[0].tags.valueof(ORIENTATION, 1))
        if values.shape != shape:
            raise BadImage(f"its shape is {values.shape}, not {shape}; volumes are no images: save one channel per page")
        return values


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] turned as EXIF's orientation, 1..8, says."""
    values = values.swapaxes(0, 1) if orientation > 4 else values
    values = values[::-1] if orientation in (3, 4, 7, 8) else values
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values
