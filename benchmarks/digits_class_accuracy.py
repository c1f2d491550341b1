"""Do images of the digits recipes show what was asked for? A classifier of real digits says which digit each image shows.

    python benchmarks/digits_class_accuracy.py ddpm-digits-text --output accuracy.json --picture accuracy.png

Samples as many images of each digit, by class label or by prompt, and counts those that the classifier takes for that digit, at
guidance 1 and 2. A text model is also asked for wordings that training held out, after replaying the run's captions to be
sure that it never saw them. Images of one digit must differ from each other: their mean pairwise distance is given as a
share of that of the real digits.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMTextToImagePipeline
from ddpm_pipeline.conditioning_alpha_ddpm import prepare_prompt
from ddpm_pipeline.data import ConditionColumns, load_images
from ddpm_pipeline.evaluation.digits import NUM_CLASSES, fit_digits_classifier, load_digits_images
from ddpm_pipeline.support.draws import BatchSlice, image_indices
from ddpm_pipeline.support.pictures import grid, save_picture
from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions
from ddpm_pipeline.training.captions import Captions

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN = "a handwritten {name}"
UNSEEN = ("{name}, handwritten", "number {name}", "a {name}")
BATCH_SIZE = 100


@dataclass(frozen=True)
class ClassAccuracy:
    """Shares in [0, 1]; `diversity` is 1 where images of one digit differ as much as the real ones do."""

    asked_by: str
    guidance_scale: float
    num_images: int
    class_accuracy: float
    class_accuracy_by_digit: tuple[float, ...]
    diversity: float
    seconds: float
    times_in_training: int | None = None  # how many of the run's captions, all digits together, had this wording


@torch.no_grad()
def sample_digits(pipe: Any, asked: str, count: int, scale: float, steps: int | None, seed: int) -> torch.Tensor:
    """`count` images of each digit in turn, [10 * count, 1, 8, 8] in [0, 1]; image i has the generator of seed + i."""
    digits = [digit for digit in range(NUM_CLASSES) for _ in range(count)]
    images = []
    for start in range(0, len(digits), BATCH_SIZE):
        batch = digits[start : start + BATCH_SIZE]
        condition = {"class_labels": batch}
        if asked != "label":
            condition = {"prompt": [asked.replace("{name}", WORDS[digit]) for digit in batch]}
        sampled = pipe(
            **condition,
            guidance_scale=scale,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
            output_type="pt",
        )
        images.append(sampled.images)
    return torch.cat(images)


def accuracy_and_diversity(images: torch.Tensor) -> tuple[list[float], float]:
    """(class accuracy of each digit, diversity) of images [10 * count, 1, 8, 8] in [0, 1], digit by digit."""
    by_digit = (images * 2 - 1).view(NUM_CLASSES, -1, 1, 8, 8)
    classifier = fit_digits_classifier()
    right = [(classifier(sampled).argmax(dim=1) == digit) for digit, sampled in enumerate(by_digit)]
    real, labels = load_digits_images()
    ours = torch.stack([torch.pdist(sampled.flatten(1)).mean() for sampled in by_digit]).mean()
    theirs = torch.stack([torch.pdist(real[labels == digit].flatten(1)).mean() for digit in range(NUM_CLASSES)]).mean()
    return [each.double().mean().item() for each in right], (ours / theirs).item()


def training_captions(folder: Path) -> Counter[str]:
    """Every caption that the run in `folder` sampled, as the tokenizer saw it: a function of its options."""
    options = TrainingOptions(config=folder / "training_config.yaml")
    columns, batch_size, seed = options.condition.columns, options.optimisation.batch_size, options.run.seed
    data = load_images(options.data, ConditionColumns("none", columns.label_column, columns.text_column))
    captions, seen = Captions(options.condition, data), Counter()
    for step in range(options.optimisation.max_train_steps):
        where = BatchSlice(seed, step, batch_size, slice(None))
        values = data.column(captions.column, image_indices(seed, len(data), step, batch_size))
        seen.update(map(prepare_prompt, captions.draw(values, where, [False] * batch_size)))
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a digits recipe with a condition")
    parser.add_argument("--num_images", type=int, default=1000, help="images for each guidance scale")
    parser.add_argument("--num_unseen", type=int, default=500, help="images for each held-out wording")
    parser.add_argument("--steps", type=int, default=100, help="reverse steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write: one row per digit, at guidance 2")
    arguments = parser.parse_args()

    text = (arguments.folder / "text_encoder").is_dir()
    pipe = (AlphaDDPMTextToImagePipeline if text else AlphaDDPMPipeline).from_pretrained(arguments.folder)
    pipe.set_progress_bar_config(disable=True)
    seen = training_captions(arguments.folder) if text else Counter()
    tasks = [(SEEN if text else "label", scale, arguments.num_images) for scale in (1.0, 2.0)]
    tasks += [(wording, 2.0, arguments.num_unseen) for wording in UNSEEN if text]
    results = []
    for asked, scale, count in tasks:
        began = time.monotonic()
        images = sample_digits(pipe, asked, count // NUM_CLASSES, scale, arguments.steps, arguments.seed)
        accuracies, diversity = accuracy_and_diversity(images)
        result = ClassAccuracy(
            asked_by=asked,
            guidance_scale=scale,
            num_images=len(images),
            class_accuracy=sum(accuracies) / NUM_CLASSES,
            class_accuracy_by_digit=tuple(accuracies),
            diversity=diversity,
            seconds=time.monotonic() - began,
            times_in_training=sum(seen[asked.replace("{name}", word)] for word in WORDS) if text else None,
        )
        print(json.dumps(asdict(result)), flush=True)
        results.append(asdict(result))
        if arguments.picture and scale == 2 and asked in (SEEN, "label"):
            rows = images.view(NUM_CLASSES, -1, 1, 8, 8)[:, :12]
            save_picture(grid(rows.flatten(0, 1), columns=rows.shape[1]), arguments.picture)
    if arguments.output:
        report = {
            "command": f"python benchmarks/digits_class_accuracy.py {arguments.folder.name} "
            f"--num_images {arguments.num_images} --num_unseen {arguments.num_unseen} --steps {arguments.steps} "
            f"--seed {arguments.seed}",
            **provenance(torch.device("cpu")),
        }
        report |= {"steps": arguments.steps, "classifier_accuracy": fit_digits_classifier().held_out_accuracy}
        arguments.output.write_text(json.dumps(report | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
