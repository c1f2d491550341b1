"""Checkpoints of a run: found, written in the background, and read back.

A checkpoint is a folder `checkpoints/step-00001000`. It is written beside under a hidden name, and renamed once every file is
on the disk and listed with its size and hash in `manifest.json`: under its own name it is whole.
"""

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file

from ..support.atomic import remove_folder, remove_leftovers, replace_folder, sync_folder, temporary_beside
from ..support.errors import CheckpointError, ConfigError
from .options import TrainingOptions
from .output_folder import OPTIONS_FILE
from .state import TrainingState

logger = logging.getLogger(__name__)

STATE_FILE, MANIFEST_FILE = "run_state.json", "manifest.json"
EMA_FILE, PARTS_FILE = "ema.safetensors", "parts.pt"


# ---- finding one ------------------------------------------------------------------------------------


def find_checkpoint(folder: Path, options: TrainingOptions, accelerator: Accelerator) -> Path | None:
    """The checkpoint that `--resume` means; None if there is none yet for 'latest'. `options` are the resolved ones.

    'latest' is the newest whole one; damaged ones are passed over and logged. The main process looks and tells the others.
    Raises ConfigError if there is no such checkpoint, or if options changed that would make it another run.
    """
    checkpoint, problem = None, None
    if accelerator.is_main_process:
        try:
            resume = options.run.resume
            checkpoint = _newest_whole(folder) if resume == "latest" else _named_checkpoint(Path(resume))
            if checkpoint is not None:
                _compare_options(checkpoint, options)
        except ConfigError as error:
            problem = str(error)
    checkpoint, problem = broadcast_object_list([checkpoint, problem])
    if problem is not None:
        raise ConfigError(problem)
    return checkpoint


def _named_checkpoint(path: Path) -> Path:
    if not (path / STATE_FILE).is_file():
        raise ConfigError(f"--resume {path} is not a checkpoint: it has no {STATE_FILE}. Name one, or 'latest'.")
    if problem := damage_of(path):
        raise ConfigError(f"--resume {path} is damaged: {problem}. Name another checkpoint, or 'latest'.")
    return path


def _compare_options(checkpoint: Path, options: TrainingOptions) -> None:
    """Logs which options differ from those of the checkpoint's run. Raises ConfigError if they make it another run."""
    stored_file = checkpoint.parent.parent / OPTIONS_FILE
    stored = yaml.safe_load(stored_file.read_text("utf-8")) if stored_file.is_file() else {}
    changed: dict[str, list[str]] = {"refuse": [], "tell": [], "allow": []}
    for name, value in options.flat().items():
        if name in stored and stored[name] != value:
            rule = options.declared()[name].metadata["on_resume"]
            changed[rule].append(f"--{name} was {stored[name]} and is {value}")
    if refused := "; ".join(changed["refuse"]):
        raise ConfigError(f"{checkpoint} belongs to another run: {refused}. Repeat the options of that run.")
    if changed["tell"]:
        logger.info("resuming with changed options: %s", "; ".join(changed["tell"]))


def _newest_whole(folder: Path) -> Path | None:
    damaged: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = damage_of(checkpoint)
        if problem is None:
            return checkpoint
        damaged.append(f"{checkpoint.name}: {problem}")
        logger.warning("passing over the checkpoint %s: %s", checkpoint.name, problem)
    if damaged:
        raise ConfigError(
            f"none of the {len(damaged)} checkpoints in {folder} is whole ({'; '.join(damaged)}). Restore one from a backup, "
            "or start a new run with --overwrite."
        )
    logger.info("%s has no checkpoint yet: starting a new run", folder)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first."""
    parent = folder / "checkpoints"
    named = [path for path in parent.iterdir() if re.fullmatch(r"step-\d+", path.name)] if parent.is_dir() else []
    return sorted(named, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def damage_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, by its manifest of sizes and hashes; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text("utf-8"))
        for name, listed in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != listed["size"]:
                return f"{name} has {size} bytes instead of {listed['size']}"
            if _hash_file(path) != listed["blake2b"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"
    return None if STATE_FILE in manifest["files"] else f"its {MANIFEST_FILE} lists no {STATE_FILE}"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# ---- writing ----------------------------------------------------------------------------------------


class Checkpoints:
    """Writes the checkpoints of a run. Training waits while the state is written; hashing it, bringing it to the disk, renaming
    and removing older ones happen in the background.

    Every process calls `save` and `close`. Both raise CheckpointError if a checkpoint could not be written.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int):
        self.accelerator, self.folder, self.limit = accelerator, folder, limit
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future | None = None
        if accelerator.is_main_process:
            remove_leftovers(folder / "checkpoints", ".step-*")

    def save(self, state: TrainingState, step: int, own: Any = None) -> None:
        """Save the state after `step` updates, and `own`: plain values that differ between processes."""
        self.wait()
        final = self.folder / "checkpoints" / f"step-{step:08d}"
        temporary = temporary_beside(final, "run")  # one name for all processes
        all_own, main = gather_object([own]), self.accelerator.is_main_process
        with self._together(temporary):
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        with self._together(temporary):
            self.accelerator.save_state(str(temporary))
            if main:
                if state.ema is not None:
                    shadow = {str(index): value.contiguous() for index, value in enumerate(state.ema.shadow_params)}
                    save_file(shadow, temporary / EMA_FILE)
                torch.save({name: part.state_dict() for name, part in state.parts.items()}, temporary / PARTS_FILE)
                ema_step = None if state.ema is None else state.ema.optimization_step
                stored = {"step": step, "ema_step": ema_step, "processes": all_own}
                (temporary / STATE_FILE).write_text(json.dumps(stored), "utf-8")
        if main:
            self._under_way = self._worker.submit(_finish, temporary, final, self.limit)

    def wait(self) -> None:
        """Until the latest checkpoint is whole."""
        under_way, self._under_way = self._under_way, None
        with self._together():
            if under_way is not None:
                under_way.result()

    def close(self) -> None:
        """Wait for the latest checkpoint, or raise the reason why it is not whole."""
        self.wait()
        self._worker.shutdown()

    @property
    def last(self) -> str:
        """Name of the last whole checkpoint, for messages."""
        whole = list_checkpoints(self.folder)
        return str(whole[-1]) if whole else "none"

    @contextlib.contextmanager
    def _together(self, temporary: Path | None = None) -> Iterator[None]:
        """Raises CheckpointError in all processes if what is done within fails in one, so that none waits for it."""
        problem = None
        try:
            yield
        except Exception as error:  # safetensors, torch and the operating system each have their own for a full disk
            problem = error
        problems = [problem and f"{type(problem).__name__}: {problem}"]
        if self.accelerator.num_processes > 1:
            problems = gather_object(problems)
        if found := [text for text in problems if text]:
            free = shutil.disk_usage(self.folder).free / 1e6  # libraries have words of their own for a full disk
            if temporary is not None and self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)  # others may need the room
            raise CheckpointError(
                f"a checkpoint could not be written, with {free:,.0f} MB free on its disk: {found[0]}. The last whole one is "
                f"{self.last}; make room, and continue from it with --resume latest."
            ) from problem


def _finish(temporary: Path, final: Path, limit: int) -> None:
    """Bring a written checkpoint to the disk and under its name, then remove all but the newest `limit`."""
    listed = {}
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        name = path.relative_to(temporary).as_posix()
        listed[name] = {"size": path.stat().st_size, "blake2b": _hash_file(path)}
    (temporary / MANIFEST_FILE).write_text(json.dumps({"files": listed}, indent=1), "utf-8")
    sync_folder(temporary)
    replace_folder(temporary, final)  # one may be left over from an attempt that got further than where we resumed
    up_to_this = [other for other in list_checkpoints(final.parent.parent) if _step_of(other) <= _step_of(final)]
    for old in up_to_this[:-limit]:
        remove_folder(old)


# ---- reading ----------------------------------------------------------------------------------------


def load_checkpoint(accelerator: Accelerator, state: TrainingState, checkpoint: Path) -> tuple[int, Any]:
    """Restore the state without executing anything pickled; (the number of updates done, what this process gave as `own`, or
    None if the number of processes has changed).
    """
    accelerator.load_state(str(checkpoint))
    stored: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    if state.ema is not None:
        if not (checkpoint / EMA_FILE).is_file():
            raise ConfigError(f"{checkpoint} has no EMA of the weights; resume it with --ema_decay 0.")
        shadows = load_file(checkpoint / EMA_FILE)
        with torch.no_grad():
            for index, shadow in enumerate(state.ema.shadow_params):
                shadow.copy_(shadows[str(index)])
        state.ema.optimization_step = stored["ema_step"]
    stored_parts = torch.load(checkpoint / PARTS_FILE, map_location="cpu", weights_only=True)
    for name, part in state.parts.items():
        part.load_state_dict(stored_parts[name])
    same = len(stored["processes"]) == accelerator.num_processes
    return stored["step"], stored["processes"][accelerator.process_index] if same else None
