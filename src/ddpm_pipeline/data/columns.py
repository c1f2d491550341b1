"""Which columns of a data set hold its images, labels and captions, and which of their values are missing.

Called by `mapped` and `streamed`; imports `datasets`' types and `skipped`.
"""

import re
from typing import Any

import datasets
from datasets import ClassLabel, Features, List, Value

from ..support.errors import DataError

KINDS = ("image", "image struct", "array", "bytes")  # of image columns; the first kind that a data set has is meant
PIXELS, DIGEST, REASON, FILE = "pixels", "pixels_digest", "skipped_reason", "skipped_file"
RESERVED = (PIXELS, DIGEST, REASON, FILE)  # the columns of the cache beside those kept from the source


def find_image_column(features: Features, named: str | None = None) -> str:
    """The image column's name: the one given, else the only column of the first kind of `KINDS` that there is.

    Kinds: the `Image` feature; structs {bytes, path}; uint8 arrays of two or three dimensions; bytes.
    Raises DataError if there is no such column, or a choice.
    """
    kinds = {name: image_kind(feature) for name, feature in features.items()}
    if named is not None:
        check_column(named, features, "--image_column ")
        if kinds[named] is None:
            raise DataError(
                f"--image_column {named!r} has the type {features[named]}, which holds no images; allowed are the "
                f"Image feature, {{bytes, path}} structs, uint8 arrays [H, W] or [H, W, C], and bytes."
            )
        return named
    for kind in KINDS:
        candidates = [name for name in features if kinds[name] == kind]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise DataError(f"there are several image columns, {candidates}; name one with --image_column.")
    columns = ", ".join(f"{name} ({feature})" for name, feature in features.items())
    raise DataError(f"the data set has no image column; its columns are: {columns}.")


def image_kind(feature: Any) -> str | None:
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return "image struct" if _is_value(feature["bytes"], "binary", "large_binary") else None
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return "array" if feature.dtype == "uint8" else None
    if isinstance(feature, List) and isinstance(feature.feature, List):
        inner = feature.feature.feature
        return "array" if _is_value(inner.feature if isinstance(inner, List) else inner, "uint8") else None
    return "bytes" if _is_value(feature, "binary", "large_binary") else None


def _is_value(feature: Any, *dtypes: str) -> bool:
    return isinstance(feature, Value) and feature.dtype in dtypes


def is_whole_number(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and bool(re.match("u?int", feature.dtype)))


def is_text(feature: Any) -> bool:
    """Strings, or lists of them: several captions for an image."""
    return _is_value(feature.feature if isinstance(feature, List) else feature, "string", "large_string")


def kept_columns(features: Features, image_column: str) -> list[str]:
    """The columns that can be conditions, and cost little beside the pixels: labels, whole numbers, texts."""
    others = {name: feature for name, feature in features.items() if name != image_column}
    return [
        name
        for name, feature in others.items()
        if (is_whole_number(feature) or is_text(feature)) and name not in RESERVED
    ]


def check_column(name: str, features: Features, option: str = "") -> None:
    if name not in features:
        raise DataError(f"{option}{name!r} is no column of the data set; its columns are {list(features)}.")


def find_label_column(features: Features, named: str | None, image_column: str) -> str | None:
    if named is None:
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        return labels[0] if len(labels) == 1 else None
    check_column(named, features, "--label_column ")
    if named not in kept_columns(features, image_column) or not is_whole_number(features[named]):
        raise DataError(
            f"--label_column {named!r} has the type {features[named]}; labels are a ClassLabel or whole numbers from 0 "
            "(Dataset.class_encode_column makes them of strings)."
        )
    return named


def check_text_column(features: Features, name: str, image_column: str) -> None:
    check_column(name, features, "--text_column ")
    if name not in kept_columns(features, image_column) or not is_text(features[name]):
        raise DataError(f"--text_column {name!r} has the type {features[name]}; texts are strings or lists of strings.")


def condition_column(condition: str, label_column: str | None, text_column: str | None) -> str | None:
    """The column that every image must have a value of, for `--condition`."""
    return {"class": label_column, "text": text_column or label_column}.get(condition)


def missing_value(value: Any, column: str, num_classes: int | None) -> str | None:
    """Why a value cannot be a condition: it is missing, or no class; None if it can. An empty caption can.

    `num_classes` is that of a label column, None for captions.
    """
    if num_classes is None:
        missing = value is None or (isinstance(value, list) and all(text is None for text in value))
        return f"there is no caption in the column {column!r}" if missing else None
    if value is None:
        return f"there is no label in the column {column!r}"
    if not 0 <= value < num_classes:
        return f"the label {value} in the column {column!r} is none of 0..{num_classes - 1}"
    return None
