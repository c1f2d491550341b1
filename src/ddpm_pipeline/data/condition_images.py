"""Preprocessed images with what they are conditioned on beside labels and captions: second images, and vectors of numbers.

In a launch of several processes the main one calls `load_images` first (`accelerator.main_process_first()`), and the others
find the caches, Arrow files. Second images have a cache of their own, with the same rows.
"""

import hashlib
import logging
from dataclasses import replace

import numpy as np
import pyarrow.compute as pc
from datasets import Features

from ..support.errors import DataError
from .columns import ColumnRoles, find_roles, kept_columns
from .images import image_file
from .label_maps import MISFIT
from .mapped import REASON, ImageData, fingerprint_of, preprocessed, scan
from .options import UNCONDITIONAL, ConditionColumns, DataOptions, shown_size
from .skipped import SHOWN, check_bad_fraction, describe
from .sources import Source, column_of, hash_of, load_source
from .vectors import Attributes, find_attributes

logger = logging.getLogger(__name__)


def load_images(options: DataOptions, columns: ConditionColumns = UNCONDITIONAL) -> ImageData:
    """The images that the options name, preprocessed, from the cache if they are there.

    `options.dataset` is the first of these that exists: a bundled data set such as "digits"; a local folder, archive, table or
    pattern of tables (docs/data.md); a data set on the Hub. Size and channels default to the data's own, the label column
    to the only ClassLabel column. Rows whose image cannot be read, or that lack what the condition reads, are skipped.

    Raises DataError if the data cannot be used as asked, or if all rows or more than `max_bad_fraction` of them are skipped.
    """
    source = load_source(options, columns)
    roles = find_roles(source.dataset.features, options.image_column, columns)
    source = source.with_classes(roles)
    data = preprocessed(source, options, roles, kept_columns(source.dataset.features))
    if roles.partner is not None:
        data = _with_partners(data, source, options, columns)
    if roles.numbers:
        attributes = attributes_of(source, roles)
        vectors = attributes.read(source.dataset.select_columns(list(roles.numbers)).with_format("arrow")[:])
        _tell_missing(attributes, vectors)
        told = vectors if data.rows is None else vectors[data.rows]
        digest = hashlib.blake2b(told.tobytes(), digest_size=16).hexdigest()
        fingerprint = hash_of(data.fingerprint, attributes.names, digest)
        data = replace(data, attributes=attributes, vectors=vectors, fingerprint=fingerprint)
    return data


def attributes_of(source: Source, roles: ColumnRoles) -> Attributes:
    return find_attributes(roles.numbers, source.dataset.features, lambda name: column_of(source, name))


def _with_partners(data: ImageData, source: Source, options: DataOptions, columns: ConditionColumns) -> ImageData:
    """With the second images, without the rows that have none. Raises DataError for those that do not fit the images."""
    roles = ColumnRoles(data.roles.partner, data.roles.partner_kind, None, None, None)
    _check_sizes(source, options, data.roles, roles)
    given = replace(options, resolution=shown_size(data.size), channels=None)
    second = preprocessed(source, given, roles, Features({}), columns.condition_classes)
    misfits = pc.indices_nonzero(pc.starts_with(second.dataset.data.column(REASON), MISFIT)).to_pylist()
    if misfits:
        skipped = [one for one in second.skipped if one["row"] in misfits[:SHOWN]]
        _refuse(roles.image, len(misfits), len(second.dataset), [describe(one) for one in skipped])
    skipped = {one["row"]: one for one in (*second.skipped, *data.skipped)}
    skipped = [skipped[row] for row in sorted(skipped)]
    total = len(data.dataset)
    check_bad_fraction(repr(options.dataset), skipped, len(skipped), total, options.max_bad_fraction)
    rows = np.setdiff1d(np.arange(total), [one["row"] for one in skipped]) if skipped else None
    fingerprint = hash_of(*(fingerprint_of(images, images.dataset, rows) for images in (data, second)))
    second = replace(second, rows=None)
    return replace(data, condition_images=second, rows=rows, skipped=skipped, fingerprint=fingerprint)


def _check_sizes(source: Source, options: DataOptions, images: ColumnRoles, partners: ColumnRoles) -> None:
    """Raises DataError if second images differ in size from their images."""
    shapes = [scan(source, options, roles).data for roles in (images, partners)]
    widths, heights = (np.stack([table.column(name).to_numpy() for table in shapes]) for name in ("width", "height"))  # [2, N]
    different = np.flatnonzero(widths.all(axis=0) & ((widths[0] != widths[1]) | (heights[0] != heights[1])))
    if len(different):
        rows = source.dataset.with_format("arrow")[different[:SHOWN]].column(partners.image).to_pylist()
        found = []
        for row, value in zip(different, rows, strict=False):
            sizes = [shown_size(size) for size in zip(heights[:, row].tolist(), widths[:, row].tolist(), strict=True)]
            file = f" ({image_file(value)})" if image_file(value) else ""
            found.append(f"row {row}{file}: {sizes[1]}, its image {sizes[0]}")
        _refuse(partners.image, len(different), len(widths[0]), found, "differ in size from their images")


def _refuse(column: str, count: int, of: int, found: list[str], why: str = "cannot be used") -> None:
    more = "; ..." if count > len(found) else ""
    raise DataError(f"{count:,} of {of:,} condition images ({column!r}) {why}: {'; '.join(found)}{more}.")


def _tell_missing(attributes: Attributes, vectors: np.ndarray) -> None:
    missing = dict(zip(attributes.names, np.isnan(vectors).sum(axis=0).tolist(), strict=True))
    if told := [f"{name} {count:,}" for name, count in missing.items() if count]:
        logger.info("Of %d rows, not told: %s", len(vectors), ", ".join(told))
