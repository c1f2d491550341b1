"""What `--dataset` names, found and loaded: bundled, local, or on the Hub; in memory-mapped files or as a stream."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HfHubHTTPError

from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .bundled import BUNDLED
from .columns import BESIDE, ColumnRoles
from .files import ARCHIVES, MODEL, PACKED, Account, File, Reach, content_of, some, stamps
from .folders import TABLES, Folder, read_archives, read_folder
from .options import UNCONDITIONAL, ConditionColumns, DataOptions
from .pairs import missing_partners
from .splits import SPLIT_COLUMNS, split_in_column, split_word

logger = logging.getLogger(__name__)

STREAMED_ROWS = 100  # rows of a parquet file decoded at a time; the library's default is a whole row group
HUB_TIMEOUT = 10  # seconds to wait for the Hub's first answer
EXPECTED = ("hidden", "other file", MODEL)  # what is left out without a warning


@dataclass(frozen=True)
class Source:
    """Rows of one split, and what is known of where they came from."""

    dataset: Dataset | IterableDataset
    name: str  # a name only, never a path: of the bundled or Hub data set, or of the folder or file when it was opened
    identity: str  # changes when the files do; part of the keys of caches
    reach: Reach = Reach()  # noqa: RUF009 (it is frozen)
    files: tuple[str, ...] = ()  # local files that hold the rows
    rows: str = ""  # which rows of these files, or a hash of what is known of the images that the rows name

    def with_classes(self, roles: ColumnRoles) -> "Source":
        """Without the images outside of class folders if a class is needed, and if others have one."""
        if not self.rows or self.files or roles.needed != roles.label or not roles.label:
            return self
        labels = self.dataset.with_format("arrow")[:].column(roles.label)
        kept = pc.indices_nonzero(pc.is_valid(labels)).to_pylist()
        if len(kept) in (0, len(labels)) or not isinstance(self.dataset.features[roles.label], ClassLabel):
            return self
        logger.warning("Left out of %r, in no class: %d", self.name, len(labels) - len(kept))
        return replace(self, dataset=self.dataset.select(kept), identity=hash_of(self.identity, "classes"))

    def linked(self, image_column: str) -> list[str]:
        """The local files that rows name in place of holding their image, in order. Of a stream, none."""
        if not isinstance(self.dataset, Dataset) or not isinstance(self.dataset.features[image_column], datasets.Image | dict):
            return []
        found = []
        for table in self.dataset.select_columns([image_column]).with_format("arrow").iter(batch_size=10_000):
            column = table.column(image_column).combine_chunks()
            named = pc.struct_field(column, "path") if "path" in [field.name for field in column.type] else None
            if named is not None:
                named = named.filter(pc.is_null(pc.struct_field(column, "bytes")))
                found += [self.reach.local(path) for path in named.to_pylist() if path]
        return [path for path in found if path is not None]

    def state(self, image_column: str) -> str:
        """The identity of rows and of the files that they name: changes when an image is replaced by one of the same name."""
        return hash_of(self.identity, self.reach.anywhere, list(stamps(self.linked(image_column))))

    def content(self, image_column: str) -> str:
        """A hash of names and content, wherever the files lie; for data on the Hub, of the commit."""
        files, root = [*self.files, *self.linked(image_column)], self.reach.roots[0] if self.reach.roots else os.sep
        return hash_of(self.rows, content_of((os.path.relpath(file, root), file) for file in files)) if files else self.identity


def load_source(options: DataOptions, columns: ConditionColumns = UNCONDITIONAL, streaming: bool = False) -> Source:
    """Loads what `options.dataset` names; local files take precedence over a Hub data set of that name.

    A second folder of condition images, if the columns name one, is a column. With `streaming`, data on the Hub or in tables
    become an IterableDataset. Everything else is memory-mapped (for a folder of images: the paths), and is a Dataset in any
    case. Says in one line of the log what it took the data for and what it left out. Raises DataError for what cannot be loaded
    or has no rows.
    """
    name, split = options.dataset, options.split
    path = Path(os.path.abspath(Path(name).expanduser())) if name else Path("-")
    found = glob.glob(str(path), recursive=True) if glob.has_magic(name) and not path.exists() else [str(path)]
    if name in BUNDLED:
        if path.exists():
            logger.warning("--dataset %s is the bundled data set; for the local %s, use ./%s", name, name, name)
        rows = _select_split(BUNDLED[name](options), split, name)
        source = Source(rows, name, hash_of(name, options.dataset_config, str(rows.features), split))
    elif not found:
        raise DataError(
            f"--dataset {name!r}: there is no such folder or parquet file, nor a match of a pattern. Quote patterns."
        )
    elif os.path.exists(found[0]):
        source = _load_local(path, found, options, columns, streaming)
    elif re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name):
        source = _load_from_hub(name, options, streaming)
    else:
        raise DataError(
            f"--dataset {name!r}: there is no such folder or parquet file, and it cannot be the name of a Hub data set "
            f"('name' or 'owner/name'). Use one of these, or {', '.join(map(repr, BUNDLED))}."
        )
    if isinstance(source.dataset, Dataset) and len(source.dataset) == 0:
        raise DataError(f"The data set {name!r} has no rows in its split {split!r}. Choose another split.")
    _warn_of_held_out_rows(source)
    return source


def _warn_of_held_out_rows(source: Source) -> None:
    """Log that a column would divide the rows of a table, which the names of its files alone do."""
    name = next((name for name in source.dataset.column_names or () if name.lower() in SPLIT_COLUMNS), None)
    if name is None or (isinstance(source.dataset, IterableDataset) and not source.files):
        return
    with contextlib.suppress(pa.ArrowException):  # of a stream of .arrow files
        feature, values = source.dataset.features[name], column_of(source, name).unique().drop_null().to_pylist()
        values = feature.int2str(values) if isinstance(feature, ClassLabel) else [str(value) for value in values if value != ""]
        if len(values) > 1 and split_in_column(values):
            words = (
                "All rows of %r are read, whatever the column %r says (%s). Keep held-out rows in another file, test.parquet."
            )
            logger.warning(words, source.name, name, some(values))


def column_of(source: Source, name: str) -> pa.ChunkedArray:
    """One column of memory-mapped rows, or of the parquet files of a stream. Raises DataError for a stream from the Hub."""
    if isinstance(source.dataset, Dataset):
        return source.dataset.select_columns([name]).with_format("arrow")[:].column(0)
    if not source.files:
        raise DataError(
            f"The column {name!r} has the type {source.dataset.features[name]}, which does not say what values there are, and "
            "they are unknown before all rows are read. Drop --streaming, or choose a ClassLabel column."
        )
    return pa.dataset.dataset(list(source.files)).to_table([name]).column(0)


def _load_local(path: Path, found: list[str], options: DataOptions, columns: ConditionColumns, streaming: bool) -> Source:
    if options.dataset_config is not None:
        raise DataError(f"--dataset_config {options.dataset_config!r} is for data sets on the Hub; {str(path)!r} is local.")
    suffixes = {Path(file).suffix.lower() for file in found}
    files = [File(os.path.basename(file), file, ()) for file in sorted(found)]
    if path.is_dir():
        with as_data_error(f"the folder {str(path)!r}"):
            saved = _saved_data_sets(path)
            if saved:
                return _load_saved(path, saved, options)
            return _load_folder(path, read_folder(path, columns.second_folders), options, streaming)
    if len(suffixes) == 1 and suffixes <= set(TABLES):
        return _load_tables(files, path, options, streaming, Account())
    if suffixes <= set(ARCHIVES):
        return _load_folder(path, read_archives(path, files, columns.second_folders), options, streaming)
    fix = "Use a folder or archive of images, or *.parquet. Of images, name the folder that holds them."
    fix = "Unpack it and name the folder." if suffixes & set(PACKED) else fix
    raise DataError(f"--dataset {options.dataset!r} is a file, but not parquet, zip or tar. {fix}")


def _saved_data_sets(path: Path) -> dict[str, Path]:
    """Folders that Dataset.save_to_disk wrote: this one, or those in it."""
    if _is_saved(path) or (path / "dataset_dict.json").is_file():
        return {"": path}
    return {entry.name: entry for entry in sorted(path.iterdir()) if _is_saved(entry)}


def _is_saved(path: Path) -> bool:
    return all((path / name).is_file() for name in ("state.json", "dataset_info.json"))  # other programs write the former


def _load_saved(path: Path, saved: dict[str, Path], options: DataOptions) -> Source:
    _refuse_chains(path)
    with as_data_error(f"the saved data set {str(path)!r}"):
        loaded = {name: datasets.load_from_disk(str(folder)) for name, folder in saved.items()}
    splits: Mapping[str, Dataset] = loaded
    if "" in loaded:
        splits = loaded[""] if isinstance(loaded[""], DatasetDict) else {str(loaded[""].split or "train"): loaded[""]}
    dataset, account = _select_split(splits, options.split, path), Account()
    for entry in sorted(path.iterdir()):
        if entry.name not in splits and entry.suffix not in (".json", ".arrow", ".lock") and entry.name[0] != ".":
            account.add("beside the saved data set", entry.name)
    files = tuple(file["filename"] for file in dataset.cache_files)
    identity = hash_of(dataset._fingerprint, list(stamps(files)))  # a folder may be saved anew with the same fingerprint
    _say(path, "a data set saved by Dataset.save_to_disk", _lengths(splits), options.split, account)
    return Source(dataset, path.name, identity, _reach(path, options), files, options.split)


def _reach(folder: Path, options: DataOptions) -> Reach:
    return Reach((str(folder),), anywhere=options.follow_paths)


def _refuse_chains(path: Path) -> None:
    if "::" in str(path):
        raise DataError(
            f"The path {str(path)!r} holds '::', which the datasets library reads as a chain of addresses. Rename it."
        )


def _load_folder(path: Path, folder: Folder, options: DataOptions, streaming: bool) -> Source:
    """Images as paths, with what describes them; or tables."""
    if folder.tables:
        return _load_tables(folder.tables, path, options, streaming, folder.account)
    dataset = _select_split(folder.splits, options.split, path)
    root = path if path.is_dir() else path.parent
    roots = tuple(filter(None, (str(root), folder.second and folder.second.root)))
    rows = json.dumps(dataset.to_dict(), default=str, ensure_ascii=False)
    for one in roots:
        rows = rows.replace(one, "")
    rows = hash_of(rows, str(dataset.features))
    _say(path, folder.kind, _lengths(folder.splits), options.split, folder.account)
    if folder.second is not None:
        table = dataset.select_columns(["image", BESIDE]).with_format("arrow")[:]
        alone = table.filter(pc.and_(pc.is_null(table.column(BESIDE)), pc.is_valid(table.column("image"))))
        if names := [
            image["path"].partition("::")[0].removeprefix(f"{root}{os.sep}") for image in alone.column("image").to_pylist()
        ]:
            raise missing_partners(names, len(table), folder.second.name, folder.account)
    name = path.name if path.exists() else root.name  # of a pattern
    return Source(dataset, name, rows, replace(_reach(root, options), roots=roots), rows=rows)


def _select_split(splits: dict[str, Dataset], split: str, name: str | Path) -> Dataset:
    """The rows that a split such as "train", "train[:10%]" or "train+test" names, as `load_dataset` reads it."""
    _check_split(name, split, list(splits))
    with as_data_error(f"the split {split!r}"):
        ranges = datasets.ReadInstruction.from_spec(split).to_absolute({key: len(one) for key, one in splits.items()})
        return datasets.concatenate_datasets([splits[one.splitname].select(range(one.from_, one.to)) for one in ranges])


def _lengths(splits: Mapping[str, Dataset]) -> dict[str, int]:
    return {name: len(dataset) for name, dataset in splits.items()}


def _say(path: Path, kind: str, splits: Mapping[str, int], split: str, account: Account) -> None:
    """One line in the log of what the data were taken for; a warning if what is left out may be data."""
    counts = ", ".join(f"{name} {count:,}" for name, count in splits.items())
    left_out = f". Left out: {account}" if account.names else ""
    level = logging.WARNING if set(account.names) - set(EXPECTED) else logging.INFO
    logger.log(level, "%r is read as %s: %s; reading the split %r%s", path.name, kind, counts, split, left_out)


def _load_tables(files: list[File], path: Path, options: DataOptions, streaming: bool, account: Account) -> Source:
    """Parquet or Arrow files, in the splits in their paths (`train/0.parquet`, `test-0-of-2.parquet`); else "train"."""
    _refuse_chains(path)
    if path.is_dir() and len(configs := _described_configurations(path / "README.md")) > 1:
        raise DataError(
            f"The folder {str(path)!r} has several configurations, {configs} (README.md). Name the files of one, such as "
            " 'folder/name/*.parquet'."
        )
    kinds = {file.suffix for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"{str(path)!r} has both .parquet and .arrow files. Name those to read with a pattern, 'folder/*.parquet'."
        )
    splits: dict[str, list[str]] = {}
    for file in files:
        words = [split_word(name)[0] for name in (*file.folders, Path(file.stem).name)] if path.is_dir() else []
        found = next(filter(None, words), "")
        splits.setdefault(found, []).append(file.path)
    if "" in splits and len(splits) > 1:
        raise DataError(
            f"Some parquet files in {str(path)!r} are named after a split and others, such as {splits[''][0]!r}, "
            "are not. Select the files with a pattern, such as 'folder/*.parquet'."
        )
    splits = {name or "train": found for name, found in splits.items()}
    _check_split(path, options.split, list(splits))
    builder = kinds.pop()[1:]
    root = path if path.is_dir() else Path(os.path.commonpath([os.path.dirname(file.path) for file in files]))
    name = path.name if path.exists() else root.name
    read = tuple(file for split in options.split.split("+") for file in splits[split.partition("[")[0]])
    identity = hash_of(read, list(stamps(read)), options.split)
    escaped = {split: [glob.escape(file) for file in found] for split, found in splits.items()}
    given = {"path": builder, "data_files": escaped, "split": options.split}
    with as_data_error(f"the {builder} files {str(path)!r}"):
        if streaming:
            _refuse_slices(options.split)
            batches = {"batch_size": STREAMED_ROWS} if builder == "parquet" else {}
            dataset = datasets.load_dataset(**given, streaming=True, **batches)
        else:  # the library would take a file of the same name and time for the same file
            cache = cache_folder(options.cache_dir) / f"tables-{hash_of(builder, escaped, identity)}"
            dataset = datasets.load_dataset(**given, cache_dir=str(cache))
    kind = f"{len(read)} {builder} file{'s' if len(read) > 1 else ''}"
    _say(path, kind, {split: len(found) for split, found in splits.items()}, options.split, account)
    return Source(dataset, name, identity, _reach(root, options), read, options.split)


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
    given = {"split": split, "trust_remote_code": False}
    caches = datasets.config.HF_CACHE_HOME, huggingface_hub.constants.HF_HUB_CACHE, cache_folder(options.cache_dir).parent
    reach = Reach(tuple(os.path.abspath(cache) for cache in caches), remote=True, anywhere=options.follow_paths)
    try:
        datasets.config.HF_HUB_OFFLINE = not reachable
        if streaming:
            dataset = datasets.load_dataset(name, config, streaming=True, **given)
            identity = hash_of(name, config, split, api.dataset_info(name, timeout=HUB_TIMEOUT).sha)
        else:
            dataset = datasets.load_dataset(name, config, cache_dir=options.cache_dir, **given)
            identity = hash_of(dataset._fingerprint, list(stamps(file["filename"] for file in dataset.cache_files)))
        logger.info("%r is read from the Hub; reading the split %r", name, split)
        return Source(dataset, name, identity, reach)
    except Exception as error:
        here = f"--dataset {name!r} is no local folder or file"
        if config is None and (configs := _configurations(name, reachable)):
            raise DataError(
                f"The data set {name!r} has several configurations. Set --dataset_config to one of {configs}."
            ) from error
        if not reachable:
            why = "offline mode is on (HF_HUB_OFFLINE)" if offline else "the Hub cannot be reached"
            raise DataError(
                f"{here}, {why}, and no earlier download is in the cache. Check the name and the network, or use a local "
                f"folder, parquet files or {', '.join(map(repr, BUNDLED))}. ({describe_exception(error)})"
            ) from error
        raise DataError(f"{here}, and loading it from the Hub failed: {describe_exception(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _described_configurations(readme: Path) -> list[str]:
    """The configurations of a copy of a Hub data set, which have tables of their own."""
    try:
        return [config["config_name"] for config in metadata_load(readme)["configs"]]
    except Exception:  # no such file, or one that was not written for the Hub
        return []


def _configurations(name: str, reachable: bool) -> list[str]:
    """The names of a Hub data set's configurations if there are several and none is the default; else none."""
    if not reachable:
        return []
    try:
        configs = datasets.get_dataset_config_names(name)
        return configs if len(configs) > 1 and datasets.get_dataset_default_config_name(name) is None else []
    except Exception:  # whatever was wrong before is wrong here, and is said
        return []


def _check_split(name: str | Path, split: str, available: list[str]) -> None:
    """Raises DataError unless every split that is named, whole or in slices such as "train[:10%]", is available."""
    for one in split.split("+"):
        if one.partition("[")[0] not in available:
            raise DataError(f"The data set {str(name)!r} has no split {one!r}. Its splits are {available}.")


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


def hash_of(*parts: Any) -> str:
    """32 hex digits that depend on all parts (which JSON can hold), the same in every process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
