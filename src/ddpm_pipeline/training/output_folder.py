"""The folder that a run leaves its model in, and what it may write, find or remove there."""

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
from ..support.atomic import temporary_beside
from ..support.errors import CheckpointError, ConfigError
from .options import RunOptions

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

OPTIONS_FILE = "training_config.yaml"  # its presence marks a folder as one of ours
TRACKER_PROJECT = "ddpm-pipeline"  # TensorBoard's files are in a folder of this name
LOCK = ".lock"  # is locked by the run that writes to the folder, and names its process
SHIPPED = AlphaDDPMPipeline.shipped_files() | AlphaDDPMTextToImagePipeline.shipped_files()
ATTEMPT_FILES = {"train.log", "skipped.jsonl"}  # written before a run is known by its OPTIONS_FILE
SETUP_FILES = {*ATTEMPT_FILES, OPTIONS_FILE, TRACKER_PROJECT, "wandb"}  # all that a run has before its first update
# Everything that a run writes into its folder, and so all that --overwrite may remove.
RUN_FILES = frozenset((
    *SETUP_FILES, "checkpoints", "samples", "samples.png", "samples.txt", "process.png", "metrics.jsonl", "README.md",
    "model_index.json", "modular_config.json", "unet", "scheduler", "text_encoder", "tokenizer", *SHIPPED, ".push",
    "evaluation.json", "closest_pairs.png", "evaluations.jsonl", "logs",
))  # fmt: skip
ASIDE, MOVING = ".previous", ".previous-moving"  # an earlier run that --overwrite set aside: all of it, a part of it
TEMPORARY = re.compile(r"\.(.+)\.\w+\.tmp")  # of `support.atomic`


_held: set[tuple[int, int, int]] = set()  # process, device and inode of folders: a lock keeps other processes out alone


class OutputFolder:
    """The output folder of a run that is under way: locked, and with an earlier run set aside until this one has begun."""

    def __init__(self, path: Path, options: RunOptions):
        """Raises ConfigError if the folder cannot be written, holds files that no run wrote, is that of a run under way, or
        holds a run that is to be neither resumed nor overwritten.
        """
        self.path, self._resumes = path, bool(options.resume)
        present = _names_in(path)
        if foreign := _foreign(present):
            raise ConfigError(
                f"--output_dir {path} holds {', '.join(foreign[:3])}{' and more' if len(foreign) > 3 else ''}, which no "
                "training run wrote; name an empty or new folder."
            )
        if path.is_symlink() and not path.exists():
            raise ConfigError(f"--output_dir {path} is a link to {path.readlink()}, which is not there; name another.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._identity = _identity(path)
            if (os.getpid(), *self._identity) in _held:
                raise _held_by(path, "this process")
            self._lock = _locked(path / LOCK)
        except OSError as error:
            raise ConfigError(f"--output_dir {path} cannot be written to: {error.strerror}.") from error
        _held.add((os.getpid(), *self._identity))
        try:
            put_back(path)
            for leftover in path.iterdir():
                if _is_temporary(leftover.name):
                    _remove(leftover)
            if not (options.resume or options.overwrite) and _own(_names_in(path)) - SETUP_FILES:
                raise ConfigError(
                    f"--output_dir {path} holds an earlier run. Resume it with --resume latest, replace it with --overwrite, "
                    "or name another folder."
                )
        except BaseException:
            self.release()
            raise

    def set_aside(self) -> None:
        """Move an earlier run out of the way, unless this run resumes it. Until `keep`, `put_back` undoes that."""
        present = _own(_names_in(self.path))
        if self._resumes or not present:
            return
        moving = self.path / MOVING
        moving.mkdir()
        for name in present:
            os.rename(self.path / name, moving / name)
        os.rename(moving, self.path / ASIDE)

    def keep(self) -> None:
        """This run has begun: remove what was set aside."""
        if (self.path / ASIDE).is_dir():
            doomed = temporary_beside(self.path / ASIDE, "removed")
            os.replace(self.path / ASIDE, doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # what cannot be removed is no reason to end the run

    def check(self) -> None:
        """Raises CheckpointError if the folder was removed or renamed since the run began."""
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                return
        raise CheckpointError(
            f"--output_dir {self.path} was removed or renamed during the run, and what the run had written with it. Put the "
            "folder back and continue with --resume latest, or start again."
        )

    def release(self) -> None:
        """Let other runs have the folder; one in which nothing was written goes."""
        with contextlib.suppress(OSError):
            self.check()
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()  # refused if it holds anything
        _held.discard((os.getpid(), *self._identity))
        os.close(self._lock)


@contextlib.contextmanager
def output_folder(path: Path, options: RunOptions) -> Iterator[OutputFolder]:
    """The folder for a run, for its main process. If the run fails before it has begun, an earlier one is back in its place."""
    folder = OutputFolder(path, options)
    try:
        yield folder
    except BaseException:
        folder.check()
        put_back(path)
        raise
    finally:
        folder.release()


def put_back(path: Path) -> None:
    """Undo `set_aside` where the new run failed or was killed before it had begun. A kill in between loses nothing."""
    aside, moving = path / ASIDE, path / MOVING
    if aside.is_dir():  # it is whole, so that what lies outside is of the new run
        for name in _own(_names_in(path)):
            _remove(path / name)
        os.rename(aside, moving)
    if moving.is_dir():
        for entry in moving.iterdir():
            os.rename(entry, path / entry.name)
        moving.rmdir()


def _names_in(path: Path) -> list[str]:
    """Raises ConfigError if the path is that of a file."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"--output_dir {path} cannot be used: {error.strerror}; name a folder.") from error


def _own(present: list[str]) -> set[str]:
    """The names that a run writes and leaves."""
    return RUN_FILES & set(present)


def _is_temporary(name: str) -> bool:
    """Whether a kill left it, in the middle of a write or of a removal."""
    found = TEMPORARY.fullmatch(name)
    return name.startswith(".export") or (found is not None and found[1] in {*RUN_FILES, ASIDE})


def _foreign(present: list[str]) -> list[str]:
    """The names that no run wrote. In a folder without a run they are all but what a run begins with, so that nobody's README
    or model is taken for that of a run.
    """
    if {OPTIONS_FILE, ASIDE, MOVING} & set(present):
        return []
    return [name for name in present if name not in ATTEMPT_FILES | {LOCK} and not _is_temporary(name)]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int]:
    """Of a folder, whatever its name."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _held_by(path: Path, holder: str) -> ConfigError:
    return ConfigError(
        f"--output_dir {path} is being written to by another run ({holder}); wait until it has ended, stop it, or name another "
        "folder."
    )


def _locked(path: Path) -> int:
    """A descriptor of the locked file, with this process in it. The lock ends with the process, however that ends, so that a
    file which a kill left does not count. Data workers do not inherit it. Raises ConfigError if another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
        os.close(descriptor)
        raise _held_by(path.parent, holder) from error
    except OSError:  # a file system without locks
        pass
    if os.fstat(descriptor).st_nlink == 0:  # the run that had it removed the file just now
        os.close(descriptor)
        return _locked(path)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
