"""What images are conditioned on, as the training loop sees it: the base of all conditions, which is none.

A condition reads its values with the images (`read`), drops them for a share of the images, for classifier-free guidance
(`draw`, both on the CPU, in the data loader), turns them into arguments of the network (`inputs`, on the device), and ends in a
pipeline.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..data.mapped import ImageData, ImageSet
from ..generation.drawing import UNCONDITIONAL, Request
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..ranges_alpha_ddpm import ValueRange
from ..sampling_alpha_ddpm import describe_conditions
from ..support.draws import BatchSlice, RandomStream
from ..support.pictures import Display
from ..tables_alpha_ddpm import OWN_KEY
from .options import ConditionOptions

MAX_PREVIEW_ROWS = 10
EXAMPLES = 100  # of a stream


class Condition:
    """No condition; the base of the others."""

    unet_class: type = UNet2DModel
    pipeline_class: type = AlphaDDPMPipeline
    column: str | None = None  # of the data, whose values `draw` takes
    names: list[str] | None = None  # of classes
    variance_type: str | None = None  # of a new model; the scheduler's default if None
    input_channels = 0  # that the UNet takes beside those of the images
    options = ConditionOptions()
    data: ImageSet | None = None
    dropout_streams: tuple[int, ...] = (RandomStream.CONDITION_DROPOUT,)  # a condition that any of these drops is dropped

    def unet_config(self) -> dict[str, Any]:
        """What the UNet's config needs for this condition."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What the condition means, for the UNet's config: arguments of `describe_conditions`."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find as it was: JSON values by the names that messages use."""
        settings = self.settings().items()
        return {name.replace("_", " "): value if isinstance(value, list) else value.to_json() for name, value in settings}

    def read(self, data: ImageData, indices: Sequence[int], views: Any = None) -> Any:
        """The values of images with these indices that `draw` takes; of condition images, seen as by `views`."""
        return None if self.column is None else data.column(self.column, indices)

    def draw(self, values: Any, where: BatchSlice) -> Any:
        """The conditions of b images with these values, some dropped: None, or what a data loader passes on. Each is a function
        of the value and of (seed, step, position).
        """
        return None

    def inputs(self, drawn: Any, original_samples: Tensor) -> dict[str, Tensor]:
        """What `draw` gave as arguments of the network, for x_0 [b, C, H, W] in [-1, 1], on its device."""
        return {}

    def probe(self, count: int, unet: nn.Module) -> dict[str, Tensor]:
        """Arguments of the UNet for so many images, of the right shapes and types."""
        return {}

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        """A request for images with the conditions that these images of the data have; none is dropped."""
        return UNCONDITIONAL

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        """The values of a request as arguments of `denoiser`, [B, ...]."""
        return {}

    def denoiser(self, unet: nn.Module) -> nn.Module:
        """What predicts, called as denoiser(images, timesteps, **inputs): the UNet, or what puts the condition beside x_t."""
        return unet

    def network(self, unet: nn.Module) -> nn.Module:
        """What is trained: `denoiser`, and what is trained with it."""
        return self.denoiser(unet)

    def components(self, unet: Any) -> dict[str, Any]:
        """What the pipeline has beside UNet and scheduler."""
        return {}

    def described(self) -> dict[str, Any]:
        """`settings`, the share that is dropped, and the range of values if it is not that of 8 bits."""
        described = self.settings()
        if self.options.condition != "none":
            described["condition_dropout"] = self.options.condition_dropout
        if self.data is not None and self.data.value_range != ValueRange():
            described["value_range"] = self.data.value_range
        return described

    def pipeline(self, unet: Any, scheduler: Any) -> Any:
        settings = self.described()
        if settings or OWN_KEY in unet.config:
            describe_conditions(unet, **settings)
        return self.pipeline_class(unet=unet, scheduler=scheduler, **self.components(unet))

    def preview(self, count: int) -> tuple[Request, int | None]:
        """A request for about `count` images, and the columns of their grid, with one row per condition."""
        return UNCONDITIONAL, None

    def left(self, request: Request, columns: int | None, display: Display) -> Tensor | None:
        """Pictures [rows, 1, 3 or 4, H, W] in [0, 1] that the rows of such a grid begin with, if the condition has some; of the
        images themselves, they are shown as `display` says.
        """
        return None

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        """What each row of such a grid shows: the names of classes, or prompts."""
        return []

    def facts(self) -> dict[str, str]:
        """For the model card."""
        return {}

    def arguments(self) -> list[str]:
        """Of a call of the pipeline, as code."""
        return []

    def example(self) -> str:
        """All arguments of such a call, with the guidance if the model has any."""
        arguments, guidance = self.arguments(), f"guidance_scale={self.guidance:g}"
        return ", ".join([*arguments, guidance] if arguments and self.options.condition_dropout else arguments)

    # ---- for the conditions that there are -----------------------------------------------------------

    @cached_property
    def examples(self) -> ImageData:
        """Images whose conditions previews show: all, or the first of a stream."""
        return self.data.shown(EXAMPLES)

    def dropped(self, where: BatchSlice) -> np.ndarray:
        """Which conditions are dropped, bool [b]."""
        return np.any([where.uniform(stream) < self.options.condition_dropout for stream in self.dropout_streams], axis=0)

    def share_of(self, what: str) -> str:
        """How many of these are dropped, in words."""
        return f"{self.options.condition_dropout:.0%} of the {what}"

    @property
    def guidance(self) -> float:
        """The scale for previews, 1 for a model that was not trained both with conditions and without."""
        both = self.options.condition != "none" and self.options.condition_dropout
        return self.options.preview_guidance if both else 1.0

    def asked(self, **arguments: Sequence[Any]) -> Request:
        """A request with this guidance."""
        return Request(arguments, self.guidance)

    def rows(self, count: int, **arguments: Sequence[Any]) -> tuple[Request, int]:
        """Equal rows of about `count` images in total, at most MAX_PREVIEW_ROWS of them: one for each value."""
        shown = min(count, MAX_PREVIEW_ROWS, *map(len, arguments.values()))
        columns = max(1, count // shown)
        repeated = {name: [value for value in values[:shown] for _ in range(columns)] for name, values in arguments.items()}
        return self.asked(**repeated), columns
