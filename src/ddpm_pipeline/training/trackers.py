"""Pictures for trackers: which of accelerate's take them here, and how. The libraries are imported when they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def _to_tensorboard(writer: Any, tag: str, picture: Image.Image, caption: str, step: int) -> None:
    """TensorBoard's pictures have no captions; a text of the same tag and step has this one."""
    writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    writer.add_text(tag, caption.replace("\n", "  \n"), step)  # two spaces: a line break in Markdown


def _to_wandb(run: Any, tag: str, picture: Image.Image, caption: str, step: int) -> None:
    import wandb

    run.log({tag: wandb.Image(picture, caption=caption)}, step=step)


# By accelerate's names. The other trackers get numbers only.
SHOW: dict[str, Callable[[Any, str, Image.Image, str, int], None]] = {"tensorboard": _to_tensorboard, "wandb": _to_wandb}


def settings(folder: Path, first: int) -> dict[str, dict[str, Any]]:
    """How the trackers of a run in this folder are started, after `first` updates: their files are in it."""
    return {
        "tensorboard": {"purge_step": first + 1},  # drops what was logged after the checkpoint that we resume from
        "wandb": {"dir": str(folder), "name": folder.resolve().name},
    }
