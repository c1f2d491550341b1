"""Pipeline folders as they go to the Hub: whole on disk, and with a model card that says only what is known.

Imports the pipelines, huggingface_hub and diffusers. Called by training/train.py.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

CARD_TEMPLATE = Path(__file__).parent / "model_card.md"


def export(pipe: DiffusionPipeline, folder: str | Path) -> None:
    """Save `pipe` into `folder`, replacing an earlier export; what was there stays whole until the new one is."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as temporary:
        pipe.save_pretrained(temporary)
        for entry in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "model_index.json"):
            target = folder / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)  # model_index.json last: with it the folder is a pipeline


def build_card(
    pipe: DiffusionPipeline,
    *,
    name: str,
    dataset: str,
    num_images: int,
    training: Mapping[str, Any],
    repo_id: str | None = None,
    example: str = "",
) -> ModelCard:
    """The card of a model trained on `num_images` images of `dataset`, with `training` as a table of facts.

    `example` holds the arguments of a call, as code: the prompt or label.
    """
    task = "text-to-image" if hasattr(pipe, "tokenizer") else "unconditional-image-generation"
    unet, schedule = pipe.unet.config, pipe.scheduler.config
    colours = {1: "grey", 3: "RGB", 4: "RGBA"}.get(unet.in_channels, f"{unet.in_channels}-channel")
    known_schedule = "trained betas" if schedule.trained_betas is not None else f"{schedule.beta_schedule} schedule"
    return ModelCard.from_template(
        ModelCardData(
            library_name="diffusers",
            pipeline_tag=task,
            tags=["ddpm", "ddpm-pipeline", "pytorch", task],
        ),
        template_path=str(CARD_TEMPLATE),
        name=name,
        repo_id=repo_id or name,
        pipeline_class=type(pipe).__name__,
        stock_call="" if "class_labels" in example else f"({example})",
        example=f"{example}, num_inference_steps=100".removeprefix(", "),
        summary=(
            f"A denoising diffusion probabilistic model (Ho et al. 2020) of {colours} {unet.sample_size}x{unet.sample_size} "
            f"images, trained from scratch on {num_images:,} images of `{dataset}`."
        ),
        training_table="\n".join(
            ["| | |", "|---|---|", *(f"| {fact} | {value} |" for fact, value in training.items())]
        ),
        diffusion=(
            f"{schedule.num_train_timesteps} steps, {known_schedule}, {schedule.prediction_type} prediction, "
            f"{schedule.variance_type} variance"
        ),
        resolution=f"{unet.sample_size}x{unet.sample_size}",
    )


def put_results_into_card(readme: str | Path, model_name: str, results: Sequence[EvalResult]) -> None:
    """Set the model-index of the card at `readme`: what was measured before is replaced, all else stays."""
    card = ModelCard.load(str(readme))
    card.data.model_name = model_name
    card.data.eval_results = list(results)
    temporary = Path(readme).with_name(".README.md.tmp")
    temporary.write_text(str(card), "utf-8")
    os.replace(temporary, readme)
