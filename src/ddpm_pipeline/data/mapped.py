"""Preprocessing and caching the training images.

`load_images` takes what `--dataset` says (`sources`), finds the image column (`columns`), brings every image to
one size and channel count once (`images`), and keeps the result as a memory-mapped Arrow file; `ImageData` then reads
batches from it without touching an image file. Rows that cannot be used are left out (`skipped`). Called by `train.py`
and `evaluate.py`; in a launch of several processes the main one calls it first (`accelerator.main_process_first()`) and the
others find the cache.

It imports `datasets`, torch and those modules; nothing of the package.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from ..support.draws import image_indices
from ..support.errors import DataError
from .columns import (
    DIGEST,
    FILE,
    PIXELS,
    REASON,
    RESERVED,
    check_column,
    check_text_column,
    condition_column,
    find_image_column,
    find_label_column,
    image_kind,
    is_whole_number,
    kept_columns,
    missing_value,
)
from .images import BadImage, check_channels, check_resolution, image_file, image_pixels, image_shape
from .skipped import SkippedRow, check_bad_fraction, skipped_row
from .sources import Source, hash_of, load_source, summary

__all__ = ["DataError", "ImageData", "find_image_column", "load_images", "to_model_range"]

PREPROCESSING_VERSION = 2  # part of the cache's key: raise it when the same options give other pixels
BATCH_BYTES = 2**25  # pixels held by the preprocessing at a time


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1], of any shape: x / 127.5 - 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Preprocessed images, and the columns of their source that can serve as conditions. Its indices count usable rows."""

    dataset: Dataset  # a row for each of the source, bad or not: the RESERVED and the kept columns; memory-mapped
    resolution: int
    channels: int
    name: str  # of the built-in or Hub data set, or the last part of a local path
    fingerprint: str  # of usable pixels and kept columns in their order: the same wherever they lie, 32 hex digits
    label_column: str | None
    class_names: list[str] | None  # of the label column's values 0, 1, ...
    text_column: str | None
    rows: np.ndarray | None = None  # the usable rows, int64, where some are not
    skipped: Sequence[SkippedRow] = ()  # the others

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    @property
    def num_images(self) -> int:
        return len(self)

    @property
    def columns(self) -> list[str]:
        """The kept columns, which can serve as conditions."""
        return [name for name in self.dataset.column_names if name not in RESERVED]

    def rows_of(self, indices: Sequence[int]) -> np.ndarray:
        """The numbers of these images' rows in the source, int64 [B]. Raises IndexError for one outside 0..len-1."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"index {indices.min()} or {indices.max()} is outside 0..{len(self) - 1}")
        return indices if self.rows is None else self.rows[indices]

    def pixels(self, indices: Sequence[int], flip: np.ndarray | None = None) -> torch.Tensor:
        """Images uint8 [B, C, H, W], contiguous; those where `flip`, bool [B], is true are mirrored left to right.

        Raises IndexError for an index outside 0..len-1.
        """
        out = np.empty((len(indices), self.resolution**2 * self.channels), dtype=np.uint8)
        for image, (chunk, place) in zip(out, self._locate(indices), strict=True):
            image[:] = self._pixel_chunks[chunk][place]
        return images_of(out, self.resolution, self.channels, flip)

    def column(self, name: str, indices: Sequence[int]) -> torch.Tensor | list:
        """A kept column's values: int64 [B] for labels and whole numbers, else a list of B strings (or lists of them).

        Raises DataError for an unknown column or a missing number, IndexError for an index outside 0..len-1.
        """
        check_column(name, self.dataset.features)
        column = self.dataset.data.column(name)
        values = [column.chunk(chunk)[place].as_py() for chunk, place in self._locate(indices)]
        if not is_whole_number(self.dataset.features[name]):
            return values
        if None in values:
            missing = self.rows_of(indices)[values.index(None)]
            raise DataError(f"row {missing} has no value in the column {name!r}; fill it in or leave the row out.")
        return torch.tensor(values, dtype=torch.int64)

    def values(self, name: str) -> Iterator[Any]:
        """A kept column's values, one by one in the order of the images. Raises DataError for an unknown column."""
        check_column(name, self.dataset.features)
        column = self.dataset.data.column(name)
        if self.rows is None:
            return (value.as_py() for value in column)
        return (column.chunk(chunk)[place].as_py() for chunk, place in self._locate(range(len(self))))

    def examples(self, count: int, seed: int) -> torch.Tensor:
        """The same few images at each call, uint8 [n, C, H, W]: the first `count` of a random order, or all there are."""
        return self.pixels(image_indices(seed, len(self), 0, min(count, len(self))))

    @cached_property
    def _pixel_chunks(self) -> list[np.ndarray]:
        """Views into the memory-mapped file, uint8 [rows, H*W*C] each; nothing is read yet."""
        width = self.resolution**2 * self.channels
        chunks = self.dataset.data.column(PIXELS).chunks
        return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in chunks]

    @cached_property
    def _chunk_starts(self) -> np.ndarray:
        return np.cumsum([0] + [len(chunk) for chunk in self._pixel_chunks])

    def _locate(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(chunk, row in it) for each index. Arrow's own `take` would copy every chunk: 20 ms for 150 MB, not 0.1."""
        rows = self.rows_of(indices)
        chunks = np.searchsorted(self._chunk_starts, rows, side="right") - 1
        return zip(chunks.tolist(), (rows - self._chunk_starts[chunks]).tolist(), strict=True)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which a worker process makes again from the file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def images_of(flat: np.ndarray, resolution: int, channels: int, flip: np.ndarray | None = None) -> torch.Tensor:
    """Rows of H*W*C values, uint8 [B, H*W*C], as images uint8 [B, C, H, W]; mirrored where `flip`, bool [B], is true."""
    shape = (len(flat), resolution, resolution, channels)
    images = torch.from_numpy(flat).view(shape).permute(0, 3, 1, 2).contiguous()  # [B, H, W, C] -> [B, C, H, W]
    if flip is not None:
        array, mirrored = images.numpy(), np.asarray(flip, dtype=bool)  # numpy's view: twice as fast as torch here
        array[mirrored] = array[mirrored][..., ::-1]
    return images


def load_images(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    cache_dir: str | None = None,
    preprocessing_num_workers: int | None = None,
    condition: str = "none",
    label_column: str | None = None,
    text_column: str | None = None,
    max_bad_fraction: float = 0.01,
) -> ImageData:
    """The images that `dataset` names, preprocessed, from the cache where they are in it.

    `dataset` is, in this order: the built-in name "digits"; a parquet file or a glob of them; a local folder (saved by
    `Dataset.save_to_disk`, of images, or of parquet files); the name of a data set on the Hub. `resolution` and
    `channels` left out are the data's own: the one square size that all images share, and 1 if all are grey, else 3.
    The label column is by default the only ClassLabel column, if there is one.

    Rows whose image cannot be read, or that miss what `condition` ("none", "class" or "text") needs, are left out.

    Raises DataError for data that cannot be used as asked, and where more than `max_bad_fraction` of the rows, or all, are
    left out; ValueError for an impossible resolution or channel count.
    """
    if resolution is not None:
        check_resolution(resolution)
    if channels is not None:
        check_channels(channels)
    source = load_source(dataset, dataset_config, split, cache_dir)
    total = len(source.dataset)
    if total == 0:
        raise DataError(f"the data set {dataset!r} has no rows in its split {split!r}; choose another split.")
    features = source.dataset.features
    column = find_image_column(features, image_column)
    label_column = find_label_column(features, label_column, column)
    if text_column is not None:
        check_text_column(features, text_column, column)
    workers = _workers(preprocessing_num_workers, total)
    job = _Job(source, column, Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline", workers)
    if resolution is None or channels is None:
        sizes, native, bad = _scan(job)
        check_bad_fraction(repr(dataset), bad, len(bad), total, max_bad_fraction)
        resolution = resolution or _own_resolution(dataset, sizes)
        channels = channels or native
    images = _preprocess(job, resolution, channels)
    needed = condition_column(condition, label_column, text_column)
    name = repr(dataset)
    return image_data(
        images, source.name, name, resolution, channels, label_column, text_column, needed, max_bad_fraction
    )


def image_data(
    images: Dataset,
    name: str,
    called: str,
    resolution: int,
    channels: int,
    label_column: str | None,
    text_column: str | None,
    needed: str | None,
    max_bad_fraction: float,
) -> ImageData:
    """The usable ones of preprocessed images: those that are not bad, and have a value in the `needed` column.

    Raises DataError, which calls the data `called`, where too many are not.
    """
    class_names = _class_names(images, label_column) if label_column in images.features else None
    num_classes = len(class_names) if class_names and needed == label_column else None
    skipped = _unusable(images, needed, num_classes)
    check_bad_fraction(called, skipped, len(skipped), len(images), max_bad_fraction)
    rows = np.setdiff1d(np.arange(len(images)), [one["row"] for one in skipped]) if skipped else None
    return ImageData(
        dataset=images,
        resolution=resolution,
        channels=channels,
        name=name,
        fingerprint=_content_fingerprint(images, rows, resolution, channels),
        label_column=label_column,
        class_names=class_names,
        text_column=text_column,
        rows=rows,
        skipped=skipped,
    )


def _class_names(images: Dataset, label_column: str | None) -> list[str] | None:
    """The names of a ClassLabel's values; for plain whole numbers "0" up to the largest."""
    if label_column is None:
        return None
    feature = images.features[label_column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    high = pc.max(images.data.column(label_column)).as_py()
    if high is None or high < 0:
        raise DataError(f"the label column {label_column!r} holds no label; labels are 0, 1, 2, ...")
    return [str(value) for value in range(high + 1)]


# Preprocessing


@dataclass(frozen=True)
class _Job:
    """One source on its way into the cache."""

    source: Source
    column: str
    folder: Path
    workers: int | None

    def run(self, function: Callable, key: str, features: Features, batch_size: int, desc: str, **kwargs) -> Dataset:
        """`Dataset.map` from Arrow tables to Arrow tables, cached under `key`."""
        kind = image_kind(self.source.dataset.features[self.column])
        try:
            result = self.source.dataset.with_format("arrow").map(
                function,
                with_indices=True,
                batched=True,
                batch_size=batch_size,
                writer_batch_size=batch_size,
                remove_columns=self.source.dataset.column_names,
                features=features,
                fn_kwargs={"column": self.column, "kind": kind, **kwargs},
                num_proc=self.workers,
                new_fingerprint=key,
                cache_file_name=str(self.folder / f"{key}.arrow"),
                load_from_cache_file=True,
                desc=desc,
            )
        except OSError as error:
            raise DataError(
                f"cannot write the preprocessed images to {str(self.folder)!r}: {summary(error)}. "
                "Make room there, or name another folder with --cache_dir."
            ) from error
        return result.with_format(None)


def _workers(asked: int | None, rows: int) -> int | None:
    if asked is not None and asked < 0:
        raise DataError(f"--preprocessing_num_workers {asked} is negative; give the number of processes.")
    workers = min(asked or 1, rows)
    return workers if workers > 1 else None


WHY_NOT = {REASON: Value("string"), FILE: Value("string")}  # of a row's image; null where it is good


def _scan(job: _Job) -> tuple[np.ndarray, int, list[SkippedRow]]:
    """(sizes [N, 2] of good images as width and height, the data's own channels, the bad rows), cached too."""
    features = Features({"width": Value("int32"), "height": Value("int32"), "channels": Value("int8"), **WHY_NOT})
    key = hash_of("scan", PREPROCESSING_VERSION, job.source.identity, job.column)
    found = job.run(_scan_batch, key, features, 1000, "Looking at image sizes")
    width, height, channels = (found.data.column(name).to_numpy() for name in ("width", "height", "channels"))
    good = width > 0
    return np.stack([width, height], axis=1)[good], int(channels.max()), _unusable(found)


def _own_resolution(dataset: str, sizes: np.ndarray) -> int:
    width, height = sizes[0].tolist()
    if (sizes == sizes[0]).all() and width == height:
        return width
    if (sizes == sizes[0]).all():
        found = f"are all {width}x{height}, which is not square"
    else:
        order = sizes[np.lexsort((sizes[:, 0], sizes.prod(axis=1)))]
        (w0, h0), (w1, h1) = order[0].tolist(), order[-1].tolist()
        found = f"have {len(np.unique(sizes, axis=0))} different sizes, from {w0}x{h0} to {w1}x{h1}"
    raise DataError(f"the images of {dataset!r} {found}; give the side they should have with --resolution.")


def _preprocess(job: _Job, resolution: int, channels: int) -> Dataset:
    """A data set of the RESERVED and the kept columns, in the source's order. The pixels of bad rows are 0."""
    size = resolution * resolution * channels
    kept = kept_columns(job.source.dataset.features, job.column)
    features = cache_features({name: job.source.dataset.features[name] for name in kept}, size)
    key = hash_of("pixels", PREPROCESSING_VERSION, job.source.identity, job.column, resolution, channels)
    batch_size = max(1, min(1000, BATCH_BYTES // size))
    options = {"kept": kept, "resolution": resolution, "channels": channels}
    return job.run(_preprocess_batch, key, features, batch_size, "Preprocessing images", **options)


def cache_features(kept: dict[str, Any], size: int) -> Features:
    """The columns of preprocessed images of `size` values each, and those kept from the source."""
    return Features({PIXELS: List(Value("uint8"), length=size), DIGEST: Value("uint64"), **WHY_NOT, **kept})


def _scan_batch(table: pa.Table, rows: list[int], *, column: str, kind: str) -> pa.Table:
    shapes, reasons, files = _looked_at(table, column, (0, 0, 0), image_shape, kind)
    width, height, channels = zip(*shapes, strict=True)
    return pa.table(
        {
            "width": pa.array(width, pa.int32()),
            "height": pa.array(height, pa.int32()),
            "channels": pa.array(channels, pa.int8()),
            REASON: reasons,
            FILE: files,
        }
    )


def _preprocess_batch(
    table: pa.Table, rows: list[int], *, column: str, kind: str, kept: list[str], resolution: int, channels: int
) -> pa.Table:
    nothing = np.zeros((resolution, resolution, channels), dtype=np.uint8)
    images, reasons, files = _looked_at(table, column, nothing, image_pixels, kind, resolution, channels)
    return cache_table(np.stack(images).reshape(len(rows), -1), reasons, files, table.select(kept))


def cache_table(pixels: np.ndarray, reasons: pa.Array, files: pa.Array, kept: pa.Table) -> pa.Table:
    """Rows of the cache: pixels uint8 [N, H*W*C], what is wrong with them, and the N rows of kept columns."""
    conditions = kept.to_pylist() if kept.column_names else [{}] * len(pixels)
    digests = [_row_digest(image, values) for image, values in zip(pixels, conditions, strict=True)]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1])
    columns = {PIXELS: flat, DIGEST: pa.array(digests, pa.uint64()), REASON: reasons, FILE: files}
    return pa.table({**columns, **{name: kept.column(name) for name in kept.column_names}})


def _looked_at(
    table: pa.Table, column: str, bad: Any, function: Callable, *args: Any
) -> tuple[list[Any], pa.Array, pa.Array]:
    """`function` of each value of the column, or `bad`; and for bad ones the reason and the file, if there is one.

    The column's Python values are made one by one: a batch of large images is never held as a whole.
    """
    results, reasons, files = [], [], []
    for scalar in table.column(column):
        value, reason, file = scalar.as_py(), None, None
        try:
            result = function(value, *args)
        except BadImage as error:
            result, reason, file = bad, str(error), image_file(value)
        results.append(result)
        reasons.append(reason)
        files.append(file)
    return results, pa.array(reasons, pa.string()), pa.array(files, pa.string())


def _unusable(images: Dataset, needed: str | None = None, num_classes: int | None = None) -> list[SkippedRow]:
    """The rows whose image is bad, or whose value in the `needed` column is missing, in their order."""
    table = images.data
    bad = pc.indices_nonzero(pc.is_valid(table.column(REASON)))
    reasons, files = (table.column(name).take(bad).to_pylist() for name in (REASON, FILE))
    found = {
        row: skipped_row(row, reason, file) for row, reason, file in zip(bad.to_pylist(), reasons, files, strict=True)
    }
    if needed is not None:
        column = table.column(needed)
        for row in _suspects(column, num_classes):
            reason = missing_value(column[row].as_py(), needed, num_classes)
            if reason is not None:
                found.setdefault(row, skipped_row(row, reason))
    return [found[row] for row in sorted(found)]


def _suspects(column: pa.ChunkedArray, num_classes: int | None) -> Sequence[int]:
    """The rows of the column that `missing_value` may refuse; found by Arrow, for there may be millions of good ones."""
    if num_classes is not None:
        good = pc.and_(pc.greater_equal(column, 0), pc.less(column, num_classes))
        return pc.indices_nonzero(pc.fill_null(pc.invert(good), True)).to_pylist()
    if pa.types.is_list(column.type):
        return range(len(column))
    return pc.indices_nonzero(pc.is_null(column)).to_pylist()


# Fingerprints


def _row_digest(pixels: np.ndarray, conditions: dict[str, Any]) -> int:
    """64 bits that depend on one row's pixels and kept columns."""
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=8)
    digest.update(json.dumps(conditions, sort_keys=True).encode())
    return int.from_bytes(digest.digest(), "little")


def _content_fingerprint(images: Dataset, rows: np.ndarray | None, resolution: int, channels: int) -> str:
    digests = images.data.column(DIGEST).to_numpy().astype("<u8")
    digests = digests if rows is None else digests[rows]
    features = {name: str(feature) for name, feature in images.features.items() if name not in (REASON, FILE)}
    return hash_of(resolution, channels, features, hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest())
