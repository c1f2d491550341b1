"""One sampled image as a file, in the units of the model's data: which formats hold what a model samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..ranges_alpha_ddpm import ValueRange
from ..support.atomic import atomic_file
from ..support.errors import ConfigError
from ..support.extras import needs_extra

IN_PNG = {(1, "uint8"), (3, "uint8"), (4, "uint8"), (1, "uint16")}  # channels and types that PIL writes


@dataclass(frozen=True)
class ImageFiles:
    """The files of images [C, H, W], one of each: PNG, or [H, W] of one channel and [H, W, C] of others as NPY or TIFF.

    Raises ConfigError for a format that does not hold such images.
    """

    format: str  # png, npy, tiff, parquet (of PNGs), or auto: PNG where PNG holds such images, else NPY
    shape: tuple[int, int, int]
    value_range: ValueRange

    def __post_init__(self) -> None:
        if self.format == "auto":
            vars(self).update(format="png" if self._kind in IN_PNG else "npy")
        if self.format in ("png", "parquet") and self._kind not in IN_PNG:
            raise ConfigError(
                f"--format {self.format} holds grey, RGB and RGBA of 8 bits and grey of 16 bits, and this model samples "
                f"{self.shape[0]} channels of {self.value_range.dtype}; use npy or tiff."
            )
        if self.format == "tiff":
            with needs_extra("tiff", "--format tiff"):
                import tifffile  # noqa: F401

    @property
    def _kind(self) -> tuple[int, str]:
        return self.shape[0], self.value_range.dtype

    @property
    def are_pictures(self) -> bool:
        """Whether any viewer shows them as they are."""
        return self.format in ("png", "parquet") and self.value_range.dtype == "uint8"

    def path(self, folder: Path, number: int) -> Path:
        return folder / f"{number:06d}.{'png' if self.format == 'parquet' else self.format}"

    def write(self, values: np.ndarray, path: Path) -> None:
        """Values [C, H, W] of this type as a file, whole or not at all."""
        values = np.ascontiguousarray(values.transpose(1, 2, 0) if len(values) > 1 else values[0])
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            if self.format == "npy":
                np.save(file, values)
            elif self.format == "tiff":
                import tifffile

                colours = "rgb" if self._kind in IN_PNG and values.ndim > 2 else "minisblack"
                tifffile.imwrite(file, values, photometric=colours, planarconfig="contig" if values.ndim > 2 else None)
            else:
                Image.fromarray(values).save(file, "PNG")

    def read(self, path: Path) -> np.ndarray:
        """What `write` wrote, [C, H, W]. Raises one of many exceptions for a file that is missing, damaged or another."""
        if self.format == "npy":
            values: Any = np.load(path, allow_pickle=False)
        elif self.format == "tiff":
            import tifffile

            values = tifffile.imread(path)
        else:
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()  # the checksums of all of its parts
            with Image.open(path, formats=["PNG"]) as image:
                values = np.asarray(image).astype(np.uint16) if image.mode == "I" else np.asarray(image)  # of older versions
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        if (values.shape, values.dtype) != (self.shape, self.value_range.dtype):
            raise ValueError(f"{path} holds {values.shape} of {values.dtype}.")
        return values
