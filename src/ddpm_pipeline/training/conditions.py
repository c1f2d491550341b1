"""The conditions that a run can have: none, a class, a caption, numbers, an image, or several of these at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.mapped import ImageData, ImageSet
from ..generation.drawing import Request
from ..support.draws import BatchSlice, RandomStream
from ..support.errors import ConfigError
from .condition_base import MAX_PREVIEW_ROWS, Condition
from .image_conditions import ImageInput
from .options import ConditionOptions
from .text_conditions import TextCondition
from .vector_conditions import NumbersCondition


class ClassCondition(Condition):
    """Labels 0..N-1, and N for images whose label was dropped."""

    def __init__(self, options: ConditionOptions, data: ImageSet):
        if data.label_column is None:
            raise ConfigError(
                f"--condition {options.condition}: {data.name} has no label column that is found automatically; name one of "
                f"{data.columns} with --label_column."
            )
        self.options, self.column, self.names = options, data.label_column, data.class_names

    def unet_config(self) -> dict[str, Any]:
        return {"num_class_embeds": len(self.names) + 1}

    def settings(self) -> dict[str, Any]:
        return {"class_names": self.names, "condition_dropout": self.options.condition_dropout}

    def identity(self) -> dict[str, Any]:
        return {"class names": self.names}

    def draw(self, values: Sequence[int], where: BatchSlice) -> Tensor:
        dropped = torch.from_numpy(self.dropped(where))
        return torch.as_tensor(values, dtype=torch.int64).masked_fill(dropped, len(self.names))

    def probe(self, count: int, unet: nn.Module) -> dict[str, Tensor]:
        return {"class_labels": torch.zeros(count, dtype=torch.int64)}

    def inputs(self, drawn: Tensor, original_samples: Tensor) -> dict[str, Tensor]:
        return {"class_labels": drawn.to(original_samples.device, non_blocking=True)}

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        return self.asked(class_labels=data.column(self.column, indices).tolist())

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor(request.arguments["class_labels"])}

    def preview(self, count: int) -> tuple[Request, int | None]:
        return self.rows(count, class_labels=list(range(len(self.names))))

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        return [self.names[label] for label in request.arguments["class_labels"][::columns]]

    def facts(self) -> dict[str, str]:
        dropout = f"{self.options.condition_dropout:.0%} of the labels"
        return {"condition": f"{len(self.names)} classes", "condition dropout": dropout}

    def arguments(self) -> list[str]:
        return [f"class_labels={self.names[-1]!r}"]


class CombinedCondition(Condition):
    """A class or numbers, and an image.

    `condition_dropout` is the share of images trained without any, which guidance needs, and for each of the others the
    probability that it is dropped on its own (after Huang et al. 2023, "Composer", §2.2).
    """

    def __init__(self, options: ConditionOptions, first: Condition, image: ImageInput):
        self.options, self.parts, self.image = options, (first, image), image
        self.column, self.names = first.column, first.names
        self.pipeline_class, self.input_channels = image.pipeline_class, image.input_channels
        for part, stream in zip(self.parts, (RandomStream.FIRST_DROPOUT, RandomStream.IMAGE_DROPOUT), strict=True):
            part.dropout_streams += (stream,)

    def _merged(self, method: str, *arguments: Any) -> dict[str, Any]:
        """What a method of both parts gives, as one dict."""
        first, second = (getattr(part, method)(*arguments) for part in self.parts)
        return {**first, **second}

    def unet_config(self) -> dict[str, Any]:
        return self._merged("unet_config")

    def settings(self) -> dict[str, Any]:
        return self._merged("settings")

    def identity(self) -> dict[str, Any]:
        return self._merged("identity")

    def read(self, data: ImageData, indices: Sequence[int], views: Any = None) -> list[Any]:
        return [part.read(data, indices, views) for part in self.parts]

    def draw(self, values: Sequence[Any], where: BatchSlice) -> list[Any]:
        return [part.draw(some, where) for part, some in zip(self.parts, values, strict=True)]

    def inputs(self, drawn: Sequence[Any], original_samples: Tensor) -> dict[str, Tensor]:
        first, second = (part.inputs(some, original_samples) for part, some in zip(self.parts, drawn, strict=True))
        return {**first, **second}

    def probe(self, count: int, unet: nn.Module) -> dict[str, Tensor]:
        return self._merged("probe", count, unet)

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        first, second = (part.request_like(data, indices, seed).arguments for part in self.parts)
        return self.asked(**first, **second)

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        return self._merged("unet_inputs", request)

    def denoiser(self, unet: nn.Module) -> nn.Module:
        for part in self.parts:
            unet = part.denoiser(unet)
        return unet

    def preview(self, count: int) -> tuple[Request, int]:
        shown = range(min(MAX_PREVIEW_ROWS, len(self.examples)))
        return self.rows(count, **self.request_like(self.examples, shown, 0).arguments)

    def left(self, request: Request, columns: int) -> Tensor:
        return self.image.left(request, columns)

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        return self.parts[0].row_names(request, columns)

    def facts(self) -> dict[str, str]:
        first, second = (part.facts() for part in self.parts)
        both = {name: f"{first[name]}; {second[name]}" for name in first.keys() & second.keys()}
        return {**first, **second, **both}

    def arguments(self) -> list[str]:
        return [argument for part in self.parts for argument in part.arguments()]


def build_condition(
    options: ConditionOptions, data: ImageSet, init_from: str | None = None, cache_dir: str | None = None
) -> Condition:
    """What `--condition` names. A small encoder's initial weights come from torch's global generator, as the UNet's do."""
    kinds = {"none": Condition, "class": ClassCondition, "vector": NumbersCondition, "image": ImageInput}
    if options.condition == "text":
        condition = TextCondition(options, data, init_from)
    elif options.condition == "none":
        condition = Condition()
    else:
        parts = [kinds[kind](options, data) for kind in options.condition.split("+")]
        condition = parts[0] if len(parts) == 1 else CombinedCondition(options, *parts)
    condition.data, condition.cache_dir = data, cache_dir
    return condition
