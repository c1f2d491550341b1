"""What do augmentations that do not leak give a model of few images?

    python benchmarks/small_data.py --output benchmarks/results/small_data

Trains the digits_small recipe, which has 200 images, with and without --augment, over some seeds. Bits per dimension of the
EMA weights are measured at each checkpoint, of the images trained on and of those held out, with the same noise for all runs.
A standard error is that of the mean over the held-out images, each image's figure being its mean over the seeds.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_pipeline.data import DataOptions, load_images
from ddpm_pipeline.evaluation.figures import likelihood_of
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions, train
from ddpm_pipeline.training.checkpoints import list_checkpoints
from ddpm_pipeline.training.export import pipeline_of

RECIPE, HELD_OUT = "digits_small", "train[1000:]"
CHECKPOINTS = 4  # of a run


def measured(checkpoint: Path, data: Any, calls: int) -> Tensor:
    """Bits per dimension of each image, float64 [N]."""
    pipe, rows = pipeline_of(checkpoint), range(len(data))
    noise_seeds = seeds(0, RandomStream.NOISE, 0, len(data))
    how = {"num_evaluated": calls, "batch_size": 256, "progress": False}
    return likelihood_of(pipe.unet, pipe.scheduler, data.pixels(rows), data.value_range, noise_seeds, **how).total.double()


def mean_and_error(values: Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "standard_error": (values.std() / len(values) ** 0.5).item()}


def one_run(options: TrainingOptions, held_out: Any, calls: int) -> dict[int, dict[str, Tensor]]:
    """By number of updates: the figures of the images held out and of those trained on."""
    folder = train(options)
    trained_on = load_images(DataOptions(split=options.data.split, cache_dir=options.data.cache_dir))
    return {
        int(checkpoint.name.split("-")[1]): {
            "held_out": measured(checkpoint, held_out, calls),
            "trained_on": measured(checkpoint, trained_on, calls),
        }
        for checkpoint in list_checkpoints(folder)
    }


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown, with the lowest of the held-out images in bold."""
    names = list(report["runs"])
    lines = ["Bits per dimension (upper bound; lower is better), ± one standard error:", ""]
    lines.append(
        f"| updates | {' | '.join(f'held out, {name} | trained on, {name}' for name in names)} | difference held out |"
    )
    lines.append("|---" * (2 * len(names) + 2) + "|")
    best = {name: min(rows.values(), key=lambda row: row["held_out"]["mean"]) for name, rows in report["runs"].items()}
    for updates, difference in report["differences"].items():
        cells = []
        for name in names:
            row = report["runs"][name][updates]
            text = f"{row['held_out']['mean']:.3f} ± {row['held_out']['standard_error']:.3f}"
            cells += [f"**{text}**" if row is best[name] else text, f"{row['trained_on']['mean']:.3f}"]
        cells.append(f"{difference['mean']:+.3f} ± {difference['standard_error']:.3f}")
        lines.append(f"| {updates} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{report['trained_on']} digits are trained on and {report['held_out']} are held out; means over {report['seeds']} "
        f"seeds, {report['network_calls']} network calls per image. `{report['command']}`, {report['date']}, "
        f"{report['processor']}, {report['threads']} threads, {report['seconds'] / 60:.0f} minutes.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--updates", type=int, help="of each run; by default the recipe's")
    parser.add_argument("--augment", type=float, help="probability of each augmentation; by default the recipe's")
    parser.add_argument("--calls", type=int, default=50, help="network calls per image")
    parser.add_argument("--output", type=Path, help="without suffix; a .json and a .md are written")
    arguments = parser.parse_args()
    began, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as scratch:
        apart = {"cache_dir": f"{scratch}/cache", "validation_split": None}  # measured here, of more images
        shown = {"preview_every": 0, "num_samples": 1, "sample_inference_steps": 2, "fit_noises": 0}
        recipe = TrainingOptions(config=RECIPE, **shown, **apart)
        updates = arguments.updates or recipe.optimisation.max_train_steps
        every = {"max_train_steps": updates, "checkpoint_every": updates // CHECKPOINTS, "checkpoints_total_limit": CHECKPOINTS}
        recipe = recipe.with_values(**every, lr_warmup_steps=min(100, updates // 10))
        augment = arguments.augment or recipe.data.augment
        held_out = load_images(DataOptions(split=HELD_OUT, cache_dir=f"{scratch}/cache"))
        for name, value in {"plain": None, f"augment {augment:g}": augment}.items():
            runs = []
            for seed in range(arguments.seeds):
                where = f"{scratch}/{seed}-{value}"
                runs.append(one_run(recipe.with_values(seed=seed, augment=value, output_dir=where), held_out, arguments.calls))
            found[name] = {
                step: {part: torch.stack([run[step][part] for run in runs]).mean(dim=0) for part in runs[0][step]}
                for step in runs[0]
            }
    plain, augmented = found.values()
    report = {
        "command": f"python benchmarks/small_data.py {' '.join(sys.argv[1:])}",
        **provenance(torch.device("cpu")),
        "seconds": round(time.monotonic() - began, 1),
        "seeds": arguments.seeds,
        "network_calls": arguments.calls,
        "held_out": len(held_out),
        "trained_on": len(next(iter(plain.values()))["trained_on"]),
        "runs": {
            name: {str(step): {part: mean_and_error(values) for part, values in parts.items()} for step, parts in rows.items()}
            for name, rows in found.items()
        },
        "differences": {
            str(step): mean_and_error(augmented[step]["held_out"] - plain[step]["held_out"]) for step in plain
        },
    }  # fmt: skip
    print(table(report))
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
        arguments.output.with_suffix(".md").write_text(table(report))


if __name__ == "__main__":
    main()
