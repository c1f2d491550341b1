"""Samplers of few steps fitted to the model in a folder: `fit(FittingOptions(model="ddpm-digits"))`."""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ..generation.pipelines import load_pipeline
from ..generation.requests import request_of
from ..stock_format import INDEX
from ..support.atomic import check_writable, write_text
from ..support.errors import ConfigError
from .options import FittingOptions
from .samplers import SamplerFit, fit_sampler

SCHEDULER = "scheduler/scheduler_config.json"


def fit(options: FittingOptions) -> SamplerFit:
    """Fit the samplers, write them into the folder's scheduler config, and print what they reach.

    Raises ConfigError for a model or a request that cannot be used, and if no sampler is better than diffusers' best; OSError,
    before the fit, if the folder cannot be written to.
    """
    began, accelerator, sampling = time.monotonic(), Accelerator(), options.sampling
    if sampling.num_cpu_threads:
        torch.set_num_threads(sampling.num_cpu_threads)
    folder = Path(sampling.model)
    if not (folder / INDEX).is_file():
        raise ConfigError(f"--model {folder} is no folder of a pipeline; download or save it first: the fit is written there.")
    pipe = load_pipeline(sampling.model).to(accelerator.device)
    pipe.set_progress_bar_config()  # shown
    if accelerator.is_main_process:
        for name in (*pipe.shipped_files(), SCHEDULER, INDEX):
            check_writable(folder / name)
    with accelerator.main_process_first():  # the others find its cache of condition images
        request, _ = request_of(pipe, options)
    how = {"num_noises": sampling.num_noises, "long_steps": sampling.long_steps}
    try:
        found = fit_sampler(
            pipe, sampling.num_inference_steps, request, **how, batch_size=sampling.batch_size, seed=sampling.seed
        )
    except ValueError as error:
        raise ConfigError(f"{error} Options: --num_inference_steps, --long_steps, --num_noises.") from error
    if accelerator.is_main_process:
        how_far = f"RMSE to {sampling.long_steps} steps of the model's own solution, of held-out images in [-1, 1]"
        print(f"{how_far}, after {time.monotonic() - began:.0f} s:", file=sys.stderr)
        print(found.table())
        if any(length.is_better for length in found.lengths.values()):
            pipe.scheduler = found.scheduler
            _write(pipe, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not any(length.is_better for length in found.lengths.values()):
        raise ConfigError(f"no fitted sampler is better than diffusers' solvers, so {folder} stays as it is.")
    return found


def _write(pipe, folder: Path) -> None:
    """The scheduler's config, the code that reads it, and the index, which may have named another scheduler."""
    for name, code in pipe.shipped_code().items():
        write_text(folder / name, code)
    write_text(folder / SCHEDULER, pipe.scheduler.to_json_string())
    write_text(folder / INDEX, pipe.to_json_string())
