"""Which columns of a data set hold its images, what they are conditioned on, and which of their values are missing."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, List, Value

from ..support.errors import DataError
from .options import ConditionColumns

KINDS = ("image", "image struct", "array", "bytes", "numbers")  # of image columns, the most telling type first
LISTS = "lists"  # the kind of columns that are images only if they are named, since lists of boxes have their type too
IMAGE_COLUMNS = (
    "Image columns hold the Image feature, {bytes, path} structs, arrays (Array2D, Array3D), nested lists of uint8, or bytes; "
    "and, if it is named, nested lists of other numbers."
)
MAX_CLASSES = 2**16
BESIDE = "second_folder"  # the column of images in a second folder
IMAGE_DIGEST = "image_digest"  # of the pixels alone
RESERVED = ("pixels", "pixels_digest", "skipped_reason", "skipped_file", IMAGE_DIGEST)  # the cache's own columns


@dataclass(frozen=True)
class ColumnRoles:
    """What the columns of a data set are used for."""

    image: str
    kind: str  # of the image column, one of KINDS
    label: str | None
    text: str | None
    needed: str | None  # the column that the condition reads: a row without a value there is skipped
    partner: str | None = None  # the column of second images, and
    partner_kind: str | None = None  # its kind, one of KINDS
    numbers: tuple[str, ...] = ()  # columns of numbers or of lists of labels

    def num_classes(self, class_names: list[str] | None) -> int | None:
        """How many classes the needed column has; None for captions."""
        return len(class_names) if class_names and self.needed == self.label else None


def find_roles(features: Features, image_column: str | None, asked: ConditionColumns) -> ColumnRoles:
    """The columns to read: those named, else the only ones of their type. Raises DataError for what is not there."""
    partner, numbers = _find_beside(features, asked)
    if partner is not None and (image_column == partner or image_columns(features) == [partner]):
        raise DataError(
            f"--condition_column {partner!r} is the column of the images themselves. Name another column or a folder; "
            "--condition_from makes a condition of the image itself."
        )
    others = Features({name: feature for name, feature in features.items() if name != partner})
    image, label, text = find_image_column(others, image_column), asked.label_column, asked.text_column
    if text is not None:
        _check_condition("--text_column", text, features, _is_text, "Captions must be strings or lists of strings.")
    elif "text" in asked.kinds and label is None and not asked.from_labels and _is_text(features.get("text")):
        text = "text"
    words = "Labels must be a ClassLabel, whole numbers, booleans, strings or times."
    if label is not None:
        _check_condition("--label_column", label, features, _is_label, words)
    else:
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        label = labels[0] if len(labels) == 1 else None
        by_name = "label" in features and ("class" in asked.kinds or _is_label(features["label"]))
        if by_name and not labels and {"class", "text"} & set(asked.kinds):
            _check_condition("the column", "label", features, _is_label, words)
            label = "label"
    needed = {"class": label, "text": text or label}.get(asked.kinds[0])
    partner_kind = None if partner is None else _image_kind(features[partner])
    return ColumnRoles(image, _image_kind(features[image]), label, text, needed, partner, partner_kind, numbers)


def _find_beside(features: Features, asked: ConditionColumns) -> tuple[str | None, tuple[str, ...]]:
    """(the column of second images, the columns of numbers) that the condition reads. Raises DataError."""
    found = {name: _named_column(name, features) for name in asked.condition_names}
    images = [name for name, column in found.items() if column == BESIDE or _image_kind(features[column]) is not None]
    numbers = tuple(column for name, column in found.items() if name not in images)
    if not found or not {"image", "vector"} & set(asked.kinds):
        return None, ()
    if len(images) != ("image" in asked.kinds) or bool(numbers) != ("vector" in asked.kinds):
        types = ", ".join(f"{name} ({features[column]})" for name, column in found.items())
        wanted = {"image": "one column or folder of images", "vector": "columns of numbers, such as a,b,c"}
        needs = " and ".join(words for kind, words in wanted.items() if kind in asked.kinds)
        raise DataError(f"--condition {asked.condition} needs {needs} in --condition_column, which names {types}.")
    for name in numbers:
        words = (
            "Numbers must be whole numbers (without leading zeros), floats, booleans, or lists of labels; for a single label, "
            "--condition class."
        )
        _check_condition("--condition_column", name, features, _is_numbers, words)
    return (found[images[0]] if images else None), numbers


def _named_column(name: str, features: Features) -> str:
    """The column that is meant: of this name, of the images that a column of file names became, or of a folder's images."""
    column = next((one for one in (name, name.removesuffix("_file_name"), BESIDE) if one in features), None)
    if column is None:
        raise DataError(
            f"--condition_column {name!r} is no column of the data set, and no folder with condition images for a folder of "
            f"images. The columns are {list(features)}."
        )
    return column


def _check_condition(option: str, name: str, features: Features, fits: Callable[[Any], bool], words: str) -> None:
    """Raises DataError unless the column is there, and of a type that fits, under a name that the cache leaves free."""
    check_column(name, features, f"{option} ")
    if name in RESERVED or not fits(features[name]):
        raise DataError(f"{option} {name!r} has the type {features[name]}. {words}")


def find_image_column(features: Features, named: str | None = None) -> str:
    """The image column's name: the one given, else the only column of the first of `KINDS` that occurs. Raises DataError."""
    kinds = {name: _image_kind(feature) for name, feature in features.items()}
    if named is not None:
        check_column(named, features, "--image_column ")
        if kinds[named] is None:
            raise DataError(f"--image_column {named!r} has the type {features[named]}, which holds no images. {IMAGE_COLUMNS}")
        return named
    for kind in KINDS:
        candidates = [name for name in features if kinds[name] == kind]
        if len(candidates) > 1:
            raise DataError(f"The data set has several image columns, {candidates}. Name one with --image_column.")
        if candidates:
            return candidates[0]
    columns = ", ".join(f"{name} ({feature})" for name, feature in features.items())
    raise DataError(f"The data set has no image column. Its columns are: {columns}. {IMAGE_COLUMNS}")


def image_columns(features: Features) -> list[str]:
    """The columns whose types say that they hold images; other arrays may hold anything."""
    return [name for name, feature in features.items() if _image_kind(feature) in KINDS[:-1]]


def _image_kind(feature: Any) -> str | None:
    """The `Image` feature; a struct {bytes, path}; an array of two or three dimensions; bytes; or None."""
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return "image struct" if _is_value(feature["bytes"], "binary", "large_binary") else None
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return "array" if feature.dtype == "uint8" else "numbers"
    if isinstance(feature, List) and isinstance(feature.feature, List):
        inner = feature.feature.feature
        inner = inner.feature if isinstance(inner, List) else inner
        number = isinstance(inner, Value) and re.match("u?int|float|bool", inner.dtype)
        return ("array" if inner.dtype == "uint8" else LISTS) if number else None
    return "bytes" if _is_value(feature, "binary", "large_binary") else None


def _is_value(feature: Any, *dtypes: str) -> bool:
    return isinstance(feature, Value) and feature.dtype in dtypes


def _is_label(feature: Any) -> bool:
    """A ClassLabel, or a type whose values can be told apart and sorted: those that occur are the classes."""
    times = isinstance(feature, Value) and feature.dtype.startswith(("timestamp", "date"))
    return is_whole_number(feature) or times or _is_value(feature, "bool", "string", "large_string")


def is_whole_number(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and bool(re.match("u?int", feature.dtype)))


def _is_numbers(feature: Any) -> bool:
    """Numbers or booleans, or lists of labels."""
    if isinstance(feature, List):
        return is_whole_number(feature.feature) or _is_value(feature.feature, "string", "large_string")
    return isinstance(feature, Value) and bool(re.match("u?int|float|bool", feature.dtype))


def _is_text(feature: Any) -> bool:
    """Strings, or lists of strings: several captions per image."""
    return _is_value(feature.feature if isinstance(feature, List) else feature, "string", "large_string")


def kept_columns(features: Features) -> Features:
    """The columns that can be conditions, and are small beside the pixels: labels and texts."""
    fitting = {name: feature for name, feature in features.items() if _is_label(feature) or _is_text(feature)}
    return Features({name: feature for name, feature in fitting.items() if name not in RESERVED})


def occurring_classes(column: pa.ChunkedArray, name: str) -> pa.Array:
    """The values of a label column that is no ClassLabel, sorted: its classes. Raises DataError for none, or for too many."""
    values = pc.unique(column).drop_null()
    if len(values) == 0:
        raise DataError(f"The label column {name!r} holds no label. Labels are whole numbers, booleans, strings or times.")
    if len(values) > MAX_CLASSES:
        raise DataError(
            f"The label column {name!r} has {len(values):,} different values; at most {MAX_CLASSES:,} classes can be learnt. "
            "Choose another column, or group its values."
        )
    return values.take(pc.sort_indices(values))


def check_column(name: str, features: Features, option: str = "") -> None:
    if name not in features:
        raise DataError(f"{option}{name!r} is no column of the data set. Its columns are {list(features)}.")


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
