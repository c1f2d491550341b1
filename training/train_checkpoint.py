"""Checkpoints of a run, and the output folder they lie in.

A checkpoint is a folder `checkpoints/step-00001000`, written beside under a dotted name and renamed when it is whole.
Imports accelerate, safetensors and torch; nothing of the package.
"""

import json
import logging
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from train_config import ConfigError, TrainingConfig

logger = logging.getLogger(__name__)

STATE_FILE = "run_state.json"
EMA_FILE = "ema.safetensors"
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
        "num_train_epochs", "gradient_checkpointing", "compile", "channels_last", "num_cpu_threads", "output_dir",
        "overwrite", "resume", "max_bad_fraction", "checkpoint_every", "checkpoints_total_limit", "preview_every",
        "preview_images", "preview_inference_steps", "preview_prompts", "preview_guidance", "num_samples", "log_every",
        "report_to",
    )
)  # fmt: skip


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


def find_checkpoint(folder: Path, config: TrainingConfig) -> Path | None:
    """The checkpoint that `--resume` means; None where 'latest' finds none. `config` is the resolved one.

    Raises ConfigError where there is no such checkpoint, or options changed that make it another run.
    """
    if config.resume != "latest":
        checkpoint = Path(config.resume)
        if not (checkpoint / STATE_FILE).is_file():
            raise ConfigError(
                f"--resume {checkpoint} is not a checkpoint (no {STATE_FILE} in it); name one, or 'latest'."
            )
    elif checkpoints := list_checkpoints(folder):
        checkpoint = checkpoints[-1]
    else:
        logger.info("no checkpoint in %s yet: starting anew", folder)
        return None
    stored_file = checkpoint.parent.parent / CONFIG_FILE
    stored = yaml.safe_load(stored_file.read_text("utf-8")) if stored_file.is_file() else {}
    changed = [
        f"--{name} was {stored[name]} and is {value}"
        for name, value in asdict(config).items()
        if name in stored and name not in FREE_TO_CHANGE and stored[name] != value
    ]
    if changed:
        raise ConfigError(f"{checkpoint} belongs to another run: {'; '.join(changed)}. Give the options of that run.")
    return checkpoint


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    parent = folder / "checkpoints"
    if not parent.is_dir():
        return []
    whole = [
        path for path in parent.iterdir() if re.fullmatch(r"step-\d+", path.name) and (path / STATE_FILE).is_file()
    ]
    return sorted(whole, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, ema: EMAModel | None, folder: Path, step: int, limit: int) -> Path:
    """Write the state after `step` updates, then drop all but the newest `limit` checkpoints. Called by every process."""
    final = folder / "checkpoints" / f"step-{step:08d}"
    temporary = final.with_name(f".{final.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        if ema is not None:
            shadow = {str(index): value.contiguous() for index, value in enumerate(ema.shadow_params)}
            save_file(shadow, temporary / EMA_FILE)
        state = {"step": step, "ema_step": None if ema is None else ema.optimization_step}
        (temporary / STATE_FILE).write_text(json.dumps(state))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, ema: EMAModel | None, checkpoint: Path) -> int:
    """Bring everything back to where it was, and return the number of updates done."""
    accelerator.load_state(str(checkpoint))
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text())
    if ema is not None:
        if not (checkpoint / EMA_FILE).is_file():
            raise ConfigError(f"{checkpoint} has no moving average of the weights; resume it with --ema_decay 0.")
        stored = load_file(checkpoint / EMA_FILE)
        with torch.no_grad():
            for index, shadow in enumerate(ema.shadow_params):
                shadow.copy_(stored[str(index)])
        ema.optimization_step = state["ema_step"]
    return state["step"]
