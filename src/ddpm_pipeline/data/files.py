"""Files of data, wherever they lie: in folders, behind links, in archives, at addresses; which may be read, and how much.

A file in an archive has a path such as "zip://cat/1.png::/data/pets.zip", as in fsspec. Of the data modules, imports only
`images`.
"""

import contextlib
import hashlib
import os
import posixpath
import stat
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from huggingface_hub import get_session

from ..support.errors import DataError
from ..support.exceptions import describe_exception
from .images import BadImage, image_file

MAX_FILE_BYTES = 2**30  # of one image; the largest that is decoded (64 million pixels of 16 bytes) fits
MAX_REMOTE_BYTES = 2**28  # of one that another machine sends, or a service that never ends
TIMEOUT = 30  # seconds without an answer
SAMPLE_BYTES = 2**13  # of either end of a file, for the fingerprint: small files whole, and the footer of a table
SAMPLING_THREADS = 16  # since files may lie on a network
ARCHIVES = (".zip", ".tar")
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".lz4")  # cannot be read in any order
HIDDEN = ("__MACOSX", "__pycache__")
MODEL, MODEL_FILES = "folder of a model", ("training_config.yaml", "model_index.json")  # with pictures that are no data
SHOWN = 3  # names in a message
UNREADABLE = "the file cannot be read now"  # how the reason of an `UnreadableFile` begins


class UnreadableFile(BadImage):
    """The file, not what is in it, is the trouble: network, permission, memory. It may be readable the next time."""

    def __init__(self, error: BaseException):
        why = error.strerror if isinstance(error, OSError) and error.strerror else describe_exception(error)
        super().__init__(f"{UNREADABLE}: {why}")


@dataclass(frozen=True)
class File:
    name: str  # within the data, with "/" between folders
    path: str  # to read it by
    folders: tuple[str, ...]  # that it lies in, as far as they mean anything

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1].lower()


@dataclass
class Account:
    """What was left out, and why: for one line of the log."""

    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, name: str) -> None:
        self.names[reason].append(name)

    def leave_out(self, reason: str, files: Iterable[File]) -> None:
        for file in files:
            self.add(reason, file.name)

    def __str__(self) -> str:
        return "; ".join(f"{reason}: {len(names)} ({some(names)})" for reason, names in sorted(self.names.items()))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def list_files(root: Path, account: Account) -> list[File]:
    """All files under a folder, sorted by name; links are followed, and each folder is read once.

    Accounts for hidden files, broken links, links that lead in a circle, and folders of models and runs within the data. Raises
    DataError for a folder that cannot be read.
    """
    files, read, links = [], set(), []
    above = os.path.realpath(root) + os.sep

    def enter(folder: str, names: tuple[str, ...]) -> None:
        read.add(os.path.realpath(folder))
        entries = _entries(folder)
        if names and any(entry.name in MODEL_FILES for entry in entries):
            account.add(MODEL, "/".join(names))
            return
        for entry in entries:
            name = "/".join([*names, entry.name])
            if entry.name.startswith(".") or entry.name in HIDDEN:
                account.add("hidden", name)
            elif not _is_text(entry.name):
                account.add("name that is no text", ascii(name))
            elif entry.is_dir():
                links.append((entry.path, names, name)) if entry.is_symlink() else enter(entry.path, (*names, entry.name))
            elif entry.is_file():
                files.append(File(name, entry.path, names))
            else:
                account.add("broken link" if entry.is_symlink() else "no ordinary file", name)

    enter(str(root), ())
    while links:  # after the real folders, so that what is linked twice is read under its own name
        path, names, name = links.pop(0)
        real = os.path.realpath(path)
        if real in read or above.startswith(real + os.sep):
            account.add("link to a folder that is read already", name)
        else:
            enter(path, (*names, os.path.basename(path)))
    return sorted(files, key=lambda file: file.name)


def _is_text(name: str) -> bool:
    """Whether a name is more than bytes that no encoding explains: tables cannot hold such."""
    with contextlib.suppress(UnicodeEncodeError):
        return bool(name.encode())
    return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"The folder {folder!r} cannot be read: {error.strerror}. Give permission, or move it out of the data."
        ) from error


def list_archive(archive: File, folders: tuple[str, ...], account: Account) -> list[File]:
    """The files in a zip or an uncompressed tar, as if it were one of these folders. Raises DataError if it cannot be read."""
    scheme, files = archive.suffix[1:], []
    try:
        members = _members(archive.path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(
            f"The archive {archive.path!r} cannot be read: {describe_exception(error)}. Repair it, or unpack it and name the "
            "folder."
        ) from error
    for member in members:
        inside = PurePosixPath(member.replace("\\", "/"))  # as some programs pack on Windows
        parts = [part for part in inside.parts if part not in ("/", "..")]  # nothing is unpacked, so that none leads out
        name = "/".join([archive.name, *parts])
        if any(part.startswith(".") or part in HIDDEN for part in parts):
            account.add("hidden", name)
        else:
            files.append(File(name, f"{scheme}://{member}::{archive.path}", (*folders, *parts[:-1])))
    return sorted(files, key=lambda file: file.name)


def _members(path: str) -> list[str]:
    if path.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}  # the last of a name
            if any(info.flag_bits & 1 for info in members.values()):
                raise ValueError("it is encrypted")
            return list(members)
    return list(_tar_index(path, _stamp(os.stat(path))))


@lru_cache(maxsize=16)
def _tar_index(path: str, _: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Where each file of a tar begins, and its size."""
    with tarfile.open(path, "r:") as archive:
        return {member.name: (member.offset_data, member.size) for member in archive if member.isreg()}


@lru_cache(maxsize=16)
def _zip(path: str, *_: Any) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def in_archive(path: str) -> tuple[str, str] | None:
    """(member, path of the archive) if this is the path of a file in a local archive."""
    if path.startswith(("zip://", "tar://")):
        member, separator, archive = path[len("zip://") :].partition("::/")
        if separator:
            return member, f"/{archive}"
    return None


def read_bytes(path: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a local file, or of one in a local archive. Raises OSError, or DataError if it is none or too large."""
    found = in_archive(path)
    if found is None:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("it is no ordinary file")
        return _limited(path, status.st_size, limit)
    member, archive = found
    state = _stamp(os.stat(archive))
    if path.startswith("tar"):
        start, size = _tar_index(archive, state)[member]
        return _limited(archive, size, limit, start)
    opened = _zip(archive, state, os.getpid())  # a forked process must not share the file's position
    if opened.getinfo(member).file_size > limit:
        raise DataError(f"it has more than {limit:,} bytes")
    return opened.read(member)


def _limited(path: str, size: int, limit: int, start: int = 0) -> bytes:
    if size > limit:
        raise DataError(f"it has {size:,} bytes; at most {limit:,} are read")
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def text_of(file: File, limit: int) -> str | None:
    """The content of a small UTF-8 file; None of any other."""
    try:
        return read_bytes(file.path, limit).decode("utf-8-sig")
    except (UnicodeDecodeError, DataError):
        return None
    except OSError as error:
        raise DataError(f"The file {file.path!r} cannot be read: {describe_exception(error)}.") from error


@dataclass(frozen=True)
class Reach:
    """Which files the rows of a data set may name: a table is written by others, and may name any file or address."""

    roots: tuple[str, ...] = ()  # folders on this machine; relative paths begin in the first
    remote: bool = False  # the Hub and the web, as data sets on the Hub do
    anywhere: bool = False  # as --follow_paths asks

    def fetched(self, value: Any) -> Any:
        """The image of a row, with its bytes in place of its path. Raises `BadImage`, or `UnreadableFile`."""
        path = image_file(value, alone=True)
        if path is None:
            return value
        try:
            return {"bytes": self._read(path), "path": path}
        except (DataError, KeyError) as error:
            raise BadImage(f"the row's file cannot be read: {error}") from error
        except Exception as error:  # the HTTP client's exceptions differ between versions of the library
            raise UnreadableFile(error) from error

    def file_of(self, value: Any) -> dict[str, Any]:
        """The image of a row as an ordinary file on this machine, if it is one: its beginning may say enough."""
        path = image_file(value, alone=True)
        local = self.local(path) if path and not in_archive(path) else None
        return {"path": local} if local and os.path.isfile(local) else {}

    def local(self, path: str) -> str | None:
        """The file on this machine that has to be there for this path of a row; None if it may not be read, or is remote."""
        found = in_archive(path)
        where = path if found is None else found[1]
        if "://" in where:
            return None
        where = os.path.normpath(os.path.join(self.roots[0] if self.roots else "", where))
        inside = any(os.path.commonpath([root, where]) == root for root in self.roots if os.path.isabs(where))
        return where if self.anywhere or inside else None

    def _read(self, path: str) -> bytes:
        local = self.local(path)
        if local is not None:
            return read_bytes(path if in_archive(path) else local)
        hops = [hop.partition("://")[0] for hop in path.split("::") if "://" in hop]
        from_hub = self.remote and set(hops[:-1]) <= {"zip", "tar"} and set(hops[-1:]) < {"https", "http", "hf"}
        if not (self.anywhere or (from_hub and hops)):
            raise DataError(
                f"{path!r} is not in the folder of the data. Move it there, or add --follow_paths if you trust the data"
            )
        if hops[-1:] in (["file"], ["local"]):  # which may name a device
            return read_bytes(path.rpartition("://")[2])
        return _download(path)


def _download(address: str) -> bytes:
    """What is there, by the Hub's client if it is on the web. Raises DataError if it does not end."""
    content = bytearray()
    with contextlib.ExitStack() as stack:
        if address.startswith(("http://", "https://")):
            answer = stack.enter_context(get_session().stream("GET", address, follow_redirects=True, timeout=TIMEOUT))
            answer.raise_for_status()
            chunks = answer.iter_bytes()
        else:
            file = stack.enter_context(fsspec.open(address, "rb"))
            chunks = iter(partial(file.read, 2**20), b"")
        for chunk in chunks:
            content += chunk
            if len(content) > MAX_REMOTE_BYTES:
                raise DataError(f"it has more than {MAX_REMOTE_BYTES:,} bytes")
    return bytes(content)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def stamps(paths: Iterable[str | None]) -> Iterator[tuple[int, ...] | None]:
    """What changes when a local file is replaced, even by one of the same size and time; None for one that is not there."""
    known: dict[str, tuple[int, ...] | None] = {None: None}
    for path in paths:
        if path not in known:
            try:
                known[path] = _stamp(os.stat(path))
            except (OSError, ValueError):  # a name that no file can have
                known[path] = None
        yield known[path]


def content_of(files: Iterable[tuple[str, str]]) -> str:
    """32 hex digits of files given as (name, path): their names, sizes, and each one's first and last SAMPLE_BYTES."""
    digest, files = hashlib.blake2b(digest_size=16), sorted(set(files))
    chunks = [files[start : start + 256] for start in range(0, len(files), 256)]
    with ThreadPoolExecutor(SAMPLING_THREADS) as pool:
        for samples in pool.map(lambda chunk: b"".join(map(_sample, chunk)), chunks):
            digest.update(samples)
    return digest.hexdigest()


def _sample(file: tuple[str, str]) -> bytes:
    name, path = file
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape") + b"\0", digest_size=16)
    if os.path.isfile(path):
        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(b"%d\0" % size + opened.read(SAMPLE_BYTES))
            opened.seek(max(opened.tell(), size - SAMPLE_BYTES))
            digest.update(opened.read(SAMPLE_BYTES))
    return digest.digest()
