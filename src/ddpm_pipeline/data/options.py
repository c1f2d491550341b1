"""Which data a command reads, and how: the options from the command line to the reader. Imports neither torch nor datasets."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from ..support.errors import ConfigError
from ..support.options import BELOW_ONE, OptionGroup, at_least, one_of, option

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


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
    channels: int | None = option(
        None, "1 (grey), 3 (RGB) or 4 (RGBA). By default 1 if all images are grey, else 3.", one_of(CHANNELS))
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

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width), if the resolution is given."""
        return None if self.resolution is None else size_of(self.resolution)

    def require_resolution(self) -> None:
        """Raises ConfigError without a resolution, which streams need."""
        if self.resolution is None:
            raise ConfigError("--streaming needs --resolution: image sizes are unknown before the images are read.")


@dataclass(frozen=True)
class TrainingDataOptions(DataOptions):
    """The same, and the order in which training sees the images."""

    random_flip: bool = option(False, "Mirror each image left to right with probability 1/2.")
    shuffle_buffer: int = option(
        10_000, "Rows of a stream that each reading process shuffles together, or fewer if they exceed 256 MB.", at_least(1))
    dataloader_num_workers: int = option(
        0, "Worker processes that prepare batches in advance, per training process.", at_least(0), on_resume="tell",
        in_recipe=False)

    def check(self) -> None:
        if self.streaming:
            self.require_resolution()


@dataclass(frozen=True)
class ConditionColumns:
    """What images are conditioned on: "none" reads no column, "class" a label, "text" a caption or a label."""

    condition: str = "none"
    label_column: str | None = None  # by default the only ClassLabel column, else one called label
    text_column: str | None = None  # by default one called text
    from_labels: bool = False  # captions are made of labels, also where there is a column called text


UNCONDITIONAL = ConditionColumns()
