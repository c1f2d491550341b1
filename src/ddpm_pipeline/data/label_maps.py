"""Label maps: images whose pixels are class ids. Of the data modules, imports `images` only."""

from dataclasses import replace
from typing import Any

import numpy as np

from .images import BadImage, Form, image_pixels

VOID = 255  # no class; with 2 classes, white, which is class 1


def form_of_label_maps(form: Form, classes: int) -> Form:
    """The same, for ids of so many classes."""
    return replace(form, channels=1, dtype="uint8" if classes <= VOID else "uint16", raw=True, nearest=True)


def label_map(value: Any, kind: str, form: Form, classes: int) -> np.ndarray:
    """One row's label map, ids 0..classes-1 or VOID, [*size, 1] in the form of label maps, by its nearest pixels.

    `value` is that of a column of this kind. Palettes are read as their indices. With 2 classes, black and white are 0 and 1;
    with more than 255 there is no VOID. Raises `BadImage`.
    """
    ids = image_pixels(value, kind, replace(form, dtype="uint16"))
    if classes == 2 and {*np.unique(ids).tolist()} <= {0, VOID}:
        ids = ids // VOID
    known = ids[ids != VOID] if 2 < classes <= VOID else ids
    if known.size and known.max() >= classes:
        void = f", and {VOID} where there is none" if 2 < classes <= VOID else ""
        raise BadImage(f"it has the id {known.max()}; ids of {classes} classes are 0..{classes - 1}{void}")
    return ids.astype(form.dtype)
