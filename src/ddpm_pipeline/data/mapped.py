"""Images preprocessed once into a memory-mapped cache, from which batches are read without touching an image file.

In a launch of several processes the main one calls `load_images` first (`accelerator.main_process_first()`), and the others
find the cache, an Arrow file. `streamed` fills a cache of the same form.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from ..ranges_alpha_ddpm import DEPTHS, ValueRange
from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .columns import (
    RESERVED,
    ColumnRoles,
    check_column,
    find_roles,
    is_whole_number,
    kept_columns,
    missing_value,
    occurring_classes,
)
from .files import UNREADABLE, Reach, UnreadableFile
from .images import SAY_RANGE, BadImage, Form, Shape, image_file, image_pixels, image_shape
from .options import MAX_CHANNELS, UNCONDITIONAL, ConditionColumns, DataOptions, shown_size
from .ranges import measured_images, range_of
from .skipped import SkippedRow, check_bad_fraction, skipped_row
from .sources import Source, cache_folder, hash_of, load_source

logger = logging.getLogger(__name__)

PREPROCESSING_VERSION = 4  # part of the cache's key: raise it when the same options give other pixels
BATCH_BYTES = 2**25  # of pixels preprocessed at a time

PIXELS, DIGEST, REASON, FILE = RESERVED
WHY_BAD = {REASON: Value("string"), FILE: Value("string")}  # of a row's image; null if it is good
SIZES = Features(
    {**dict.fromkeys(("width", "height", "channels", "pages"), Value("int32")),
     **dict.fromkeys(("low", "high"), Value("float64")), **WHY_BAD}
)  # fmt: skip
NO_SHAPE = Shape(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images of one size, whether mapped or streamed.

    Both kinds have `class_names` (of the label column's values 0, 1, ..., or None), `columns` (names of those that can be
    conditions) and `fingerprint`: 32 hex digits that say whether two runs see the same data. It is of the content, not of the
    path: it stays when a folder is moved or renamed, when a cache is rebuilt, and over processes. It changes when an image is
    added, removed or replaced, when a caption or label is edited or a class renamed, and with the size, the channels, the way
    of resizing and the range of values.

    - `ImageData`: of the preprocessed pixels of the usable rows in order, with the names, types and values of their columns.
    - `StreamData`: of local files, of their names within the data, their sizes, and the first and last 8 KB of each (so an
      equally long edit in the middle of a large parquet file goes unnoticed), of the classes and of the columns read; of data
      on the Hub, of the commit. The two kinds never agree.
    """

    name: str  # of the bundled or Hub data set, or the last part of a local path
    size: tuple[int, int]  # height and width
    channels: int
    value_range: ValueRange  # of the pixels, and their type
    roles: ColumnRoles
    form: Form  # in which they are stored, or leave the stream

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width before anything is cut at random from the images."""
        return self.form.size

    @property
    def values_per_image(self) -> int:
        """As stored."""
        return math.prod(self.stored_size) * self.channels

    @property
    def bytes_per_image(self) -> int:
        return self.values_per_image * np.dtype(self.form.dtype).itemsize

    @property
    def label_column(self) -> str | None:
        return self.roles.label

    @property
    def text_column(self) -> str | None:
        return self.roles.text


@dataclass(frozen=True, eq=False)
class ImageData(ImageSet):
    """Preprocessed images. Indices count the usable rows, and raise IndexError outside 0..len-1."""

    dataset: Dataset  # memory-mapped, with one row per row of the source, bad or not: the RESERVED and the kept columns
    class_names: list[str] | None  # of the label column's values 0, 1, ...
    fingerprint: str  # of the usable rows' pixels and kept columns, in order, wherever they lie; 32 hex digits
    rows: np.ndarray | None  # the usable rows, int64; None if all are
    skipped: Sequence[SkippedRow]  # the others

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    @property
    def num_images(self) -> int:
        return len(self)

    @property
    def columns(self) -> list[str]:
        """The kept columns, which can be conditions."""
        return [name for name in self.dataset.column_names if name not in RESERVED]

    def rows_of(self, indices: Sequence[int]) -> np.ndarray:
        """These images' row numbers in the source, int64 [B]."""
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"index {indices.min()} or {indices.max()} is outside 0..{len(self) - 1}")
        return indices if self.rows is None else self.rows[indices]

    def pixels(self, indices: Sequence[int], flip: np.ndarray | None = None) -> torch.Tensor:
        """Images [B, C, H, W] of their own type, contiguous; mirrored left to right where `flip`, bool [B], is true."""
        out = np.empty((len(indices), self.values_per_image), dtype=self.form.dtype)
        for image, (chunk, place) in zip(out, self._locate(indices), strict=True):
            image[:] = self._pixel_chunks[chunk][place]
        return images_of(out, self.stored_size, self.channels, flip)

    def column(self, name: str, indices: Sequence[int]) -> torch.Tensor | list:
        """A kept column's values: int64 [B] for labels and whole numbers, else a list of B strings (or lists of them).

        Raises DataError for an unknown column or a missing number.
        """
        values = list(self._cells(name, indices))
        if not is_whole_number(self.dataset.features[name]):
            return values
        if None in values:
            missing = self.rows_of(indices)[values.index(None)]
            raise DataError(f"Row {missing} has no value in the column {name!r}. Fill it in, or remove the row.")
        return torch.tensor(values, dtype=torch.int64)

    def values(self, name: str) -> Iterator[Any]:
        """A kept column's values, one by one in the order of the images. Raises DataError for an unknown column."""
        return self._cells(name, np.arange(len(self)))

    @cached_property
    def _pixel_chunks(self) -> list[np.ndarray]:
        """Views into the memory-mapped file, [rows, H*W*C] each; nothing is read yet."""
        flat = (chunk.flatten().to_numpy(zero_copy_only=True) for chunk in self.dataset.data.column(PIXELS).chunks)
        return [values.reshape(-1, self.values_per_image) for values in flat]

    @cached_property
    def _chunk_starts(self) -> np.ndarray:
        return np.cumsum([0] + [len(chunk) for chunk in self._pixel_chunks])

    def _locate(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(chunk, row in it) per index. Arrow's own `take` would copy every chunk: 20 ms for 150 MB instead of 0.1 ms."""
        rows = self.rows_of(indices)
        chunks = np.searchsorted(self._chunk_starts, rows, side="right") - 1
        return zip(chunks.tolist(), (rows - self._chunk_starts[chunks]).tolist(), strict=True)

    def _cells(self, name: str, indices: Sequence[int]) -> Iterator[Any]:
        check_column(name, self.dataset.features)
        column = self.dataset.data.column(name)
        return (column.chunk(chunk)[place].as_py() for chunk, place in self._locate(indices))

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which a worker process rebuilds from the file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def cache_key(kind: str, *parts: Any) -> str:
    return hash_of(kind, PREPROCESSING_VERSION, *parts)


def images_of(flat: np.ndarray, size: tuple[int, int], channels: int, flip: np.ndarray | None = None) -> torch.Tensor:
    """Rows of H*W*C values [B, H*W*C] as images [B, C, H, W] of their type; mirrored where `flip`, bool [B], is true."""
    shape = (len(flat), *size, channels)
    images = torch.from_numpy(flat).view(shape).permute(0, 3, 1, 2).contiguous()  # [B, H, W, C] -> [B, C, H, W]
    if flip is not None:
        array, mirrored = images.numpy(), np.asarray(flip, dtype=bool)  # numpy's view: twice as fast as torch here
        array[mirrored] = array[mirrored][..., ::-1]
    return images


def load_images(
    options: DataOptions, columns: ConditionColumns = UNCONDITIONAL, value_range: ValueRange | None = None
) -> ImageData:
    """The images that the options name, preprocessed, from the cache if they are there.

    `options.dataset` is the first of these that exists: a bundled data set such as "digits"; a local folder, archive, table or
    pattern of tables (docs/data.md); a data set on the Hub. Size, channels and depth default to the data's own, the label
    column to the only ClassLabel column. Rows whose image cannot be read, or that lack what the condition reads, are skipped.

    A `value_range` is that of a model which is evaluated on the images: they are read in its type, and values beyond it are
    clipped, in place of what `options.value_range` says.

    Raises DataError if the data cannot be used as asked, or if all rows or more than `max_bad_fraction` of them are skipped.
    """
    source = load_source(options)
    roles = find_roles(source.dataset.features, options.image_column, columns)
    source = source.with_classes(roles)
    state = source.state(roles.image)
    reading = {"roles": roles, "reach": source.reach, "threads": options.preprocessing_num_workers or 1}
    job = partial(_cached, source, options, roles)
    looked_for = {"raw": is_raw(options, value_range), "channels": options.channels}
    scan = partial(_scan_batch, **looked_for, **reading)
    key = cache_key("scan", state, roles.image, looked_for)
    scanned = job(scan, key, SIZES, 1000, "Looking at image sizes")
    check_rows(repr(options.dataset), _unusable(scanned), len(scanned), options.max_bad_fraction)
    size, form = _found_form(options, scanned, **looked_for)
    form = form if value_range is None else replace(form, dtype=value_range.dtype)
    images = ImageSet(source.name, size, form.channels, unmeasured(form), roles, form)
    _note_resizing(source, images)
    kept = kept_columns(source.dataset.features)
    key = cache_key("pixels", state, roles.image, astuple(form))
    features, batch_size = cache_features(kept, images), BATCH_BYTES // images.bytes_per_image
    preprocess = partial(_preprocess_batch, kept=list(kept), form=form, **reading)
    cached = job(preprocess, key, features, max(1, min(1000, batch_size)), "Preprocessing images")
    data = usable_images(cached, images, repr(options.dataset), options.max_bad_fraction)
    if not form.raw:
        return data
    if value_range is None:
        looked_at = data.pixels(measured_images(len(data), data.bytes_per_image)).numpy()
        value_range = range_of(options.value_range, looked_at, data.name)
    return replace(data, value_range=value_range, fingerprint=hash_of(data.fingerprint, value_range.to_json()))


def is_raw(options: DataOptions, value_range: ValueRange | None) -> bool:
    """Whether values are taken as they are stored: if their range is stated or measured, and not that of a type."""
    if value_range is None:
        return options.value_range is not None
    return value_range.dtype == "int16" or value_range != ValueRange.of_type(value_range.dtype)


def unmeasured(form: Form) -> ValueRange:
    """The range of a type; in place of that of raw values, which is not known yet, any."""
    return ValueRange((0,), (1,), form.dtype) if form.raw else ValueRange.of_type(form.dtype)


def depth_of(low: float, high: float) -> str:
    """The smallest type that holds integers from low to high; float32 if none does, or if they are infinite."""
    return next((depth for depth in DEPTHS[:-1] if np.iinfo(depth).min <= low and high <= np.iinfo(depth).max), DEPTHS[-1])


def _found_form(options: DataOptions, scanned: Dataset, raw: bool, channels: int | None) -> tuple[tuple[int, int], Form]:
    """(size, form) of the images, as far as asked for, or else as found."""
    found = {name: scanned.data.column(name).to_numpy() for name in NO_SHAPE._fields}
    good = found["width"] > 0
    sizes = np.stack([found["height"], found["width"]], axis=1)[good]
    size = options.size
    if size is None or options.resize == "none":
        own = _own_size(options.dataset, sizes)
        if size not in (None, own):
            fix = f"Use --resolution {shown_size(own)}, or --resize crop, pad or stretch"
            raise DataError(
                f"--resize none: the images of {options.dataset!r} are {shown_size(own)}, not {shown_size(size)}. {fix}."
            )
        size = own
    if channels is None and (pages := int(found["pages"].max())) > 1:
        words = "%r has TIFF files of %s pages, of which the first is read. If pages are channels, say --channels %d."
        logger.warning(words, options.dataset, f"{pages} or more" if pages > MAX_CHANNELS else pages, min(pages, MAX_CHANNELS))
    channels = channels or int(found["channels"].max())
    dtype = depth_of(found["low"][good].min(), found["high"][good].max())
    return size, Form(options.stored_size(size), channels, dtype, raw, options.resize)


def _note_resizing(source: Source, to: ImageSet) -> None:
    """Log that the images are resized or change their channels, as far as the first one tells."""
    first = source.dataset.with_format("arrow")[:1].column(to.roles.image)[0]
    with contextlib.suppress(BadImage):
        shape = _shape_of(to.roles.kind, source.reach, to.form.raw, to.channels, row_value(first))
        found, wanted = (shape.height, shape.width, shape.channels), (*to.stored_size, to.channels)
        if found != wanted:
            shapes = " to ".join(f"{h}x{w} with {c} channels" for h, w, c in (found, wanted))
            logger.info("%s: images are resized (%s) and converted, the first from %s", to.name, to.form.resize, shapes)


def usable_images(
    cached: Dataset, of: ImageSet, shown_name: str, max_bad_fraction: float, classes: pa.Array | None = None
) -> ImageData:
    """The rows of the cache that have a good image and a value in the needed column. Raises DataError if too many do not.

    `classes` are the values of the label column, sorted; by default those that occur.
    """
    cached = _with_class_numbers(cached, of.roles.label, classes)
    label = cached.features.get(of.roles.label)  # of a stream, only the needed column is in the cache
    class_names = None if label is None else list(label.names)
    skipped = _unusable(cached, of.roles.needed, of.roles.num_classes(class_names))
    check_rows(shown_name, skipped, len(cached), max_bad_fraction)
    rows = np.setdiff1d(np.arange(len(cached)), [one["row"] for one in skipped]) if skipped else None
    digests = cached.data.column(DIGEST).to_numpy().astype("<u8")
    content = hashlib.blake2b((digests if rows is None else digests[rows]).tobytes(), digest_size=16).hexdigest()
    features = {name: str(feature) for name, feature in cached.features.items() if name not in (REASON, FILE)}
    fingerprint = hash_of(of.size, of.channels, features, content)
    about = (of.name, of.size, of.channels, of.value_range, of.roles, of.form)
    return ImageData(*about, cached, class_names, fingerprint, rows, skipped)


def check_rows(name: str, skipped: Sequence[SkippedRow], total: int, max_bad_fraction: float) -> None:
    """As `check_bad_fraction`; in one line, if too many images are bad for want of `--value_range`."""
    unclear = [one for one in skipped if SAY_RANGE in one["reason"]]
    if len(unclear) / total > max_bad_fraction:
        reason = unclear[0]["reason"].removesuffix(SAY_RANGE).rstrip(",; ")
        raise DataError(
            f"{len(unclear):,} of {total:,} images of {name} have no known black and white: {reason}. State them, as in "
            "--value_range=-1000,3000 or --value_range percentile:1,99."
        )
    check_bad_fraction(name, skipped, len(skipped), total, max_bad_fraction)


def _with_class_numbers(images: Dataset, label_column: str | None, classes: pa.Array | None) -> Dataset:
    """With a label column of any type made a ClassLabel: the values that occur are the classes, named by themselves."""
    feature = images.features.get(label_column)
    if feature is None or isinstance(feature, ClassLabel):
        return images
    column = images.data.column(label_column)
    classes = occurring_classes(column, label_column) if classes is None else classes
    chunks = [pc.index_in(chunk, value_set=classes).cast(pa.int64()) for chunk in column.chunks]  # as in the other columns
    place = images.column_names.index(label_column)
    table = images.data.set_column(place, pa.field(label_column, pa.int64()), pa.chunked_array(chunks))
    features = Features({**images.features, label_column: ClassLabel(names=class_names_of(classes))})
    return Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=images._fingerprint)


def class_names_of(classes: pa.Array) -> list[str]:
    return [str(value) for value in classes.to_pylist()]


def _cached(
    source: Source,
    options: DataOptions,
    roles: ColumnRoles,
    function: Callable,
    key: str,
    features: Features,
    batch_size: int,
    desc: str,
) -> Dataset:
    """`Dataset.map` by a function from Arrow tables to Arrow tables of these features, cached under `key`.

    A file that could not be read is not remembered as bad: when it can be, the cache is made anew.
    """
    folder, dataset = cache_folder(options.cache_dir), source.dataset
    cache = {"new_fingerprint": key, "cache_file_name": str(folder / f"{key}.arrow")}
    batches = {"batched": True, "batch_size": batch_size, "writer_batch_size": batch_size}
    job = {"function": function, "remove_columns": dataset.column_names, "features": features, "desc": desc, **batches, **cache}
    try:
        made = dataset.with_format("arrow").map(**job, load_from_cache_file=True)
        if _readable_again(made, dataset, roles, source.reach):
            made = dataset.with_format("arrow").map(**job, load_from_cache_file=False)
    except OSError as error:
        raise DataError(
            f"Cannot write the preprocessed images to {str(folder)!r}: {describe_exception(error)}. "
            "Free some space there, or choose another folder with --cache_dir."
        ) from error
    return made.with_format(None)


def _readable_again(made: Dataset, dataset: Dataset, roles: ColumnRoles, reach: Reach) -> bool:
    """Whether an image that could not be read when this cache was made can be read now."""
    rows = unreadable_rows(made.data)
    for value in dataset.with_format("arrow")[rows].column(roles.image).to_pylist() if rows else ():
        try:
            reach.fetched(value)
        except BadImage:
            continue
        return True
    return False


def unreadable_rows(cache: pa.Table) -> list[int]:
    """The rows whose file, not its content, was in the way."""
    return pc.indices_nonzero(pc.starts_with(cache.column(REASON), UNREADABLE)).to_pylist()


def _own_size(dataset: str, sizes: np.ndarray) -> tuple[int, int]:
    """The size that all images share, from their heights and widths [N, 2]."""
    different = sorted(map(tuple, np.unique(sizes, axis=0).tolist()), key=lambda size: (size[0] * size[1], size))
    if len(different) == 1:
        return different[0]
    found = f"{len(different)} different sizes, from {shown_size(different[0])} to {shown_size(different[-1])} (height x width)"
    raise DataError(f"The images of {dataset!r} have {found}. Choose one with --resolution, such as 64 or 48x96.")


def cache_features(kept: Features, of: ImageSet) -> Features:
    """The cache's columns: those of preprocessed images, and those kept from the source."""
    pixels = List(Value(of.form.dtype), length=of.values_per_image)
    return Features({PIXELS: pixels, DIGEST: Value("uint64"), **WHY_BAD, **kept})


def _scan_batch(
    table: pa.Table, *, roles: ColumnRoles, reach: Reach, threads: int, raw: bool, channels: int | None
) -> pa.Table:
    look = partial(_shape_of, roles.kind, reach, raw, channels)
    shapes, *why_bad = _each_image(table.column(roles.image), look, NO_SHAPE, threads)
    columns = dict(zip(SIZES, [*zip(*shapes, strict=True), *why_bad], strict=True))
    return pa.Table.from_pydict(columns, schema=SIZES.arrow_schema)


def _shape_of(kind: str, reach: Reach, raw: bool, channels: int | None, value: Any) -> Shape:
    """`image_shape` of a row's image, whose file is read as a whole only if its header does not suffice."""
    with contextlib.suppress(BadImage):
        if file := reach.file_of(value):
            return image_shape(file, kind, raw, channels)
    return read_image(image_shape, kind, reach, raw, channels, value)


def _preprocess_batch(
    table: pa.Table, *, roles: ColumnRoles, reach: Reach, threads: int, kept: list[str], form: Form
) -> pa.Table:
    nothing = np.zeros((*form.size, form.channels), dtype=form.dtype)
    read = partial(read_image, image_pixels, roles.kind, reach, form)
    images, *why_bad = _each_image(table.column(roles.image), read, nothing, threads)
    return cache_table(np.stack(images).reshape(len(table), -1), *why_bad, table.select(kept))


def cache_table(pixels: np.ndarray, reasons: list[str | None], files: list[str | None], kept: pa.Table) -> pa.Table:
    """Rows of the cache: pixels [N, H*W*C]; what is wrong with them; and the N rows of the kept columns."""
    rows = zip(pixels, kept.to_pylist() if kept.column_names else [{}] * len(pixels), strict=True)
    contents = (image.tobytes() + json.dumps(values, sort_keys=True, default=str).encode() for image, values in rows)
    digests = np.frombuffer(b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in contents), "<u8")
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1])
    why_bad = {REASON: pa.array(reasons, pa.string()), FILE: pa.array(files, pa.string())}
    columns = {PIXELS: flat, DIGEST: pa.array(digests, pa.uint64()), **why_bad}
    return pa.table({**columns, **{name: kept.column(name) for name in kept.column_names}})


def read_image(function: Callable, kind: str, reach: Reach, *args: Any) -> Any:
    """`function` of a row's image, the last argument, in a column of that kind. Raises `BadImage`, or `UnreadableFile`."""
    *others, value = args
    try:
        return function(reach.fetched(value), kind, *others)
    except BadImage as error:
        if isinstance(error.__cause__, MemoryError):
            raise UnreadableFile(error.__cause__) from error
        raise


def _each_image(column: pa.ChunkedArray, function: Callable, bad: Any, threads: int) -> Iterator[tuple]:
    """Results of `function` on the images, or `bad` where it raises BadImage; the reasons; the files of the bad ones."""

    def one(scalar: pa.Scalar) -> tuple:
        value = row_value(scalar)  # one by one, since they may be large
        try:
            return function(value), None, None
        except BadImage as error:
            return bad, str(error), image_file(value)

    if threads == 1:
        return zip(*map(one, column), strict=True)
    with ThreadPoolExecutor(threads) as pool:  # decoding and resizing leave the interpreter free
        return zip(*pool.map(one, column), strict=True)


def row_value(scalar: pa.Scalar) -> Any:
    """A cell of an Arrow table as Python has it, but nested lists of numbers as an array of their own type."""
    scalar = scalar.value if isinstance(scalar, pa.ExtensionScalar) else scalar
    if not _is_list(scalar.type) or scalar.values is None:
        return scalar.as_py()
    values, shape = scalar.values, [len(scalar.values)]
    while _is_list(values.type):
        lengths = values.value_lengths().unique().to_pylist()
        if len(lengths) != 1 or None in lengths:
            return scalar.as_py()  # an array that is not regular, which `images` refuses
        shape, values = [*shape, lengths[0]], values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape) if values.null_count == 0 else scalar.as_py()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _unusable(images: Dataset, needed: str | None = None, num_classes: int | None = None) -> list[SkippedRow]:
    """The rows whose image is bad or whose value in the `needed` column is missing, in order."""
    table = images.data
    bad = pc.indices_nonzero(pc.is_valid(table.column(REASON)))
    reasons, files = (table.column(name).take(bad).to_pylist() for name in (REASON, FILE))
    found = {row: skipped_row(row, *why) for row, *why in zip(bad.to_pylist(), reasons, files, strict=True)}
    if needed is not None:
        column = table.column(needed)
        for row in _suspects(column, num_classes):
            reason = missing_value(column[row].as_py(), needed, num_classes)
            if reason is not None:
                found.setdefault(row, skipped_row(row, reason))
    return [found[row] for row in sorted(found)]


def _suspects(column: pa.ChunkedArray, num_classes: int | None) -> Sequence[int]:
    """The rows that `missing_value` may refuse, found by Arrow because there may be millions of good ones."""
    if pa.types.is_list(column.type):
        return range(len(column))
    good = pc.is_valid(column)
    if num_classes is not None:
        good = pc.fill_null(pc.and_(pc.greater_equal(column, 0), pc.less(column, num_classes)), False)
    return pc.indices_nonzero(pc.invert(good)).to_pylist()
