"""Images that a model is given as its condition, from a folder or other data, read as training reads them."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features
from torch import Tensor

from ..data.columns import find_roles
from ..data.mapped import ImageData, preprocessed, scan
from ..data.options import UNCONDITIONAL, DataOptions, shown_size
from ..data.ranges import is_raw
from ..data.sources import load_source
from ..encoding_alpha_ddpm import ImageCondition, image_condition
from ..support.errors import ConfigError, DataError
from .pipelines import Pipeline


class ConditionImages(Sequence):
    """The images of a data set at a model's size, each read when it is asked for.

    An image is a tensor [k, H, W]: class ids, integers in the units that the model knows, or floats as fractions of its range.
    Raises ConfigError where one cannot be read, or does not fit the model.
    """

    def __init__(self, pipe: Pipeline, given: str, option: str, as_masks: bool = False):
        condition, (_, _, *size) = ImageCondition(1) if as_masks else image_condition(pipe.unet), pipe._shape(1)
        sizes = {tuple(side // factor for side in size) for factor in (1, condition.factor or 1)}
        options = DataOptions(
            given,
            resolution=None if condition.factor else shown_size(tuple(size)),  # they may be small already
            channels=None if condition.classes else condition.channels,
            max_bad_fraction=0.0,
        )
        fitting = f"this model takes {' or '.join(map(shown_size, sorted(sizes)))}"
        try:
            source = load_source(options)
            roles = find_roles(source.dataset.features, None, UNCONDITIONAL)
            known = None if condition.classes else condition.value_range
            if not condition.factor:
                raw, channels = bool(condition.classes) or is_raw(options, known), 1 if condition.classes else options.channels
                scanned = scan(source, options, roles, raw, channels)
                _check_shapes(f"{option} {given}", scanned, tuple(size), bool(condition.classes))
            self.data: ImageData = preprocessed(source, options, roles, Features({}), condition.classes, known)
        except DataError as error:
            told = re.sub(r"Choose one with --resolution.*", f"They must be of one: {fitting}.", str(error))
            told = told.replace("--dataset", option)
            raise ConfigError(told if option in told else f"{option}: {told}") from error
        if self.data.size not in sizes:
            raise ConfigError(f"{option} {given} has images of {shown_size(self.data.size)}; {fitting}.")
        column = source.dataset.with_format("arrow")[:].column(roles.image)  # memory-mapped
        files = pc.struct_field(column, "path").to_pylist() if pa.types.is_struct(column.type) else [None] * len(column)
        self.names = [Path(file).name if file else f"row {row}" for row, file in enumerate(files)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        image = self.data.pixels([index])[0]
        return self.data.value_range.normalize(image) / 2 + 0.5 if image.is_floating_point() else image


def _check_shapes(told: str, scanned: Dataset, size: tuple[int, int], are_maps: bool) -> None:
    """Say how images of other sizes are made to fit. Raises ConfigError for label maps that would lose their sides."""
    heights, widths = (scanned.data.column(name).to_numpy().astype(int) for name in ("height", "width"))
    good = heights > 0
    others = sorted({*zip(heights[good].tolist(), widths[good].tolist(), strict=True)} - {size})
    cut = [other for other in others if other[0] * size[1] != other[1] * size[0]]
    if cut and are_maps:
        raise ConfigError(
            f"{told} has label maps of {shown_size(cut[0])}, whose sides would be cut off to fit {shown_size(size)}; give them "
            "that shape first, by nearest pixels."
        )
    if others and PartialState().is_main_process:
        how = "by nearest pixels" if are_maps else "with their sides cut off" if cut else "as a whole"
        print(f"{told} has images of {shown_size(others[0])}; they are resized to {shown_size(size)} {how}", file=sys.stderr)
