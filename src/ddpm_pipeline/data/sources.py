"""What `--dataset` names, found and loaded: bundled, local, or on the Hub; in memory-mapped files or as a stream."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .bundled import BUNDLED
from .options import DataOptions

logger = logging.getLogger(__name__)

STREAMED_ROWS = 100  # rows of a parquet file decoded at a time; the library's default is a whole row group
SAMPLE_BYTES = 2**16  # of either end of a file, for the fingerprint: small files whole, and the footer of a table
HUB_TIMEOUT = 10  # seconds to wait for the Hub's first answer

IMAGE_EXTENSIONS = frozenset(ImageFolder.EXTENSIONS)
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}  # names of folders and files -> the split; the same names as in the `datasets` library


@dataclass(frozen=True)
class Source:
    dataset: Dataset | IterableDataset
    name: str  # of the bundled or Hub data set, or the last part of a local path
    identity: str  # changes when the files do; part of the keys of caches
    files: tuple[tuple[str, str], ...] = ()  # (name within the data, path) of each local file; none of data on the Hub


def load_source(options: DataOptions, streaming: bool = False) -> Source:
    """Loads what `options.dataset` names; local files take precedence over a Hub data set of that name.

    With `streaming`, data on the Hub or in parquet files become an IterableDataset. Everything else is memory-mapped (for a
    folder of images: the paths), and is a Dataset in any case. Raises DataError for what cannot be loaded or has no rows.
    """
    name, split = options.dataset, options.split
    path = Path(name).expanduser() if name else Path("-")
    if name in BUNDLED:
        if path.exists():
            logger.warning("--dataset %s is the bundled data set; for the local %s, use ./%s", name, path, path)
        source = Source(_select_split({"train": BUNDLED[name]()}, split, name), name, hash_of(name, split))
    elif path.is_dir():
        source = _load_folder(path, options, streaming)
    elif path.suffix == ".parquet" and (path.is_file() or glob.has_magic(name)):
        files = [path] if path.is_file() else [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise DataError(f"No file matches --dataset {str(path)!r}. Check the folder, and quote the pattern.")
        source = _load_parquet(files, path, options, streaming)
    elif path.exists():
        raise DataError(f"--dataset {name!r} is a file, but not parquet. Use a folder of images or *.parquet.")
    elif re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name):
        source = _load_from_hub(name, options, streaming)
    else:
        raise DataError(
            f"--dataset {name!r}: there is no such folder or parquet file, and it cannot be the name of a Hub data set "
            f"('name' or 'owner/name'). Use one of these, or {', '.join(map(repr, BUNDLED))}."
        )
    if isinstance(source.dataset, Dataset) and len(source.dataset) == 0:
        raise DataError(f"The data set {name!r} has no rows in its split {split!r}. Choose another split.")
    return source


def _with_identity(dataset: Dataset, name: str) -> Source:
    """Identified by the library's fingerprint and by its files, since a folder may be saved anew with the same one."""
    files = [file["filename"] for file in dataset.cache_files]
    named = tuple((os.path.basename(file), file) for file in files)
    return Source(dataset, name, hash_of(dataset._fingerprint, _stats(files)), named)


def _stats(files: list[str]) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]


def _load_folder(path: Path, options: DataOptions, streaming: bool) -> Source:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        with as_data_error(f"the saved data set {str(path)!r}"):
            saved = datasets.load_from_disk(str(path))
        splits = saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}
        return _with_identity(_select_split(splits, options.split, path), path.resolve().name)
    images, parquet = _find_files(path)
    if images:
        return _with_identity(_load_image_folder(path, options), path.resolve().name)
    if parquet:
        return _load_parquet(parquet, path, options, streaming)
    raise DataError(
        f"The folder {str(path)!r} holds no images (.png, .jpg, .jpeg, .webp, .gif, .bmp, .tif, .tiff, ...; sub-folders are "
        "searched too) and no *.parquet files, and was not written by Dataset.save_to_disk."
    )


def _find_files(path: Path) -> tuple[bool, list[Path]]:
    """(whether there is an image, or an archive that may hold images; all parquet files). Hidden files are ignored."""
    parquet = []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith((".", "__")))
        visible = [Path(folder, file) for file in sorted(files) if not file.startswith(".")]
        if any(file.suffix.lower() in IMAGE_EXTENSIONS or file.suffix.lower() == ".zip" for file in visible):
            return True, []
        parquet += [file for file in visible if file.suffix == ".parquet"]
    return False, parquet


def _select_split(splits: dict[str, Dataset], split: str, name: str | Path) -> Dataset:
    """The rows that a split such as "train", "train[:10%]" or "train+test" names, as `load_dataset` reads it."""
    _check_split(name, split, list(splits))
    with as_data_error(f"the split {split!r}"):
        ranges = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(one) for key, one in splits.items()})
        return datasets.concatenate_datasets([splits[one.splitname].select(range(one.from_, one.to)) for one in ranges])


def _load_image_folder(path: Path, options: DataOptions) -> Dataset:
    """A folder of images through `datasets`, with labels from its sub-folders or columns from its metadata file.

    Sub-folders are splits only if all have names of splits and no image lies beside them; the library's own rule would read
    nothing but a class called "train", or a file with "test" in its name.
    """
    folders = {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[0] not in "._"}
    loose = [file for file in path.iterdir() if file.is_file() and file.suffix.lower() in IMAGE_EXTENSIONS]
    files, flat = {"train": ["**"]}, False
    if folders and not loose and all(name.lower() in SPLIT_NAMES for name in folders):
        files = {}
        for name in folders:
            files.setdefault(SPLIT_NAMES[name.lower()], []).append(f"{glob.escape(name)}/**")
        flat = all(entry.is_file() for folder in folders.values() for entry in folder.iterdir())
    _check_split(path, options.split, list(files))
    with as_data_error(f"the images in {str(path)!r}"):
        given = {"data_dir": glob.escape(str(path)), "data_files": files, "split": options.split}
        drop_labels = True if flat else None  # names of splits are no classes
        return datasets.load_dataset("imagefolder", **given, drop_labels=drop_labels, cache_dir=options.cache_dir)


def _load_parquet(files: list[Path], path: Path, options: DataOptions, streaming: bool) -> Source:
    """Parquet files: of a folder, in the splits in their paths (`train/0.parquet`, `test-0-of-2.parquet`); else "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = [*file.relative_to(path).parent.parts, *re.split(r"[-._\s\d]+", file.stem)] if path.is_dir() else []
        found = next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), "")
        splits.setdefault(found, []).append(str(file.resolve()))
    if "" in splits and len(splits) > 1:
        raise DataError(
            f"Some parquet files in {str(path)!r} are named after a split and others, such as {splits[''][0]!r}, "
            "are not. Select the files with a pattern, such as 'folder/*.parquet'."
        )
    splits = {name or "train": found for name, found in splits.items()}
    _check_split(path, options.split, list(splits))
    escaped = {name: [glob.escape(file) for file in found] for name, found in splits.items()}
    name, given = path.resolve().name, {"path": "parquet", "data_files": escaped, "split": options.split}
    with as_data_error(f"the parquet files {str(path)!r}"):
        if not streaming:
            return _with_identity(datasets.load_dataset(**given, cache_dir=options.cache_dir), name)
        _refuse_slices(options.split)
        stream = datasets.load_dataset(**given, streaming=True, batch_size=STREAMED_ROWS)
    read = [file for split in options.split.split("+") for file in splits[split]]
    return Source(stream, name, hash_of(read, _stats(read)), tuple((os.path.basename(file), file) for file in read))


def _refuse_slices(split: str) -> None:
    if "[" in split:
        raise DataError(f"Streaming does not support split slices such as {split!r}. Use a whole split, or drop --streaming.")


def _load_from_hub(name: str, options: DataOptions, streaming: bool) -> Source:
    """A Hub data set; from the cache at once if the Hub is unreachable, where the library would retry for 20 s."""
    config, split = options.dataset_config, options.split
    if streaming:
        _refuse_slices(split)
    offline, api = datasets.config.HF_HUB_OFFLINE, HfApi(endpoint=datasets.config.HF_ENDPOINT)
    try:
        reachable = not offline and bool(api.dataset_info(name, timeout=HUB_TIMEOUT))
    except (HfHubHTTPError, ValueError):  # an answer, if a negative one: the library's error says more
        reachable = True
    except Exception as error:  # the HTTP client and its exceptions differ between versions of the library
        logger.warning("The Hub cannot be reached (%s); looking for %s in the cache.", describe_exception(error), name)
        reachable = False
    try:
        datasets.config.HF_HUB_OFFLINE = not reachable
        if not streaming:
            return _with_identity(datasets.load_dataset(name, config, split=split, cache_dir=options.cache_dir), name)
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        revision = api.dataset_info(name, timeout=HUB_TIMEOUT).sha
        return Source(stream, name, hash_of(name, config, split, revision))
    except Exception as error:
        here = f"--dataset {name!r} is no local folder or file"
        if not reachable:
            why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
            raise DataError(
                f"{here}, {why}, and no earlier download is in the cache. Check the name and the network, or use a local "
                f"folder, parquet files or {', '.join(map(repr, BUNDLED))}. ({describe_exception(error)})"
            ) from error
        raise DataError(f"{here}, and loading it from the Hub failed: {describe_exception(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _check_split(name: str | Path, split: str, available: list[str]) -> None:
    """Raises DataError unless every split that is named, whole or in slices such as "train[:10%]", is available."""
    for one in split.split("+"):
        if one.partition("[")[0] not in available:
            raise DataError(f"The data set {str(name)!r} has no split {one!r}. Set --split to one of {available}.")


@contextlib.contextmanager
def as_data_error(what: str) -> Iterator[None]:
    """Turns any exception into DataError: the libraries raise many types on files that they cannot read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"Cannot load {what}: {describe_exception(error)}") from error


def cache_folder(cache_dir: str | None) -> Path:
    """Where this package caches what it makes of data: in `--cache_dir`, or in the cache of the datasets library."""
    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline"


def content_of(files: Iterable[tuple[str, str]]) -> str:
    """32 hex digits of files given as (name, path): their names, sizes, and each one's first and last SAMPLE_BYTES."""
    digest = hashlib.blake2b(digest_size=16)
    for name, path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(file.tell(), size - SAMPLE_BYTES))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def hash_of(*parts: Any) -> str:
    """32 hex digits that depend on all parts (which JSON can hold), the same in every process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
