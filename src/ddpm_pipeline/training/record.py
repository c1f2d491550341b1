"""What the model card records of a run: facts, and the command that trains the same model; no path, no name of a machine."""

import os
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from huggingface_hub import ModelCard

from ..data.bundled import BUNDLED
from ..hub import TrainingFacts, build_card, pictures_in
from .options import TrainingOptions

if TYPE_CHECKING:
    from .jobs import Run


def model_card(run: "Run", target: Path, done: int) -> ModelCard:
    """The card of this run after `done` updates, with the pictures that lie in the folder that it is for."""
    dataset, hub, processes = run.options.data.dataset, run.options.hub, run.accelerator.num_processes
    is_local = dataset in BUNDLED or public(dataset) != dataset  # as far as `data.sources` takes it for that
    training = TrainingFacts(
        dataset=public(run.data.name),
        num_images=run.data.num_images,
        hub_dataset=None if is_local else dataset,
        facts=run.condition.facts() | training_facts(run, done),
        command=recipe_command(run.options, processes),
    )
    return build_card(
        run.pipe,
        name=(hub.hub_model_id or run.folder.resolve().name).split("/")[-1],
        repo_id=hub.hub_model_id,
        license=hub.hub_license,
        training=training,
        evaluation=[],
        example=run.condition.example(),
        pictures=pictures_in(target),
    )


def training_facts(run: "Run", done: int) -> dict[str, Any]:
    """What the model card says of the training."""
    options, optimisation, device = run.options, run.options.optimisation, run.accelerator.device.type
    schedule = f"{optimisation.lr_scheduler}, {optimisation.warmup_steps} warm-up updates"
    time_of = "time" if run.first == 0 else f"time since resuming at update {run.first}"
    return {
        "parameters": f"{run.state.num_parameters / 1e6:.2f} M",
        "objective": options.diffusion.objective,
        "updates": done if done == run.total else f"{done} of {run.total} so far",
        "batch size": optimisation.batch_size,
        "learning rate": f"{optimisation.learning_rate} ({schedule})",
        "EMA of weights": f"decay up to {optimisation.ema_decay}" if optimisation.ema_decay else "none",
        "precision": options.hardware.mixed_precision,
        "seed": options.run.seed,
        "hardware": f"{run.accelerator.num_processes} x {torch.cuda.get_device_name() if device == 'cuda' else device}",
        time_of: f"{(time.monotonic() - run.began) / 60:.1f} minutes",
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


def recipe_command(options: TrainingOptions, num_processes: int = 1) -> str:
    """The command line that trains the same model: what belongs to the recipe and differs from the defaults."""
    words = ["accelerate", "launch", *(["--num_processes", str(num_processes)] if num_processes > 1 else [])]
    words.append("training/train.py")
    declared = options.declared()
    for name, value in options.flat().items():
        default = name != "dataset" and value == declared[name].default  # with no --dataset the default recipe runs
        if declared[name].metadata["in_recipe"] and value is not None and not default:
            words += [f"--{name}", public(str(value))]
    return shlex.join(words)


def public(value: str) -> str:
    """A value as the card may show it: of a path only its last part."""
    looks_like_path = os.path.isabs(value) or value.startswith((".", "~")) or re.search(r"[\\*?]|\.\w+$", value)
    return Path(value).name or value if looks_like_path or os.path.exists(value) else value
