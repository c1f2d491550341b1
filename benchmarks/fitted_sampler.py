"""How near do fitted samplers come to a model's own solution, and how good are their images, beside diffusers' samplers?

    python benchmarks/fitted_sampler.py ddpm-digits --dataset digits --output benchmarks/results/fitted_sampler

Each of diffusers' samplers is given its best documented setting at each number of steps, by a pilot on noises of its own:
the setting with the lowest Fréchet distance to the data, and of deterministic ones also the one with the lowest RMSE. Then,
for each seed, samplers are fitted to the model, and all sample the same held-out noises: RMSE of the first COMPARED images,
in [-1, 1], to 100 steps of the model's own solution, and Fréchet distance of all in the features that --features names. Every
row is written as soon as it is known, and a second run of the same command continues from there.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
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
from ddpm_pipeline.fitting.stock import CLIPPED
from ddpm_pipeline.generation.pipelines import load_pipeline
from ddpm_pipeline.support.atomic import write_text
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.provenance import provenance, weights_digest

LENGTHS = (3, 4, 5, 7, 10, 15, 20)
COMPARED = 512
PILOT_SEED = 1_000_000
FITTED, LONG, OURS = "fitted", "long solution", "full chain"
WITH_ITS_TIMES = "DPM-Solver++, fitted timesteps"
SPACED = {name: {"timestep_spacing": name} for name in ("leading", "trailing", "linspace")}
KARRAS = {"Karras sigmas": {"use_karras_sigmas": True}}
THIRD_ORDER = {"third order": {"solver_order": 3}}
OF_DPM_SOLVER = {
    **SPACED,
    **KARRAS,
    "linspace, clipped": SPACED["linspace"] | CLIPPED,
    "uniform log-SNR, clipped": {"use_lu_lambdas": True, **CLIPPED},
}
VARIANCES = {name: {"variance_type": name} for name in ("fixed_small", "fixed_large")}
STOCHASTIC = {
    "DDPM": (
        DDPMScheduler,
        {f"{space}, {kind}": SPACED[space] | VARIANCES[kind] for space, kind in itertools.product(SPACED, VARIANCES)},
    ),
    "SDE-DPM-Solver++": (
        DPMSolverMultistepScheduler,
        {name: {"algorithm_type": "sde-dpmsolver++", **options} for name, options in OF_DPM_SOLVER.items()},
    ),
    "SA-Solver": (SASolverScheduler, SPACED | KARRAS),
}
SOLVERS = {
    "DDIM": (DDIMScheduler, SPACED),
    "DPM-Solver++": (DPMSolverMultistepScheduler, OF_DPM_SOLVER | THIRD_ORDER),
    "UniPC": (UniPCMultistepScheduler, SPACED | KARRAS | THIRD_ORDER | {"bh1": {"solver_type": "bh1"}}),
    "DEIS": (DEISMultistepScheduler, SPACED | KARRAS | THIRD_ORDER),
    **STOCHASTIC,
}


class Report:
    """The rows so far, in a file that is written with each."""

    def __init__(self, path: Path, settings: dict[str, Any], **facts: Any):
        self.path, self.content = path, {"rows": [], "fits": {}}
        if path.is_file():
            self.content = json.loads(path.read_text())
        if self.content.get("settings", settings) != settings:
            sys.exit(f"error: {path} holds results of {self.content['settings']}; remove it or name another --output.")
        self.content |= {"settings": settings, **facts}

    def lacks(self, *key: Any) -> bool:
        """Whether there is no row of this sampler, setting, number of steps and seed."""
        rows = self.content["rows"]
        return not any((row["sampler"], row["setting"], row["steps"], row["seed"]) == key for row in rows)

    def add(self, sampler: str, setting: str, steps: int, seed: int | str, **figures: float) -> None:
        row = {"sampler": sampler, "setting": setting, "steps": steps, "seed": seed, **figures}
        self.content["rows"].append(row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    def best_setting(self, sampler: str, steps: int, figure: str) -> str | None:
        """The one with the lowest figure of the pilot; None if all fail."""
        rows = [row for row in self.content["rows"] if (row["sampler"], row["steps"], row["seed"]) == (sampler, steps, "pilot")]
        return min((row for row in rows if figure in row), key=lambda row: row[figure], default={}).get("setting")


class Study:
    """A model, the data, and what is measured of them."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.pipe = arguments, load_pipeline(arguments.folder)
        self.own = self.pipe.scheduler
        channels, size = image_channels(self.pipe.unet), self.pipe.unet.config.sample_size
        self.extractor = feature_extractor(arguments.features, arguments.dataset, None, channels=channels)
        data = DataOptions(arguments.dataset, resolution=size, channels=channels)
        self.real = real_features(load_images(data, UNCONDITIONAL, value_range(self.pipe.unet)), self.extractor, None)
        names = ("dataset", "features", "num_images", "num_noises", "num_pilot")
        settings = {name: getattr(arguments, name) for name in names} | {"weights": weights_digest(self.pipe.unet)}
        command = " ".join(["python benchmarks/fitted_sampler.py", Path(arguments.folder).name, *sys.argv[2:]])
        halves = {"frechet_distance_of_real_halves": frechet_distance_of_halves(self.real)}
        self.report = Report(
            arguments.output.with_suffix(".json"), settings, command=command, **provenance(self.pipe.device), **halves
        )

    def noise(self, seed: int, count: int) -> Tensor:
        """Noises of this seed, other than those that its samplers are fitted to, [count, C, H, W]."""
        first = self.arguments.num_noises
        every = seeds(seed, RandomStream.NOISE, 0, first + count)[first:]
        shape = self.pipe._shape(1)[1:]
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(each))) for each in every])

    def sampled(self, scheduler: Any, noise: Tensor, **steps: Any) -> Tensor:
        """x_0 of each noise, [N, C, H, W] in [-1, 1]. Row i of a stochastic sampler has a generator of its own."""
        self.pipe.scheduler, images = scheduler, []
        for start in range(0, len(noise), self.arguments.batch_size):
            latents = noise[start : start + self.arguments.batch_size].to(self.pipe.device)
            generator = [torch.Generator().manual_seed(start + row) for row in range(len(latents))]
            drawn = self.pipe(latents=latents, generator=generator, output_type="latent", **steps).images
            images.append(drawn.clamp(-1, 1).cpu())
        self.pipe.scheduler = self.own
        return torch.cat(images)

    def solved(self, noise: Tensor) -> Tensor:
        return self.sampled(long_solver(self.own, LONG_STEPS), noise, num_inference_steps=LONG_STEPS)

    def distance(self, images: Tensor) -> float:
        """Fréchet distance to the data."""
        batches = ((images + 1) * 127.5).round().to(torch.uint8).split(self.arguments.batch_size)
        return frechet_distance(self.real, torch.cat([extract(self.extractor, batch)[0] for batch in batches]))

    def add(self, sampler: str, setting: str, steps: int, seed: int | str, noise: Tensor, solved: Tensor, judged: bool) -> None:
        """The row of a sampler: RMSE to `solved`, of as many images, unless it is stochastic, and Fréchet distance of all."""
        if not self.report.lacks(sampler, setting, steps, seed):
            return
        scheduler, asked = self.scheduler(sampler, setting, steps, seed)
        try:
            images = self.sampled(scheduler, noise, **asked)
        except (ValueError, FloatingPointError, IndexError):  # in some numbers of steps
            self.report.add(sampler, setting, steps, seed)
            return
        near = (images[: len(solved)] - solved).square().mean().sqrt().item()
        figures = {} if sampler in STOCHASTIC else {"rmse": near}
        self.report.add(
            sampler, setting, steps, seed, **figures | ({"frechet_distance": self.distance(images)} if judged else {})
        )

    def scheduler(self, sampler: str, setting: str, steps: int, seed: int | str) -> tuple[Any, dict[str, Any]]:
        """The scheduler of a row, and what it is asked for."""
        if sampler in SOLVERS:
            kind, settings = SOLVERS[sampler]
            return kind.from_config(self.own.config, **settings[setting]), {"num_inference_steps": steps}
        fitted = self.fitted(seed)
        if sampler == FITTED:
            return fitted, {"num_inference_steps": steps}
        timesteps = fitted.fitted_samplers[str(steps)]["timesteps"]
        return DPMSolverMultistepScheduler.from_config(self.own.config), {"timesteps": timesteps}

    def fitted(self, seed: int) -> AlphaDDPMFittedScheduler:
        """The fitted samplers of a seed, also those that are not better than diffusers' solvers."""
        arguments, fits = self.arguments, self.report.content["fits"]
        if str(seed) not in fits:
            began = time.process_time()
            how = {"num_noises": arguments.num_noises, "batch_size": arguments.batch_size, "seed": seed}
            lengths = fit_sampler(self.pipe, LENGTHS, **how).lengths
            samplers = {str(steps): found.sampler for steps, found in lengths.items()}
            fits[str(seed)] = {"cpu_seconds": round(time.process_time() - began, 1), "samplers": samplers}
            self.report.write()
        return AlphaDDPMFittedScheduler.from_config(self.own.config, fitted_samplers=fits[str(seed)]["samplers"])

    def pilot(self) -> None:
        """All settings of all solvers."""
        wanted = [(name, setting, n) for name in SOLVERS for setting in SOLVERS[name][1] for n in self.arguments.steps]
        if any(self.report.lacks(*key, "pilot") for key in wanted):
            noise = self.noise(PILOT_SEED, self.arguments.num_pilot)
            solved = self.solved(noise)
            for key in wanted:
                self.add(*key, "pilot", noise, solved, judged=True)

    def measure(self, seed: int) -> None:
        """All rows of a seed."""
        noise = self.noise(seed, self.arguments.num_images)
        if self.report.lacks(LONG, "", LONG_STEPS, seed):
            self.report.add(LONG, "", LONG_STEPS, seed, frechet_distance=self.distance(self.solved(noise)))
        solved = self.solved(noise[:COMPARED])
        for steps in self.arguments.steps:
            for name in (FITTED, WITH_ITS_TIMES):
                self.add(name, "", steps, seed, noise, solved, judged=True)
            for name in SOLVERS:
                best, nearest = (self.report.best_setting(name, steps, figure) for figure in ("frechet_distance", "rmse"))
                if best is not None:
                    self.add(name, best, steps, seed, noise, solved, judged=True)
                if nearest not in (None, best):
                    self.add(name, nearest, steps, seed, noise[:COMPARED], solved, judged=False)

    def measure_full_chain(self, seed: int) -> None:
        if self.report.lacks(OURS, "", len(self.own), seed):
            noise, chain = self.noise(seed, self.arguments.num_images), AlphaDDPMScheduler.from_config(self.own.config)
            images = self.sampled(chain, noise, num_inference_steps=len(self.own))
            self.report.add(OURS, "", len(self.own), seed, frechet_distance=self.distance(images))


def table(report: dict[str, Any]) -> str:
    """Both figures as Markdown, a sampler a line, mean ± standard deviation over the seeds, the best of each column in bold."""
    rows, lines = [row for row in report["rows"] if row["seed"] != "pilot"], []
    steps, names = sorted({row["steps"] for row in rows if row["sampler"] == FITTED}), [FITTED, WITH_ITS_TIMES, *SOLVERS]
    for figure, title, digits in (("rmse", "RMSE to the long solution", 3), ("frechet_distance", "Fréchet distance", 2)):
        found = {key: _of_seeds(rows, figure, *key) for key in itertools.product(names, steps)}
        best = {n: min((found[name, n].mean().item() for name in names if len(found[name, n])), default=None) for n in steps}
        lines += [f"{title} (lower is better):", "", f"| sampler | {' | '.join(map(str, steps))} |"]
        lines += ["|---" * (len(steps) + 1) + "|"]
        for name in names:
            cells = [_cell(found[name, n], digits, best[n]) for n in steps]
            lines += [f"| {name} | {' | '.join(cells)} |"] if any(cells) else []
        lines += [""]
    return "\n".join([*lines, *_notes(report, rows)]) + "\n"


def _of_seeds(rows: list[dict], figure: str, name: str, steps: int) -> Tensor:
    """The figure of each seed, at the sampler's best setting."""
    best: dict[int, float] = {}
    for row in rows:
        if (row["sampler"], row["steps"]) == (name, steps) and figure in row:
            best[row["seed"]] = min(row[figure], best.get(row["seed"], math.inf))
    return torch.tensor([*best.values()], dtype=torch.float64)


def _cell(values: Tensor, digits: int, best: float | None) -> str:
    if not len(values):
        return ""
    text = f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")
    return f"**{text}**" if values.mean().item() == best else text


def _notes(report: dict[str, Any], rows: list[dict]) -> list[str]:
    settings, seeds_done = report["settings"], len({row["seed"] for row in rows})
    known = {name: [row["frechet_distance"] for row in rows if row["sampler"] == name] for name in (LONG, OURS)}
    others = [f"the {name} {sum(values) / len(values):.2f}" for name, values in known.items() if values]
    seconds = ", ".join(f"{fit['cpu_seconds']:g}" for fit in report["fits"].values())
    return [
        f"{settings['num_images']:,} images per seed (RMSE: {min(COMPARED, settings['num_images'])}), {seeds_done} "
        f"seed{'s' * (seeds_done > 1)}, from noises that were not fitted to; mean ± standard deviation over seeds. Fréchet "
        f"distances: {', '.join([*others, 'halves of the data'])} {report['frechet_distance_of_real_halves']:.2f}. diffusers' "
        f"samplers have the best of their settings in a pilot of {settings['num_pilot']} images. CPU seconds to fit, and to "
        f"compare with diffusers' solvers: {seconds}.",
        "",
        f"`{report['command']}`, {report['date']}, {report['processor']}, {report['threads']} threads.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a pipeline folder of a model without condition")
    parser.add_argument("--dataset", default="digits", help="images to compare with")
    parser.add_argument("--features", default="auto", help="feature extractor, as of evaluate.py")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fitted_sampler"), help="without suffix")
    parser.add_argument("--steps", type=int, nargs="+", choices=LENGTHS, default=LENGTHS, help="numbers of steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num_images", type=int, default=5000, help="images of each figure")
    parser.add_argument("--num_pilot", type=int, default=256, help="images by which settings are chosen")
    parser.add_argument("--num_noises", type=int, default=192, help="noises of a fit")
    parser.add_argument("--batch_size", type=int, default=256, help="images in a network call")
    parser.add_argument("--full_chain", action="store_true", help="also the Fréchet distance of the model's full chain")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    study = Study(arguments)
    study.pilot()
    for seed in range(arguments.seeds):
        study.measure(seed)
    for seed in range(arguments.seeds if arguments.full_chain else 0):
        study.measure_full_chain(seed)
    write_text(arguments.output.with_suffix(".md"), table(study.report.content))
    print(table(study.report.content))


if __name__ == "__main__":
    main()
