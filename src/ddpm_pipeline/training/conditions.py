"""The conditions that a run can have: none, a class, a caption, numbers, an image, or several of these at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.mapped import ImageData, ImageSet
from ..generation.drawing import Request
from ..support.draws import BatchSlice, RandomStream
from ..support.errors import ConfigError
from .condition_base import Condition
from .image_conditions import ImageInput
from .options import ConditionOptions
from .text_conditions import TextCondition
from .vector_conditions import NumbersCondition


class ClassCondition(Condition):
    """Labels 0..N-1, and N for images whose label was dropped."""

    def __init__(self, options: ConditionOptions, data: ImageSet):
        if data.label_column is None:
            raise ConfigError(
                f"--condition {options.condition}: {data.name} has no label column that is found automatically; name it with "
                f"--label_column. Its columns besides images: {', '.join(data.columns) or 'none'}."
            )
        self.options, self.column, self.names = options, data.label_column, data.class_names

    def unet_config(self) -> dict[str, Any]:
        return {"num_class_embeds": len(self.names) + 1}

    def settings(self) -> dict[str, Any]:
        return {"class_names": self.names}

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
        return {"condition": f"{len(self.names)} classes", "condition dropout": self.share_of("labels")}

    def arguments(self) -> list[str]:
        return [f"class_labels={self.names[-1]!r}"]


def _of_both(method: str) -> Callable[..., dict[str, Any]]:
    """A method whose result is those of both parts, merged."""
    return lambda self, *arguments: {k: v for part in self.parts for k, v in getattr(part, method)(*arguments).items()}


class CombinedCondition(Condition):
    """A class or numbers, and an image.

    `condition_dropout` is the share of images trained without any, which guidance needs, and for each of the others the
    probability that it is dropped on its own (after Huang et al. 2023, "Composer", §2.2).
    """

    unet_config, settings, probe, unet_inputs = map(_of_both, ("unet_config", "settings", "probe", "unet_inputs"))
    preview = ImageInput.preview

    def __init__(self, options: ConditionOptions, first: Condition, image: ImageInput):
        self.options, self.parts, self.names, self.row_names = options, (first, image), first.names, first.row_names
        self.pipeline_class, self.input_channels, self.left = image.pipeline_class, image.input_channels, image.left
        first.dropout_streams += (RandomStream.FIRST_DROPOUT,)
        image.dropout_streams += (RandomStream.IMAGE_DROPOUT,)

    def read(self, data: ImageData, indices: Sequence[int], views: Any = None) -> list[Any]:
        return [part.read(data, indices, views) for part in self.parts]

    def draw(self, values: Sequence[Any], where: BatchSlice) -> list[Any]:
        return [part.draw(some, where) for part, some in zip(self.parts, values, strict=True)]

    def inputs(self, drawn: Sequence[Any], original_samples: Tensor) -> dict[str, Tensor]:
        first, image = self.parts
        return first.inputs(drawn[0], original_samples) | image.inputs(drawn[1], original_samples)

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        first, image = (part.request_like(data, indices, seed).arguments for part in self.parts)
        return self.asked(**first, **image)

    def denoiser(self, unet: nn.Module) -> nn.Module:
        return self.parts[1].denoiser(self.parts[0].denoiser(unet))

    def facts(self) -> dict[str, str]:
        first, image = (part.facts() for part in self.parts)
        return {name: f"{first[name]}; {image[name]}" for name in first}

    def arguments(self) -> list[str]:
        return [argument for part in self.parts for argument in part.arguments()]


def build_condition(options: ConditionOptions, data: ImageSet, init_from: str | None = None) -> Condition:
    """What `--condition` names. A small encoder's initial weights come from torch's global generator, as the UNet's do."""
    kinds = {"class": ClassCondition, "vector": NumbersCondition, "image": ImageInput}
    if options.condition in ("none", "text"):
        condition = Condition() if options.condition == "none" else TextCondition(options, data, init_from)
    else:
        parts = [kinds[kind](options, data) for kind in options.condition.split("+")]
        condition = parts[0] if len(parts) == 1 else CombinedCondition(options, *parts)
    condition.data = data
    return condition
