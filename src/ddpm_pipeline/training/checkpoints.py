"""Checkpoints of a run: found, written in the background, and read back.

A checkpoint is a folder `checkpoints/step-00001000`. It is written beside under a hidden name, and renamed once every file is
on the disk and listed with its size and hash in `manifest.json`: under its own name it is whole.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file

from ..support.atomic import remove_folder, remove_leftovers, replace_folder, sync_folder, temporary_beside
from ..support.errors import CheckpointError, ConfigError
from ..support.exceptions import describe_exception
from .identity import DATA, changes
from .options import RunOptions, TrainingOptions
from .output_folder import OPTIONS_FILE
from .state import TrainingState

logger = logging.getLogger(__name__)

STATE_FILE, MANIFEST_FILE, WEIGHTS_FILE = "run_state.json", "manifest.json", "model.safetensors"
EMA_FILE, PARTS_FILE, IDENTITY_FILE = "ema.safetensors", "parts.pt", "identity.json"
CHANGES_SHOWN = 5


# ---- finding one ------------------------------------------------------------------------------------


def find_checkpoint(
    folder: Path, options: TrainingOptions, accelerator: Accelerator, identity: Callable[[], dict[str, Any]]
) -> Path | None:
    """The checkpoint that `--resume` means; None without it, or if there is none yet for 'latest'. `options` are the resolved
    ones, and `identity` gives what this run is of besides (`identity_of`).

    'latest' is the newest whole one; damaged ones are passed over and logged. The main process looks and tells the others.
    Raises ConfigError if there is no such checkpoint, or if changed options, data or models would make it another run.
    """
    checkpoint, problem = None, None
    if accelerator.is_main_process and (resume := options.run.resume):
        try:
            checkpoint = _newest_whole(folder) if resume == "latest" else _named_checkpoint(Path(resume), folder)
            if checkpoint is not None:
                _compare_options(checkpoint, options)
                _compare_identity(checkpoint, identity(), options.run.accept_changed_data)
        except ConfigError as error:
            problem = str(error)
    checkpoint, problem = broadcast_object_list([checkpoint, problem])
    if problem is not None:
        raise ConfigError(problem)
    return checkpoint


def _named_checkpoint(path: Path, folder: Path) -> Path:
    if not (path / STATE_FILE).is_file():
        known = ", ".join(map(str, list_checkpoints(folder))) or "there is none"
        raise ConfigError(
            f"--resume {path} is not a checkpoint: it has no {STATE_FILE}. Name one of {folder} ({known}), or 'latest'."
        )
    if problem := damage_of(path):
        raise ConfigError(f"--resume {path} is damaged: {problem}. Name another checkpoint, or 'latest'.")
    return path


def _compare_options(checkpoint: Path, options: TrainingOptions) -> None:
    """Logs which options differ from those of the checkpoint's run. Raises ConfigError if they make it another run, or if it
    has done more updates already than are asked for.
    """
    stored = stored_options(checkpoint)
    changed: dict[str, list[str]] = {"refuse": [], "tell": [], "allow": []}
    for name, value in options.flat().items():
        if name in stored and stored[name] != value:
            rule = options.declared()[name].metadata["on_resume"]
            rule = "tell" if rule == "refuse" and _moved(stored[name], value) else rule
            changed[rule].append(f"--{name} was {stored[name]} and is {value}")
    if refused := "; ".join(changed["refuse"]):
        raise ConfigError(
            f"{checkpoint} belongs to another run: {refused}. Repeat the options of that run, or {_another_run(checkpoint)}."
        )
    done, asked = _read_state(checkpoint)["step"], options.optimisation.max_train_steps
    if done > asked:
        raise ConfigError(
            f"{checkpoint} has done {done} updates, more than the {asked} asked for. Ask for at least {done} with "
            f"--max_train_steps, name an earlier checkpoint, or make a model of this one: {export_command(checkpoint)}."
        )
    if changed["tell"]:
        logger.info("resuming with changed options: %s", "; ".join(changed["tell"]))


def _moved(before: Any, now: Any) -> bool:
    """Whether both may be paths of the same file or folder, moved; of what it holds, the identities are compared."""
    both = isinstance(before, str) and isinstance(now, str)
    return both and os.sep in before + now and os.path.basename(before.rstrip(os.sep)) == os.path.basename(now.rstrip(os.sep))


def options_to_resume(options: RunOptions, folder: Path) -> dict[str, Any] | None:
    """Those of the run that `--resume` means, before it is known whether its checkpoint is whole; None if there is none yet."""
    found = list_checkpoints(folder)[-1:] if options.resume == "latest" else [Path(options.resume)] if options.resume else []
    return stored_options(found[0]) if found else None


def stored_options(checkpoint: Path) -> dict[str, Any]:
    """The options of a checkpoint's run, by the inverse of `TrainingOptions.to_yaml`; none if it does not have them. Raises
    ConfigError if they cannot be read.
    """
    files = (checkpoint / OPTIONS_FILE, checkpoint.parent.parent / OPTIONS_FILE)  # the latter of earlier versions
    file = next((file for file in files if file.is_file()), None)
    try:
        stored = {} if file is None else yaml.safe_load(file.read_text("utf-8"))
        return dict(stored)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {describe_exception(error)}. Use another checkpoint.") from error


def _compare_identity(checkpoint: Path, identity: dict[str, Any], accept_changed_data: bool) -> None:
    """Raises ConfigError if the run is of something else now. Changed images can be accepted."""
    if not (checkpoint / IDENTITY_FILE).is_file():
        logger.warning("%s is of an earlier version and does not say what it was trained on", checkpoint)
        return
    stored = _read_json(checkpoint / IDENTITY_FILE)
    own = {name: value for name, value in identity.items() if name != DATA}
    if changed := "; ".join(islice(changes(stored, own), CHANGES_SHOWN)):
        raise ConfigError(
            f"{checkpoint} belongs to another run: {changed}. Restore what was there, or {_another_run(checkpoint)}."
        )
    if stored.get(DATA) != identity.get(DATA):
        what = f"the data were {stored.get(DATA)} and are {identity.get(DATA)}"
        if not accept_changed_data:
            raise ConfigError(
                f"{checkpoint} was trained on other data: {what}. Restore them, resume on the changed data with "
                f"--accept_changed_data, or {_another_run(checkpoint)}."
            )
        logger.warning("resuming on changed data: %s", what)


def export_command(checkpoint: Path | str) -> str:
    """The command that makes a model of a checkpoint."""
    return f"python -m ddpm_pipeline.training.export {shlex.quote(str(checkpoint))} --output_dir FOLDER"


def _another_run(checkpoint: Path) -> str:
    return f"start a new run from its weights with --init_from {checkpoint}"


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises ConfigError unless the counters are numbers of updates."""
    stored = _read_json(checkpoint / STATE_FILE)
    counts = stored.get("step"), stored.get("ema_step") or 0
    if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(stored.get("processes"), list):
        raise ConfigError(f"{checkpoint / STATE_FILE} does not say how many updates were done; use another checkpoint.")
    return stored


def _read_json(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {describe_exception(error)}. Use another checkpoint.") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(stored).__name__}; use another checkpoint.")
    return stored


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
    return sorted(filter(Path.is_dir, named), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def damage_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, by its manifest of sizes and hashes; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text("utf-8"))
        for name, listed in manifest["files"].items():
            path = checkpoint / name
            if not path.resolve().is_relative_to(checkpoint.resolve()):
                return f"its {MANIFEST_FILE} names {name}, which lies outside of it"
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
        self.best: int | None = None  # the update whose checkpoint is kept beside the limit
        self.saved: int | None = None  # the update whose checkpoint was written last
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future | None = None
        if accelerator.is_main_process:
            remove_leftovers(folder / "checkpoints", ".step-*")

    def set_aside(self, first: int, resume: str | None) -> None:
        """Rename checkpoints of another course of the run than the one that continues after update `first` of the checkpoint
        that `--resume` names, so that 'latest' never means them; nothing is removed. For the main process.
        """
        folder = self.folder / "checkpoints"
        elsewhere = resume not in (None, "latest") and Path(resume).resolve().parent != folder.resolve()
        for path in sorted(folder.glob("step-*")):
            if re.fullmatch(r"step-\d+", path.name) and (elsewhere or _step_of(path) > first):
                names = (path.with_name(f"{path.name}-set-aside-{number}") for number in count(1))
                aside = path.rename(next(name for name in names if not os.path.lexists(name)))
                logger.warning("the run continues after update %d; the later %s is now %s", first, path.name, aside.name)

    def save(self, state: TrainingState, step: int, own: Any, describe: Callable[[Path], None]) -> None:
        """Save the state after `step` updates, and `own`: plain values that differ between processes. `describe` writes files
        that say what the model is.
        """
        self.wait()
        final, self.saved = self.path(step), step
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
                describe(temporary)
        if main:
            self._under_way = self._worker.submit(_finish, temporary, final, self.limit, self.best)

    def path(self, step: int) -> Path:
        """Of the checkpoint after `step` updates, whether or not it exists."""
        return self.folder / "checkpoints" / f"step-{step:08d}"

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


def _finish(temporary: Path, final: Path, limit: int, best: int | None) -> None:
    """Bring a written checkpoint to the disk and under its name, then remove all but that of update `best` and the newest
    `limit` others. One that cannot be removed is reported and left where it is.
    """
    listed = {}
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        name = path.relative_to(temporary).as_posix()
        listed[name] = {"size": path.stat().st_size, "blake2b": _hash_file(path)}
    (temporary / MANIFEST_FILE).write_text(json.dumps({"files": listed}, indent=1), "utf-8")
    sync_folder(temporary)
    replace_folder(temporary, final)  # one may be left over from an attempt that got further than where we resumed
    found = list_checkpoints(final.parent.parent)
    for old in [other for other in found if _step_of(other) <= _step_of(final) and _step_of(other) != best][:-limit]:
        try:
            remove_folder(old)
        except OSError as error:
            logger.warning("the old checkpoint %s cannot be removed (%s); remove it by hand", old, error)


# ---- reading ----------------------------------------------------------------------------------------


def load_checkpoint(accelerator: Accelerator, state: TrainingState, checkpoint: Path) -> tuple[int, Any]:
    """Restore the state without executing anything pickled; (the number of updates done, what this process gave as `own`, or
    None if the number of processes has changed). Raises ConfigError if the state is not one of this network and optimizer.
    """
    stored = _read_state(checkpoint)
    if state.ema is not None and not (checkpoint / EMA_FILE).is_file():
        raise ConfigError(f"{checkpoint} has no EMA of the weights; resume it with --ema_decay 0.")
    try:
        _restore(accelerator, state, checkpoint, stored["ema_step"])
    except Exception as error:  # safetensors, torch and pickle each have their own for what they cannot read
        why = describe_exception(error)
        raise ConfigError(f"{checkpoint} cannot be resumed: {why}. Resume from another checkpoint.") from error
    if not state.weights_are_finite():
        raise ConfigError(f"{checkpoint} has weights that are not finite; resume from another checkpoint.")
    same = len(stored["processes"]) == accelerator.num_processes
    return stored["step"], stored["processes"][accelerator.process_index] if same else None


def _restore(accelerator: Accelerator, state: TrainingState, checkpoint: Path, ema_step: int | None) -> None:
    """Compare first: some of these would take, cast or write into what does not fit, without an error."""
    _check_form(load_file(checkpoint / WEIGHTS_FILE), state.model.state_dict(), "weights")
    optimizer = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True, mmap=True)
    parameters = [parameter for group in state.updater.optimizer.param_groups for parameter in group["params"]]
    moments = {index: dict.fromkeys(("exp_avg", "exp_avg_sq"), value) for index, value in enumerate(parameters)}
    if strange := optimizer["state"].keys() - moments.keys():
        raise ValueError(f"the optimizer's state is of parameters {sorted(strange)[:3]}, and there are {len(parameters)}")
    _check_form(optimizer["state"], moments, "optimizer state")
    _check_form(optimizer["param_groups"], state.updater.optimizer.state_dict()["param_groups"], "optimizer")
    parts = torch.load(checkpoint / PARTS_FILE, map_location="cpu", weights_only=True)
    _check_form(parts, {name: part.state_dict() for name, part in state.parts.items()}, "state")
    if state.ema is not None:
        shadows = load_file(checkpoint / EMA_FILE)
        own = {str(index): shadow for index, shadow in enumerate(state.ema.shadow_params)}
        if shadows.keys() != own.keys():
            raise ValueError(f"the EMA has {len(shadows)} tensors and the network {len(own)}")
        _check_form(shadows, own, "EMA weights")
        with torch.no_grad():
            for name, shadow in own.items():
                shadow.copy_(shadows[name])
        state.ema.optimization_step = ema_step
    accelerator.load_state(str(checkpoint))
    for name, part in state.parts.items():
        part.load_state_dict(parts[name])


def _check_form(stored: Any, own: Any, name: str) -> None:
    """Raises ValueError if types, lengths, or the shapes and dtypes of tensors differ. A key that one of them lacks is no
    difference here: versions of torch add some, and for the others loading says what is missing.
    """
    if isinstance(stored, dict) and isinstance(own, dict):
        for key in stored.keys() & own.keys():
            _check_form(stored[key], own[key], f"{name} {key}")
    elif isinstance(stored, list | tuple) and isinstance(own, list | tuple) and len(stored) == len(own):
        for index, pair in enumerate(zip(stored, own, strict=True)):
            _check_form(*pair, f"{name} {index}")
    elif (has := _form(stored)) != (needs := _form(own)):
        raise ValueError(f"{name} is {has} instead of {needs}")


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    return "a number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
