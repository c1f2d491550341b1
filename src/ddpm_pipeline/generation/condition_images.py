"""Images that a model is given as its condition, from a folder or other data, read as training reads them."""

from collections.abc import Sequence
from pathlib import Path

from datasets import Features
from torch import Tensor

from ..data.columns import find_roles
from ..data.images import image_file
from ..data.mapped import ImageData, preprocessed
from ..data.options import UNCONDITIONAL, DataOptions, shown_size
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
        condition = ImageCondition(1) if as_masks else image_condition(pipe.unet)
        self.wanted, (_, _, *size) = condition.value_range, pipe._shape(1)
        own_size = condition.factor is not None  # they may be small already
        pairs = [f"{low:g},{high:g}" for low, high in zip(self.wanted.low, self.wanted.high, strict=True)]
        options = DataOptions(
            given,
            resolution=None if own_size else shown_size(tuple(size)),
            channels=None if condition.classes else condition.channels,
            max_bad_fraction=0.0,
            **({} if condition.classes or self.wanted.is_whole_type else {"value_range": ",".join(pairs)}),
        )
        try:
            source = load_source(options)
            roles = find_roles(source.dataset.features, None, UNCONDITIONAL)
            self.data: ImageData = preprocessed(source, options, roles, Features({}), condition.classes)
        except DataError as error:
            raise ConfigError(str(error).replace("--dataset", option)) from error
        small = tuple(side // (condition.factor or 1) for side in size)
        if self.data.size not in (tuple(size), small):
            fitting = f"{shown_size(small)}, or {shown_size(tuple(size))} to be scaled down"
            raise ConfigError(f"{option} {given} has images of {shown_size(self.data.size)}; this model takes {fitting}.")
        values = source.dataset.with_format("arrow")[:].column(roles.image).to_pylist()
        files = [image_file(value) for value in values]
        self.names = [Path(file).name if file else f"row {row}" for row, file in enumerate(files)]
        same = self.data.value_range == self.wanted and self.wanted.dtype != "float32"
        self.is_raw = same or condition.classes is not None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        image = self.data.pixels([index])[0]
        return image if self.is_raw else self.data.value_range.normalize(image) / 2 + 0.5
