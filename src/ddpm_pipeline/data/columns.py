"""Which columns of a data set hold its images, labels and captions, and which of their values are missing.

Imports the column types of `datasets`; `mapped` and `streamed` call it.
"""

import re
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import ClassLabel, Features, List, Value

from ..support.errors import DataError
from .options import ConditionColumns

KINDS = ("image", "image struct", "array", "bytes")  # of image columns, the most telling type first
RESERVED = ("pixels", "pixels_digest", "skipped_reason", "skipped_file")  # the cache's own columns


@dataclass(frozen=True)
class ColumnRoles:
    """What the columns of a data set are used for."""

    image: str
    kind: str  # of the image column, one of KINDS
    label: str | None
    text: str | None
    needed: str | None  # the column that the condition reads: a row without a value there is skipped

    def num_classes(self, class_names: list[str] | None) -> int | None:
        """How many classes the needed column has; None for captions."""
        return len(class_names) if class_names and self.needed == self.label else None


def find_roles(features: Features, image_column: str | None, asked: ConditionColumns) -> ColumnRoles:
    """The columns to read: those named, else the only ones of their type. Raises DataError for what is not there."""
    image = find_image_column(features, image_column)
    kept = kept_columns(features, image)
    label, text = _find_label_column(features, asked.label_column, kept), asked.text_column
    if text is not None:
        check_column(text, features, "--text_column ")
        if text not in kept or not _is_text(features[text]):
            raise DataError(
                f"--text_column {text!r} has the type {features[text]}. Captions must be strings or lists of strings."
            )
    needed = {"class": label, "text": text or label}.get(asked.condition)
    return ColumnRoles(image, _image_kind(features[image]), label, text, needed)


def find_image_column(features: Features, named: str | None = None) -> str:
    """The image column's name: the one given, else the only column of the first of `KINDS` that occurs.

    Kinds: the `Image` feature; structs {bytes, path}; uint8 arrays of two or three dimensions; bytes. Raises DataError if
    there is no such column, or several.
    """
    kinds = {name: _image_kind(feature) for name, feature in features.items()}
    if named is not None:
        check_column(named, features, "--image_column ")
        if kinds[named] is None:
            raise DataError(
                f"--image_column {named!r} has the type {features[named]}, which holds no images. Image columns hold "
                "the Image feature, {bytes, path} structs, uint8 arrays [H, W] or [H, W, C], or bytes."
            )
        return named
    for kind in KINDS:
        candidates = [name for name in features if kinds[name] == kind]
        if len(candidates) > 1:
            raise DataError(f"The data set has several image columns, {candidates}. Name one with --image_column.")
        if candidates:
            return candidates[0]
    columns = ", ".join(f"{name} ({feature})" for name, feature in features.items())
    raise DataError(f"The data set has no image column. Its columns are: {columns}.")


def _image_kind(feature: Any) -> str | None:
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


def _is_text(feature: Any) -> bool:
    """Strings, or lists of strings: several captions per image."""
    return _is_value(feature.feature if isinstance(feature, List) else feature, "string", "large_string")


def kept_columns(features: Features, image_column: str) -> list[str]:
    """The columns that can be conditions, and are small beside the pixels: labels, whole numbers, texts."""
    return [
        name
        for name, feature in features.items()
        if name not in (image_column, *RESERVED) and (is_whole_number(feature) or _is_text(feature))
    ]


def check_column(name: str, features: Features, option: str = "") -> None:
    if name not in features:
        raise DataError(f"{option}{name!r} is no column of the data set. Its columns are {list(features)}.")


def _find_label_column(features: Features, named: str | None, kept: list[str]) -> str | None:
    if named is None:
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        return labels[0] if len(labels) == 1 else None
    check_column(named, features, "--label_column ")
    if named not in kept or not is_whole_number(features[named]):
        raise DataError(
            f"--label_column {named!r} has the type {features[named]}. Labels must be a ClassLabel or whole numbers from 0; "
            "Dataset.class_encode_column converts strings."
        )
    return named


def missing_value(value: Any, column: str, num_classes: int | None) -> str | None:
    """Why a value cannot be a condition, or None if it can; an empty caption can. `num_classes` is None for captions."""
    if num_classes is None:
        missing = value is None or (isinstance(value, list) and all(text is None for text in value))
        return f"there is no caption in the column {column!r}" if missing else None
    if value is None:
        return f"there is no label in the column {column!r}"
    if not 0 <= value < num_classes:
        return f"the label {value} in the column {column!r} is not in 0..{num_classes - 1}"
    return None
