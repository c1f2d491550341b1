"""Preprocessed images with what they are conditioned on beside labels and captions: second images, and vectors of numbers.

In a launch of several processes the main one calls `load_images` first (`accelerator.main_process_first()`), and the others
find the caches, Arrow files. Second images have a cache of their own, with the same rows.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features

from ..ranges_alpha_ddpm import ValueRange
from .columns import ColumnRoles, find_roles, kept_columns
from .images import image_file
from .mapped import ImageData, check_rows, fingerprint_of, other_size, preprocessed, row_value, scan
from .options import PERCENTILES, UNCONDITIONAL, ConditionColumns, DataOptions, shown_size
from .skipped import SkippedRow, skipped_row
from .sources import Source, column_of, hash_of, load_source
from .vectors import Attributes, find_attributes

logger = logging.getLogger(__name__)

CONDITION_IMAGE = "the condition image: "  # begins the reason of a row that is bad for it


def load_images(options: DataOptions, columns: ConditionColumns = UNCONDITIONAL, *model_ranges: ValueRange | None) -> ImageData:
    """The images that the options name, preprocessed, from the cache if they are there.

    `options.dataset` is the first of these that exists: a bundled data set such as "digits"; a local folder, archive, table or
    pattern of tables (docs/data.md); a data set on the Hub. Size, channels and depth default to the data's own, the label
    column to the only ClassLabel column. Rows whose image cannot be read, or that lack what the condition reads, are skipped.

    The `model_ranges` are those of a model that is evaluated on the data, of its images and of its condition images: they are
    read in these types, and values beyond the ranges are clipped.

    Raises DataError if the data cannot be used as asked, or if all rows or more than `max_bad_fraction` of them are skipped.
    """
    source = load_source(options, columns)
    roles = find_roles(source.dataset.features, options.image_column, columns)
    source = source.with_classes(roles)
    of_images, of_partners, *_ = (*model_ranges, None, None)
    data = preprocessed(source, options, roles, kept_columns(source.dataset.features), value_range=of_images)
    if roles.partner is not None:
        data = _with_partners(data, source, options, columns, of_partners)
    if roles.numbers:
        data = replace(data, attributes=attributes_of(source, roles))
        data = with_vectors(data, source.dataset.select_columns(list(roles.numbers)).with_format("arrow")[:])
    return data


def attributes_of(source: Source, roles: ColumnRoles) -> Attributes:
    return find_attributes(roles.numbers, source.dataset.features, lambda name: column_of(source, name))


def source_of_partners(source: Source) -> Source:
    return replace(source, name=f"{source.name} (condition images)")


def options_of_partners(options: DataOptions) -> DataOptions:
    """How second images are read: with channels of their own, and percentiles of their own or the range of their type."""
    percentiles = (options.value_range or "").startswith(PERCENTILES)
    return replace(options, channels=None, value_range=options.value_range if percentiles else None)


def _with_partners(
    data: ImageData, source: Source, options: DataOptions, columns: ConditionColumns, value_range: ValueRange | None
) -> ImageData:
    """With the second images, without the rows where they cannot be read or do not fit the image. Raises DataError."""
    roles = ColumnRoles(data.roles.partner, data.roles.partner_kind, None, None, None)
    given = replace(options_of_partners(options), resolution=shown_size(data.size))
    source = source_of_partners(source)
    second = preprocessed(source, given, roles, Features({}), columns.condition_classes, value_range)
    unread = [{**one, "reason": CONDITION_IMAGE + one["reason"]} for one in second.skipped]
    shapes = [
        scan(source, options, data.roles, data.form.raw, options.channels),
        scan(source, given, roles, second.form.raw, 1 if second.classes else None),
    ]
    bad = [*unread, *_of_another_size(source, roles.image, *shapes)]
    return joined(data, second, bad, options.max_bad_fraction)


def joined(data: ImageData, second: ImageData, bad: list[SkippedRow], max_bad_fraction: float) -> ImageData:
    """Images with their second images, without these bad rows. Raises DataError if too many rows are bad by now."""
    skipped, total = {one["row"]: one for one in (*bad, *data.skipped)}, len(data.dataset)
    skipped = [skipped[row] for row in sorted(skipped)]
    check_rows(data.name, skipped, total, max_bad_fraction)
    rows = np.setdiff1d(np.arange(total), [one["row"] for one in skipped]) if skipped else None
    fingerprint = hash_of(*(fingerprint_of(images, images.dataset, rows) for images in (data, second)))
    return replace(data, condition_images=replace(second, rows=None), rows=rows, skipped=skipped, fingerprint=fingerprint)


def with_vectors(data: ImageData, table: pa.Table) -> ImageData:
    """With the numbers in a table of the source's rows."""
    names, vectors = data.vector_names, data.attributes.read(table)
    missing = dict(zip(names, np.isnan(vectors).sum(axis=0).tolist(), strict=True))
    if told := [f"{name} {count:,}" for name, count in missing.items() if count]:
        logger.info("Of %d rows, not told: %s", len(vectors), ", ".join(told))
    digest = hashlib.blake2b((vectors if data.rows is None else vectors[data.rows]).tobytes(), digest_size=16).hexdigest()
    return replace(data, vectors=vectors, fingerprint=hash_of(data.fingerprint, names, digest))


def _of_another_size(source: Source, column: str, *scanned: Dataset) -> Iterator[SkippedRow]:
    """The rows whose second image, in this column, differs in size from the image, where both can be read."""
    sizes = np.array([[each.data.column(side).to_numpy() for side in ("height", "width")] for each in scanned])  # [2, 2, N]
    both_read, differ = sizes.all(axis=(0, 1)), (sizes[0] != sizes[1]).any(axis=0)
    rows = source.dataset.with_format("arrow")
    for row in np.flatnonzero(both_read & differ).tolist():
        why = other_size(*sizes[..., row].astype(int).tolist())
        yield skipped_row(row, f"{CONDITION_IMAGE}{why}", image_file(row_value(rows[row].column(column)[0])))
