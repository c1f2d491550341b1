"""Masks for models that are trained to inpaint: where an image is unknown."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw


def inpainting_masks(seeds: Sequence[int] | np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """True where an image of this size (height, width) is unknown, bool [B, 1, H, W]; each mask is a function of its seed.

    Half of the masks are rectangles of any shape, the others thick brush strokes along polygonal chains, as for the wide masks
    of Suvorov et al. 2022 ("LaMa", §2.3).
    """
    return torch.from_numpy(np.stack([_mask(np.random.default_rng(int(seed)), *size) for seed in seeds]))[:, None]


def _mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = Image.new("1", (width, height))
    draw, boxes = ImageDraw.Draw(picture), rng.random() < 0.5
    for _ in range(rng.integers(1, 4)):
        if boxes:
            h, w = (max(1, round(side * rng.uniform(0.1, 0.6))) for side in (height, width))
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            draw.rectangle([int(left), int(top), int(left + w - 1), int(top + h - 1)], fill=1)
        else:
            points = rng.uniform((0, 0), (width - 1, height - 1), (rng.integers(2, 7), 2))
            thickness = max(1, round(min(height, width) * rng.uniform(0.05, 0.3)))
            draw.line([tuple(point) for point in points.tolist()], fill=1, width=thickness, joint="curve")
    return np.array(picture)
