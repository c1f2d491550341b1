"""Label maps: images whose pixels are class ids. Of the data modules, imports `images` only."""

from typing import Any

import numpy as np

from .images import BadImage, open_image, stored_image, window

VOID = 255  # no class; with 2 classes, white, which is class 1


def label_map(value: Any, kind: str, size: tuple[int, int], classes: int) -> np.ndarray:
    """One row's label map, ids 0..classes-1 or VOID, uint8 [*size, 1] (uint16 from 256 classes on), by its nearest pixels.

    `value` is that of a column of this kind. Palettes are read as their indices. With 2 classes, black and white are 0 and 1;
    with more than 255 there is no VOID. Raises `BadImage`.
    """
    image = open_image(stored_image(value, kind))
    if len(image.getbands()) > 1 or image.mode == "F":
        raise BadImage(f"its mode is {image.mode}; it has colours; a label map has one number per pixel")
    ids = np.asarray(image).astype(np.int64)  # [H, W]
    if classes == 2 and ids.max() == VOID and not (ids == 1).any():
        ids = ids // VOID
    known = ids[ids != VOID] if 2 < classes <= VOID else ids
    if known.size and not 0 <= known.min() <= known.max() < classes:
        void = f", and {VOID} where there is none" if 2 < classes <= VOID else ""
        wrong = known.max() if known.max() >= classes else known.min()
        raise BadImage(f"it has the id {wrong}; ids of {classes} classes are 0..{classes - 1}{void}")
    left, top, right, bottom = window(ids.shape, size)
    rows = (top + (np.arange(size[0]) + 0.5) * ((bottom - top) / size[0])).astype(int)
    columns = (left + (np.arange(size[1]) + 0.5) * ((right - left) / size[1])).astype(int)
    return ids[rows[:, None], columns, None].astype(np.uint8 if classes <= VOID else np.uint16)
