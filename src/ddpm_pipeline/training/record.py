"""What the model card records of a run: facts, and the command that trains the same model; no path, no name of a machine.

Imports diffusers, torch and the hub room; called by the training loop.
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from huggingface_hub import ModelCard

from ..data.bundled import BUNDLED
from ..data.mapped import ImageData
from ..data.streamed import StreamData
from ..hub import TrainingFacts, build_card, pictures_in
from .conditions import Condition
from .options import TrainingOptions


def training_facts(
    options: TrainingOptions, num_parameters: int, first: int, done: int, seconds: float, accelerator: Accelerator
) -> dict[str, Any]:
    """What the model card says of the run."""
    optimisation, device = options.optimisation, accelerator.device.type
    total, warmup = optimisation.max_train_steps, optimisation.lr_warmup_steps
    return {
        "parameters": f"{num_parameters / 1e6:.2f} M",
        "objective": options.diffusion.objective,
        "updates": done if done == total else f"{done} of {total} so far",
        "batch size": optimisation.batch_size,
        "learning rate": f"{optimisation.learning_rate} ({optimisation.lr_scheduler}, {warmup} warm-up updates)",
        "EMA of weights": f"decay up to {optimisation.ema_decay}" if optimisation.ema_decay else "none",
        "precision": options.hardware.mixed_precision,
        "seed": options.run.seed,
        "hardware": f"{accelerator.num_processes} x {torch.cuda.get_device_name() if device == 'cuda' else device}",
        "time" if first == 0 else f"time since resuming at update {first}": f"{seconds / 60:.1f} minutes",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


def model_card(
    pipe: Any,
    options: TrainingOptions,
    data: ImageData | StreamData,
    condition: Condition,
    facts: dict[str, Any],
    target: Path,
    num_processes: int,
) -> ModelCard:
    """The card of this run, with the pictures that lie in the folder that it is for."""
    dataset, hub = options.data.dataset, options.hub
    return build_card(
        pipe,
        name=(hub.hub_model_id or Path(options.run.output_dir).resolve().name).split("/")[-1],
        repo_id=hub.hub_model_id,
        license=hub.hub_license,
        training=TrainingFacts(
            dataset=public(data.name),
            num_images=data.num_images,
            hub_dataset=dataset if is_hub_dataset(dataset) else None,
            facts=condition.facts() | facts,
            command=recipe_command(options, num_processes),
        ),
        evaluation=[],
        example=condition.example(),
        pictures=pictures_in(target),
    )


def recipe_command(options: TrainingOptions, num_processes: int = 1) -> str:
    """The command line that trains the same model: what belongs to the recipe and differs from the defaults."""
    words = ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else [])]
    words.append("training/train.py")
    for name, value in options.flat().items():
        field = options.declared()[name]
        # the data set is always named: with no --dataset the default recipe runs
        if not field.metadata["in_recipe"] or value is None or (value == field.default and name != "dataset"):
            continue
        words += [f"--{name}", public(str(value))]
    return shlex.join(words)


def public(value: str) -> str:
    """A value as the card may show it: of a path only its last part."""
    looks_like_path = os.path.isabs(value) or value.startswith((".", "~")) or re.search(r"[\\*?]|\.\w+$", value)
    return Path(value).name or value if looks_like_path or os.path.exists(value) else value


def is_hub_dataset(dataset: str) -> bool:
    """Whether a data set's name is one of the Hub's, as far as `data.sources` does not take it for local."""
    return dataset not in BUNDLED and public(dataset) == dataset
