"""Numbers that images are conditioned on: columns of numbers, or of lists of labels, as one vector per image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features, List

from ..support.errors import DataError
from .columns import occurring_classes


@dataclass(frozen=True)
class Attributes:
    """The names of a vector's numbers, and how rows become vectors."""

    names: list[str]  # of columns of numbers, and of labels
    labels: dict[str, list | None]  # by column: the labels that its lists can hold; None for a column of numbers

    def read(self, table: pa.Table) -> np.ndarray:
        """The vectors of rows, float32 [N, K]; NaN where a value is missing. Raises DataError for infinite values."""
        return np.concatenate([_values(table.column(name), name, labels) for name, labels in self.labels.items()], axis=1)

    def statistics(self, vectors: np.ndarray) -> tuple[list[float], list[float]]:
        """(means, deviations) of the numbers in vectors [N, K] where they are told; 0 and 1 for labels.

        Raises DataError for a number that no row has, or that is the same in all.
        """
        found = []
        for name, values in zip(self.names, vectors.T, strict=True):
            told = values[~np.isnan(values)].astype(np.float64)
            if self.labels.get(name, ()) is not None:
                found.append((0.0, 1.0))
            elif len(told) and told.min() < told.max():
                found.append((float(told.mean()), float(told.std())))
            else:
                why = f"is {told[0]:g} in all rows" if len(told) else "has no value in any row"
                raise DataError(f"The column {name!r} {why}: nothing can be learnt from it. Drop it from --condition_column.")
        means, deviations = zip(*found, strict=True)
        return list(means), list(deviations)


def find_attributes(columns: Sequence[str], features: Features, read: Callable[[str], pa.ChunkedArray]) -> Attributes:
    """What the vectors of these columns hold; `read` gives a whole column, to see which labels occur."""
    names, labels = [], {}
    for column in columns:
        feature, labels[column] = features[column], None
        if not isinstance(feature, List):
            names.append(column)
        elif isinstance(feature.feature, ClassLabel):
            labels[column] = [*range(len(feature.feature.names))]
            names += feature.feature.names
        else:
            labels[column] = occurring_classes(pc.list_flatten(read(column)), column).to_pylist()
            names += map(str, labels[column])
    return Attributes(names, labels)


def _values(column: pa.ChunkedArray, name: str, labels: list | None) -> np.ndarray:
    """float32 [N, 1] of numbers, or [N, labels], 1 where a row's list has the label; NaN for null."""
    if labels is None:
        values = column.cast(pa.float32(), safe=False).to_numpy()[:, None]
        if np.isinf(values).any():
            raise DataError(
                f"The column {name!r} holds infinity in row {np.isinf(values).argmax()}. Leave unknown values empty."
            )
        return values
    lists = column.combine_chunks()
    places = pc.index_in(pc.list_flatten(lists), value_set=pa.array(labels, lists.type.value_type))
    held = pa.table({"row": pc.list_parent_indices(lists), "place": places}).drop_null()
    values = np.zeros((len(lists), len(labels)), np.float32)
    values[held["row"].to_numpy(), held["place"].to_numpy()] = 1
    values[lists.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return values
