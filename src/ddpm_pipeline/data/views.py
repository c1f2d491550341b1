"""How the images of a batch are seen: through which window, mirrored or not, moved or not.

Images may be stored larger than they are seen, so that training can take another window of them each time. What is chosen at
random is drawn by the caller. An image and its condition image are seen through the same `Views`. Imports no sibling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

LOBES = 3  # of the Lanczos filter
STILL = np.eye(2, 3)  # the motion that leaves an image where it is


@dataclass(frozen=True, eq=False)
class Views:
    """How each of b images is seen; by default the plain view, which evaluation uses.

    `windows`, in [0, 1], are the side of each window as a share of the largest that fits, and its place from top to bottom and
    from left to right; by default the largest in the centre. A window has the aspect of `size`. Without `resized` it has this
    size itself, so its side does not count.

    `motions` map where each pixel lies to where its value comes from, in pixels from the image's centre to the right and down.
    The last column is taken off before, in shares of the width and the height. Beyond the edges, images are reflected.
    """

    size: tuple[int, int]  # height and width of what is seen
    resized: bool = False
    windows: np.ndarray | None = None  # float64 [b, 3]
    flips: np.ndarray | None = None  # bool [b, 2]: upside down, left to right
    motions: np.ndarray | None = None  # float64 [b, 2, 3]

    def apply(self, images: Sequence[np.ndarray], nearest: bool = False) -> Tensor:
        """Stored images, b arrays [H, W, C] of one shape, as they are seen: [b, C, h, w] of their own type, contiguous.

        Windows are resized by an antialiased Lanczos filter and moved images sampled by cubic interpolation, or, for label
        maps, both by taking the `nearest` pixel. Only what a window needs is read of memory-mapped images. Raises ValueError
        for images smaller than a window that is not resized.
        """
        seen = torch.from_numpy(self._resized(images, nearest) if self.resized else self._cut(images))  # [b, h, w, C]
        seen = seen.permute(0, 3, 1, 2).contiguous()
        array = seen.numpy()  # of the same memory; numpy mirrors twice as fast as torch
        if self.flips is not None:
            upside_down, mirrored = self.flips.T
            array[upside_down] = array[upside_down][..., ::-1, :]
            array[mirrored] = array[mirrored][..., ::-1]
        if self.motions is not None and (moved := (self.motions != STILL).any(axis=(1, 2))).any():
            array[moved] = _moved(array[moved], self.motions[moved], nearest)
        return seen

    def _cut(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The windows at the images' own scale, [b, h, w, C]."""
        (height, width), first = self.size, images[0] if len(images) else images  # an array [0, H, W, C]
        *own, channels = first.shape[-3:]
        free = np.array(own) - self.size
        if free.min() < 0:
            found = "x".join(map(str, own))
            raise ValueError(f"images of {found} pixels have no window of {height}x{width}; store larger ones.")
        places = np.tile(free // 2, (len(images), 1))
        if self.windows is not None:
            places = np.minimum(self.windows[:, 1:] * (free + 1), free).astype(int)
        seen = np.empty((len(images), height, width, channels), first.dtype)
        for out, image, (top, left) in zip(seen, images, places.tolist(), strict=True):
            out[:] = image[top : top + height, left : left + width]
        return seen

    def _resized(self, images: Sequence[np.ndarray], nearest: bool) -> np.ndarray:
        """The windows at `size`, [b, h, w, C]."""
        stored, size = np.stack(images), np.array(self.size)
        own = np.array(stored.shape[1:3])
        windows = np.tile([1.0, 0.5, 0.5], (len(stored), 1)) if self.windows is None else self.windows
        scales = windows[:, 0] * (own / size).min()  # stored pixels per pixel, [b]
        starts = windows[:, 1:] * (own - scales[:, None] * size)
        # the middles of the pixels, as places in the stored image, [b, h] and [b, w]
        rows, columns = (starts[:, [axis]] + scales[:, None] * (np.arange(size[axis]) + 0.5) for axis in (0, 1))
        if nearest:
            top, left = (np.minimum(each.astype(int), end - 1) for each, end in zip((rows, columns), own, strict=True))
            return stored[np.arange(len(stored))[:, None, None], top[:, :, None], left[:, None]]
        down, right = (_lanczos(each, scales, end)[:, None] for each, end in zip((rows, columns), own, strict=True))
        values = down @ stored.transpose(0, 3, 1, 2).astype(np.float32) @ right.swapaxes(2, 3)  # [b, C, h, w]
        return _of_type(values, stored.dtype).transpose(0, 2, 3, 1)


def _lanczos(places: np.ndarray, scales: np.ndarray, length: int) -> np.ndarray:
    """The weights of an axis' `length` pixels in the value at each of n places on it, float32 [b, n, length].

    The filter is widened by the scale, [b], where pixels get fewer, so that nothing aliases.
    """
    offsets = (np.arange(length) + 0.5 - places[..., None]) / np.maximum(scales, 1)[:, None, None]
    weights = np.sinc(offsets) * np.sinc(offsets / LOBES) * (abs(offsets) < LOBES)
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def _moved(images: np.ndarray, motions: np.ndarray, nearest: bool) -> np.ndarray:
    """Images [n, C, h, w] after such motions [n, 2, 3]."""
    size = np.array(images.shape[:1:-1])  # width and height
    x, y = (np.arange(length) + 0.5 - length / 2 for length in size)
    offsets = motions[:, None, None, :, 2] * size
    pixels = np.stack(np.meshgrid(x, y), axis=-1) - offsets  # [n, h, w, 2]
    sources = np.einsum("nij,nhwj->nhwi", motions[..., :2], pixels) * (2 / size)  # from -1 to 1
    mode = "nearest" if nearest else "bicubic"
    values, grid = (torch.from_numpy(each.astype(np.float32)) for each in (images, sources))
    moved = functional.grid_sample(values, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return _of_type(moved.numpy(), images.dtype)


def _of_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers as that type, rounded to its nearest value if it has whole numbers only."""
    if dtype.kind == "f":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    return np.rint(values).clip(limits.min, limits.max).astype(dtype)
