"""Which data a command reads, and how: the options from the command line to the reader. Imports neither torch nor datasets."""

import contextlib
import math
import os
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ..support.errors import ConfigError
from ..support.options import BELOW_ONE, Allowed, OptionGroup, at_least, one_of, option

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA: of pictures, which are converted to one another
MAX_CHANNELS = 64
RESIZE = ("crop", "pad", "stretch", "none")
PERCENTILES = "percentile:"
SHARE = Allowed("above 0 and at most 1", lambda value: 0 < value <= 1)


def parse_resolution(value: Any) -> int | str:
    """64 or "64" as 64, and (48, 96), [48, 96] or "48x96" as "48x96". Raises ValueError, completing "must be", for others."""
    words = "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    found = re.fullmatch(r"0*([1-9]\d*)(?:[xX×]0*([1-9]\d*))?", words.strip())
    if not found or isinstance(value, bool):
        raise ValueError("a number of pixels, such as 64, or height x width, such as 48x96")
    height, width = found.group(1), found.group(2) or found.group(1)
    return int(height) if height == width else f"{height}x{width}"


def size_of(resolution: int | str) -> tuple[int, int]:
    """(height, width) of what `parse_resolution` returns."""
    sides = str(resolution).split("x")
    return int(sides[0]), int(sides[-1])


def shown_size(size: tuple[int, int]) -> str:
    """A size as people write it: "48x96", height first."""
    return "x".join(map(str, size))


def parse_value_range(value: Any) -> str:
    """As text, with the numbers that `numbers_of_range` gives. Raises ValueError, completing "must be", for others."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).replace(" ", "")
    with contextlib.suppress(ValueError):
        numbers = numbers_of_range(text)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        percentiles = not text.startswith(PERCENTILES) or (len(pairs) == 1 and numbers[0] >= 0 and numbers[1] <= 100)
        if pairs and percentiles and all(math.isfinite(high - low) and low < high for low, high in pairs):
            return text
    raise ValueError("low,high such as -1000,3000 (or such a pair for each channel), or percentiles such as percentile:1,99")


def numbers_of_range(text: str) -> list[float]:
    """The numbers in a range of values, or in one of percentiles."""
    return [float(number) for number in text.removeprefix(PERCENTILES).split(",")]


# fmt: off


@dataclass(frozen=True)
class DataOptions(OptionGroup):
    """Which images are read, and their size and channels after preprocessing."""

    title: ClassVar[str] = "data"

    dataset: str = option(
        "digits", "Images: 'digits' or 'cats' (built in), a Hub data set, a folder or archive of images, parquet files, or a "
        "folder saved by Dataset.save_to_disk (docs/data.md).")
    dataset_config: str | None = option(
        None, "Configuration of a Hub data set; of the cats, num_images=10000,seed=0.")
    split: str = option("train", "Split of the data set.")
    image_column: str | None = option(None, "Image column. By default the only column that holds images.")
    resolution: int | str | None = option(
        None, "Size of the images in pixels: 64, or height x width as in 48x96. By default their own, if they share one.",
        parse=parse_resolution)
    resize: str = option(
        "crop", "How images get this size: scaled to cover it and cut to the centre (crop), scaled to fit into it and padded "
        "with the values of their edges (pad), scaled in each direction (stretch), or not at all (none).", one_of(RESIZE))
    channels: int | None = option(
        None, f"1 (grey), 3 (RGB), 4 (RGBA), or the number of bands, up to {MAX_CHANNELS}. By default those of the images.",
        Allowed(f"at least 1 and at most {MAX_CHANNELS}", lambda value: 1 <= value <= MAX_CHANNELS))
    value_range: str | None = option(
        None, "Values of the data that become black and white: low,high such as -1000,3000, for all channels or a pair for "
        "each, or percentile:1,99, measured on the data. By default those of the file type.", parse=parse_value_range)
    cache_dir: str | None = option(
        None, "Cache folder for preprocessed images. By default the datasets library's.", on_resume="tell", in_recipe=False)
    preprocessing_num_workers: int | None = option(
        None, "Threads that preprocess the images.", at_least(1), on_resume="tell", in_recipe=False)
    max_bad_fraction: float = option(
        0.01, "Largest share of rows that may be skipped, and listed in skipped.jsonl, because the image cannot be read or the "
        "label or caption is missing. If more rows are bad, the run ends.", BELOW_ONE, on_resume="tell")
    follow_paths: bool = option(
        False, "Read images that the rows of local data name by an address or by a path outside of the data's folder.")
    streaming: bool = option(False, "Read images as they are needed instead of preprocessing all of them first.")
    random_crop: float | None = option(
        None, "Windows with this share of the height and width, from images stored at --resolution / SHARE: in training at "
        "random places, else in the centre. With --resize none, 1: windows of --resolution from images as they are.", SHARE)

    resizes_windows: ClassVar[bool] = False  # whether windows of random shares are resized

    @property
    def window_share(self) -> float | None:
        """The smallest share of a stored image's sides that a window has; None if images are stored as they are seen."""
        return self.random_crop

    def check(self) -> None:
        if self.random_crop and (self.random_crop == 1) != (self.resize == "none"):
            raise ConfigError("--random_crop 1 is for --resize none; else use a smaller share of the height and width.")
        if self.random_crop == 1 and self.streaming:
            raise ConfigError("--random_crop 1 does not work with --streaming: the images' own size is unknown; drop one.")

    def stored_size(self, size: tuple[int, int], own: tuple[int, int] | None = None) -> tuple[int, int]:
        """Height and width at which images are stored that are seen in this size: with --resize none, their `own`. Raises
        ConfigError if windows were asked for, and there is one alone or some would be enlarged.
        """
        if self.window_share is None:
            return own or size
        stored = own or tuple(round(side / self.window_share) for side in size)
        name = f"{'random_crop' if self.random_crop else 'random_resized_crop'} {self.window_share:g}"
        if stored == size:
            fix = "a --resolution below that" if own else f"at most {max(size) / (max(size) + 1):.2g}"
            raise ConfigError(f"--{name} of {shown_size(size)} pixels leaves a window only one place; use {fix}.")
        least = max(side / of for side, of in zip(size, stored, strict=True))
        if own and self.resizes_windows and self.window_share < least:
            wanted = f"--resolution {shown_size(size)}; use {least:.2g}"
            raise ConfigError(f"--{name} of {shown_size(own)} pixels is below {wanted}.")
        return stored

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), if the resolution is given."""
        return None if self.resolution is None else size_of(self.resolution)

    def require_resolution(self) -> None:
        """Raises ConfigError without a resolution, which streams need."""
        if self.resolution is None:
            raise ConfigError("--streaming needs --resolution: image sizes are unknown before the images are read.")


@dataclass(frozen=True)
class HeldOutDataOptions(DataOptions):
    """The same, with images of which some are held out."""

    validation_split: str | None = option(
        None, "Images to hold out: never trained on, and evaluated on the way. A split (test, train[90%:]), a folder or file "
        "(with a / in its path), or a share of the images (10%, 0.1), chosen by their pixels (docs/training.md).")

    def check(self) -> None:
        super().check()
        share = self.held_out_share
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"--validation_split {self.validation_split} must be above 0 and below 1, or 100%.")

    @property
    def held_out_share(self) -> float | None:
        """The share that --validation_split is; None if it names something."""
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)(%?)", self.validation_split or "")
        return found and float(found[1]) / (100 if found[2] else 1)

    @property
    def validation_path(self) -> bool:
        """Whether --validation_split names a folder or file; a bare name is a split."""
        given = self.validation_split or ""
        return os.path.basename(given) != given or os.path.isfile(given)

    @property
    def validation_name(self) -> str | None:
        """--validation_split without the folders of a path."""
        return os.path.basename(os.path.normpath(self.validation_split)) if self.validation_path else self.validation_split


@dataclass(frozen=True)
class TrainingDataOptions(HeldOutDataOptions):
    """The same, and the order in which training sees the images."""

    random_flip: bool = option(False, "Mirror each image left to right with probability 1/2.")
    random_resized_crop: float | None = option(
        None, "Windows at random places, with a random share of the height and width from this one to 1, resized to "
        "--resolution. Images are stored at --resolution / SHARE, so that no window is enlarged.", SHARE)
    augment: float | None = option(
        None, "Probability of each of six augmentations, usually 0.12: mirroring, turning upside down, scaling, rotation, "
        "stretching, shifting. The network is told which, so that samples show none (docs/training.md).", SHARE)
    shuffle_buffer: int = option(
        10_000, "Rows of a stream that each reading process shuffles together, or fewer if they exceed 256 MB.", at_least(1))
    dataloader_num_workers: int = option(
        0, "Worker processes that prepare batches in advance, per training process.", at_least(0), on_resume="tell",
        in_recipe=False)

    @property
    def resizes_windows(self) -> bool:
        return self.random_resized_crop is not None

    @property
    def window_share(self) -> float | None:
        return self.random_crop or self.random_resized_crop

    def check(self) -> None:
        super().check()
        if self.random_crop and self.random_resized_crop:
            raise ConfigError("--random_crop and --random_resized_crop are two kinds of windows; drop one.")
        if self.streaming:
            self.require_resolution()
            splits = [set(re.sub(r"\[.*?\]", "", split or "").split("+")) for split in (self.split, self.validation_split)]
            if self.held_out_share is not None or (not self.validation_path and set.intersection(*splits)):
                raise ConfigError(
                    f"--validation_split {self.validation_split} is a part of the images, which --streaming cannot leave out; "
                    "name another split, a folder or a file, or drop --streaming."
                )


@dataclass(frozen=True)
class ConditionColumns:
    """What images are conditioned on: "none" reads no column, "class" a label, "text" a caption or a label, "image" a second
    image, "vector" numbers; "class+image" and "vector+image" both.
    """

    condition: str = "none"
    label_column: str | None = None  # by default the only ClassLabel column, else one called label
    text_column: str | None = None  # by default one called text
    from_labels: bool = False  # captions are made of labels, also where there is a column called text
    condition_column: str | None = None  # a column of images or a folder of them; for vectors, columns of numbers: "a,b,c"
    condition_classes: int | None = None  # the second image is a label map of so many classes

    @property
    def kinds(self) -> tuple[str, ...]:
        """Such as ("class", "image")."""
        return tuple(self.condition.split("+"))

    @property
    def condition_names(self) -> tuple[str, ...]:
        """What `condition_column` names: several columns only with numbers, since a folder's name may have a comma."""
        names = (self.condition_column or "").split(",") if "vector" in self.kinds else [self.condition_column or ""]
        return tuple(filter(None, map(str.strip, names)))

    @property
    def second_folders(self) -> tuple[str, ...]:
        """Those that may be a folder of condition images."""
        return self.condition_names if "image" in self.kinds else ()


UNCONDITIONAL = ConditionColumns()
