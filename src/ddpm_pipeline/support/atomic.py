"""Files and folders that appear whole or not at all, also after a kill or a power cut. Imports the standard library alone.

What is being written lies beside its destination under a hidden name that ends in `.tmp`, is brought to the disk, and is then
renamed. A write that fails removes it; what a kill left behind is harmless, and `remove_leftovers` clears it away.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path


def temporary_beside(path: Path, owner: int | str | None = None) -> Path:
    """The hidden name under which `path` is written: by this process, or by several that agree on an `owner`."""
    return path.with_name(f".{path.name}.{os.getpid() if owner is None else owner}.tmp")


def writer_of(path: Path) -> int | None:
    """The process that writes, or wrote, a file under this temporary name; None for any other name."""
    found = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
    return int(found[1]) if found else None


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a path to write to, in a folder that is made if missing; on leaving without an error the file written there takes
    the place of `path`. Raises OSError if that is a folder, a device or a pipe, which a file must not replace.
    """
    path = Path(path)
    temporary = _place_for(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def check_writable(path: Path) -> None:
    """Raises OSError, before anything that takes long, where `atomic_file` would. Makes the folder if it is missing."""
    temporary = _place_for(path)
    temporary.touch()
    temporary.unlink()


def _place_for(path: Path) -> Path:
    """Where to write what is to take the place of `path`, in a folder that exists."""
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    return temporary_beside(path)


def write_text(path: str | Path, text: str) -> None:
    """Replace a UTF-8 file; line ends stay as they are in `text`."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Bring a folder, with all files and folders in it, to the disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        sync(path)


def sync(path: Path) -> None:
    """Bring a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a folder that is whole under its name until it is gone."""
    doomed = temporary_beside(folder, "removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a folder that was written beside in the place of `folder`, whether or not there is one already."""
    if folder.exists():
        remove_folder(folder)
    os.replace(temporary, folder)
    sync(folder.parent)


def remove_leftovers(folder: Path, pattern: str = ".*.tmp") -> None:
    """Remove what killed processes left half-written in a folder."""
    for leftover in folder.glob(pattern):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
