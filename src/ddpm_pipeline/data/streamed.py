"""Images that are streamed: read from the Hub or from files as they are needed, never held or stored as a whole.

The stream is cut into parts, one for each process that reads (`cut`), and `rows_of_part` goes through one part for ever, in an
order that is a function of the seed. Where it has got to is a `Position` of a few numbers. Images are preprocessed as they come
by (`images`), and what cannot be used is left out (`skipped`).

Called by `batches` and `evaluate.py`; imports `datasets`, torch and the other modules of the data.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter

from ..support.draws import block_order, shard_order
from ..support.errors import DataError
from .columns import (
    check_column,
    check_text_column,
    condition_column,
    find_image_column,
    find_label_column,
    image_kind,
    kept_columns,
    missing_value,
)
from .images import BadImage, check_channels, check_resolution, image_file, image_pixels
from .mapped import PREPROCESSING_VERSION, ImageData, cache_features, cache_table, image_data, images_of
from .skipped import SkippedRow, check_bad_fraction, skipped_row
from .sources import as_data_error, hash_of, load_source

READ_ROWS = 100  # rows that are asked for at a time
LOCAL_SHARDS = 256  # that a memory-mapped data set is read in
MANY_SHARDS = 16  # times as many shards as parts: sharing them out leaves parts of about the same length
BLOCK_BYTES = 2**28  # of a block of rows as they are stored, whatever --shuffle_buffer is
FIRST_ROWS = 10_000  # rows whose captions a tokenizer is made from
JUDGED_ROWS = 1000  # rows after which the share of bad ones is looked at
SHARD_BITS = 32  # a row's number holds that of its shard above these bits


@dataclass(frozen=True, eq=False)
class StreamData:
    """A stream of images, and what it is known to be beforehand."""

    stream: IterableDataset  # the image column, not decoded, and the one that the condition needs
    image_column: str
    kind: str  # of that column, as `columns.image_kind` says
    resolution: int
    channels: int
    name: str  # of the built-in or Hub data set, or the last part of a local path
    fingerprint: str  # of where the data come from and what they are made into, 32 hex digits
    columns: list[str]  # that can serve as conditions
    label_column: str | None
    class_names: list[str] | None  # of the label column's values 0, 1, ...
    text_column: str | None
    needed: str | None  # the column that every image must have a value of
    max_bad_fraction: float

    num_images = None  # unknown
    skipped = ()  # before anything was read

    def values(self, name: str) -> Iterator[Any]:
        """The needed column's values in the first rows. Raises DataError for another column, or where reading fails."""
        check_column(name, self.stream.features)
        column = self.stream.select_columns([name])
        with as_data_error(f"the stream {self.name!r}"):
            for table in islice(_tables(column), FIRST_ROWS // READ_ROWS):
                yield from (value.as_py() for value in table.column(name))

    def first(self, count: int) -> torch.Tensor:
        """The first usable images in the stream's own order, uint8 [n, C, H, W]: `count`, or as many as there are.

        Raises DataError where too many rows before them are bad, or all.
        """
        images, skipped, seen = [], [], 0
        for row, table, index in self._in_order():
            seen += 1
            pixels, found = self.read(table, index, row)
            skipped += [] if found is None else [found]
            if pixels is not None:
                images.append(pixels.reshape(-1))
                if len(images) == count:
                    break
        self._check(skipped, len(skipped), seen)
        return images_of(np.stack(images), self.resolution, self.channels)

    def examples(self, count: int, seed: int) -> torch.Tensor:
        """The same few images at each call, uint8 [n, C, H, W]: the first ones, whatever the seed."""
        return self.first(count)

    def stored(self, count: int, cache_dir: str | None) -> ImageData:
        """The first `count` usable images (or as many as there are) as data in a memory-mapped file of the cache.

        Raises DataError where too many rows before them are bad, or all.
        """
        folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline"
        path = folder / f"{hash_of('stream', PREPROCESSING_VERSION, self.fingerprint, count)}.arrow"
        kept = {name: feature for name, feature in self.stream.features.items() if name != self.image_column}
        features = cache_features(kept, self.resolution**2 * self.channels)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with ArrowWriter(features=features, path=str(temporary)) as writer:
                self._write(writer, list(kept), count)
                writer.finalize()
            os.replace(temporary, path)
        images = Dataset.from_file(str(path), info=datasets.DatasetInfo(features=features))
        return image_data(
            images, self.name, self.name, self.resolution, self.channels, self.label_column, self.text_column, self.needed,
            self.max_bad_fraction,
        )  # fmt: skip

    def _write(self, writer: ArrowWriter, kept: list[str], count: int) -> None:
        """Rows of the cache, one by one, until `count` of them are usable."""
        nothing, left = np.zeros(self.resolution**2 * self.channels, np.uint8), count
        for row, table, index in self._in_order():
            pixels, found = self.read(table, index, row)
            reason, file = (found["reason"], found.get("file")) if found else (None, None)
            flat = (nothing if pixels is None else pixels.reshape(-1))[None]
            reasons = pa.array([reason], pa.string()), pa.array([file], pa.string())
            writer.write_table(cache_table(flat, *reasons, table.slice(index, 1).select(kept)))
            left -= pixels is not None
            if left == 0:
                return

    def _in_order(self) -> Iterator[tuple[int, pa.Table, int]]:
        """(number of the row, a table, the row's place in it) of every row in the stream's own order."""
        row = 0
        with as_data_error(f"the stream {self.name!r}"):
            for table in _tables(self.stream):
                for index in range(len(table)):
                    yield row, table, index
                    row += 1

    def read(
        self, table: pa.Table, index: int, row: int, shard: int | None = None
    ) -> tuple[np.ndarray | None, SkippedRow | None]:
        """A row's image, uint8 [H, W, C], and None; or None and why it cannot be used."""
        value = table.column(self.image_column)[index].as_py()
        try:
            if self.needed is not None:
                classes = len(self.class_names or ()) if self.needed == self.label_column else None
                missing = missing_value(table.column(self.needed)[index].as_py(), self.needed, classes)
                if missing is not None:
                    return None, skipped_row(row, missing, shard=shard)
            return image_pixels(_fetched(value), self.kind, self.resolution, self.channels), None
        except BadImage as error:
            return None, skipped_row(row, str(error), image_file(value), shard)

    def _check(self, skipped: list[SkippedRow], bad: int, seen: int) -> None:
        if seen == 0:
            raise DataError(f"the stream {self.name!r} has no rows; choose another split or data set.")
        check_bad_fraction(repr(self.name), skipped, bad, seen, self.max_bad_fraction)


def open_stream(
    dataset: str,
    *,
    resolution: int,
    dataset_config: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    channels: int | None = None,
    cache_dir: str | None = None,
    condition: str = "none",
    label_column: str | None = None,
    text_column: str | None = None,
    max_bad_fraction: float = 0.01,
) -> StreamData:
    """The images that `dataset` names, as `mapped.load_images` takes it, to be read as they are needed.

    `channels` left out are 1 where the column's type says grey, else 3. Labels must be a ClassLabel. Raises DataError for data
    that cannot be used as asked, ValueError for an impossible resolution or channel count.
    """
    check_resolution(resolution)
    if channels is not None:
        check_channels(channels)
    source = load_source(dataset, dataset_config, split, cache_dir, streaming=True)
    stream = source.dataset
    if isinstance(stream, Dataset):
        if len(stream) == 0:
            raise DataError(f"the data set {dataset!r} has no rows in its split {split!r}; choose another split.")
        stream = stream.to_iterable_dataset(num_shards=min(len(stream), LOCAL_SHARDS))
    features = stream.features
    if features is None:
        raise DataError(f"what columns {dataset!r} has is not known before it is read; leave out --streaming.")
    column = find_image_column(features, image_column)
    label_column = find_label_column(features, label_column, column)
    if text_column is not None:
        check_text_column(features, text_column, column)
    needed = condition_column(condition, label_column, text_column)
    channels = channels or _declared_channels(features[column])
    identity = (source.identity, column, resolution, channels, needed)
    return StreamData(
        stream=stream.decode(False).select_columns([column, *([] if needed is None else [needed])]),
        image_column=column,
        kind=image_kind(features[column]),
        resolution=resolution,
        channels=channels,
        name=source.name,
        fingerprint=hash_of(*identity),
        columns=kept_columns(features, column),
        label_column=label_column,
        class_names=_class_names(features, label_column, needed),
        text_column=text_column,
        needed=needed,
        max_bad_fraction=max_bad_fraction,
    )


def _declared_channels(feature: Any) -> int:
    """1 if the type of the column says that images are grey; most types say nothing."""
    grey = isinstance(feature, datasets.Array2D) or getattr(feature, "mode", None) in ("1", "L", "I;16", "I", "F")
    return 1 if grey else 3


def _class_names(features: Features, label_column: str | None, needed: str | None) -> list[str] | None:
    """The names of a ClassLabel's values. How many whole numbers there are is not known before all are read."""
    if label_column is None:
        return None
    if isinstance(features[label_column], ClassLabel):
        return list(features[label_column].names)
    if label_column == needed:
        raise DataError(
            f"--label_column {label_column!r} has the type {features[label_column]}, which does not tell how many classes "
            "there are; make it a ClassLabel (Dataset.cast_column), or leave out --streaming."
        )
    return None


def _tables(stream: IterableDataset) -> Iterator[pa.Table]:
    """The stream's rows in tables of READ_ROWS. By `iter`, which in a DataLoader's worker too gives all of them."""
    return stream.with_format("arrow").iter(batch_size=READ_ROWS)


def _fetched(value: Any) -> Any:
    """The value, with the bytes of a file that does not lie here. Raises `BadImage`."""
    path = image_file(value)
    if path is None or "://" not in path or value.get("bytes") is not None:
        return value
    try:
        with fsspec.open(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except Exception as error:  # of the HTTP client, which differs between versions of the library
        raise BadImage(f"it cannot be fetched: {type(error).__name__}: {error}") from error


# Parts


@dataclass(frozen=True)
class Cut:
    """A stream as cut into parts: part p reads the shards in places p, p + parts, ... of an epoch's order, or, where there
    are not enough shards, every shard and of it every `parts`-th row.
    """

    stream: IterableDataset
    parts: int
    by_shard: bool


def cut(data: StreamData, parts: int) -> Cut:
    """Parts without overlap, which cover the stream. Files of parquet are taken by row groups where they are few.

    Raises DataError where a file cannot be read.
    """
    stream = data.stream
    if parts > 1 and stream.num_shards % parts == 0:
        return Cut(stream, parts, by_shard=True)
    if stream.num_shards < MANY_SHARDS * parts:
        with as_data_error(f"the stream {data.name!r}"):
            stream = stream.reshard()
    return Cut(stream, parts, by_shard=parts == 1 or stream.num_shards >= MANY_SHARDS * parts)


@dataclass(frozen=True)
class Position:
    """Where a part has been read to."""

    epoch: int = 0
    place: int = 0  # of a shard in the epoch's order, and
    row: int = 0  # a row in it, with which a block begins
    passed: int = 0  # rows of the epoch that were come by before that one
    block: int = 0  # number of the block in the epoch
    offset: int = 0  # rows of the block, in its shuffled order, that are done
    seen: int = 0  # rows done since the run began
    bad: int = 0  # of them left out

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, int]) -> "Position":
        return cls(**values)


@dataclass(frozen=True)
class StreamedImage:
    """A usable row."""

    pixels: np.ndarray  # uint8 [H, W, C]
    value: Any  # of the needed column
    number: int  # of shard and row: shard * 2^32 + row
    position: Position  # after it
    skipped: list[SkippedRow]  # since the usable row before


@dataclass(frozen=True)
class _Piece:
    """Rows of one table that belong to a part."""

    table: pa.Table
    place: int
    shard: int
    rows: np.ndarray  # their numbers in the shard, int64 [n]
    passed: np.ndarray  # rows of the epoch before each of them, int64 [n]

    def __len__(self) -> int:
        return len(self.rows)

    def slice(self, start: int, stop: int | None = None) -> "_Piece":
        stop = len(self) if stop is None else stop
        table = self.table.slice(start, stop - start)
        return replace(self, table=table, rows=self.rows[start:stop], passed=self.passed[start:stop])


def rows_of_part(
    data: StreamData, cut: Cut, part: int, seed: int, shuffle_buffer: int, position: Position
) -> Iterator[StreamedImage]:
    """The usable rows of a part from a position on, for ever: epoch after epoch, each in an order of its own.

    Shards are shuffled, and rows in blocks of `shuffle_buffer` (fewer, if they have BLOCK_BYTES). Raises DataError where
    reading fails, where a whole round of epochs has no usable row, and where JUDGED_ROWS in a row are bad and the part's
    share of bad rows is above the limit.
    """
    skipped: list[SkippedRow] = []
    barren, seen_before = 0, position.seen  # epochs in a row without a usable row
    while True:
        barren += 1
        for block in _blocks(_pieces(data, cut, part, seed, position), shuffle_buffer):
            position = replace(
                position, place=block[0].place, row=int(block[0].rows[0]), passed=int(block[0].passed[0])
            )
            starts = np.cumsum([0] + [len(piece) for piece in block])
            order = block_order(seed, position.epoch, part, position.block, int(starts[-1]))
            pieces = np.searchsorted(starts, order, side="right") - 1
            for offset in range(position.offset, len(order)):
                piece, index = block[pieces[offset]], int(order[offset] - starts[pieces[offset]])
                row = int(piece.rows[index])
                pixels, found = data.read(piece.table, index, row, piece.shard)
                position = replace(
                    position, offset=offset + 1, seen=position.seen + 1, bad=position.bad + (pixels is None)
                )
                if pixels is None:
                    skipped.append(found)
                    if len(skipped) >= JUDGED_ROWS:
                        data._check(skipped, position.bad, position.seen)
                    continue
                value = None if data.needed is None else piece.table.column(data.needed)[index].as_py()
                yield StreamedImage(pixels, value, (piece.shard << SHARD_BITS) + row, position, skipped)
                skipped, barren, seen_before = [], 0, position.seen
            position = replace(position, block=position.block + 1, offset=0)
        if barren >= cut.parts:
            data._check(skipped, len(skipped), position.seen - seen_before)
        position = Position(epoch=position.epoch + 1, seen=position.seen, bad=position.bad)


def _pieces(data: StreamData, cut: Cut, part: int, seed: int, start: Position) -> Iterator[_Piece]:
    """The part's rows of an epoch, from the beginning of the block that the position is in."""
    order = shard_order(seed, cut.stream.num_shards, start.epoch)
    passed = start.passed
    with as_data_error(f"the stream {data.name!r}"):
        for place in range(part, len(order), cut.parts) if cut.by_shard else range(len(order)):
            if place < start.place:
                continue
            shard = cut.stream.shard(len(order), int(order[place]))
            first = start.row if place == start.place else 0
            row = 0
            for table in _tables(shard):
                skip = min(max(first - row, 0), len(table))
                rows = np.arange(row + skip, row + len(table))
                row += len(table)
                before = passed + np.arange(len(rows))
                passed += len(rows)
                mine = np.arange(len(rows))
                if not cut.by_shard:  # by turns, which each epoch begins with another part
                    mine = np.flatnonzero((before + start.epoch) % cut.parts == part)
                if len(mine):
                    taken = table.slice(skip) if cut.by_shard else table.take(skip + mine)
                    yield _Piece(taken, place, int(order[place]), rows[mine], before[mine])


def _blocks(pieces: Iterator[_Piece], shuffle_buffer: int) -> Iterator[list[_Piece]]:
    """The rows in blocks that are shuffled: of `shuffle_buffer` rows each, or fewer that have BLOCK_BYTES."""
    block: list[_Piece] = []
    rows = size = 0
    for piece in pieces:
        while len(piece):
            taken = piece.slice(0, shuffle_buffer - rows) if len(piece) > shuffle_buffer - rows else piece
            block.append(taken)
            rows, size = rows + len(taken), size + taken.table.nbytes
            if rows == shuffle_buffer or size >= BLOCK_BYTES:
                yield block
                block, rows, size = [], 0, 0
            piece = piece.slice(len(taken))
    if block:
        yield block
