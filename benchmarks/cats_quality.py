"""Does a model of the built-in cats draw cats, are they new, and do they have what was asked for?

    python benchmarks/cats_quality.py ddpm-cats --output cats_quality.json
    python benchmarks/cats_quality.py ddpm-cats-text --guidance_scales 1 2 4 --output cats_text.json --picture cats_text.png

Runs `evaluate` on a finished model. A text model is asked for cats of the training split, for held-out cats, for held-out pairs
of a body and an accessory, and for training cats in wordings that training never shows.
"""

import argparse
import itertools
import json
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from ddpm_pipeline.data import DataOptions
from ddpm_pipeline.data.sources import load_source
from ddpm_pipeline.evaluation import EvaluationOptions, evaluate
from ddpm_pipeline.generation import load_pipeline
from ddpm_pipeline.generation.drawing import UNCONDITIONAL, Request, sample_in_batches
from ddpm_pipeline.generation.pipelines import condition_of, scheduler_for
from ddpm_pipeline.support.pictures import grid, save_picture
from ddpm_pipeline.support.provenance import provenance

ASKED = {  # the split and the column of the captions
    "training cats": ("train", "text"),
    "held-out cats": ("test", "text"),
    "held-out pairs": ("pairs", "text"),
    "unseen wordings": ("train", "unseen_text"),
}
SHOWN, COLUMNS, SHOWN_SIDE, TEXT_LINES, TEXT_HEIGHT = 12, 6, 128, 6, 13  # pictures, and pixels


def judged(arguments: argparse.Namespace, asked: str, scale: float, sampler: str) -> dict[str, Any]:
    """The section "cats" of an evaluation, with the FID."""
    split, column = ASKED[asked]
    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(
            EvaluationOptions(
                model=str(arguments.folder), dataset="cats", dataset_config=arguments.dataset_config, split=split,
                text_column=column if arguments.condition == "text" else None, guidance_scale=scale, seed=arguments.seed,
                num_images=arguments.num_images, num_likelihood_images=0, num_inference_steps=arguments.steps,
                scheduler=sampler, batch_size=arguments.batch_size, update_card=False, output=f"{folder}/x.json",
            )
        )  # fmt: skip
    cats = results["cats"] | {"scheduler": sampler, "guidance_scale": scale}
    return {"asked": asked, "split": split, **cats, "fid": results["quality"]["fid"]}


def table(results: list[dict[str, Any]]) -> str:
    """Shares in percent, ± a standard error; the sampler where there are several."""

    def percent(found: dict[str, float], name: str, error: str) -> str:
        return f"{100 * found[name]:.1f} ± {100 * found[error]:.1f} %"

    kinds = results[0].get("attributes", {})
    several = len({row["scheduler"] for row in results}) > 1
    head = " sampler |" * several + "".join(f" {'parts' if kind == 'all' else kind} right |" for kind in kinds)
    lines = ["| asked for | guidance | valid | copies | new |" + head, "|---" * (5 + several + len(kinds)) + "|"]
    for row in results:
        shares = [percent(row, name, f"{name}_standard_error") for name in ("valid", "copies", "new")]
        shares += [row["scheduler"]] * several
        shares += [percent(row["attributes"][kind], "accuracy", "standard_error") for kind in kinds]
        lines.append(f"| {row['asked'] if kinds else 'nothing'} | {row['guidance_scale']:g} | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def picture(arguments: argparse.Namespace, pipe: Any) -> Image.Image:
    """Samples, each above its prompt if the model takes texts: those of held-out cats."""
    prompts, request = [], UNCONDITIONAL
    if arguments.condition == "text":
        data = DataOptions("cats", split="test", resolution=pipe.unet.config.sample_size)
        prompts = [texts[0] for texts in load_source(data).dataset[:SHOWN]["text"]]
        request = Request({"prompt": prompts}, arguments.guidance_scales[-1])
    elif arguments.condition == "class":
        request = Request({"class_labels": sorted(pipe.id2label or range(pipe.unet.config.num_class_embeds))})
    pipe.scheduler = scheduler_for(pipe, arguments.scheduler[-1])
    images = sample_in_batches(pipe, SHOWN, arguments.batch_size, arguments.seed, arguments.steps, request)
    return with_texts(images, prompts) if prompts else grid(images, COLUMNS, SHOWN_SIDE)


def with_texts(images: torch.Tensor, texts: list[str]) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1] in rows, each above its text."""
    cells, font = [grid(image[None], 1, SHOWN_SIDE) for image in images], ImageFont.load_default(TEXT_HEIGHT - 2)
    width, height = cells[0].width, cells[0].height + TEXT_LINES * TEXT_HEIGHT
    page = Image.new("RGB", (COLUMNS * width, -(-len(cells) // COLUMNS) * height), "white")
    for place, (cell, text) in enumerate(zip(cells, texts, strict=True)):
        left, top = place % COLUMNS * width, place // COLUMNS * height
        page.paste(cell, (left, top))
        lines = textwrap.wrap(text, width * 2 // TEXT_HEIGHT)
        ImageDraw.Draw(page).text((left + 4, top + cell.height), "\n".join(lines), "black", font, spacing=1)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a recipe of cats")
    parser.add_argument("--dataset_config", default="num_images=10000,seed=0", help="as the model was trained with")
    parser.add_argument("--num_images", type=int, default=1000, help="samples for each row")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--scheduler", nargs="+", default=["keep"], help="samplers, as in evaluate.py")
    parser.add_argument("--steps", type=int, default=100, help="reverse steps")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write: samples, of a text model with their prompts")
    arguments = parser.parse_args()

    pipe = load_pipeline(str(arguments.folder))
    arguments.condition = condition_of(pipe)
    asked = ASKED if arguments.condition == "text" else ["training cats"]
    each = itertools.product(arguments.scheduler, arguments.guidance_scales, asked)
    results = [judged(arguments, name, scale, sampler) for sampler, scale, name in each]
    print(table(results))
    names = ("dataset_config", "num_images", "guidance_scales", "scheduler", "steps", "batch_size", "seed")
    told = {name: getattr(arguments, name) for name in names}
    words = {name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in told.items()}
    given = "".join(f" --{name} {words[name]}" for name, value in told.items() if value != parser.get_default(name))
    report = {"command": f"python benchmarks/cats_quality.py {arguments.folder.name}{given}"}
    report |= {**provenance(torch.device("cpu")), **told, "results": results}
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.picture:
        save_picture(picture(arguments, pipe), arguments.picture)


if __name__ == "__main__":
    main()
