"""The images that a run holds out: what `--validation_split` names, read as the training images are and never trained on.

Called by training and evaluation. Whether an image is held out, or the same as another, is told from its pixels after
preprocessing.
"""

import logging
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa

from ..ranges_alpha_ddpm import ValueRange
from ..support.errors import DataError
from .columns import IMAGE_DIGEST
from .mapped import ImageData, ImageSet, fingerprint_of, measured, with_class_column
from .options import PERCENTILES, ConditionColumns, HeldOutDataOptions
from .skipped import SHOWN, describe
from .sources import hash_of
from .streamed import StreamData, open_data

logger = logging.getLogger(__name__)

FEWEST = 2  # held-out images, so that figures have a standard error


def open_training_data(
    options: HeldOutDataOptions, columns: ConditionColumns, streamed: int, *model_ranges: ValueRange | None
) -> ImageSet:
    """The images to train on, with those held out, if any: all of them or, beside a stream, the first `streamed`. The ranges
    of values are those of a model that is evaluated, as in `load_images`.

    Raises DataError if nothing would be left to train on or to hold out, or if the held-out images lack the training images'
    classes or columns.
    """
    data, given, share = open_data(options, columns, *model_ranges), options.validation_split, options.held_out_share
    if given is None:
        return data
    if share is None:
        held_out = _load(options, columns, data, streamed)
    else:
        held_out = part(data, image_digests(data) < np.uint64(share * 2**64))
    left, count = data, "a stream"
    if isinstance(data, ImageData):
        same = np.isin(image_digests(data), image_digests(held_out))
        left = part(data, ~same) if same.any() else data
        count = f"{len(left):,} of {len(data):,}, which are not held out"
    if len(held_out) < FEWEST or left.num_images == 0:
        what = f"{len(held_out):,} images, and leaves {count}"
        raise DataError(f"--validation_split {given} holds out {what}. Hold out at least {FEWEST} images, and not all.")
    if left is not data:
        left = _measured(left, options)
        held_out = _in_ranges_of(left, held_out)
    logger.info("held out (--validation_split %s): %d images; trained on: %s", given, len(held_out), count)
    return replace(left, held_out=held_out)


def image_digests(data: ImageData) -> np.ndarray:
    """A number per image that depends on its pixels alone, uint64 [N], evenly distributed."""
    return data.dataset.data.column(IMAGE_DIGEST).to_numpy()[data.rows_of(range(len(data)))]


def part(data: ImageData, chosen: np.ndarray) -> ImageData:
    """The images where `chosen`, bool [N], is true."""
    rows = data.rows_of(np.flatnonzero(chosen))
    return replace(data, rows=rows, fingerprint=hash_of(data.fingerprint, fingerprint_of(data, data.dataset, rows)))


def _measured(data: ImageData, options: HeldOutDataOptions) -> ImageData:
    """With percentiles of these images' values, if that is what --value_range asks for, and of their condition images'."""
    if not (options.value_range or "").startswith(PERCENTILES):
        return data
    second = data.condition_images
    if second is not None and not second.classes:
        second = replace(measured(replace(second, rows=data.rows), options.value_range), rows=None)
    return replace(measured(data, options.value_range), condition_images=second)


def _in_ranges_of(training: ImageData, held_out: ImageData) -> ImageData:
    second = held_out.condition_images
    second = second and replace(second, value_range=training.condition_images.value_range)
    return replace(held_out, value_range=training.value_range, condition_images=second)


def _load(options: HeldOutDataOptions, columns: ConditionColumns, like: ImageSet, streamed: int) -> ImageData:
    """The split, folder or file that `options` name, with the size, channels and class numbers of the training images."""
    given, is_path = options.validation_split, options.validation_path
    place = {"dataset": given, "dataset_config": None, "split": "train"} if is_path else {"split": given}
    own = replace(options, validation_split=None, **place, resolution=like.size, channels=like.channels)
    ranges = like.value_range, like.condition_images and like.condition_images.value_range
    try:
        found = open_data(own, columns, *ranges)
        found = found.stored(streamed, own.cache_dir) if isinstance(found, StreamData) else found
        if found.roles.needed != like.roles.needed:
            raise DataError(f"its condition is in the column {found.roles.needed!r}, and not in {like.roles.needed!r}.")
        found = _with_labels_of(like, _with_classes_of(like, found))
    except DataError as error:
        folder = "" if is_path or not os.path.exists(given) else f" The folder of that name is ./{given}."
        raise DataError(f"--validation_split {given}: {error}{folder}") from error
    if found.skipped:
        first = "; ".join(map(describe, found.skipped[:SHOWN]))
        logger.warning("--validation_split %s: %d rows cannot be used and are skipped: %s", given, len(found.skipped), first)
    return found


def _with_classes_of(training: ImageSet, held_out: ImageData) -> ImageData:
    """With the training images' class numbers, if a label is what the condition reads."""
    label, names = training.label_column, training.class_names
    if label is None or training.roles.needed != label or held_out.class_names == names:
        return held_out
    number_of = {number: names.index(name) for number, name in enumerate(held_out.class_names) if name in names}
    for number in held_out.column(label, range(len(held_out))).unique().tolist():
        _check_known("class", held_out.class_names[number], number in number_of, names)
    chunks = (chunk.to_pylist() for chunk in held_out.dataset.data.column(label).chunks)
    column = [pa.array([number_of.get(number) for number in chunk], pa.int64()) for chunk in chunks]
    dataset = with_class_column(held_out.dataset, label, column, names)
    return replace(held_out, dataset=dataset, class_names=names, fingerprint=hash_of(held_out.fingerprint, names))


def _with_labels_of(training: ImageSet, held_out: ImageData) -> ImageData:
    """With vectors that have a number for each label of the training images."""
    if training.attributes is None or held_out.vector_names == training.vector_names:
        return held_out
    names, own = training.vector_names, held_out.vector_names
    for name in own:
        _check_known("label", name, name in names, names)
    vectors = np.zeros((1, len(names)), np.float32) * held_out.vectors.sum(axis=1, keepdims=True)  # NaN if one is not told
    vectors[:, [names.index(name) for name in own]] = held_out.vectors
    return replace(held_out, attributes=training.attributes, vectors=vectors)


def _check_known(kind: str, name: str, known: bool, names: list[str]) -> None:
    if not known:
        raise DataError(f"its {kind} {name!r} is not among the {len(names)} of the training images, {names[:10]}.")
