"""The folder that images are sampled into: whose images it holds, which are missing, and all of them as one parquet file."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from ..support.atomic import atomic_file, write_text, writer_of
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from .files import ImageFiles

SETTINGS_FILE = "generation.json"
PARQUET_FILE = "images.parquet"
DIGESTED = ("weights", "scheduler", "text_encoder", "condition_images")  # settings that a message only names
ROWS_AT_ONCE = 1000  # images of the parquet file in memory


def prepare(folder: Path, count: int, settings: dict[str, Any], files: ImageFiles) -> list[int] | str:
    """The numbers of the images 0..count-1 that the folder lacks in such files, or what is wrong with it."""
    try:
        if folder.exists() and not folder.is_dir():
            return f"--output_dir {folder} is a file; name a new folder."
        found = {path.name for path in folder.iterdir() if writer_of(path) is None} if folder.exists() else set()
        if found <= {SETTINGS_FILE}:  # also of a run that ended before its first image
            write_text(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
        elif SETTINGS_FILE not in found:
            return f"--output_dir {folder} holds something that this command did not write; name a new folder."
        elif problem := _difference(folder, settings):
            return problem
        _remove_leftovers(folder)
        return _missing(folder, count, files)
    except OSError as error:
        return f"--output_dir {folder} cannot be used: {error}"


def check_still_there(folder: Path) -> None:
    """Raises ConfigError if the folder was removed or renamed meanwhile: writing on would make a part look like the whole."""
    if not (folder / SETTINGS_FILE).is_file():
        raise ConfigError(f"--output_dir {folder} was removed or renamed during the run; bring it back and repeat the command.")


def _difference(folder: Path, settings: dict[str, Any]) -> str | None:
    """Why a folder's images are not those of these settings."""
    try:
        kept = json.loads((folder / SETTINGS_FILE).read_text("utf-8"))
        different = [name for name in {**settings, **kept} if kept.get(name) != settings.get(name)]
    except (ValueError, TypeError, AttributeError) as error:
        return f"--output_dir {folder}: {SETTINGS_FILE} is damaged ({error}), so its images cannot be told; name a new folder."
    if not different:
        return None
    shown = [f"other {name}" if name in DIGESTED else f"{name} {_short(kept.get(name))}" for name in different]
    wanted = [f"{name} {_short(settings.get(name))}" for name in different if name not in DIGESTED]
    rather = f" rather than {', '.join(wanted)}" if wanted else ""
    return f"--output_dir {folder} holds images of {', '.join(shown)}{rather}; name a new folder."


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60)


def _missing(folder: Path, count: int, files: ImageFiles) -> list[int] | str:
    """The numbers of the images that are not there whole, in files or in one."""
    whole = folder / PARQUET_FILE
    if blocked := [path for path in (whole, *(files.path(folder, number) for number in range(count))) if path.is_dir()]:
        return f"--output_dir {folder}: {blocked[0].name} is a folder, in the place of images; remove it."
    if whole.is_file():
        try:
            stored = pq.read_metadata(whole).num_rows
        except (OSError, pa.ArrowException) as error:
            return f"--output_dir {folder}: {whole.name} is damaged ({describe_exception(error)}); remove it to sample again."
        if stored < count:
            return f"--output_dir {folder} has {PARQUET_FILE} with {stored} images; to get {count}, remove it."
        print(f"the images are in {whole}", file=sys.stderr)
        return []
    missing = [number for number in range(count) if not _is_whole(files.path(folder, number), files)]
    damaged = [path for path in (files.path(folder, number) for number in missing) if path.exists()]
    if damaged:
        print(f"{len(damaged)} damaged images are sampled again, such as {damaged[0]}", file=sys.stderr)
    return missing


def _is_whole(path: Path, files: ImageFiles) -> bool:
    try:
        files.read(path)
    except Exception:  # there is no such file, or one of three libraries raises one of many types
        return False
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written, but nothing that another process here is writing."""
    for path in folder.iterdir():
        if (writer := writer_of(path)) is not None and not psutil.pid_exists(writer):
            path.unlink(missing_ok=True)


def to_parquet(folder: Path, count: int, files: ImageFiles) -> None:
    """The PNGs as one file that the datasets library reads as images; they are removed once it is complete."""
    whole, paths = folder / PARQUET_FILE, [files.path(folder, number) for number in range(count)]
    try:
        if not whole.is_file():
            _write_parquet(whole, paths)
    except FileNotFoundError:
        if not whole.is_file():  # else another process has written it, and removed the PNGs, meanwhile
            raise
    for path in paths:
        path.unlink(missing_ok=True)


def _write_parquet(whole: Path, paths: list[Path]) -> None:
    features = {"info": {"features": {"image": {"_type": "Image"}, "number": {"_type": "Value", "dtype": "int64"}}}}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "number": pa.int64()}, metadata={"huggingface": json.dumps(features)})
    with atomic_file(whole) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(paths), ROWS_AT_ONCE):
            rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths[start : start + ROWS_AT_ONCE]]
            writer.write_table(pa.Table.from_pydict({"image": rows, "number": range(start, start + len(rows))}, schema))
