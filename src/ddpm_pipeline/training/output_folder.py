"""The folder that a run leaves its model in, and what it may write, find or remove there."""

import os
import shutil
from pathlib import Path

from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
from ..support.errors import ConfigError
from .options import RunOptions

OPTIONS_FILE = "training_config.yaml"  # its presence marks a folder as one of ours
SHIPPED = AlphaDDPMPipeline.shipped_files() | AlphaDDPMTextToImagePipeline.shipped_files()
# Everything that a run writes into its folder, and so all that --overwrite may remove.
RUN_FILES = (
    OPTIONS_FILE, "checkpoints", "samples", "samples.png", "process.png", "train.log", "metrics.jsonl", "skipped.jsonl",
    "README.md", "model_index.json", "unet", "scheduler", "text_encoder", "tokenizer", *SHIPPED, ".push", "evaluation.json",
    "logs",
)  # fmt: skip


def prepare_output_folder(folder: Path, options: RunOptions) -> None:
    """Make the output folder ready to be written to, and clear an earlier run if --overwrite asks for it. Raises ConfigError if
    the folder cannot be written, holds files that no run wrote, or holds a run that is to be neither resumed nor overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output_dir {folder} is a file; name a folder.")
    present = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    ours = OPTIONS_FILE in present
    if present and not ours and set(present) - {"train.log"}:
        raise ConfigError(
            f"--output_dir {folder} holds {', '.join(present[:3])}{' and more' if len(present) > 3 else ''}, which no "
            "training run wrote; name an empty or new folder."
        )
    if ours and not (options.resume or options.overwrite):
        raise ConfigError(
            f"--output_dir {folder} holds an earlier run. Resume it with --resume latest, replace it with --overwrite, "
            "or name another folder."
        )
    if options.overwrite:
        for path in (folder / name for name in RUN_FILES):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output_dir {folder} cannot be written to: {error.strerror}.") from error
