"""Finding the source of the training images and loading it, whole or as a stream.

`load_source` decides what `--dataset` names. Called by `mapped` and `streamed`; imports `datasets`, the Hub's client
and `skipped`.
"""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..support.errors import DataError

logger = logging.getLogger(__name__)

BUILT_IN = "digits"
STREAMED_ROWS = 100  # of a parquet file that are decoded at a time; by default the library takes a whole row group
HUB_TIMEOUT = 10  # seconds for the first answer of the Hub

IMAGE_EXTENSIONS = frozenset(ImageFolder.EXTENSIONS)
COMMON_EXTENSIONS = ".png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}  # what folders and files are called -> the split; the names the `datasets` library knows


@dataclass(frozen=True)
class Source:
    """What `--dataset` names, loaded."""

    dataset: Dataset | IterableDataset
    name: str  # of the built-in or Hub data set, or the last part of a local path
    identity: str  # changes when the data do


def load_source(name: str, config: str | None, split: str, cache_dir: str | None, streaming: bool = False) -> Source:
    """Decides what `name` is and loads it; anything local goes before a Hub data set of that name.

    With `streaming`, what is on the Hub or in parquet files is an IterableDataset; the rest lies in memory-mapped files (of
    a folder of images the paths), and is a Dataset all the same. Raises DataError for what cannot be loaded.
    """
    path = Path(name).expanduser() if name else Path("-")
    if name == BUILT_IN:
        if path.exists():
            logger.warning("--dataset digits is the built-in data set; for the local %s say ./%s", path, path)
        return Source(_cut({"train": _digits()}, split, BUILT_IN), BUILT_IN, hash_of(BUILT_IN, split))
    if path.is_dir():
        loaded = _load_folder(path, split, cache_dir, streaming)
    elif path.suffix == ".parquet" and (path.is_file() or glob.has_magic(name)):
        loaded = _load_parquet(_matching_files(path), path, split, cache_dir, streaming)
    elif path.exists():
        raise DataError(f"--dataset {name!r} is a file, but not parquet; give a folder of images or *.parquet.")
    elif re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name):
        return _load_from_hub(name, config, split, cache_dir, streaming)
    else:
        raise DataError(
            f"--dataset {name!r}: there is no such folder or parquet file, and it cannot be a Hub data set's name "
            f"('name' or 'owner/name'). Give one of these, or {BUILT_IN!r}."
        )
    return loaded if isinstance(loaded, Source) else _with_identity(loaded, path.resolve().name)


def _with_identity(dataset: Dataset, name: str) -> Source:
    """With the library's fingerprint and, since a saved folder may be written anew under the same one, its files."""
    files = [file["filename"] for file in dataset.cache_files]
    return Source(dataset, name, hash_of(dataset._fingerprint, _stats(files)))


def _stats(files: list[str]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; their levels 0..16 become round(v * 255 / 16)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    features = Features(
        {"image": datasets.Array2D((8, 8), "uint8"), "label": ClassLabel(names=[str(i) for i in range(10)])}
    )
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    return Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)


def _load_folder(path: Path, split: str, cache_dir: str | None, streaming: bool) -> Dataset | Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _load_saved(path, split)
    images, parquet = _find_files(path)
    if images:
        return _load_image_folder(path, split, cache_dir)
    if parquet:
        return _load_parquet(parquet, path, split, cache_dir, streaming)
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
    with as_data_error(f"the saved data set {str(path)!r}"):
        saved = datasets.load_from_disk(str(path))
    return _cut(saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}, split, path)


def _cut(splits: dict[str, Dataset], split: str, name: str | Path) -> Dataset:
    """What a split such as "train", "train[:10%]" or "train+test" means, as `load_dataset` reads it."""
    _check_split(name, split, list(splits))
    with as_data_error(f"the split {split!r}"):
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
    with as_data_error(f"the images in {str(path)!r}"):
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


def _load_parquet(
    files: list[Path], path: Path, split: str, cache_dir: str | None, streaming: bool
) -> Dataset | Source:
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
    with as_data_error(f"the parquet files {str(path)!r}"):
        if not streaming:
            return datasets.load_dataset("parquet", data_files=escaped, split=split, cache_dir=cache_dir)
        _refuse_slices(split)
        stream = datasets.load_dataset(
            "parquet", data_files=escaped, split=split, streaming=True, batch_size=STREAMED_ROWS
        )
    read = [file for name in split.split("+") for file in splits[name]]
    return Source(stream, path.resolve().name, hash_of(read, _stats(read)))


def _refuse_slices(split: str) -> None:
    """Raises DataError for a slice of a split, which `datasets` cannot stream."""
    if "[" in split:
        raise DataError(
            f"--split {split!r} is a slice, which a stream has not; name a whole split, or drop --streaming."
        )


def _split_of(file: Path) -> str | None:
    """The split that a relative path is named after: `train/0.parquet`, `train-00000-of-00002.parquet`; or None."""
    words = [*file.parent.parts, *re.split(r"[-._\s\d]+", file.stem)]
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def _load_from_hub(name: str, config: str | None, split: str, cache_dir: str | None, streaming: bool) -> Source:
    """A Hub data set; from the cache at once if the Hub is out of reach, where the library would retry for 20 s."""
    if streaming:
        _refuse_slices(split)
    offline = datasets.config.HF_HUB_OFFLINE
    reachable = not offline and _hub_answers(name)
    try:
        with contextlib.nullcontext() if reachable else _offline():
            if not streaming:
                return _with_identity(datasets.load_dataset(name, config, split=split, cache_dir=cache_dir), name)
            stream = datasets.load_dataset(name, config, split=split, streaming=True)
            revision = HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=HUB_TIMEOUT).sha
            return Source(stream, name, hash_of(name, config, split, revision))
    except Exception as error:
        here = f"--dataset {name!r} is no local folder or file"
        if not reachable:
            why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
            raise DataError(
                f"{here}, {why}, and it is not in the cache of earlier downloads. Check the name and the network, "
                f"or give a local folder, parquet files or {BUILT_IN!r}. ({summary(error)})"
            ) from error
        raise DataError(f"{here}, and loading it from the Hub failed: {summary(error)}") from error


def _hub_answers(name: str) -> bool:
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, ValueError):  # an answer, if not a good one: the library words it better
        return True
    except Exception as error:  # the HTTP client in use and its exceptions differ between versions of the library
        logger.warning("The Hub cannot be reached (%s); looking for %s in the cache.", summary(error), name)
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
def as_data_error(what: str) -> Iterator[None]:
    """The libraries below raise many types of exception on files that they cannot read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot load {what}: {summary(error)}") from error


def summary(error: Exception) -> str:
    """Type and message of an exception, with that of its cause, which often is the telling one."""
    cause = f"; {summary(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
    return f"{type(error).__name__}: {error}{cause}"


def hash_of(*parts: Any) -> str:
    """32 hex digits that depend on all parts (what JSON can hold), alike in every process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
