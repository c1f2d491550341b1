"""Which values of the data are black and white: as --value_range states, or as measured on the images.

What is measured, and what a stated range is held against, are images at even distances through the data, as many as have
MEASURED_BYTES: a function of the data alone, in memory that does not grow with them.
"""

import logging

import numpy as np

from ..ranges_alpha_ddpm import DEPTHS, ValueRange
from ..support.errors import DataError
from .images import Form
from .options import PERCENTILES, DataOptions, numbers_of_range

logger = logging.getLogger(__name__)

MEASURED_BYTES = 2**26
DARK = 2**14  # as 14 bits in files of 16
MOST_CLIPPED = 0.001  # share of the values that a stated range may leave out


def is_raw(options: DataOptions, value_range: ValueRange | None) -> bool:
    """Whether values are taken as they are stored: if their range, or that of a model, is not the one of a type."""
    if value_range is None:
        return options.value_range is not None
    return value_range.dtype == "int16" or value_range != ValueRange.of_type(value_range.dtype)


def unmeasured(form: Form) -> ValueRange:
    """The range of a type; in place of that of raw values, which is not known yet, any."""
    return ValueRange((0,), (1,), form.dtype) if form.raw and not form.nearest else ValueRange.of_type(form.dtype)


def depth_of(low: float, high: float) -> str:
    """The smallest type that holds integers from low to high; float32 if none does, or if they are infinite."""
    return next((depth for depth in DEPTHS[:-1] if np.iinfo(depth).min <= low and high <= np.iinfo(depth).max), DEPTHS[-1])


def measured_images(count: int, bytes_per_image: int) -> np.ndarray:
    """The numbers of the images to look at, of so many: int64, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, max(1, MEASURED_BYTES // bytes_per_image))).round().astype(np.int64))


def _clipped(images: np.ndarray, pairs: list[tuple[float, float]]) -> float:
    """The share of the values of images [N, C, H, W] that lie beyond these pairs, one for all channels or one for each."""
    pairs = pairs * (images.shape[1] // len(pairs))
    return np.mean([((one < low) | (one > high)).mean() for one, (low, high) in zip(images.swapaxes(0, 1), pairs, strict=True)])


def warn_of_clipped(images: np.ndarray, value_range: ValueRange, name: str) -> None:
    """Log that a model's range leaves out values of the images [N, C, H, W] that it is evaluated on."""
    if (share := _clipped(images, list(zip(value_range.low, value_range.high, strict=True)))) > MOST_CLIPPED:
        words = "%r: %.2f %% of the values lie beyond the model's range, %g..%g, and are clipped to it"
        logger.warning(words, name, 100 * share, min(value_range.low), max(value_range.high))


def warn_of_dark(images: np.ndarray, name: str) -> None:
    """Log that 16-bit images [N, C, H, W] use so little of 0..65535 that a model would see hardly any contrast."""
    brightest = np.percentile(images, 99.9)
    if brightest < DARK:
        words = "%r: 99.9 %% of the values are at most %d of 65535. State black and white, or --value_range percentile:0.1,99.9"
        logger.warning(words, name, brightest)


def range_of(text: str, images: np.ndarray, name: str) -> ValueRange:
    """The range that `--value_range` asks for, for images [N, C, H, W] of the data. Bounds of integers are rounded outwards.

    Raises DataError for a range that does not fit the type or the channels of the data, or that would clip too much of them.
    """
    numbers, dtype = numbers_of_range(text), images.dtype.name
    if text.startswith(PERCENTILES):
        pairs = [np.percentile(images[:, channel], numbers).tolist() for channel in range(images.shape[1])]
    else:
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        _check_pairs(text, pairs, images, name)
    low, high = zip(*pairs, strict=True)
    if dtype != "float32":
        low, high = np.floor(low), np.ceil(high)
    try:
        return ValueRange(tuple(low), tuple(high), dtype)
    except ValueError as error:
        shown = ", ".join(f"{one:g}..{other:g}" for one, other in zip(low, high, strict=True))
        why = f"means {shown} for the {dtype} values of {name!r}, which go from {images.min():g} to {images.max():g}"
        raise DataError(f"--value_range {text} {why}. State low,high within this type, low below high.") from error


def _check_pairs(text: str, pairs: list[tuple[float, float]], images: np.ndarray, name: str) -> None:
    channels = images.shape[1]
    if len(pairs) not in (1, channels):
        fix = f"Give one pair for all channels, or {channels}"
        raise DataError(f"--value_range {text} has {len(pairs)} pairs, and the images of {name!r} {channels} channels. {fix}.")
    if (share := _clipped(images, pairs)) > MOST_CLIPPED:
        raise DataError(
            f"--value_range {text} would clip {share:.2%} of the values of {name!r}, which go from {images.min():g} to "
            f"{images.max():g}. Widen it, or clip the ends on purpose with --value_range {PERCENTILES}0.1,99.9."
        )
