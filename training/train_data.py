"""Finding, loading, preprocessing and caching the training images.

`load_images` takes what `--dataset` says, finds the image column, brings every image to one size and channel count
once (`train_images`), and keeps the result as a memory-mapped Arrow file; `ImageData` then reads batches from it
without touching an image file. Called by `train.py` and `evaluate.py`; in a launch of several processes the main one
calls it first (`accelerator.main_process_first()`) and the others find the cache.

It imports `datasets`, torch, `train_images` and `train_random`; nothing of the package.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
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
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from train_images import (
    BadImage,
    array_to_image,
    check_channels,
    check_resolution,
    image_size_and_channels,
    native_channels,
    open_image,
    to_array,
)
from train_random import image_indices

logger = logging.getLogger(__name__)

BUILT_IN = "digits"
PIXELS, DIGEST = "pixels", "pixels_digest"  # the columns of the cache beside those kept from the source
PREPROCESSING_VERSION = 1  # part of the cache's key: raise it when the same options give other pixels
BATCH_BYTES = 2**25  # pixels held by the preprocessing at a time
HUB_TIMEOUT = 10  # seconds for the first answer of the Hub

IMAGE_EXTENSIONS = frozenset(ImageFolder.EXTENSIONS)
COMMON_EXTENSIONS = ".png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}  # what folders and files are called -> the split; the names the `datasets` library knows
KINDS = ("image", "image struct", "array", "bytes")  # of image columns; the first kind that a data set has is meant


class DataError(ValueError):
    """The data cannot be used as asked; the message says what was given, what is allowed and what to do."""


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to float32 in [-1, 1], of any shape: x / 127.5 - 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Preprocessed images, and the columns of their source that can serve as conditions."""

    dataset: Dataset  # "pixels" (H*W*C values, HWC order), "pixels_digest" and the kept columns; memory-mapped
    resolution: int
    channels: int
    name: str  # of the built-in or Hub data set, or the last part of a local path
    fingerprint: str  # of pixels and kept columns in their order: the same wherever the data lie, 32 hex digits
    label_column: str | None
    class_names: list[str] | None  # of the label column's values 0, 1, ...
    text_column: str | None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def num_images(self) -> int:
        return len(self)

    @property
    def columns(self) -> list[str]:
        """The kept columns, which can serve as conditions."""
        return [name for name in self.dataset.column_names if name not in (PIXELS, DIGEST)]

    def pixels(self, indices: Sequence[int], flip: np.ndarray | None = None) -> torch.Tensor:
        """Images uint8 [B, C, H, W], contiguous; those where `flip`, bool [B], is true are mirrored left to right.

        Raises IndexError for an index outside 0..len-1.
        """
        out = np.empty((len(indices), self.resolution**2 * self.channels), dtype=np.uint8)
        for row, (chunk, index) in zip(out, self._locate(indices), strict=True):
            row[:] = self._pixel_chunks[chunk][index]
        shape = (len(out), self.resolution, self.resolution, self.channels)
        images = torch.from_numpy(out).view(shape).permute(0, 3, 1, 2).contiguous()  # [B, H, W, C] -> [B, C, H, W]
        if flip is not None:
            array, mirrored = images.numpy(), np.asarray(flip, dtype=bool)  # numpy's view: twice as fast as torch here
            array[mirrored] = array[mirrored][..., ::-1]
        return images

    def column(self, name: str, indices: Sequence[int]) -> torch.Tensor | list:
        """A kept column's values: int64 [B] for labels and whole numbers, else a list of B strings (or lists of them).

        Raises DataError for an unknown column or a missing number, IndexError for an index outside 0..len-1.
        """
        _check_column(name, self.dataset.features)
        column = self.dataset.data.column(name)
        values = [column.chunk(chunk)[index].as_py() for chunk, index in self._locate(indices)]
        if not _is_whole_number(self.dataset.features[name]):
            return values
        if None in values:
            missing = indices[values.index(None)]
            raise DataError(f"row {missing} has no value in the column {name!r}; fill it in or leave the row out.")
        return torch.tensor(values, dtype=torch.int64)

    def values(self, name: str) -> Iterator[Any]:
        """A kept column's values, one by one in the order of the images. Raises DataError for an unknown column."""
        _check_column(name, self.dataset.features)
        return (value.as_py() for value in self.dataset.data.column(name))

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
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"index {rows.min()} or {rows.max()} is outside 0..{len(self) - 1}")
        chunks = np.searchsorted(self._chunk_starts, rows, side="right") - 1
        return zip(chunks.tolist(), (rows - self._chunk_starts[chunks]).tolist(), strict=True)

    def __getstate__(self) -> dict[str, Any]:
        """Without the views, which a worker process makes again from the file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


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
    label_column: str | None = None,
    text_column: str | None = None,
) -> ImageData:
    """The images that `dataset` names, preprocessed, from the cache where they are in it.

    `dataset` is, in this order: the built-in name "digits"; a parquet file or a glob of them; a local folder (saved by
    `Dataset.save_to_disk`, of images, or of parquet files); the name of a data set on the Hub. `resolution` and
    `channels` left out are the data's own: the one square size that all images share, and 1 if all are grey, else 3.
    The label column is by default the only ClassLabel column, if there is one.

    Raises DataError for data that cannot be used as asked, ValueError for an impossible resolution or channel count.
    """
    if resolution is not None:
        check_resolution(resolution)
    if channels is not None:
        check_channels(channels)
    source = _load_source(dataset, dataset_config, split, cache_dir)
    if len(source.dataset) == 0:
        raise DataError(f"the data set {dataset!r} has no rows in its split {split!r}; choose another split.")
    features = source.dataset.features
    column = find_image_column(features, image_column)
    label_column = _label_column(features, label_column, column)
    if text_column is not None:
        _check_text_column(features, text_column, column)
    workers = _workers(preprocessing_num_workers, len(source.dataset))
    job = _Job(source, column, Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline", workers)
    if resolution is None or channels is None:
        sizes, native = _scan(job)
        resolution = resolution or _own_resolution(dataset, sizes)
        channels = channels or native
    images = _preprocess(job, resolution, channels)
    return ImageData(
        dataset=images,
        resolution=resolution,
        channels=channels,
        name=source.name,
        fingerprint=_content_fingerprint(images, resolution, channels),
        label_column=label_column,
        class_names=_class_names(images, label_column),
        text_column=text_column,
    )


# Where the data come from


@dataclass(frozen=True)
class _Source:
    dataset: Dataset
    name: str
    identity: str  # changes when the data do


def _load_source(name: str, config: str | None, split: str, cache_dir: str | None) -> _Source:
    """Decides what `name` is and loads it; anything local goes before a Hub data set of that name."""
    path = Path(name).expanduser() if name else Path("-")
    if name == BUILT_IN:
        if path.exists():
            logger.warning("--dataset digits is the built-in data set; for the local %s say ./%s", path, path)
        return _Source(_cut({"train": _digits()}, split, BUILT_IN), BUILT_IN, _hash(BUILT_IN, split))
    if path.is_dir():
        loaded = _load_folder(path, split, cache_dir)
    elif path.suffix == ".parquet" and (path.is_file() or glob.has_magic(name)):
        loaded = _load_parquet(_matching_files(path), path, split, cache_dir)
    elif path.exists():
        raise DataError(f"--dataset {name!r} is a file, but not parquet; give a folder of images or *.parquet.")
    elif re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name):
        return _with_identity(_load_from_hub(name, config, split, cache_dir), name)
    else:
        raise DataError(
            f"--dataset {name!r}: there is no such folder or parquet file, and it cannot be a Hub data set's name "
            f"('name' or 'owner/name'). Give one of these, or {BUILT_IN!r}."
        )
    return _with_identity(loaded, path.resolve().name)


def _with_identity(dataset: Dataset, name: str) -> _Source:
    """With the library's fingerprint and, since a saved folder may be written anew under the same one, its files."""
    stats = [os.stat(file["filename"]) for file in dataset.cache_files]
    return _Source(dataset, name, _hash(dataset._fingerprint, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; their levels 0..16 become round(v * 255 / 16)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features(
        {"image": datasets.Array2D((8, 8), "uint8"), "label": ClassLabel(names=[str(i) for i in range(10)])}
    )
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    return Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)


def _load_folder(path: Path, split: str, cache_dir: str | None) -> Dataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _load_saved(path, split)
    images, parquet = _find_files(path)
    if images:
        return _load_image_folder(path, split, cache_dir)
    if parquet:
        return _load_parquet(parquet, path, split, cache_dir)
    raise DataError(
        f"the folder {str(path)!r} holds no images ({COMMON_EXTENSIONS}, ...; sub-folders are searched too), no "
        "*.parquet files, and is not one written by Dataset.save_to_disk."
    )


def _find_files(path: Path) -> tuple[bool, list[Path]]:
    """(whether there is an image or an archive that may hold some, all parquet files), hidden ones left aside."""
    parquet = []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith((".", "__")))
        visible = [Path(folder, file) for file in sorted(files) if not file.startswith(".")]
        if any(file.suffix.lower() in IMAGE_EXTENSIONS or file.suffix.lower() == ".zip" for file in visible):
            return True, []
        parquet += [file for file in visible if file.suffix == ".parquet"]
    return False, parquet


def _load_saved(path: Path, split: str) -> Dataset:
    with _as_data_error(f"the saved data set {str(path)!r}"):
        saved = datasets.load_from_disk(str(path))
    return _cut(saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}, split, path)


def _cut(splits: dict[str, Dataset], split: str, name: str | Path) -> Dataset:
    """What a split such as "train", "train[:10%]" or "train+test" means, as `load_dataset` reads it."""
    _check_split(name, split, list(splits))
    with _as_data_error(f"the split {split!r}"):
        lengths = {name: len(dataset) for name, dataset in splits.items()}
        ranges = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in ranges]
        return datasets.concatenate_datasets(parts)


def _load_image_folder(path: Path, split: str, cache_dir: str | None) -> Dataset:
    """A folder of images through `datasets`, with labels from its sub-folders or columns from its metadata file.

    Splits are sub-folders named so, and only where there is nothing else: the library's own rule would take a class
    called "train", or one file with "test" in its name, for the split and leave out all the rest.
    """
    folders = {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[0] not in "._"}
    loose = [file for file in path.iterdir() if file.is_file() and file.suffix.lower() in IMAGE_EXTENSIONS]
    if not folders or loose or any(name.lower() not in SPLIT_NAMES for name in folders):
        files, flat = {"train": ["**"]}, False
    else:
        files = {}
        for name in folders:
            files.setdefault(SPLIT_NAMES[name.lower()], []).append(f"{glob.escape(name)}/**")
        flat = all(entry.is_file() for folder in folders.values() for entry in folder.iterdir())
    _check_split(path, split, list(files))
    with _as_data_error(f"the images in {str(path)!r}"):
        return datasets.load_dataset(
            "imagefolder",
            data_dir=glob.escape(str(path)),
            data_files=files,
            drop_labels=True if flat else None,  # the splits' names are no classes
            split=split,
            cache_dir=cache_dir,
        )


def _matching_files(pattern: Path) -> list[Path]:
    files = [pattern] if pattern.is_file() else [Path(file) for file in sorted(glob.glob(str(pattern), recursive=True))]
    if not files:
        raise DataError(f"no file matches --dataset {str(pattern)!r}; check the folder, and quote the pattern.")
    return files


def _load_parquet(files: list[Path], path: Path, split: str, cache_dir: str | None) -> Dataset:
    """Parquet files: of a folder, in the splits that they are named after; of a glob, all of them, as "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        found = _split_of(file.relative_to(path)) if path.is_dir() else "train"
        splits.setdefault(found or "", []).append(str(file.resolve()))
    if set(splits) == {""}:
        splits = {"train": splits[""]}
    elif "" in splits:
        raise DataError(
            f"some parquet files in {str(path)!r} are named after a split and others, such as {splits[''][0]!r}, "
            "are not; name those you mean by a pattern, such as 'folder/*.parquet'."
        )
    _check_split(path, split, list(splits))
    escaped = {name: [glob.escape(file) for file in found] for name, found in splits.items()}
    with _as_data_error(f"the parquet files {str(path)!r}"):
        return datasets.load_dataset("parquet", data_files=escaped, split=split, cache_dir=cache_dir)


def _split_of(file: Path) -> str | None:
    """The split that a relative path is named after: `train/0.parquet`, `train-00000-of-00002.parquet`; or None."""
    words = [*file.parent.parts, *re.split(r"[-._\s\d]+", file.stem)]
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def _load_from_hub(name: str, config: str | None, split: str, cache_dir: str | None) -> Dataset:
    """A Hub data set; from the cache at once if the Hub is out of reach, where the library would retry for 20 s."""
    offline = datasets.config.HF_HUB_OFFLINE
    reachable = not offline and _hub_answers(name)
    try:
        with contextlib.nullcontext() if reachable else _offline():
            return datasets.load_dataset(name, config, split=split, cache_dir=cache_dir)
    except Exception as error:
        here = f"--dataset {name!r} is no local folder or file"
        if not reachable:
            why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
            raise DataError(
                f"{here}, {why}, and it is not in the cache of earlier downloads. Check the name and the network, "
                f"or give a local folder, parquet files or {BUILT_IN!r}. ({_summary(error)})"
            ) from error
        raise DataError(f"{here}, and loading it from the Hub failed: {_summary(error)}") from error


def _hub_answers(name: str) -> bool:
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, ValueError):  # an answer, if not a good one: the library words it better
        return True
    except Exception as error:  # the HTTP client in use and its exceptions differ between versions of the library
        logger.warning("The Hub cannot be reached (%s); looking for %s in the cache.", _summary(error), name)
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE were set, for `datasets` only."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _check_split(name: str | Path, split: str, available: list[str]) -> None:
    """Raises DataError unless the split, or what a slice such as "train[:10%]" is cut from, is there."""
    for part in split.split("+"):
        if part.partition("[")[0] not in available:
            raise DataError(f"the data set {str(name)!r} has no split {part!r}; give --split one of {available}.")


@contextlib.contextmanager
def _as_data_error(what: str) -> Iterator[None]:
    """The libraries below raise many types of exception on files that they cannot read."""
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot load {what}: {_summary(error)}") from error


def _summary(error: Exception) -> str:
    """Type and message of an exception, with that of its cause, which often is the telling one."""
    cause = f"; {_summary(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
    return f"{type(error).__name__}: {error}{cause}"


# Columns


def find_image_column(features: Features, named: str | None = None) -> str:
    """The image column's name: the one given, else the only column of the first kind of `KINDS` that there is.

    Kinds: the `Image` feature; structs {bytes, path}; uint8 arrays of two or three dimensions; bytes.
    Raises DataError if there is no such column, or a choice.
    """
    kinds = {name: _image_kind(feature) for name, feature in features.items()}
    if named is not None:
        _check_column(named, features, "--image_column ")
        if kinds[named] is None:
            raise DataError(
                f"--image_column {named!r} has the type {features[named]}, which holds no images; allowed are the "
                f"Image feature, {{bytes, path}} structs, uint8 arrays [H, W] or [H, W, C], and bytes."
            )
        return named
    for kind in KINDS:
        candidates = [name for name in features if kinds[name] == kind]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise DataError(f"there are several image columns, {candidates}; name one with --image_column.")
    columns = ", ".join(f"{name} ({feature})" for name, feature in features.items())
    raise DataError(f"the data set has no image column; its columns are: {columns}.")


def _image_kind(feature: Any) -> str | None:
    if isinstance(feature, datasets.Image):
        return "image"
    if isinstance(feature, dict) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return "image struct" if _is_value(feature["bytes"], "binary", "large_binary") else None
    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return "array" if feature.dtype == "uint8" else None
    if isinstance(feature, List) and isinstance(feature.feature, List):
        inner = feature.feature.feature
        return "array" if _is_value(inner.feature if isinstance(inner, List) else inner, "uint8") else None
    return "bytes" if _is_value(feature, "binary", "large_binary") else None


def _is_value(feature: Any, *dtypes: str) -> bool:
    return isinstance(feature, Value) and feature.dtype in dtypes


def _is_whole_number(feature: Any) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and bool(re.match("u?int", feature.dtype)))


def _is_text(feature: Any) -> bool:
    """Strings, or lists of them: several captions for an image."""
    return _is_value(feature.feature if isinstance(feature, List) else feature, "string", "large_string")


def _kept_columns(features: Features, image_column: str) -> list[str]:
    """The columns that can be conditions, and cost little beside the pixels: labels, whole numbers, texts."""
    others = {name: feature for name, feature in features.items() if name != image_column}
    return [
        name
        for name, feature in others.items()
        if (_is_whole_number(feature) or _is_text(feature)) and name not in (PIXELS, DIGEST)
    ]


def _check_column(name: str, features: Features, option: str = "") -> None:
    if name not in features:
        raise DataError(f"{option}{name!r} is no column of the data set; its columns are {list(features)}.")


def _label_column(features: Features, named: str | None, image_column: str) -> str | None:
    if named is None:
        labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
        return labels[0] if len(labels) == 1 else None
    _check_column(named, features, "--label_column ")
    if named not in _kept_columns(features, image_column) or not _is_whole_number(features[named]):
        raise DataError(
            f"--label_column {named!r} has the type {features[named]}; labels are a ClassLabel or whole numbers from 0 "
            "(Dataset.class_encode_column makes them of strings)."
        )
    return named


def _check_text_column(features: Features, name: str, image_column: str) -> None:
    _check_column(name, features, "--text_column ")
    if name not in _kept_columns(features, image_column) or not _is_text(features[name]):
        raise DataError(f"--text_column {name!r} has the type {features[name]}; texts are strings or lists of strings.")


def _class_names(images: Dataset, label_column: str | None) -> list[str] | None:
    """The names of a ClassLabel's values; for plain whole numbers "0" up to the largest."""
    if label_column is None:
        return None
    feature = images.features[label_column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    bounds = pc.min_max(images.data.column(label_column))
    low, high = bounds["min"].as_py(), bounds["max"].as_py()
    if low is None or low < 0:
        raise DataError(f"the label column {label_column!r} goes from {low} to {high}; labels are 0, 1, 2, ...")
    return [str(value) for value in range(high + 1)]


# Preprocessing


@dataclass(frozen=True)
class _Job:
    """One source on its way into the cache."""

    source: _Source
    column: str
    folder: Path
    workers: int | None

    def run(self, function: Callable, key: str, features: Features, batch_size: int, desc: str, **kwargs) -> Dataset:
        """`Dataset.map` from Arrow tables to Arrow tables, cached under `key`."""
        kind = _image_kind(self.source.dataset.features[self.column])
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
                f"cannot write the preprocessed images to {str(self.folder)!r}: {_summary(error)}. "
                "Make room there, or name another folder with --cache_dir."
            ) from error
        return result.with_format(None)


def _workers(asked: int | None, rows: int) -> int | None:
    if asked is not None and asked < 0:
        raise DataError(f"--preprocessing_num_workers {asked} is negative; give the number of processes.")
    workers = min(asked or 1, rows)
    return workers if workers > 1 else None


def _scan(job: _Job) -> tuple[np.ndarray, int]:
    """(sizes [N, 2] as width and height, the data's own channels), cached too."""
    features = Features({"width": Value("int32"), "height": Value("int32"), "channels": Value("int8")})
    key = _hash("scan", PREPROCESSING_VERSION, job.source.identity, job.column)
    found = job.run(_scan_batch, key, features, 1000, "Looking at image sizes").data
    width, height, channels = (found.column(name).to_numpy() for name in features)
    return np.stack([width, height], axis=1), int(channels.max())


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
    """A data set of "pixels", "pixels_digest" and the kept columns, in the source's order."""
    size = resolution * resolution * channels
    source_features = job.source.dataset.features
    kept = _kept_columns(source_features, job.column)
    features = Features(
        {
            PIXELS: List(Value("uint8"), length=size),
            DIGEST: Value("uint64"),
            **{name: source_features[name] for name in kept},
        }
    )
    key = _hash("pixels", PREPROCESSING_VERSION, job.source.identity, job.column, resolution, channels)
    batch_size = max(1, min(1000, BATCH_BYTES // size))
    options = {"kept": kept, "resolution": resolution, "channels": channels}
    return job.run(_preprocess_batch, key, features, batch_size, "Preprocessing images", **options)


def _scan_batch(table: pa.Table, rows: list[int], *, column: str, kind: str) -> pa.Table:
    found = [_at_row(row, value, image_shape, kind) for row, value in zip(rows, _values(table, column), strict=True)]
    width, height, channels = zip(*found, strict=True)
    return pa.table(
        {
            "width": pa.array(width, pa.int32()),
            "height": pa.array(height, pa.int32()),
            "channels": pa.array(channels, pa.int8()),
        }
    )


def _preprocess_batch(
    table: pa.Table, rows: list[int], *, column: str, kind: str, kept: list[str], resolution: int, channels: int
) -> pa.Table:
    pixels = np.empty((len(rows), resolution * resolution * channels), dtype=np.uint8)
    for i, (row, value) in enumerate(zip(rows, _values(table, column), strict=True)):
        pixels[i] = _at_row(row, value, image_pixels, kind, resolution, channels).reshape(-1)
    kept_table = table.select(kept)
    conditions = kept_table.to_pylist() if kept else [{}] * len(rows)
    digests = [_row_digest(image, values) for image, values in zip(pixels, conditions, strict=True)]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pixels.reshape(-1)), pixels.shape[1])
    columns = {PIXELS: flat, DIGEST: pa.array(digests, pa.uint64())}
    return pa.table({**columns, **{name: kept_table.column(name) for name in kept}})


def _values(table: pa.Table, column: str) -> Iterator[Any]:
    """The column's Python values one by one: a batch of large images is never held as a whole."""
    return (scalar.as_py() for scalar in table.column(column))


def _at_row(row: int, value: Any, function: Callable, *args: Any) -> Any:
    """`function(value, *args)`; where the image is bad the error names the row, and the file if it has one."""
    try:
        return function(value, *args)
    except BadImage as error:
        path = value.get("path") if isinstance(value, dict) else None
        where = f"row {row} ({path})" if path else f"row {row}"
        raise DataError(f"the image in {where} cannot be used: {error}. Repair it or leave it out.") from error


def image_pixels(value: Any, kind: str, resolution: int, channels: int) -> np.ndarray:
    """One row's image as uint8 [resolution, resolution, channels]; `value` as the column of that kind stores it.

    Raises `BadImage`.
    """
    source = _stored_image(value, kind)
    image = array_to_image(source) if isinstance(source, np.ndarray) else open_image(source)
    return to_array(image, resolution, channels)


def image_shape(value: Any, kind: str) -> tuple[int, int, int]:
    """(width, height, native channels) of one row's image, by its header where that suffices. Raises `BadImage`."""
    source = _stored_image(value, kind)
    if isinstance(source, np.ndarray):
        image = array_to_image(source)
        return *image.size, native_channels(image)
    return image_size_and_channels(source)


def _stored_image(value: Any, kind: str) -> bytes | str | np.ndarray:
    """What a row holds: the bytes of a file, its path, or an array."""
    if value is not None and kind == "array":
        try:
            return np.asarray(value, dtype=np.uint8)
        except (ValueError, TypeError, OverflowError) as error:
            raise BadImage(f"the array is not regular: {error}") from error
    found = (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value
    if found is None:
        raise BadImage("there is no image in this row")
    return found


# Fingerprints


def _hash(*parts: Any) -> str:
    """32 hex digits that depend on all parts (what JSON can hold), alike in every process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _row_digest(pixels: np.ndarray, conditions: dict[str, Any]) -> int:
    """64 bits that depend on one row's pixels and kept columns."""
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=8)
    digest.update(json.dumps(conditions, sort_keys=True).encode())
    return int.from_bytes(digest.digest(), "little")


def _content_fingerprint(images: Dataset, resolution: int, channels: int) -> str:
    digests = images.data.column(DIGEST).to_numpy().astype("<u8")
    features = {name: str(feature) for name, feature in images.features.items()}
    return _hash(resolution, channels, features, hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest())
