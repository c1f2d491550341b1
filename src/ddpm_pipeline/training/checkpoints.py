"""Checkpoints of a run, and the output folder they lie in.

A checkpoint is a folder `checkpoints/step-00001000`. It is written beside under a dotted name, and renamed when every file is
on the disk and listed with its size and hash in `manifest.json`: under its own name it is whole. Imports accelerate,
safetensors and torch; nothing of the package.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from ..support.errors import CheckpointError, ConfigError
from .options import TrainingConfig

logger = logging.getLogger(__name__)

STATE_FILE = "run_state.json"
EMA_FILE = "ema.safetensors"
PARTS_FILE = "parts.pt"
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "training_config.yaml"  # its presence marks a folder as one of ours
# What a run writes into its folder, and so all that --overwrite may remove.
RUN_FILES = (
    CONFIG_FILE, "checkpoints", "samples", "samples.png", "train.log", "metrics.jsonl", "README.md", "model_index.json",
    "unet", "scheduler", "text_encoder", "tokenizer", "pipeline.py", "sampling_alpha_ddpm.py", "scheduling_alpha_ddpm.py",
    "stock_format.py", "process.png", ".push", "evaluation.json", "logs", "skipped.jsonl",
)  # fmt: skip


# Options that may differ when a run goes on; any other change would make it another run.
FREE_TO_CHANGE = frozenset(
    (
        "cache_dir", "preprocessing_num_workers", "dataloader_num_workers", "init_from", "max_train_steps",
        "num_train_epochs", "gradient_checkpointing", "channels_last", "num_cpu_threads", "output_dir", "overwrite", "resume",
        "max_bad_fraction", "max_train_time", "checkpoint_every", "checkpoints_total_limit", "preview_every",
        "preview_images", "preview_inference_steps", "preview_prompts", "preview_guidance", "num_samples", "eval_every",
        "eval_images", "eval_calls", "eval_samples", "eval_features",
        "log_every", "report_to", "push_to_hub", "hub_model_id", "hub_private", "hub_license",
        "push_every", "push_logs",
    )
)  # fmt: skip
NOT_WORTH_TELLING = frozenset(("resume", "overwrite", "output_dir"))


def prepare_output_folder(folder: Path, config: TrainingConfig) -> None:
    """Make the output folder fit to be written to, clearing an earlier run where that was asked for.

    Raises ConfigError where the folder cannot be written, holds something that is not of a run, or holds a run that was
    to be neither resumed nor overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file; name a folder.")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    ours = CONFIG_FILE in present
    if present and not ours and set(present) - {"train.log"}:
        raise ConfigError(
            f"--output_dir {folder} holds {', '.join(present[:3])}{' and more' if len(present) > 3 else ''}, which no "
            "run of this script wrote; name an empty or new folder."
        )
    if ours and not (config.resume or config.overwrite):
        raise ConfigError(
            f"--output_dir {folder} holds an earlier run. Go on with it by --resume latest, replace it by --overwrite, "
            "or name another folder."
        )
    if config.overwrite:
        for name in RUN_FILES:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    _check_writable(folder)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be written to: {error.strerror}.") from error


class HasState(Protocol):
    """A part of a run with a state of tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


# ---- finding one ------------------------------------------------------------------------------------


def find_checkpoint(folder: Path, config: TrainingConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint that `--resume` means; None where 'latest' finds none. `config` is the resolved one.

    'latest' is the newest that is whole; what it passes over is said. The main process looks, and tells the others. Raises
    ConfigError where there is no such checkpoint, or options changed that make it another run.
    """
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _find_checkpoint(folder, config)
        except ConfigError as error:
            answer[1] = str(error)
    checkpoint, problem = broadcast_object_list(answer)
    if problem is not None:
        raise ConfigError(problem)
    return checkpoint


def _find_checkpoint(folder: Path, config: TrainingConfig) -> Path | None:
    if config.resume != "latest":
        checkpoint = Path(config.resume)
        if not (checkpoint / STATE_FILE).is_file():
            raise ConfigError(
                f"--resume {checkpoint} is not a checkpoint (no {STATE_FILE} in it); name one, or 'latest'."
            )
        if problem := what_is_wrong(checkpoint):
            raise ConfigError(f"--resume {checkpoint} is damaged: {problem}. Name another checkpoint, or 'latest'.")
    else:
        checkpoint = _newest_whole(folder)
        if checkpoint is None:
            logger.info("no checkpoint in %s yet: starting anew", folder)
            return None
    stored_file = checkpoint.parent.parent / CONFIG_FILE
    stored = yaml.safe_load(stored_file.read_text("utf-8")) if stored_file.is_file() else {}
    changed = {
        name: f"--{name} was {stored[name]} and is {value}"
        for name, value in asdict(config).items()
        if name in stored and stored[name] != value
    }
    if refused := [text for name, text in changed.items() if name not in FREE_TO_CHANGE]:
        raise ConfigError(f"{checkpoint} belongs to another run: {'; '.join(refused)}. Give the options of that run.")
    if told := [text for name, text in changed.items() if name not in NOT_WORTH_TELLING]:
        logger.info("going on with changed options: %s", "; ".join(told))
    return checkpoint


def _newest_whole(folder: Path) -> Path | None:
    found = list_checkpoints(folder)
    damaged = []
    for checkpoint in reversed(found):
        problem = what_is_wrong(checkpoint)
        if problem is None:
            return checkpoint
        damaged.append(f"{checkpoint.name}: {problem}")
        logger.warning("passing over the checkpoint %s: %s", checkpoint.name, problem)
    if damaged:
        raise ConfigError(
            f"none of the {len(found)} checkpoints in {folder} is whole ({'; '.join(damaged)}). Bring one back from a copy, or "
            "start anew with --overwrite."
        )
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first."""
    parent = folder / "checkpoints"
    named = [path for path in parent.iterdir() if re.fullmatch(r"step-\d+", path.name)] if parent.is_dir() else []
    return sorted(named, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, by its manifest of sizes and hashes; None where it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text("utf-8"))
        for name, listed in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != listed["size"]:
                return f"{name} has {size} bytes, and had {listed['size']}"
            if _hash_file(path) != listed["blake2b"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST_FILE} cannot be read ({type(error).__name__}: {error})"
    return None if STATE_FILE in manifest["files"] else f"its {MANIFEST_FILE} lists no {STATE_FILE}"


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# ---- writing and reading ----------------------------------------------------------------------------


class Checkpoints:
    """Writes the checkpoints of a run. The state is written while training waits; making it safe on the disk, hashing,
    renaming and dropping older ones is done in the background.

    Every process calls `save` and `close`. Both raise CheckpointError where a checkpoint could not be written.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int):
        self.accelerator, self.folder, self.limit = accelerator, folder, limit
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future | None = None
        if accelerator.is_main_process:
            for leftover in (folder / "checkpoints").glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, ema: EMAModel | None, parts: Mapping[str, HasState], own: Any = None) -> None:
        """The state after `step` updates: what accelerate keeps, the averaged weights, the named parts, and `own`, plain values
        that differ between processes.
        """
        self.wait()
        final = self.folder / "checkpoints" / f"step-{step:08d}"
        temporary = final.with_name(f".{final.name}.tmp")
        all_own = gather_object([own])
        problem = None
        if self.accelerator.is_main_process:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = error
        self._agree(step, problem, temporary)
        try:
            self.accelerator.save_state(str(temporary))
            if self.accelerator.is_main_process:
                _write_parts(temporary, step, ema, parts, all_own)
        except Exception as error:  # safetensors, torch and the operating system all have their own for a full disk
            problem = error
        self._agree(step, problem, temporary)
        if self.accelerator.is_main_process:
            self._under_way = self._worker.submit(_finish, temporary, final, self.limit)

    def wait(self) -> None:
        """Until the last one is whole."""
        problem, step = None, 0
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            try:
                step = under_way.result()
            except Exception as error:
                problem = error
        self._agree(step, problem, None)

    def close(self) -> None:
        """The last one is whole, or the reason why not is raised."""
        self.wait()
        self._worker.shutdown()

    @property
    def last(self) -> str:
        """Name of the last whole one, for messages."""
        whole = list_checkpoints(self.folder)
        return str(whole[-1]) if whole else "none"

    def _agree(self, step: int, problem: Exception | None, temporary: Path | None) -> None:
        """Raise CheckpointError in all processes where one has a problem, so that none waits for it."""
        problems = [problem and f"{type(problem).__name__}: {problem}"]
        if self.accelerator.num_processes > 1:
            problems = gather_object(problems)
        if found := [text for text in problems if text]:
            free = shutil.disk_usage(self.folder).free / 1e6  # libraries have words of their own for a full disk
            if temporary is not None and self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)  # the room may be what others need
            raise CheckpointError(
                f"a checkpoint could not be written, with {free:,.0f} MB free on its disk: {found[0]}. The last whole one is "
                f"{self.last}; make room, and go on from it with --resume latest."
            ) from problem


def _write_parts(
    folder: Path, step: int, ema: EMAModel | None, parts: Mapping[str, HasState], all_own: list[Any]
) -> None:
    if ema is not None:
        shadow = {str(index): value.contiguous() for index, value in enumerate(ema.shadow_params)}
        save_file(shadow, folder / EMA_FILE)
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / PARTS_FILE)
    state = {"step": step, "ema_step": None if ema is None else ema.optimization_step, "processes": all_own}
    (folder / STATE_FILE).write_text(json.dumps(state), "utf-8")


def _finish(temporary: Path, final: Path, limit: int) -> int:
    """Bring a written checkpoint safely to the disk and to its name, then drop all but the newest `limit`."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    listed = {}
    for path in files:
        listed[path.relative_to(temporary).as_posix()] = {"size": path.stat().st_size, "blake2b": _hash_file(path)}
        _to_disk(path)
    (temporary / MANIFEST_FILE).write_text(json.dumps({"files": listed}, indent=1), "utf-8")
    _to_disk(temporary / MANIFEST_FILE)
    for folder in {path.parent for path in files}:
        _to_disk(folder)
    if final.exists():  # of an earlier course of the run that this one was resumed before
        _remove(final)
    os.replace(temporary, final)
    _to_disk(final.parent)
    up_to_this = [other for other in list_checkpoints(final.parent.parent) if _step_of(other) <= _step_of(final)]
    for old in up_to_this[:-limit]:
        _remove(old)
    return _step_of(final)


def _remove(checkpoint: Path) -> None:
    """Under its name it is whole until it is gone."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(
    accelerator: Accelerator, ema: EMAModel | None, parts: Mapping[str, HasState], checkpoint: Path
) -> tuple[int, Any]:
    """Bring everything back to where it was; (the number of updates done, what this process gave as `own`).

    The latter is None where the number of processes has changed. Nothing pickled is executed.
    """
    accelerator.load_state(str(checkpoint))
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text("utf-8"))
    if ema is not None:
        if not (checkpoint / EMA_FILE).is_file():
            raise ConfigError(f"{checkpoint} has no moving average of the weights; resume it with --ema_decay 0.")
        stored = load_file(checkpoint / EMA_FILE)
        with torch.no_grad():
            for index, shadow in enumerate(ema.shadow_params):
                shadow.copy_(stored[str(index)])
        ema.optimization_step = state["ema_step"]
    stored_parts = torch.load(checkpoint / PARTS_FILE, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(stored_parts[name])
    same = len(state["processes"]) == accelerator.num_processes
    return state["step"], state["processes"][accelerator.process_index] if same else None


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a run after a sudden end, finds the old text or the new one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, "utf-8")
    _to_disk(beside)
    os.replace(beside, path)
