"""The samples of an evaluation beside the training images that are nearest to them: figures over processes, and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from ..data import ImageData
from ..support.draws import image_indices
from ..support.pictures import Display, grid
from .memorisation import MOST_AT_ONCE, Nearest, blocks, copying, nearest

HELD_OUT_COMPARED = 1000  # held-out images at least, if there are so many; as many as samples, if these are more
PAIRS = 8  # in the picture


@dataclass(frozen=True)
class Samples:
    """What a process has sampled: a contiguous share of all."""

    pixels: Tensor  # in the units of the data, [n, C, H, W]
    features: Tensor | None  # [n, F]; None without an extractor
    how: Mapping[str, Any]  # steps, scheduler and guidance scale


def find_copies(
    samples: Samples, data: ImageData, references: Sequence[Tensor | None], seed: int, accelerator: Accelerator
) -> tuple[dict[str, Any], Image.Image]:
    """`copying` of all processes' samples, in pixels and in features, and a picture of the closest pairs. The `references` are
    the features of the training images `data` and of those held out.

    In pixels an image's mirror image counts as well, since a model that was trained with flips copies both.
    """
    num_samples = sum(gather_object([len(samples.pixels)]))
    num_held_out = min(len(data.held_out), max(num_samples, HELD_OUT_COMPARED))
    chosen = image_indices(seed, len(data.held_out), 0, num_held_out)
    mine = np.array_split(chosen, accelerator.num_processes)[accelerator.process_index]

    def scaled(pixels: Tensor) -> Tensor:
        return data.value_range.normalize(pixels).to(accelerator.device)

    def floats(features: Tensor) -> Tensor:
        return features.float().to(accelerator.device)

    spaces = {"pixels": (lambda: _with_mirrored(data), scaled, samples.pixels, data.held_out.pixels(mine))}
    if samples.features is not None:
        spaces["features"] = (lambda: references[0].split(MOST_AT_ONCE), floats, samples.features, references[1][mine])
    figures, rows = {}, []
    for name, (training, prepare, *images) in spaces.items():
        near, usual = (nearest(some, training(), prepare) for some in images)
        distances = [torch.tensor(gather_object(each.distances.tolist()), dtype=torch.float64) for each in (near, usual)]
        figures[name] = {"num_samples": num_samples, "num_held_out": num_held_out, **copying(*distances, seed)}
        rows += _closest_pairs(near, samples.pixels, data)
    display = Display(stretch=data.value_range.dtype != "uint8")
    return {**samples.how, **figures}, grid((torch.stack(rows) / 2 + 0.5).clamp(0, 1), min(PAIRS, num_samples), display=display)


def _with_mirrored(data: ImageData) -> Iterator[Tensor]:
    """All images in their own units, in parts [m, C, H, W], and then all of them mirrored left to right."""
    for mirrored in (False, True):
        for rows in blocks(len(data), data.values_per_image):
            yield _seen(data, rows, mirrored)


def _seen(data: ImageData, rows: Sequence[int], mirrored: bool) -> Tensor:
    return data.pixels(rows, replace(data.view, flips=np.tile([False, mirrored], (len(rows), 1))))


def _closest_pairs(near: Nearest, pixels: Tensor, data: ImageData) -> list[Tensor]:
    """The samples of all processes that are nearest to a training image, and then these images, [C, H, W] in [-1, 1] each."""
    own = [
        (near.distances[index].item(), near.indices[index].item(), data.value_range.normalize(pixels[index : index + 1])[0])
        for index in near.distances.argsort(stable=True)[:PAIRS].tolist()
    ]
    pairs = sorted(gather_object(own), key=itemgetter(0))[:PAIRS]
    places = [divmod(index, len(data)) for _, index, _ in pairs]  # past the end are the mirrored ones
    training = [data.value_range.normalize(_seen(data, [row], bool(mirrored)))[0] for mirrored, row in places]
    return [sample for *_, sample in pairs] + training
