"""How near do fitted samplers come to a model's own solution, and how good are their images, beside diffusers' samplers?

    python benchmarks/fitted_sampler.py ddpm-digits --dataset digits --output benchmarks/results/fitted_sampler

For each seed, samplers are fitted to the model in the folder. At each number of steps they and diffusers' samplers sample the
same held-out noises: RMSE of the images, in [-1, 1], to 100 steps of the model's own solution, and Fréchet distance to the data
in the features that --features names. Stochastic samplers and the model's own full chain have a Fréchet distance alone. Every
row is written as soon as it is known, and a second run continues from there.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SASolverScheduler
from torch import Tensor

from ddpm_pipeline import AlphaDDPMFittedScheduler, AlphaDDPMScheduler
from ddpm_pipeline.data import DataOptions, load_images
from ddpm_pipeline.data.options import UNCONDITIONAL
from ddpm_pipeline.encoding_alpha_ddpm import image_channels, value_range
from ddpm_pipeline.evaluation.features import extract, feature_extractor, real_features
from ddpm_pipeline.evaluation.quality import frechet_distance, frechet_distance_of_halves
from ddpm_pipeline.fitting import fit_sampler
from ddpm_pipeline.fitting.options import LONG_STEPS
from ddpm_pipeline.fitting.samplers import long_solver
from ddpm_pipeline.fitting.stock import STOCK
from ddpm_pipeline.generation.pipelines import load_pipeline
from ddpm_pipeline.support.atomic import write_text
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.provenance import provenance

LENGTHS = (3, 4, 5, 7, 10, 15, 20)
FITTED, LONG, OURS = "fitted", "long solution", "DDPM"
WITH_ITS_TIMES = "DPM-Solver++, fitted timesteps"
STOCHASTIC = {
    OURS: (AlphaDDPMScheduler, {}),
    "SDE-DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "SA-Solver": (SASolverScheduler, {}),
}


def sampled(pipe: Any, scheduler: Any, noise: Tensor, batch_size: int, **steps: Any) -> Tensor:
    """x_0 of each noise, [N, C, H, W] in [-1, 1]. Row i of a stochastic sampler has a generator of its own."""
    pipe.scheduler, images = scheduler, []
    for start in range(0, len(noise), batch_size):
        latents = noise[start : start + batch_size].to(pipe.device)
        generator = [torch.Generator().manual_seed(start + row) for row in range(len(latents))]
        drawn = pipe(latents=latents, generator=generator, output_type="latent", **steps).images
        images.append(drawn.clamp(-1, 1).cpu())
    return torch.cat(images)


class Judge:
    """Fréchet distances to the data of a model."""

    def __init__(self, pipe: Any, arguments: argparse.Namespace):
        self.extractor = feature_extractor(arguments.features, arguments.dataset, None, channels=image_channels(pipe.unet))
        self.batch_size, size = arguments.batch_size, pipe.unet.config.sample_size
        shape = {"resolution": size, "channels": image_channels(pipe.unet)}
        data = load_images(DataOptions(arguments.dataset, **shape), UNCONDITIONAL, value_range(pipe.unet))
        self.real = real_features(data, self.extractor, None)

    def __call__(self, images: Tensor) -> float:
        levels = ((images + 1) * 127.5).round().to(torch.uint8)
        return frechet_distance(self.real, torch.cat([extract(self.extractor, x)[0] for x in levels.split(self.batch_size)]))


def row_of(name: str, fit: Any, config: Any, steps: int) -> tuple[Any, dict[str, Any]]:
    """The scheduler of a row, and what it is asked for."""
    if name == FITTED:
        return fit, {"num_inference_steps": steps}
    if name == WITH_ITS_TIMES:
        timesteps = fit.fitted_samplers[str(steps)]["timesteps"]
        return DPMSolverMultistepScheduler.from_config(config), {"timesteps": timesteps}
    kind, options = (STOCK | STOCHASTIC)[name]
    return kind.from_config(config, **options), {"num_inference_steps": steps}


class Report:
    """The rows so far, in a file that is written with each."""

    def __init__(self, path: Path, settings: dict[str, Any], **facts: Any):
        self.path, self.content = path, {"rows": [], "fit_seconds": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())
        if self.content.get("settings", settings) != settings:
            sys.exit(f"error: {path} holds results of {self.content['settings']}; remove it or name another --output.")
        self.content |= {"settings": settings, **facts}

    def lacks(self, name: str, steps: int, seed: int) -> bool:
        rows = self.content["rows"]
        return not any((row["sampler"], row["steps"], row["seed"]) == (name, steps, seed) for row in rows)

    def add(self, name: str, steps: int, seed: int, **figures: float) -> None:
        self.content["rows"].append({"sampler": name, "steps": steps, "seed": seed, **figures})
        write_text(self.path, json.dumps(self.content, indent=2) + "\n")
        print(json.dumps(self.content["rows"][-1]), flush=True)


def fitted_to(pipe: Any, seed: int, arguments: argparse.Namespace) -> AlphaDDPMFittedScheduler:
    """The fitted samplers, also those that are not better than diffusers' solvers."""
    how = {"num_noises": arguments.num_noises, "batch_size": arguments.batch_size, "seed": seed}
    lengths = fit_sampler(pipe, arguments.steps, **how).lengths
    samplers = {str(steps): found.sampler for steps, found in lengths.items()}
    return AlphaDDPMFittedScheduler.from_config(pipe.scheduler.config, fitted_samplers=samplers)


def measure(pipe: Any, seed: int, report: Report, judge: Judge, arguments: argparse.Namespace) -> None:
    """All rows of a seed."""
    own, began, batch_size = pipe.scheduler, time.monotonic(), arguments.batch_size
    fit = fitted_to(pipe, seed, arguments)
    report.content["fit_seconds"].setdefault(str(seed), round(time.monotonic() - began, 1))
    every = seeds(seed, RandomStream.NOISE, 0, arguments.num_noises + arguments.num_images)[arguments.num_noises :]
    noise = torch.stack([torch.randn(pipe._shape(1)[1:], generator=torch.Generator().manual_seed(int(s))) for s in every])
    solved = sampled(pipe, long_solver(own, LONG_STEPS), noise, batch_size, num_inference_steps=LONG_STEPS)
    if report.lacks(LONG, LONG_STEPS, seed):
        report.add(LONG, LONG_STEPS, seed, frechet_distance=judge(solved))
    if arguments.full_chain and report.lacks(OURS, len(own), seed):
        full = sampled(pipe, AlphaDDPMScheduler.from_config(own.config), noise, batch_size)
        report.add(OURS, len(own), seed, frechet_distance=judge(full))
    for steps, name in itertools.product(arguments.steps, (FITTED, WITH_ITS_TIMES, *STOCK, *STOCHASTIC)):
        if report.lacks(name, steps, seed):
            scheduler, asked = row_of(name, fit, own.config, steps)
            try:
                images = sampled(pipe, scheduler, noise, batch_size, **asked)
            except (ValueError, FloatingPointError, IndexError):  # in some numbers of steps
                report.add(name, steps, seed)
                continue
            near = {} if name in STOCHASTIC else {"rmse": (images - solved).square().mean().sqrt().item()}
            report.add(name, steps, seed, frechet_distance=judge(images), **near)
    pipe.scheduler = own


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    pipe = load_pipeline(arguments.folder)
    judge = Judge(pipe, arguments)
    settings = {name: getattr(arguments, name) for name in ("dataset", "features", "num_images", "num_noises")}
    command = " ".join(["python benchmarks/fitted_sampler.py", Path(arguments.folder).name, *sys.argv[2:]])
    facts = {"command": command, **provenance(pipe.device)}
    facts["frechet_distance_of_real_halves"] = frechet_distance_of_halves(judge.real)
    report = Report(arguments.output.with_suffix(".json"), settings, **facts)
    for seed in range(arguments.seeds):
        measure(pipe, seed, report, judge, arguments)
    return report.content


def table(report: dict[str, Any]) -> str:
    """Both figures as Markdown, a sampler a line, mean ± standard deviation over the seeds, the best of each column in bold."""
    lines, steps = [], sorted({row["steps"] for row in report["rows"]} - {LONG_STEPS})
    names = list(dict.fromkeys(row["sampler"] for row in report["rows"]))
    for key, title, digits in (("rmse", "RMSE to the long solution", 4), ("frechet_distance", "Fréchet distance", 3)):
        found = {
            (name, n): torch.tensor([r[key] for r in report["rows"] if (r["sampler"], r["steps"]) == (name, n) and key in r])
            for name in names
            for n in steps
        }
        best = {n: min((found[name, n].mean().item() for name in names if len(found[name, n])), default=None) for n in steps}
        lines += [
            f"{title} (lower is better):",
            "",
            f"| sampler | {' | '.join(map(str, steps))} |",
            "|---" * (len(steps) + 1) + "|",
        ]
        for name in names:
            cells = []
            for n in steps:
                values = found[name, n]
                spread = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
                text = f"{values.mean():.{digits}f}{spread}" if len(values) else ""
                cells.append(f"**{text}**" if len(values) and values.mean().item() == best[n] else text)
            if any(cells):
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    settings, long = report["settings"], [r["frechet_distance"] for r in report["rows"] if r["sampler"] == LONG]
    lines += [
        f"{settings['num_images']} images per seed, from noises that were not fitted to; mean ± standard deviation over seeds. "
        f"The long solution of {LONG_STEPS} steps has Fréchet distance {sum(long) / len(long):.3f}, halves of the data "
        f"{report['frechet_distance_of_real_halves']:.3f}. A sampler without a figure fails. Seconds to fit and to compare "
        f"with diffusers' solvers: {', '.join(f'{value:g}' for value in report['fit_seconds'].values())}.",
        "",
        f"`{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a pipeline folder of a model without condition")
    parser.add_argument("--dataset", default="digits", help="images to compare with")
    parser.add_argument("--features", default="auto", help="feature extractor, as of evaluate.py")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fitted_sampler"), help="without suffix")
    parser.add_argument("--steps", type=int, nargs="+", default=LENGTHS, help="numbers of steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=5000, help="images of each figure")
    parser.add_argument("--num_noises", type=int, default=192, help="noises of a fit")
    parser.add_argument("--batch_size", type=int, default=128, help="images in a network call")
    parser.add_argument("--full_chain", action="store_true", help="also the Fréchet distance of the model's full chain")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = run(arguments)
    write_text(arguments.output.with_suffix(".md"), table(report))
    print(table(report))


if __name__ == "__main__":
    main()
