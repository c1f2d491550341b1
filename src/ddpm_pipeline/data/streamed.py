"""Images that are streamed: read from the Hub or from files as they are needed, never held or stored as a whole.

A stream is divided into parts, one per reading process (`divide`). `rows_of_part` reads a part for ever, in an order that is a
function of the seed; a `Position`, a few numbers, says how far it has been read. Evaluation stores the first images.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets.arrow_writer import ArrowWriter

from ..ranges_alpha_ddpm import ValueRange
from ..support.atomic import atomic_file
from ..support.draws import block_order, shard_order
from ..support.errors import ConfigError, DataError
from .columns import ColumnRoles, check_column, find_roles, kept_columns, missing_value, occurring_classes
from .condition_images import (
    CONDITION_IMAGE,
    attributes_of,
    joined,
    load_images,
    options_of_partners,
    source_of_partners,
    with_vectors,
)
from .images import DEEP_MODES, BadImage, Form, image_file
from .label_maps import form_of_label_maps
from .mapped import (
    ImageData,
    ImageSet,
    cache_features,
    cache_key,
    cache_table,
    check_rows,
    class_names_of,
    other_size,
    pixels_of,
    row_value,
    shape_of,
    unreadable_rows,
    usable_images,
)
from .options import PERCENTILES, UNCONDITIONAL, ConditionColumns, DataOptions, numbers_of_range
from .ranges import depth_of, is_raw, range_of, unmeasured
from .skipped import SkippedRow, check_bad_fraction, skipped_row
from .sources import Source, as_data_error, cache_folder, column_of, hash_of, load_source
from .views import Views

READ_ROWS = 100  # rows requested at a time
LOCAL_SHARDS = 256  # shards that a memory-mapped data set is read in
MANY_SHARDS = 16  # with this many shards per part, parts of whole shards have about the same length
BLOCK_BYTES = 2**28  # largest size of a block of rows as stored, whatever --shuffle_buffer is
FIRST_ROWS = 10_000  # rows from whose captions a tokenizer is built
JUDGED_ROWS = 1000  # rows after which the fraction of bad ones is checked
CHECKED_IMAGES = 64  # on which a stated range of values is checked
SHARD_BITS = 32  # a row's number holds its shard above these bits


@dataclass(frozen=True, eq=False)
class StreamData(ImageSet):
    """A stream of images, and what is known of it before it is read."""

    stream: IterableDataset  # the image column, not decoded, and those that the condition reads
    columns: list[str]  # that can be conditions
    class_names: list[str] | None  # of the label column's values 0, 1, ...
    labels: pa.Array | None  # the values themselves, of a needed label column that is no ClassLabel
    source: Source
    fingerprint: str  # of the source and of what its rows become, 32 hex digits
    max_bad_fraction: float
    cache_dir: str | None

    num_images = None  # unknown
    skipped = ()  # before anything was read

    @property
    def vector_statistics(self) -> tuple[list[float], list[float]]:
        """As that of `ImageData`, from all rows."""
        whole = pa.table({name: column_of(self.source, name) for name in self.roles.numbers})
        return self.attributes.statistics(self.attributes.read(whole))

    def values(self, name: str) -> Iterator[Any]:
        """The needed column's values in the first rows. Raises DataError for another column, or if reading fails."""
        check_column(name, self.stream.features)
        column = self.stream.select_columns([name])
        with as_data_error(f"the stream {self.name!r}"):
            for table in islice(_tables(column), FIRST_ROWS // READ_ROWS):
                yield from (value.as_py() for value in table.column(name))

    def first(self, count: int) -> torch.Tensor:
        """The first `count` usable images (or all), [n, C, H, W]. Raises DataError if too many rows there are bad."""
        rows = [(pixels, found) for pixels, found, *_ in self._first_rows(count)]
        skipped = [found for pixels, found in rows if pixels is None]
        self.check_bad_rows(skipped, len(skipped), len(rows))
        return self.view.apply([pixels for pixels, _ in rows if pixels is not None])

    def stored(self, count: int, cache_dir: str | None) -> ImageData:
        """The first `count` usable images (or all) in a memory-mapped cache. Raises DataError if too many rows are bad."""
        sets = [self] if self.condition_images is None else [self, self.condition_images]
        images = (self.roles.image, self.roles.partner)
        kept = Features({name: feature for name, feature in self.stream.features.items() if name not in images})
        features = [cache_features(kept if one is self else Features({}), one) for one in sets]
        key = cache_key("stream", self.fingerprint, count)
        paths = [cache_folder(cache_dir) / f"{key}{end}.arrow" for end in ("", "-second")[: len(sets)]]
        known = [Dataset.from_file(str(path)).data for path in paths if path.exists()]
        if len(known) < len(sets) or any(map(unreadable_rows, known)):  # such a file may be readable now
            with ExitStack() as stack:
                temporary = [str(stack.enter_context(atomic_file(path))) for path in paths]
                writers = [
                    stack.enter_context(ArrowWriter(features=f, path=p)) for f, p in zip(features, temporary, strict=True)
                ]
                for pixels, found, second, row in self._first_rows(count):
                    why = found if pixels is None else {}
                    for writer, one, image in zip(writers, sets, (pixels, second), strict=False):
                        flat = np.zeros(one.values_per_image, one.form.dtype) if image is None else image.reshape(-1)
                        columns = row.select(list(kept) if one is self else [])
                        writer.write_table(cache_table(flat[None], [why.get("reason")], [why.get("file")], columns))
                for writer in writers:
                    writer.finalize()
        opened = [
            Dataset.from_file(str(path), info=datasets.DatasetInfo(features=f)) for path, f in zip(paths, features, strict=True)
        ]
        limit = self.max_bad_fraction
        data, *second = (usable_images(cached, one, limit, self.labels) for cached, one in zip(opened, sets, strict=True))
        data = joined(data, *second, [], limit) if second else data
        return with_vectors(data, data.dataset.data) if self.attributes else data

    def shown(self, count: int) -> ImageData:
        """The first so many images, for previews."""
        return self.stored(count, self.cache_dir)

    def _first_rows(self, count: int) -> Iterator[tuple]:
        """Rows in the stream's own order, as `read` gives them and as tables, until `count` of them are usable."""
        with as_data_error(f"the stream {self.name!r}"):
            rows = ((table, index) for table in _tables(self.stream) for index in range(len(table)))
            for number, (table, index) in enumerate(rows):
                found = self.read(table, index, number)
                yield *found, table.slice(index, 1)
                count -= found[0] is not None
                if count == 0:
                    return

    def read(
        self, table: pa.Table, index: int, row: int, shard: int | None = None
    ) -> tuple[np.ndarray | None, Any, np.ndarray | None]:
        """A row's image [H, W, C], its value in the needed column, its second image; or None and the `SkippedRow`."""
        roles, condition, second, what = self.roles, None, None, ""
        if roles.needed is not None:
            condition = table.column(roles.needed)[index].as_py()
            condition = condition if self.labels is None else self._class_numbers.get(condition)
            missing = missing_value(condition, roles.needed, roles.num_classes(self.class_names))
            if missing is not None:
                return None, skipped_row(row, missing, shard=shard), None
        reach, value = self.source.reach, row_value(table.column(roles.image)[index])
        try:
            pixels = pixels_of(self, reach, value)
            if roles.partner is not None:
                size, what = shape_of(roles.kind, reach, value, True, self.channels)[1::-1], CONDITION_IMAGE
                value = row_value(table.column(roles.partner)[index])
                second = pixels_of(self.condition_images, reach, value)
                if why := other_size(size, shape_of(roles.partner_kind, reach, value, True, second.shape[2])[1::-1]):
                    raise BadImage(why)
        except BadImage as error:
            return None, skipped_row(row, f"{what}{error}", image_file(value), shard), None
        return pixels, condition, second

    @cached_property
    def _class_numbers(self) -> dict[Any, int]:
        return {value: number for number, value in enumerate(self.labels.to_pylist())}

    def check_bad_rows(self, skipped: list[SkippedRow], bad: int, seen: int) -> None:
        """Raises DataError if no rows were seen, or if too many of them are bad, or all."""
        if seen == 0:
            raise DataError(f"The stream {self.name!r} has no rows. Choose another split or data set.")
        check_bad_fraction(repr(self.name), skipped, bad, seen, self.max_bad_fraction)


def open_stream(
    options: DataOptions, columns: ConditionColumns = UNCONDITIONAL, *model_ranges: ValueRange | None
) -> StreamData:
    """The images that the options name, as in `load_images`, to be read as they are needed.

    The depth is that of the first usable image. Channels default to its own if it is beyond 8 bits or no picture, else to 1 if
    the column's type says that images are grey, and to 3. Labels must be a ClassLabel. Raises ConfigError without a resolution
    or for percentiles, DataError for data that cannot be used as asked.
    """
    options.require_resolution()
    of_images, of_partners, *_ = (*model_ranges, None, None)
    if of_images is None and (options.value_range or "").startswith(PERCENTILES):
        raise ConfigError(
            f"--value_range {options.value_range} is measured on all images, which a stream has not read. State low,high, or "
            "drop --streaming."
        )
    source = load_source(options, columns, streaming=True)
    features = source.dataset.features
    if features is None:
        raise DataError(f"The columns of {options.dataset!r} are unknown before it is read. Drop --streaming.")
    roles = find_roles(features, options.image_column, columns)
    source = source.with_classes(roles)
    stream = source.dataset
    if isinstance(stream, Dataset):
        stream = stream.to_iterable_dataset(num_shards=min(len(stream), LOCAL_SHARDS))
    label = features.get(roles.label)
    class_names, classes = list(label.names) if isinstance(label, ClassLabel) else None, None
    if label is not None and roles.label == roles.needed and class_names is None:
        with as_data_error(f"the column {roles.label!r}"):
            classes = occurring_classes(column_of(source, roles.label), roles.label)
        class_names = class_names_of(classes)
    more = {"resized": options.resizes_windows}
    read = list(filter(None, [roles.image, roles.needed, roles.partner, *roles.numbers]))
    stream, kept = stream.decode(False).select_columns(read), list(kept_columns(features))
    forms = [form := _first_form(options, source, stream, roles, of_images)]
    if roles.partner is not None:
        of, classes_of = ColumnRoles(roles.partner, roles.partner_kind, None, None, None), columns.condition_classes
        partners = source_of_partners(source)
        forms.append(second := _first_form(options_of_partners(options), partners, stream, of, of_partners, classes_of))
        about = (partners.name, options.size, second, of_partners or unmeasured(second), of)
        more["condition_images"] = ImageSet(*about, classes=classes_of, **more)
    if roles.numbers:
        more["attributes"] = attributes_of(source, roles)
    with as_data_error(f"the files of {source.name!r}"):
        content = [source.content(name) for name in (roles.image, roles.partner) if name]
    fingerprint = hash_of(content, read, [*map(astuple, forms)], columns.condition_classes, class_names)
    about = (source.name, options.size, form, unmeasured(form), roles)
    reading = options.max_bad_fraction, options.cache_dir
    data = StreamData(*about, stream, kept, class_names, classes, source, fingerprint, *reading, **more)
    if not form.raw:
        return data
    found = of_images or range_of(options.value_range, data.first(CHECKED_IMAGES).numpy(), data.name)
    return replace(data, value_range=found, fingerprint=hash_of(fingerprint, found.to_json()))


def _first_form(
    options: DataOptions,
    source: Source,
    stream: IterableDataset,
    roles: ColumnRoles,
    model: ValueRange | None,
    classes: int | None = None,
) -> Form:
    """What the images become: the depth, and channels that are no picture's, are those of the first usable image.

    Raises DataError if none of the first JUDGED_ROWS rows has one.
    """
    stored, raw = options.stored_size(options.size), is_raw(options, model)
    if classes:
        return form_of_label_maps(Form(stored, 1, resize=options.resize), classes)
    feature, shape, bad = source.dataset.features[roles.image], None, []
    with as_data_error(f"the stream {source.name!r}"):
        tables = islice(_tables(stream), JUDGED_ROWS // READ_ROWS)
        for value in (row_value(one) for table in tables for one in table.column(roles.image)):
            try:
                shape = shape_of(roles.kind, source.reach, value, raw, options.channels)
                break
            except BadImage as error:
                bad.append(skipped_row(len(bad), str(error), image_file(value)))
    if bad and shape is None:
        check_rows(source.name, bad, len(bad), 0)
    grey = isinstance(feature, datasets.Array2D) or getattr(feature, "mode", None) in ("1", "L", *DEEP_MODES)
    channels, dtype = 1 if grey else 3, "uint8"
    if shape is not None:
        stated = numbers_of_range(options.value_range) if raw and model is None else [shape.low]
        dtype = depth_of(min(shape.low, *stated), max(shape.high, *stated))
        channels = channels if dtype == "uint8" and shape.channels in (1, 3) else shape.channels
    return Form(stored, options.channels or channels, dtype if model is None else model.dtype, raw, options.resize)


def open_data(
    options: DataOptions, columns: ConditionColumns = UNCONDITIONAL, *model_ranges: ValueRange | None
) -> ImageData | StreamData:
    """The images that the options name: a stream with `options.streaming`, else preprocessed in the cache."""
    return (open_stream if options.streaming else load_images)(options, columns, *model_ranges)


def _tables(stream: IterableDataset) -> Iterator[pa.Table]:
    """The stream's rows in tables of READ_ROWS. By `iter`, which gives all rows even in a DataLoader's worker."""
    return stream.with_format("arrow").iter(batch_size=READ_ROWS)


@dataclass(frozen=True)
class Partition:
    stream: IterableDataset
    parts: int
    by_shard: bool  # part p reads the shards in places p, p + parts, ... of an epoch's order; else every parts-th row


def divide(data: StreamData, parts: int) -> Partition:
    """Disjoint parts that cover the stream; few parquet files are divided into row groups. Raises DataError."""
    stream = data.stream
    if parts > 1 and stream.num_shards % parts == 0:
        return Partition(stream, parts, by_shard=True)
    if stream.num_shards < MANY_SHARDS * parts:
        with as_data_error(f"the stream {data.name!r}"):
            stream = stream.reshard()
    return Partition(stream, parts, by_shard=parts == 1 or stream.num_shards >= MANY_SHARDS * parts)


@dataclass(frozen=True)
class Position:
    """How far a part has been read."""

    epoch: int = 0
    place: int = 0  # of the shard, in the epoch's order, and
    row: int = 0  # of the row in it with which the current block begins
    passed: int = 0  # rows of the epoch before that row
    block: int = 0  # number of the block in the epoch
    offset: int = 0  # rows of the block, in its shuffled order, that are done
    seen: int = 0  # rows done since the run began
    bad: int = 0  # how many of them were skipped

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, int]) -> "Position":
        return cls(**values)


@dataclass(frozen=True)
class StreamedImage:
    pixels: np.ndarray  # [H, W, C]
    value: Any  # of the needed column
    second: np.ndarray | None  # [H, W, k]
    vector: np.ndarray | None  # float32 [K]
    number: int  # of shard and row: shard * 2^32 + row
    position: Position  # after it
    skipped: list[SkippedRow]  # since the usable row before


@dataclass(frozen=True, eq=False)
class StreamedBatch:
    """Images of a stream, with what conditions read of an `ImageData`; indices are places 0, 1, ... in the batch."""

    data: StreamData
    images: Sequence[StreamedImage]

    def column(self, name: str, indices: Sequence[int]) -> list:
        return [self.images[index].value for index in indices]

    def vector(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.images[index].vector for index in indices]))

    def rows_of(self, indices: Sequence[int]) -> Sequence[int]:
        return indices

    @property
    def condition_images(self) -> "StreamedBatch":
        return self

    def pixels(self, rows: Sequence[int], views: Views) -> torch.Tensor:
        """The second images."""
        nearest = self.data.condition_images.classes is not None
        return views.apply([self.images[row].second for row in rows], nearest=nearest)


@dataclass(frozen=True)
class _Piece:
    """Rows of one table that belong to a part."""

    table: pa.Table
    place: int
    shard: int
    rows: np.ndarray  # their numbers in the shard, int64 [n]
    before: int  # rows of the epoch in the shards before

    def split(self, count: int) -> tuple["_Piece", "_Piece"]:
        """Its first `count` rows, or as many as exist, and the others."""
        first = replace(self, table=self.table.slice(0, count), rows=self.rows[:count])
        return first, replace(self, table=self.table.slice(count), rows=self.rows[count:])


def rows_of_part(
    data: StreamData, partition: Partition, part: int, seed: int, shuffle_buffer: int, position: Position
) -> Iterator[StreamedImage]:
    """The usable rows of a part from a position on, for ever: epoch after epoch, each in its own order.

    Shards are shuffled, and rows within blocks of `shuffle_buffer` rows (or of BLOCK_BYTES, if that is fewer). Raises DataError
    if reading fails, if `parts` epochs in a row have no usable row, and if JUDGED_ROWS rows in a row are bad and the part's
    fraction of bad rows exceeds the limit.
    """
    skipped, seen_before = [], position.seen
    barren = -1 if position.seen else 0  # epochs in a row without a usable row; the rest of a resumed one may be empty
    while True:
        barren += 1
        for block in _blocks(_pieces(data, partition, part, seed, position), shuffle_buffer):
            first, row = block[0], int(block[0].rows[0])
            position = replace(position, place=first.place, row=row, passed=first.before + row)
            rows = [(piece, index) for piece in block for index in range(len(piece.rows))]
            order = block_order(seed, position.epoch, part, position.block, len(rows))
            for offset in range(position.offset, len(rows)):
                piece, index = rows[order[offset]]
                row = int(piece.rows[index])
                pixels, found, second = data.read(piece.table, index, row, piece.shard)
                seen, bad = position.seen + 1, position.bad + (pixels is None)
                position = replace(position, offset=offset + 1, seen=seen, bad=bad)
                if pixels is None:
                    skipped.append(found)
                    if len(skipped) >= JUDGED_ROWS:
                        data.check_bad_rows(skipped, position.bad, position.seen)
                    continue
                vector = data.attributes and data.attributes.read(piece.table.slice(index, 1))[0]
                yield StreamedImage(pixels, found, second, vector, (piece.shard << SHARD_BITS) + row, position, skipped)
                skipped, barren, seen_before = [], 0, position.seen
            position = replace(position, block=position.block + 1, offset=0)
        if barren >= partition.parts:
            data.check_bad_rows(skipped, len(skipped), position.seen - seen_before)
        position = Position(epoch=position.epoch + 1, seen=position.seen, bad=position.bad)


def _pieces(data: StreamData, partition: Partition, part: int, seed: int, start: Position) -> Iterator[_Piece]:
    """The part's rows of an epoch, from the beginning of the block that the position is in."""
    stream, parts, by_shard = partition.stream, partition.parts, partition.by_shard
    order = shard_order(seed, stream.num_shards, start.epoch).tolist()
    before = start.passed - start.row
    with as_data_error(f"the stream {data.name!r}"):
        for place in range(part, len(order), parts) if by_shard else range(len(order)):
            if place < start.place:
                continue
            read = 0
            for table in _tables(stream.shard(len(order), order[place])):
                rows = np.arange(read, read + len(table))
                read += len(table)
                wanted = rows >= (start.row if place == start.place else 0)
                if not by_shard:  # in turn, and each epoch starts with another part
                    wanted &= (before + rows + start.epoch) % parts == part
                mine = np.flatnonzero(wanted)
                if len(mine):
                    taken = table.slice(int(mine[0])) if by_shard else table.take(mine)
                    yield _Piece(taken, place, order[place], rows[mine], before)
            before += read


def _blocks(pieces: Iterator[_Piece], shuffle_buffer: int) -> Iterator[list[_Piece]]:
    """The rows in blocks to shuffle: of `shuffle_buffer` rows each, or fewer that have BLOCK_BYTES."""
    block, rows, size = [], 0, 0
    for piece in pieces:
        while len(piece.rows):
            taken, piece = piece.split(shuffle_buffer - rows)
            block.append(taken)
            rows, size = rows + len(taken.rows), size + taken.table.nbytes
            if rows == shuffle_buffer or size >= BLOCK_BYTES:
                yield block
                block, rows, size = [], 0, 0
    if block:
        yield block
