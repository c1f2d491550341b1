"""Images preprocessed once into a memory-mapped cache, from which batches are read without touching an image file.

`condition_images` loads them with what they are conditioned on. `streamed` fills a cache of the same form.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from ..ranges_alpha_ddpm import ValueRange
from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .columns import RESERVED, ColumnRoles, check_column, is_whole_number, missing_value, occurring_classes
from .files import UNREADABLE, Reach, UnreadableFile
from .images import SAY_RANGE, BadImage, Form, Shape, image_file, image_pixels, image_shape
from .label_maps import form_of_label_maps, label_map
from .options import MAX_CHANNELS, DataOptions, shown_size
from .ranges import depth_of, is_raw, measured_images, range_of, unmeasured, warn_of_clipped, warn_of_dark
from .skipped import SkippedRow, check_bad_fraction, skipped_row
from .sources import Source, cache_folder, hash_of
from .vectors import Attributes
from .views import Views

logger = logging.getLogger(__name__)

PREPROCESSING_VERSION = 5  # part of the cache's key: raise it when the same options give other pixels
BATCH_BYTES = 2**25  # of pixels preprocessed at a time

PIXELS, DIGEST, REASON, FILE, IMAGE_DIGEST = RESERVED
WHY_BAD = {REASON: Value("string"), FILE: Value("string")}  # of a row's image; null if it is good
NO_SHAPE = Shape(0, 0, 0, 0, 0, 0)
SIZES = Features({**{name: Value("float64") for name in NO_SHAPE._fields}, **WHY_BAD})


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
    size: tuple[int, int]  # height and width, as the images are seen
    form: Form  # in which they are stored, perhaps larger, so that windows can be taken of them
    value_range: ValueRange  # of the pixels
    roles: ColumnRoles
    held_out: "ImageData | None" = field(default=None, kw_only=True)  # images that are not trained on
    resized: bool = field(default=False, kw_only=True)  # whether windows are, so that the plain view is of the whole image
    classes: int | None = field(default=None, kw_only=True)  # of label maps: the pixels are 0..classes-1, or VOID
    condition_images: "ImageSet | None" = field(default=None, kw_only=True)  # mapped, with a row per row of the source
    attributes: Attributes | None = field(default=None, kw_only=True)  # what vectors hold

    @property
    def vector_names(self) -> list[str]:
        return self.attributes.names

    @property
    def stored_size(self) -> tuple[int, int]:
        return self.form.size

    @property
    def channels(self) -> int:
        return self.form.channels

    @property
    def values_per_image(self) -> int:
        return math.prod(self.stored_size) * self.channels

    @property
    def bytes_per_image(self) -> int:
        return self.values_per_image * np.dtype(self.form.dtype).itemsize

    @property
    def view(self) -> Views:
        """How the images are seen if nothing is random."""
        return Views(self.size, self.resized)

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
    vectors: np.ndarray | None = None  # of all rows of the source, float32 [N, K]; NaN where a number is not told

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

    def pixels(self, indices: Sequence[int], views: Views | None = None) -> torch.Tensor:
        """Images [B, C, *size] of their own type, contiguous; by default in their plain view. Label maps by nearest pixels."""
        stored = [self._pixel_chunks[chunk][place] for chunk, place in self._locate(indices)]
        return (views or self.view).apply(stored or self._pixel_chunks[0][:0], nearest=self.classes is not None)

    def shown(self, count: int) -> "ImageData":
        """Images for previews: all, and of a stream the first `count`."""
        return self

    def vector(self, indices: Sequence[int]) -> torch.Tensor:
        """The numbers of images, float32 [B, K] in the order of `vector_names`; NaN where one is not told."""
        return torch.from_numpy(self.vectors[self.rows_of(indices)])

    @property
    def vector_statistics(self) -> tuple[list[float], list[float]]:
        """(means, deviations) of the numbers where they are told. Raises DataError for one that says nothing."""
        return self.attributes.statistics(self.vectors if self.rows is None else self.vectors[self.rows])

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
        """Views into the memory-mapped file, [rows, H, W, C] each; nothing is read yet."""
        flat = (chunk.flatten().to_numpy(zero_copy_only=True) for chunk in self.dataset.data.column(PIXELS).chunks)
        return [values.reshape(-1, *self.stored_size, self.channels) for values in flat]

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


def other_size(size: Sequence[int], partner: Sequence[int]) -> str | None:
    """Why a condition image of size `partner`, (height, width), does not fit an image of `size`; None if it does."""
    return None if size == partner else f"it is {shown_size(partner)}, and the image {shown_size(size)}"


def cache_key(kind: str, *parts: Any) -> str:
    return hash_of(kind, PREPROCESSING_VERSION, *parts)


def scan(source: Source, options: DataOptions, roles: ColumnRoles, raw: bool, channels: int | None) -> Dataset:
    """The SIZES of the images, from the cache if they are there; `raw` and `channels` as for `image_shape`."""
    key = cache_key("scan", source.state(roles.image), roles.image, raw, channels)
    look = partial(shape_of, roles.kind, source.reach, raw=raw, channels=channels)
    batch = partial(_scan_batch, column=roles.image, look=look, threads=options.preprocessing_num_workers or 1)
    return _cached(source, options, roles, batch, key, SIZES, 1000, "Looking at image sizes")


def preprocessed(
    source: Source,
    options: DataOptions,
    roles: ColumnRoles,
    kept: Features,
    classes: int | None = None,
    value_range: ValueRange | None = None,
) -> ImageData:
    """The images in the roles' column, with these columns beside them, from the cache if they are there.

    Size, channels and depth default to the data's own; with `classes`, the images are label maps. A `value_range` is a model's:
    images are read in its type, and values beyond it are clipped. Raises DataError if all rows or more than `max_bad_fraction`
    of them are skipped, or if the images do not fit the options.
    """
    raw, channels = bool(classes) or is_raw(options, value_range), 1 if classes else options.channels
    scanned = scan(source, options, roles, raw, channels)
    check_rows(source.name, _unusable(scanned), len(scanned), options.max_bad_fraction)
    size, form = _found_form(source.name, options, scanned, raw, channels)
    if value_range is not None:
        form = replace(form, dtype=value_range.dtype)
    if classes:
        form = form_of_label_maps(form, classes)
    images = ImageSet(source.name, size, form, unmeasured(form), roles, classes=classes, resized=options.resizes_windows)
    key = cache_key("pixels", source.state(roles.image), roles.image, astuple(form), classes, list(kept))
    features, batch_size = cache_features(kept, images), max(1, min(1000, BATCH_BYTES // images.bytes_per_image))
    threads = options.preprocessing_num_workers or 1
    preprocess = partial(_preprocess_batch, kept=list(kept), to=images, reach=source.reach, threads=threads)
    cached = _cached(source, options, roles, preprocess, key, features, batch_size, "Preprocessing images")
    data = usable_images(cached, images, options.max_bad_fraction)
    if classes or not raw:
        if form.dtype == "uint16" and not classes and value_range is None:
            warn_of_dark(_looked_at(data), data.name)
        return data
    if value_range is None:
        data = measured(data, options.value_range)
    else:
        warn_of_clipped(_looked_at(data), value_range, data.name)
        data = replace(data, value_range=value_range)
    return replace(data, fingerprint=fingerprint_of(data, data.dataset, data.rows))


def _found_form(
    name: str, options: DataOptions, scanned: Dataset, raw: bool, channels: int | None
) -> tuple[tuple[int, int], Form]:
    """(size, form) of the images, as far as asked for, or else as found."""
    found = {name: scanned.data.column(name).to_numpy() for name in NO_SHAPE._fields}
    good = found["width"] > 0
    size, sizes = options.size, np.stack([found["height"], found["width"]], axis=1)[good].astype(int)
    own = None if size and options.resize != "none" else _own_size(name, options.resize, sizes)
    size = size or own
    if options.resize == "none" and ((size != own and not options.window_share) or size[0] > own[0] or size[1] > own[1]):
        fix = f"Use --resolution {shown_size(own)}, --resize crop, pad or stretch, or --random_crop 1 for smaller windows"
        raise DataError(f"--resize none: the images of {name!r} are {shown_size(own)}, not {shown_size(size)}. {fix}.")
    stored = options.stored_size(size, own if options.resize == "none" else None)
    if channels is None and (pages := int(found["pages"].max())) > 1:
        words = "%r has TIFF files of several pages, of which the first is read. If pages are channels, say --channels %d"
        logger.warning(words, name, min(pages, MAX_CHANNELS))
    depth = depth_of(found["low"][good].min(), found["high"][good].max())
    form = Form(stored, channels or int(found["channels"].max()), depth, raw, options.resize)
    first, wanted = (*sizes[0].tolist(), int(found["channels"][good][0])), (*stored, form.channels)
    if first != wanted:
        shapes = " to ".join(f"{h}x{w} with {c} channels" for h, w, c in (first, wanted))
        logger.info("%s: images are resized (%s) and converted, the first from %s", name, options.resize, shapes)
    return size, form


def measured(data: ImageData, text: str) -> ImageData:
    """In the range that `--value_range` asks for. Raises DataError if it does not fit the images."""
    return replace(data, value_range=range_of(text, _looked_at(data), data.name))


def _looked_at(data: ImageData) -> np.ndarray:
    """The images [N, C, H, W] that stand for all."""
    return data.pixels(measured_images(len(data), data.bytes_per_image)).numpy()


def usable_images(cached: Dataset, of: ImageSet, max_bad_fraction: float, classes: pa.Array | None = None) -> ImageData:
    """The rows of the cache that have a good image and a value in the needed column. Raises DataError if too many do not.

    `classes` are the values of the label column, sorted; by default those that occur.
    """
    cached = _with_class_numbers(cached, of.roles.label, classes)
    label = cached.features.get(of.roles.label)  # of a stream, only the needed column is in the cache
    class_names = None if label is None else list(label.names)
    skipped = _unusable(cached, of.roles.needed, of.roles.num_classes(class_names))
    check_rows(of.name, skipped, len(cached), max_bad_fraction)
    rows = np.setdiff1d(np.arange(len(cached)), [one["row"] for one in skipped]) if skipped else None
    about = {field.name: getattr(of, field.name) for field in fields(ImageSet)}
    own = {"dataset": cached, "class_names": class_names, "fingerprint": fingerprint_of(of, cached, rows)}
    return ImageData(**about, **own, rows=rows, skipped=skipped)


def fingerprint_of(images: ImageSet, cached: Dataset, rows: np.ndarray | None) -> str:
    """32 hex digits of these rows of the cache."""
    digests = cached.data.column(DIGEST).to_numpy().astype("<u8")
    content = hashlib.blake2b((digests if rows is None else digests[rows]).tobytes(), digest_size=16).hexdigest()
    features = {name: str(feature) for name, feature in cached.features.items() if name not in (REASON, FILE, IMAGE_DIGEST)}
    measured = [] if images.value_range == unmeasured(images.form) else [images.value_range.to_json()]
    return hash_of(images.size, images.channels, features, content, *measured)


def check_rows(name: str, skipped: Sequence[SkippedRow], total: int, max_bad_fraction: float) -> None:
    """As `check_bad_fraction`; in one line, if too many images are bad for want of `--value_range`."""
    unclear = [one["reason"] for one in skipped if SAY_RANGE in one["reason"]]
    if len(unclear) / total > max_bad_fraction:
        found, why = f"{len(unclear):,} of {total:,} images of {name!r}", unclear[0].partition(SAY_RANGE)[0]
        fix = "state them, --value_range=-1000,3000, or measure them, --value_range percentile:1,99 (as for condition images)"
        raise DataError(f"{found} have no known black and white: {why}{fix}.")
    check_bad_fraction(repr(name), skipped, len(skipped), total, max_bad_fraction)


def _with_class_numbers(images: Dataset, label_column: str | None, classes: pa.Array | None) -> Dataset:
    """With a label column of any type made a ClassLabel: the values that occur are the classes, named by themselves."""
    feature = images.features.get(label_column)
    if feature is None or isinstance(feature, ClassLabel):
        return images
    column = images.data.column(label_column)
    classes = occurring_classes(column, label_column) if classes is None else classes
    chunks = [pc.index_in(chunk, value_set=classes).cast(pa.int64()) for chunk in column.chunks]  # as in the other columns
    return with_class_column(images, label_column, chunks, class_names_of(classes))


def with_class_column(images: Dataset, name: str, chunks: list[pa.Array], class_names: list[str]) -> Dataset:
    """With class numbers, int64 in chunks as of the other columns, in the place of a column."""
    column, place = pa.chunked_array(chunks), images.column_names.index(name)
    table = images.data.set_column(place, pa.field(name, pa.int64()), column)
    features = Features({**images.features, name: ClassLabel(names=class_names)})
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
    if not (folder / f"{key}.arrow").exists():
        logger.info("%s: %s of %d rows", source.name, desc.lower(), len(dataset))
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


def _own_size(name: str, resize: str, sizes: np.ndarray) -> tuple[int, int]:
    """The size that all images share, from their heights and widths [N, 2]."""
    different = sorted(map(tuple, np.unique(sizes, axis=0).tolist()), key=lambda size: (size[0] * size[1], size))
    if len(different) == 1:
        return different[0]
    found = f"{len(different)} different sizes, from {shown_size(different[0])} to {shown_size(different[-1])} (height x width)"
    fix = "Make them one with --resize crop, pad or stretch, and" if resize == "none" else "Choose one with"
    raise DataError(f"The images of {name!r} have {found}. {fix} --resolution, such as 64 or 48x96.")


def cache_features(kept: Features, of: ImageSet) -> Features:
    """The cache's columns: those of preprocessed images, and those kept from the source."""
    pixels = List(Value(of.form.dtype), length=of.values_per_image)
    return Features({PIXELS: pixels, DIGEST: Value("uint64"), IMAGE_DIGEST: Value("uint64"), **WHY_BAD, **kept})


def _scan_batch(table: pa.Table, *, column: str, look: Callable, threads: int) -> pa.Table:
    shapes, *why_bad = _each_image(table.column(column), look, NO_SHAPE, threads)
    columns = dict(zip(SIZES, [*zip(*shapes, strict=True), *why_bad], strict=True))
    return pa.Table.from_pydict(columns, schema=SIZES.arrow_schema)


def shape_of(kind: str, reach: Reach, value: Any, raw: bool = False, channels: int | None = None) -> Shape:
    """`image_shape` of a row's image, whose file is read as a whole only if its header does not suffice."""
    with contextlib.suppress(BadImage):
        if file := reach.file_of(value):
            return image_shape(file, kind, raw, channels)
    return read_image(image_shape, kind, reach, raw, channels, value)


def _preprocess_batch(table: pa.Table, *, kept: list[str], to: ImageSet, reach: Reach, threads: int) -> pa.Table:
    nothing = np.zeros((*to.stored_size, to.channels), dtype=to.form.dtype)
    images, *why_bad = _each_image(table.column(to.roles.image), partial(pixels_of, to, reach), nothing, threads)
    return cache_table(np.stack(images).reshape(len(table), -1), *why_bad, table.select(kept))


def cache_table(pixels: np.ndarray, reasons: list[str | None], files: list[str | None], kept: pa.Table) -> pa.Table:
    """Rows of the cache: pixels [N, H*W*C]; what is wrong with them; and the N rows of the kept columns."""
    rows = zip(pixels, kept.to_pylist() if kept.column_names else [{}] * len(pixels), strict=True)
    of_images, of_rows = [], []
    for image, values in rows:
        digest = hashlib.blake2b(image.tobytes(), digest_size=8)
        of_images.append(digest.digest())
        digest.update(json.dumps(values, sort_keys=True, default=str).encode())  # as if of both one after the other
        of_rows.append(digest.digest())
    digests, image_digests = (pa.array(np.frombuffer(b"".join(each), "<u8"), pa.uint64()) for each in (of_rows, of_images))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1])
    why_bad = {REASON: pa.array(reasons, pa.string()), FILE: pa.array(files, pa.string())}
    columns = {PIXELS: flat, DIGEST: digests, IMAGE_DIGEST: image_digests, **why_bad}
    return pa.table({**columns, **{name: kept.column(name) for name in kept.column_names}})


def pixels_of(to: ImageSet, reach: Reach, value: Any) -> np.ndarray:
    """A row's image or label map as pixels of that set, [H, W, C]. Raises `BadImage`, or `UnreadableFile`."""
    if to.classes:
        return read_image(label_map, to.roles.kind, reach, to.form, to.classes, value)
    return read_image(image_pixels, to.roles.kind, reach, to.form, value)


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
