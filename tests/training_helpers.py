"""What tests of training share: options of a run that takes seconds, and data to train on."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ddpm_pipeline.data import DataOptions, load_images
from ddpm_pipeline.support.draws import BatchSlice
from ddpm_pipeline.training import TrainingOptions
from helpers import TINY_UNET


def quick_options(folder: Path, **changed: Any) -> dict[str, Any]:
    """Twelve updates of a tiny UNet with dropout over a chain of twenty steps; no previews and no fit, on one thread."""
    (folder / "unet.json").write_text(json.dumps({**TINY_UNET, "dropout": 0.1}))
    return {
        "dataset": "digits", "model": str(folder / "unet.json"), "num_train_timesteps": 20, "beta_end": 0.4,
        "batch_size": 8, "max_train_steps": 12, "learning_rate": 1e-3, "lr_warmup_steps": 3, "mixed_precision": "no",
        "preview_every": 0, "num_samples": 2, "fit_noises": 0, "log_every": 1, "num_cpu_threads": 1,
        "cache_dir": str(folder / "cache"), **changed,
    }  # fmt: skip


def flags(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def whole_batch(step: int, batch_size: int, positions: slice = slice(None), seed: int = 0) -> BatchSlice:
    return BatchSlice(seed, step, batch_size, positions)


def digits(cache_dir: Path) -> Any:
    return load_images(DataOptions(cache_dir=str(cache_dir)))


def columns(**options: Any) -> Any:
    """The columns that a condition with these options reads."""
    return TrainingOptions(**options).condition.columns


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
