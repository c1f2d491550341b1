"""How few steps will do: the bound and the Fréchet distance of one model by sampler and number of steps.

    python benchmarks/few_steps.py ddpm-digits --output benchmarks/results/few_steps

Samples from the same weights with this package's scheduler (β̃, 1 - α, the analytic variance, the analytic variance on optimal
timesteps) and with diffusers' own DDPM, DDIM, DPM-Solver++ and UniPC. The statistics behind the analytic variance and
the timesteps are measured on other images of the digits than the bound. Every row is written as soon as it is known,
and a second run continues from there. A sampler that fails at a number of steps has its error in the row, and no figure.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ddpm_pipeline import AlphaDDPMScheduler
from ddpm_pipeline.evaluation.digits import fit_digits_classifier, load_digits_images
from ddpm_pipeline.evaluation.quality import frechet_distance, frechet_distance_of_halves
from ddpm_pipeline.generation.drawing import sample_uint8
from ddpm_pipeline.generation.pipelines import load_pipeline
from ddpm_pipeline.likelihood import (
    NoiseStatistics,
    bits_per_dim,
    estimate_analytic_variance,
    optimal_timesteps,
    with_analytic_variance,
)
from ddpm_pipeline.support.draws import image_indices
from ddpm_pipeline.support.provenance import provenance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS = (5, 10, 25, 50, 100, 1000)
SUBSET_FROM = 500  # steps from which the bound is estimated from a stratified subset of SUBSET_CALLS
SUBSET_CALLS = 100
PEERS = {
    "stock DDPM": DDPMScheduler,
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
OWN = ("fixed_small", "fixed_large", "analytic", "analytic, from errors", "optimal timesteps", "optimal, from errors")


def make_scheduler(name: str, config: dict[str, Any], statistics: NoiseStatistics, steps: int) -> Any:
    """The scheduler of a row of the table."""
    if name in PEERS:
        return PEERS[name].from_config(config)
    if name in ("fixed_small", "fixed_large"):
        return AlphaDDPMScheduler.from_config(config, variance_type=name)
    analytic = with_analytic_variance(
        AlphaDDPMScheduler.from_config(config), statistics, from_errors=name.endswith("from errors")
    )
    if name.startswith("analytic"):
        return analytic
    chosen = optimal_timesteps(statistics, analytic, steps)
    return AlphaDDPMScheduler.from_config(analytic.config, inference_timesteps=chosen)


def bound_of(pipe: Any, scheduler: Any, images: torch.Tensor, steps: int, batch_size: int) -> dict[str, float]:
    """Mean bits per dimension over the images and the standard error of the mean; each image has its own noise."""
    calls = SUBSET_CALLS if steps >= SUBSET_FROM else None
    generators = [torch.Generator().manual_seed(number) for number in range(len(images))]
    result = bits_per_dim(
        pipe.unet, scheduler, images, num_inference_steps=steps, num_evaluated=calls, batch_size=batch_size,
        generator=generators, progress=False,
    )  # fmt: skip
    error = result.total.std().item() / len(images) ** 0.5
    return {"bits_per_dim": result.total.mean().item(), "bits_per_dim_error": error}


def distance_of(pipe: Any, scheduler: Any, num_images: int, steps: int, seed: int, batch_size: int) -> dict[str, float]:
    """Fréchet distance of sampled images to all real digits, in the digits classifier's features."""
    pipe.scheduler = scheduler
    began = time.monotonic()
    drawn = [
        sample_uint8(pipe, range(start, min(start + batch_size, num_images)), seed, steps)
        for start in range(0, num_images, batch_size)
    ]
    seconds = time.monotonic() - began
    classifier = fit_digits_classifier()
    real, _ = load_digits_images()
    features = [classifier.features(images) for images in (real, torch.cat(drawn) / 127.5 - 1)]
    return {"frechet_distance": frechet_distance(*features), "seconds_to_draw": round(seconds, 2)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    path = arguments.output.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(arguments.folder)
    config = dict(pipe.scheduler.config)
    settings = {
        "num_images": arguments.num_images, "num_bound_images": arguments.num_bound_images,
        "num_statistics_images": arguments.num_statistics_images, "seed": arguments.seed,
    }  # fmt: skip
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    if report.get("settings", settings) != settings:
        sys.exit(f"error: {path} holds results of {report['settings']}; remove it or name another --output.")
    digits, _ = load_digits_images()
    report |= {
        "command": "python benchmarks/few_steps.py " + " ".join([Path(arguments.folder).name, *sys.argv[2:]]),
        "settings": settings,
        **provenance(pipe.device),
        "frechet_distance_of_real_halves": frechet_distance_of_halves(fit_digits_classifier().features(digits)),
    }
    levels = ((digits + 1) * 127.5).round() / 127.5 - 1  # 8-bit, as in training
    first, second = settings["num_statistics_images"], settings["num_bound_images"]
    order = image_indices(arguments.seed, len(levels), 0, first + second)
    statistics = measured_statistics(pipe, levels[order[:first]], path.with_suffix(".statistics.pt"), arguments)
    done = {(row["sampler"], row["steps"]) for row in report["rows"]}
    for steps in arguments.steps:
        for name in arguments.samplers:
            if (name, steps) in done or (name.startswith("optimal") and steps >= config["num_train_timesteps"]):
                continue  # the best choice of all timesteps is all of them
            scheduler = make_scheduler(name, config, statistics, steps)
            row: dict[str, Any] = {"sampler": name, "steps": steps}
            if name in OWN:
                row |= bound_of(pipe, scheduler, levels[order[first:]], steps, arguments.batch_size)
            if steps <= arguments.most_steps_drawn:
                try:
                    row |= distance_of(pipe, scheduler, arguments.num_images, steps, arguments.seed, arguments.batch_size)
                except (IndexError, ValueError, RuntimeError) as error:  # as some of diffusers' do at steps = T
                    row["error"] = f"{type(error).__name__}: {error}"
            report["rows"].append(row)
            path.write_text(json.dumps(report, indent=2) + "\n")
            print(json.dumps(row), flush=True)
    return report


def measured_statistics(pipe: Any, images: torch.Tensor, path: Path, arguments: argparse.Namespace) -> NoiseStatistics:
    if path.is_file():
        return NoiseStatistics(**torch.load(path, weights_only=True))
    statistics = estimate_analytic_variance(
        pipe.unet, pipe.scheduler, images, batch_size=arguments.batch_size,
        generator=torch.Generator().manual_seed(arguments.seed),
    )  # fmt: skip
    torch.save(vars(statistics), path)
    return statistics


def table(report: dict[str, Any]) -> str:
    """Both figures as Markdown, a sampler a line, the best of each column in bold."""
    steps = sorted({row["steps"] for row in report["rows"]})
    by_key = {(row["sampler"], row["steps"]): row for row in report["rows"]}
    lines = []
    for key, title, digits in (
        ("bits_per_dim", "Bits per dimension (upper bound; lower is better)", 3),
        ("frechet_distance", "Fréchet distance to the real digits (lower is better)", 2),
    ):
        names = [name for name in (*OWN, *PEERS) if any(key in by_key.get((name, n), {}) for n in steps)]
        known = {n: [row[key] for (_, of), row in by_key.items() if of == n and key in row] for n in steps}
        best = {n: min(values, default=None) for n, values in known.items()}
        lines += [f"{title}:", "", "| sampler | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
        for name in names:
            cells = []
            for n in steps:
                row = by_key.get((name, n), {})
                value = row.get(key)
                text = ("fails" if "error" in row else "") if value is None else f"{value:.{digits}f}"
                cells.append(f"**{text}**" if value is not None and value == best[n] else text)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    settings = report["settings"]
    lines += [
        f"Fréchet distances are of {settings['num_images']} drawn images, bounds the mean over {settings['num_bound_images']} "
        f"digits; real halves are {report['frechet_distance_of_real_halves']:.2f} apart. Over all timesteps there is "
        "nothing to choose; a sampler fails where it raises an error or gives values that are not numbers.",
        "",
        f"`{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, key, title in (
        (axes[0], "bits_per_dim", "bits per dimension (upper bound)"),
        (axes[1], "frechet_distance", "Fréchet distance"),
    ):
        for name in (*OWN, *PEERS):
            points = sorted((row["steps"], row[key]) for row in report["rows"] if row["sampler"] == name and key in row)
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, ls="--" if name in PEERS else "-")
        axis.set(xscale="log", yscale="log", xlabel="steps", title=title)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a pipeline folder trained on the digits")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/few_steps"), help="without suffix")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps")
    parser.add_argument("--samplers", nargs="+", choices=[*OWN, *PEERS], default=[*OWN, *PEERS], help="in this order")
    parser.add_argument("--num_images", type=int, default=1024, help="images drawn for each Fréchet distance")
    parser.add_argument("--num_bound_images", type=int, default=256, help="images that each bound is the mean of")
    parser.add_argument("--num_statistics_images", type=int, default=256, help="other images, for Γ_t and timesteps")
    parser.add_argument("--most_steps_drawn", type=int, default=1000, help="above these many steps only the bound")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a network call")
    parser.add_argument("--seed", type=int, default=0, help="of images, noise and draws")
    arguments = parser.parse_args()
    report = run(arguments)
    arguments.output.with_suffix(".md").write_text(table(report))
    plot(report, arguments.output.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main()
