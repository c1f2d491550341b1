"""Training on images as conditions: from a second source beside the images, or made of the images themselves."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.mapped import ImageData, ImageSet
from ..encoding_alpha_ddpm import ImageCondition, WithConditionImage
from ..generation.drawing import Request
from ..pipeline_alpha_ddpm_image import AlphaDDPMImageToImagePipeline
from ..support.draws import BatchSlice, RandomStream, seeds
from ..support.errors import ConfigError
from ..support.masks import inpainting_masks
from ..support.pictures import Display
from .condition_base import MAX_PREVIEW_ROWS, Condition
from .options import ConditionOptions

INPAINT = "inpaint"
ASKED = ("condition_image", "condition_mask")  # arguments of the pipeline, in this order


class ImageInput(Condition):
    """An image that joins x_t at the UNet's input; zeros in its place if it is dropped."""

    pipeline_class = AlphaDDPMImageToImagePipeline

    def __init__(self, options: ConditionOptions, data: ImageSet):
        self.options, self.data, self.task = options, data, options.condition_from
        if self.task == "gray" and data.channels != 3:
            raise ConfigError(f"--condition_from gray needs images of 3 channels, and {data.name} has {data.channels}.")
        try:
            if self.task:
                self.encoder = ImageCondition(data.channels, value_range=data.value_range, task=self.task)
                self.encoder.arrange(torch.zeros(1, data.channels, *data.size), inpainting_masks([0], data.size))
            else:
                second = data.condition_images
                self.encoder = ImageCondition(second.channels, second.classes, second.value_range)
        except ValueError as error:
            raise ConfigError(f"--condition_{'from' if self.task else 'column'} does not fit: {error}") from error
        self.input_channels = self.encoder.input_channels

    def settings(self) -> dict[str, Any]:
        return {"condition_image": self.encoder}

    def read(self, data: ImageData, indices: Sequence[int], views: Any = None) -> Tensor | None:
        return None if self.task else data.condition_images.pixels(data.rows_of(indices), views)

    def draw(self, values: Tensor | None, where: BatchSlice) -> dict[str, Tensor]:
        drawn = {"dropped": torch.from_numpy(self.dropped(where))}
        if self.task == INPAINT:
            drawn["mask"] = inpainting_masks(where.seeds(RandomStream.INPAINTING_MASK), self.data.size)
        return drawn if values is None else {**drawn, "image": values}

    def inputs(self, drawn: dict[str, Tensor], original_samples: Tensor) -> dict[str, Tensor]:
        drawn = {name: value.to(original_samples.device, non_blocking=True) for name, value in drawn.items()}
        made, encode = self.encoder.arrange, self.encoder.encode
        encoded = made(original_samples, drawn.get("mask")) if self.task else encode(drawn["image"])
        return {"condition_image": encoded.masked_fill(drawn["dropped"][:, None, None, None], 0)}

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        """Integers as they are, of which the pipeline knows what they mean; floats as fractions of the range of values."""
        images = data.pixels(indices) if self.task else self.read(data, indices)
        if images.is_floating_point():
            images = self.encoder.value_range.normalize(images) / 2 + 0.5
        if self.task != INPAINT:
            return self.asked(condition_image=list(images))
        masks = inpainting_masks(seeds(seed, RandomStream.INPAINTING_MASK, 0, len(images)), self.data.size)
        return self.asked(condition_image=list(images), condition_mask=list(masks))

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        images, *masks = (torch.stack([*values]) for name, values in request.arguments.items() if name in ASKED)
        if images.is_floating_point():
            return {"condition_image": self.encoder.arrange(images * 2 - 1, *masks)}
        return {"condition_image": self.encoder.encode(images, *masks)}

    def denoiser(self, unet: nn.Module) -> nn.Module:
        return WithConditionImage(unet)

    def preview(self, count: int) -> tuple[Request, int]:
        shown = range(min(MAX_PREVIEW_ROWS, len(self.examples)))
        return self.rows(count, **self.request_like(self.examples, shown, 0).arguments)

    def left(self, request: Request, columns: int, display: Display) -> Tensor:
        encoded = self.unet_inputs(request)["condition_image"][::columns]
        if self.encoder.classes:
            return encoded.argmax(dim=1, keepdim=True) / (self.encoder.classes - 1)
        shown = encoded[:, : self.encoder.channels] / 2 + 0.5  # without a mask's own channel
        same = self.task and shown.shape[1] == self.data.channels
        return (display if same else Display(stretch=self.encoder.value_range.dtype != "uint8")).show(shown)

    def facts(self) -> dict[str, str]:
        what = f"label maps of {self.encoder.classes} classes" if self.encoder.classes else "images"
        what = f"images made of the images themselves ({self.task})" if self.task else what
        return {"condition": what, "condition dropout": self.share_of("condition images")}

    def arguments(self) -> list[str]:
        return [f"{name}={name}" for name in (ASKED if self.task == INPAINT else ASKED[:1])]
