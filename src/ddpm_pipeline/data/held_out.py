"""The images that a run holds out: what `--validation_split` names, read as the training images are and never trained on.

Called by training. Whether an image is held out, or the same as another, is told from its pixels after preprocessing.
"""

import logging
import os
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features

from ..support.errors import DataError
from .columns import IMAGE_DIGEST
from .condition_images import load_images
from .mapped import ImageData, ImageSet, fingerprint_of
from .options import ConditionColumns, TrainingDataOptions
from .skipped import SHOWN, describe
from .sources import hash_of
from .streamed import StreamData, open_data, open_stream

logger = logging.getLogger(__name__)

FEWEST = 2  # held-out images, so that figures have a standard error


def open_training_data(options: TrainingDataOptions, columns: ConditionColumns, streamed: int) -> ImageSet:
    """The images to train on, with those held out, if any: all of them or, beside a stream, the first `streamed`.

    Raises DataError if nothing would be left to train on or to hold out, or if the held-out images lack the training images'
    classes or columns.
    """
    data, given, share = open_data(options, columns), options.validation_split, options.held_out_share
    if given is None:
        return data
    if isinstance(data, StreamData):
        held_out, left, words = _load(options, columns, data, streamed), data, "a stream is trained on"
    else:
        chosen = None if share is None else image_digests(data) < np.uint64(share * 2**64)
        held_out = _load(options, columns, data, streamed) if share is None else replace(part(data, chosen), skipped=())
        same = np.isin(image_digests(data), image_digests(held_out))
        left = part(data, ~same) if same.any() else data
        words = f"trained on: {len(left):,}"
        if share is None and same.any():
            words += f"; {np.count_nonzero(same):,} images of {data.name} are the same, pixel by pixel, and are left out"
        if len(held_out) < FEWEST or not len(left):
            raise DataError(
                f"--validation_split {given} holds out {len(held_out):,} images, and leaves {len(left):,} of {len(data):,} to "
                f"train on. Hold out at least {FEWEST}, and not all; of few images, a share is not exact."
            )
    logger.info("held out (--validation_split %s): %s images; %s", given, f"{len(held_out):,}", words)
    return replace(left, held_out=held_out)


def image_digests(data: ImageData) -> np.ndarray:
    """A number per image that depends on its pixels alone, uint64 [N], evenly distributed."""
    digests = data.dataset.data.column(IMAGE_DIGEST).to_numpy()
    return digests if data.rows is None else digests[data.rows]


def part(data: ImageData, chosen: np.ndarray) -> ImageData:
    """The images where `chosen`, bool [N], is true."""
    rows = data.rows_of(np.flatnonzero(chosen))
    return replace(data, rows=rows, fingerprint=hash_of(data.fingerprint, fingerprint_of(data, data.dataset, rows)))


def _load(options: TrainingDataOptions, columns: ConditionColumns, like: ImageSet, streamed: int) -> ImageData:
    """The split, folder or file that `options` name, with the size, channels and class numbers of the training images."""
    given, is_path = options.validation_split, options.validation_path
    place = {"dataset": given, "dataset_config": None, "split": "train"} if is_path else {"split": given}
    own = replace(options, validation_split=None, **place, resolution=like.size, channels=like.channels)
    try:
        found = open_stream(own, columns).stored(streamed, own.cache_dir) if own.streaming else load_images(own, columns)
        if found.roles.needed != like.roles.needed:
            raise DataError(f"its condition is in the column {found.roles.needed!r}, and not in {like.roles.needed!r}.")
        found = with_labels_of(like, with_classes_of(like, found))
    except DataError as error:
        folder = "" if is_path or not os.path.exists(given) else f" The folder of that name is ./{given}."
        raise DataError(f"--validation_split {given}: {error}{folder}") from error
    if found.skipped:
        first = "; ".join(map(describe, found.skipped[:SHOWN]))
        logger.warning("--validation_split %s: %d rows cannot be used and are skipped: %s", given, len(found.skipped), first)
    return found


def with_classes_of(training: ImageSet, held_out: ImageData) -> ImageData:
    """The held-out images with the training images' class numbers, if a label is what the condition reads. Raises DataError
    for a class that training does not know.
    """
    label, names = training.label_column, training.class_names
    if training.roles.needed is None or training.roles.needed != label or held_out.class_names == names:
        return held_out
    number_of, rows = {name: number for number, name in enumerate(names)}, held_out.rows_of(range(len(held_out)))
    own = held_out.column(label, range(len(held_out))).numpy()
    unknown = [held_out.class_names[number] for number in np.unique(own) if held_out.class_names[number] not in number_of]
    if unknown:
        raise DataError(f"its class {unknown[0]!r} is not among the {len(names)} of the training images, {names[:10]}.")
    numbers = np.zeros(len(held_out.dataset), np.int64)
    numbers[rows] = [number_of[held_out.class_names[number]] for number in own]
    table, features = held_out.dataset.data, held_out.dataset.features
    ends = np.cumsum([len(chunk) for chunk in table.column(label).chunks])[:-1]  # the same chunks as in the other columns
    column = pa.chunked_array([pa.array(chunk) for chunk in np.split(numbers, ends)])
    table = table.set_column(table.column_names.index(label), pa.field(label, pa.int64()), column)
    info = datasets.DatasetInfo(features=Features({**features, label: ClassLabel(names=names)}))
    fingerprint = hash_of(held_out.fingerprint, names)
    dataset = Dataset(table, info=info, fingerprint=fingerprint)
    return replace(held_out, dataset=dataset, class_names=list(names), fingerprint=fingerprint)


def with_labels_of(training: ImageSet, held_out: ImageData) -> ImageData:
    """The held-out images with vectors that say of each label of the training images whether they have it. Raises DataError for
    a label that training does not know.
    """
    if training.attributes is None or held_out.vector_names == training.vector_names:
        return held_out
    names, own = training.vector_names, held_out.vector_names
    if unknown := [name for name in own if name not in names]:
        raise DataError(f"its label {unknown[0]!r} is not among the {len(names)} of the training images, {names[:10]}.")
    untold = np.isnan(held_out.vectors).all(axis=1)
    vectors = np.where(untold[:, None], np.nan, np.zeros((len(untold), len(names)))).astype(np.float32)
    vectors[:, [names.index(name) for name in own]] = held_out.vectors
    return replace(held_out, attributes=training.attributes, vectors=vectors)
