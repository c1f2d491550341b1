"""Samples of models of `--dataset cats`, judged by counting: how many show a cat, a cat of the training data or a new one, and
the parts that were asked for.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import ImageData
from ..data.cats import COUNTS, KINDS, PARTS, SIDES, all_cats, draw, mentioned, training_cats
from ..data.options import DataOptions
from .cats import PLACES, TOLERATED_NOISE, CatRecognizer
from .conditions import DataConditions

NOT_ASKED = -1
NUM_FEATURES = 128
FITTED = "num_images=2048,seed=1"  # the cats that the features are fitted on


class CatJudge:
    """Judges samples under the conditions of the data, in batches; `section` then has the shares."""

    def __init__(self, data: ImageData, conditions: DataConditions, known: np.ndarray):
        """`known`: the training cats, [N, 5]."""
        self.data, self.conditions, self.num_known = data, conditions, len(known)
        self.recognizer, self.known = CatRecognizer(data.size[0]), torch.from_numpy(_numbers(known))
        self.rows: list[list[float]] = []  # of each sample: valid, copied, distance, right and asked by kind, wrong by place

    def add(self, pixels: Tensor, indices: Sequence[int]) -> None:
        """Samples in own units [B, 3, side, side], asked for with the conditions of these images of the data."""
        found = self.recognizer(self.data.value_range.normalize(pixels))
        asked = self._asked(indices)
        copied = found.valid & torch.isin(torch.from_numpy(_numbers(found.cats.numpy())), self.known)
        columns = [found.valid[:, None], copied[:, None], found.distance[:, None], found.cats == asked, asked != NOT_ASKED]
        self.rows += torch.cat([column.double() for column in (*columns, found.excess > 1)], dim=1).tolist()

    def _asked(self, indices: Sequence[int]) -> Tensor:
        """The number of each part that was asked for, by text or by class, int64 [B, 5]."""
        asked = torch.full((len(indices), len(KINDS)), NOT_ASKED)
        if "text" in self.conditions.kinds:
            parts = [mentioned(caption) for caption in self.conditions.captions(indices)]
            asked = torch.tensor([[some.get(kind, NOT_ASKED) for kind in KINDS] for some in parts])
        elif "class" in self.conditions.kinds and self.data.class_names == [names[0] for names in PARTS["body"]]:
            asked[:, 0] = torch.tensor(self.conditions.labels(indices))
        return asked

    def section(self, rows: list[list[float]]) -> dict[str, Any]:
        """The figures of evaluation.json, of the rows of all processes: shares with their standard errors."""
        table = torch.tensor(rows, dtype=torch.float64)
        valid, copied, distance = table[:, :3].T
        right, asked, wrong = table[:, 3:].split((len(KINDS), len(KINDS), len(PLACES)), dim=1)
        one, found = torch.ones_like(valid), {"num_images": len(table), "training_cats": self.num_known}
        for name, shown in {"valid": valid, "copies": copied, "new": valid - copied}.items():
            found[name], found[f"{name}_standard_error"] = _share(shown, one)
        found["copies_by_chance"] = self.num_known / len(all_cats())
        found |= {"distance": distance.mean().item(), "invalid_at": dict(zip(PLACES, wrong.mean(dim=0).tolist(), strict=True))}
        kinds = {"all": (right.sum(dim=1), asked.sum(dim=1))}
        kinds |= {kind: (right[:, place], asked[:, place]) for place, kind in enumerate(KINDS)}
        attributes = {
            kind: dict(zip(("accuracy", "standard_error"), _share(*counts), strict=True)) | {"asked": int(counts[1].sum())}
            for kind, counts in kinds.items() if counts[1].any()
        }  # fmt: skip
        return found | ({"attributes": attributes} if attributes else {})


def judge_of(options: DataOptions, data: ImageData, conditions: DataConditions) -> CatJudge | None:
    """The judge of a model's samples; None if it is none of the built-in cats, in colour and of a size that they come in."""
    height, width = data.size
    if options.dataset != "cats" or data.channels != 3 or height != width or not SIDES[0] <= height <= SIDES[1]:
        return None
    return CatJudge(data, conditions, training_cats(options.dataset_config))


def _numbers(cats: np.ndarray) -> np.ndarray:
    """One for each of all cats [N, 5], int64 [N]."""
    return np.ravel_multi_index(tuple(cats.T), COUNTS)


def _share(right: Tensor, asked: Tensor) -> tuple[float, float]:
    """Of counts by image [N]: the share of those asked that are right, and its standard error, of images drawn at random."""
    total = asked.sum()
    share = right.sum() / total
    return share.item(), ((right - share * asked).square().sum().sqrt() / total).item()


class CatFeatures(nn.Module):
    """The extractor that `--features cats` names: pixels projected on the 128 leading principal components of real cats, scaled
    to a variance of 1 for real cats with the noise that the judge tolerates, so that mouths count like bodies and noise for
    little. Nothing in it is trained or drawn at random.
    """

    num_features = NUM_FEATURES

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 128] of images [B, 3, side, side] in [-1, 1]. Raises ValueError for sizes that cats do not come in."""
        height, width = images.shape[-2:]
        if images.shape[1] != 3 or height != width or not SIDES[0] <= height <= SIDES[1]:
            raise ValueError(f"cats are squares in colour of {SIDES[0]} to {SIDES[1]} pixels")
        mean, components = (part.to(images.device) for part in _principal_components(height))
        return (images.flatten(1) - mean) @ components


@lru_cache(maxsize=2)
def _principal_components(side: int) -> tuple[Tensor, Tensor]:
    """The mean [D] of the values of FITTED cats, and what takes differences from it to features, [D, 128]."""
    cats = training_cats(FITTED)
    values = torch.from_numpy(draw(cats, side)).permute(0, 3, 1, 2).flatten(1).double() / 127.5 - 1
    mean = values.mean(dim=0)
    values -= mean
    squares, vectors = torch.linalg.eigh(values @ values.T)  # ascending
    squares, vectors = squares[-NUM_FEATURES:].flip(0), vectors[:, -NUM_FEATURES:].flip(1)
    directions = values.T @ vectors / squares.sqrt()  # orthonormal
    components = directions / (squares / len(cats) + (2 * TOLERATED_NOISE) ** 2).sqrt()  # of values in [-1, 1]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    return mean.float(), (components * largest.sign()).float()
