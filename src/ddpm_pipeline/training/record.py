"""What the model card records of a run: facts, and the command that trains the same model; no path, no name of a machine."""

import os
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from huggingface_hub import ModelCard

from ..data.bundled import BUNDLED, CREDITS
from ..hub import TrainingFacts, build_card, pictures_in
from .options import TrainingOptions

if TYPE_CHECKING:
    from .jobs import Run

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
FILES = (".json", ".yaml", ".yml", ".parquet", ".arrow", ".csv", ".jsonl", ".zip", ".tar", ".safetensors")


def model_card(run: "Run", target: Path, done: int) -> ModelCard:
    """The card of this run after `done` updates, with the pictures that lie in the folder that it is for."""
    hub, done = run.options.hub, max(done, run.first)  # a run may be resumed to end with fewer updates than it has had
    facts = run.condition.facts() | training_facts(run.options, run.state.num_parameters, done) | held_out_facts(run)
    facts |= process_facts(run)
    return build_card(
        run.pipe,
        name=(hub.hub_model_id or run.folder.resolve().name).split("/")[-1],
        repo_id=hub.hub_model_id,
        license=hub.hub_license,
        training=replace(run.origin, facts=facts),
        evaluation=[],
        example=run.condition.example(),
        pictures=pictures_in(target),
    )


def origin_of(options: TrainingOptions, data_name: str, num_images: int | None, num_processes: int = 1) -> TrainingFacts:
    """What a model comes from, by names alone. `data_name` is the name that the data were opened under.

    Called when a run begins, since what is a folder here may have moved by its end, and then looks like a name on the Hub.
    """
    dataset, base_model = options.data.dataset, options.model.init_from
    is_local = dataset in BUNDLED or data_name != dataset or public(dataset) != dataset or os.path.exists(dataset)
    base_name = None if base_model is None else _base_name(base_model)
    return TrainingFacts(
        dataset=data_name,
        num_images=num_images,
        hub_dataset=None if is_local else dataset,
        command=recipe_command(options, data_name, num_processes),
        base_model=base_name,
        hub_base_model=base_name if base_name == base_model and not os.path.exists(base_model or "") else None,
    )


def training_facts(options: TrainingOptions, num_parameters: int, done: int) -> dict[str, Any]:
    """What the model card says of a training with these resolved options after `done` updates."""
    optimisation = options.optimisation
    schedule = f"{optimisation.lr_scheduler}, {optimisation.warmup_steps} warm-up updates"
    total = optimisation.max_train_steps
    return {
        "parameters": f"{num_parameters / 1e6:.2f} M",
        "objective": options.diffusion.objective,
        "updates": done if done >= total else f"{done} of {total} so far",
        "batch size": optimisation.batch_size,
        "learning rate": f"{optimisation.learning_rate} ({schedule})",
        "EMA of weights": f"decay up to {optimisation.ema_decay}" if optimisation.ema_decay else "none",
        "precision": options.hardware.mixed_precision,
        **({"credit": CREDITS[options.data.dataset]} if options.data.dataset in CREDITS else {}),
        "seed": options.run.seed,
        "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
    }


def held_out_facts(run: "Run") -> dict[str, Any]:
    """What the model card says of images that were held out, and of their figures so far."""
    if run.data.held_out is None:
        return {}
    split, evaluations = public(run.options.data.validation_split), run.validation
    facts = {"held out": f"{len(run.data.held_out):,} images ({split}), not trained on"}
    for name, one in {"held-out bits/dim": evaluations.last, "lowest held-out bits/dim": evaluations.best}.items():
        if one is not None:
            facts[name] = f"{one}, of {len(one.held_out)} images after update {one.step}"
    return facts


def process_facts(run: "Run") -> dict[str, Any]:
    """What the model card says of the processes that train now."""
    device = run.accelerator.device.type
    time_of = "time" if run.first == 0 else f"time since resuming at update {run.first}"
    return {
        "hardware": f"{run.accelerator.num_processes} x {torch.cuda.get_device_name() if device == 'cuda' else device}",
        time_of: f"{(time.monotonic() - run.began) / 60:.1f} minutes",
    }


def recipe_command(options: TrainingOptions, data_name: str, num_processes: int = 1) -> str:
    """The command line that trains the same model: what belongs to the recipe and differs from the defaults."""
    words = ["accelerate", "launch", "--num_processes", str(num_processes)] if num_processes > 1 else ["python"]
    words.append("training/train.py")
    declared = options.declared()
    for name, value in (options.flat() | {"dataset": data_name}).items():
        default = name != "dataset" and value == declared[name].default  # with no --dataset the default recipe runs
        if declared[name].metadata["in_recipe"] and value is not None and not default:
            shown = _base_name if name == "init_from" else public
            words += [f"--{name}", shown(value) if isinstance(value, str) else str(value)]
    return shlex.join(words)


def _base_name(init_from: str) -> str:
    """The public name of the model that a run starts from: of a checkpoint, whose path is absolute by then, that of its run."""
    path = Path(init_from)
    return public(str(path.parents[1]) if path.is_absolute() and path.parent.name == "checkpoints" else init_from)


def public(value: str) -> str:
    """A value as the card may show it: of a path only its last part, of a name on the Hub also the owner."""
    is_name = HUB_NAME.fullmatch(value) and not value.startswith(".") and not value.endswith(FILES)
    looks_like_path = re.search(r"[/\\*?]", value) or value.startswith((".", "~")) or value.endswith(FILES)
    is_path = os.path.exists(value) or (looks_like_path and not is_name)
    return PureWindowsPath(value).name or value if is_path else value
