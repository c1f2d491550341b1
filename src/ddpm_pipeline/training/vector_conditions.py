"""Training on numbers as conditions: an age, an angle, several attributes, or which of many labels an image has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.mapped import ImageData, ImageSet
from ..encoding_alpha_ddpm import VectorCondition, embedding_width
from ..generation.drawing import Request
from ..support.draws import BatchSlice, RandomStream
from ..support.errors import ConfigError
from .condition_base import MAX_PREVIEW_ROWS, Condition
from .options import ConditionOptions


class NumbersCondition(Condition):
    """K numbers, standardised with the mean and deviation of the data, NaN where an image has none or it is dropped.

    `condition_dropout` is the share of images trained without any number, which guidance needs, and the probability that each
    of several is dropped on its own.
    """

    def __init__(self, options: ConditionOptions, data: ImageSet):
        self.options = options
        self.encoder = VectorCondition(data.vector_names, *data.vector_statistics)
        self._moments = [*zip(self.encoder.names, self.encoder.mean, self.encoder.std, strict=True)]
        self.width = 0  # of the UNet's time embedding, once it is known

    def unet_config(self) -> dict[str, Any]:
        return {"class_embed_type": self.encoder.class_embed_type}

    def settings(self) -> dict[str, Any]:
        return {"condition_vector": self.encoder}

    def read(self, data: ImageData, indices: Sequence[int], views: Any = None) -> Tensor:
        return data.vector(indices)

    def draw(self, values: Tensor, where: BatchSlice) -> Tensor:
        dropped, count = self.dropped(where)[:, None], values.shape[1]
        if count > 1:
            each = [where.uniform(RandomStream.ATTRIBUTE_DROPOUT + k) for k in range(count)]
            dropped = dropped | (np.stack(each, axis=1) < self.options.condition_dropout)  # [b, K]
        return values.masked_fill(torch.from_numpy(dropped), torch.nan)

    def inputs(self, drawn: Tensor, original_samples: Tensor) -> dict[str, Tensor]:
        return {"class_labels": self.encoder.encode(drawn.to(original_samples.device, non_blocking=True), self.width)}

    def probe(self, count: int, unet: nn.Module) -> dict[str, Tensor]:
        names, width = self.encoder.names, embedding_width(unet)
        if len(names) > 1 and width < 2 * len(names):
            raise ConfigError(
                f"the UNet's time embedding of {width} values has no room for {len(names)} numbers; use a larger --model, or "
                f"at most {width // 2} numbers."
            )
        return {"class_labels": self.encoder.encode(torch.zeros(count, len(names)), width)}

    def request_like(self, data: ImageData, indices: Sequence[int], seed: int) -> Request:
        return self.asked(condition_vector=self.read(data, indices).tolist())

    def unet_inputs(self, request: Request) -> dict[str, Tensor]:
        return {"class_labels": self.encoder.encode(torch.tensor(request.arguments["condition_vector"]), self.width)}

    def denoiser(self, unet: nn.Module) -> nn.Module:
        self.width = embedding_width(unet)
        return unet

    def preview(self, count: int) -> tuple[Request, int]:
        """The numbers of the images at equally spaced quantiles of the first of them."""
        first = self.read(self.examples, range(len(self.examples)))[:, 0]
        order = first.argsort(stable=True)[: first.isfinite().sum() or None]  # where it is told, if it is
        places = np.linspace(0, len(order) - 1, min(count, MAX_PREVIEW_ROWS, len(order))).round().astype(int)
        return self.rows(count, **self.request_like(self.examples, order[places].tolist(), 0).arguments)

    def row_names(self, request: Request, columns: int | None) -> list[str]:
        return [self._shown(row) for row in request.arguments["condition_vector"][::columns]]

    def _shown(self, row: Sequence[float]) -> str:
        told = dict(zip(self.encoder.names, row, strict=True))
        if {*self.encoder.mean, *self.encoder.std} == {0, 1}:  # labels that an image has or not
            return ", ".join(name for name, value in told.items() if value == 1)
        return ", ".join(f"{name}={value:.4g}" for name, value in told.items())

    def facts(self) -> dict[str, str]:
        shown = ", ".join(f"{name} {mean:.4g} ± {std:.4g}" for name, mean, std in self._moments[:MAX_PREVIEW_ROWS])
        if (more := len(self._moments) - MAX_PREVIEW_ROWS) > 0:
            shown += f" and {more} more"
        what = f"{len(self._moments)} number{'s' * (len(self._moments) > 1)} (mean ± standard deviation): {shown}"
        return {"condition": what, "condition dropout": self.share_of("numbers")}

    def arguments(self) -> list[str]:
        """Of at most three numbers, a standard deviation above the mean."""
        told = {name: float(f"{mean + std:.4g}") for name, mean, std in self._moments[:3]}
        return [f"condition_vector={told}"]
