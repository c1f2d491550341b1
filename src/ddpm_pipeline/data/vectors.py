"""Numbers that images are conditioned on: columns of numbers, or of lists of labels, as one vector per image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, List

from ..support.errors import DataError
from .columns import occurring_classes

MAX_LABELS = 1024  # different ones in a column of lists; each is a number of every image


@dataclass(frozen=True)
class Attributes:
    """The names of a vector's numbers, and how rows become vectors."""

    labels: dict[str, list | None]  # by column: the labels that its lists can hold; None for a column of numbers
    names: list[str]  # of the numbers: columns and labels

    @property
    def is_label(self) -> np.ndarray:
        """Which of the numbers say that an image has a label, bool [K]."""
        return np.repeat(
            [one is not None for one in self.labels.values()], [1 if one is None else len(one) for one in self.labels.values()]
        )

    def read(self, table: pa.Table) -> np.ndarray:
        """The vectors of rows, float32 [N, K]; NaN where a value is missing. Raises DataError for infinite values."""
        return np.concatenate([_values(table.column(name), labels) for name, labels in self.labels.items()], axis=1)


def find_attributes(columns: Sequence[str], features: Features, read: Callable[[str], pa.ChunkedArray]) -> Attributes:
    """What the vectors of these columns hold; `read` gives a whole column. Raises DataError for too many or equal names."""
    labels: dict[str, list | None] = dict.fromkeys(columns)
    names: list[str] = []
    for column in columns:
        feature = features[column].feature if isinstance(features[column], List) else None
        if isinstance(feature, ClassLabel):
            labels[column], found = list(range(len(feature.names))), list(feature.names)
        elif feature is not None:
            labels[column] = occurring_classes(pc.list_flatten(read(column)), column).to_pylist()
            found = [str(label) for label in labels[column]]
        else:
            found = [column]
        if len(found) > MAX_LABELS:
            raise DataError(
                f"The lists in the column {column!r} hold {len(found):,} labels; at most {MAX_LABELS:,} are possible."
            )
        names += found
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(
            f"--condition_column {','.join(columns)} gives several numbers the name {min(twice)!r}. Rename a column."
        )
    return Attributes(labels, names)


def statistics(values: np.ndarray, attributes: Attributes) -> tuple[list[float], list[float]]:
    """(mean, std) of each number over vectors, float [N, K], where they are told; 0 and 1 of labels.

    Raises DataError for a number that no row has, or that is the same in all.
    """
    means, stds = [], []
    for name, is_label, column in zip(attributes.names, attributes.is_label, values.T, strict=True):
        told = column[~np.isnan(column)].astype(np.float64)
        if not is_label and (not len(told) or told.min() == told.max()):
            why = f"is {told[0]:g} in all rows" if len(told) else "has no value in any row"
            raise DataError(
                f"The column {name!r} {why}, so that nothing can be learnt from it. Drop it from --condition_column."
            )
        means.append(0.0 if is_label else float(told.mean()))
        stds.append(1.0 if is_label else float(told.std()))
    return means, stds


def _values(column: pa.ChunkedArray, labels: list | None) -> np.ndarray:
    """float32 [N, 1] of numbers, or [N, labels], 1 where a row's list has the label; NaN for null."""
    if labels is None:
        values = column.cast(pa.float32(), safe=False).to_numpy()[:, None]
        if np.isinf(values).any():
            row = int(np.flatnonzero(np.isinf(values))[0])
            raise DataError(f"A condition is infinite in row {row}. Set it to null if it is unknown.")
        return values
    place, rows = {label: number for number, label in enumerate(labels)}, column.to_pylist()
    values = np.zeros((len(rows), len(labels)), np.float32)
    for vector, found in zip(values, rows, strict=True):
        if found is None:
            vector[:] = np.nan
        else:
            vector[[place[label] for label in found if label in place]] = 1
    return values
