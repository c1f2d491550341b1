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
from ..support.sharing import forgotten_accelerator
from .options import FittingOptions
from .samplers import SamplerFit, fit_sampler

SCHEDULER = "scheduler/scheduler_config.json"


@forgotten_accelerator()
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
        raise ConfigError(f"--model {folder} is no folder of a pipeline; download or save it first; the fit is written there.")
    pipe = load_pipeline(sampling.model).to(accelerator.device)
    pipe.set_progress_bar_config()  # shown
    if accelerator.is_main_process:
        for name in (*pipe.shipped_files(), SCHEDULER, INDEX):
            check_writable(folder / name)
    with accelerator.main_process_first():  # the others find its cache of condition images
        request, _ = request_of(pipe, options)
    how = {name: getattr(sampling, name) for name in ("num_noises", "long_steps", "batch_size", "seed")}
    try:
        found = fit_sampler(pipe, sampling.num_inference_steps, request, **how)
    except (ValueError, FloatingPointError) as error:
        raise ConfigError(f"{error} Options: --num_inference_steps, --long_steps, --num_noises.") from error
    some_are_better = any(length.is_better for length in found.lengths.values())
    if accelerator.is_main_process:
        how_far = f"RMSE to {sampling.long_steps} steps of the model's own solution, of held-out images in [-1, 1]"
        print(f"{how_far}, after {time.monotonic() - began:.0f} s:", file=sys.stderr)
        print(found.table())
        if some_are_better:
            pipe.scheduler = found.scheduler
            configs = {SCHEDULER: pipe.scheduler.to_json_string(), INDEX: pipe.to_json_string()}
            for name, text in (pipe.shipped_code() | configs).items():  # the index may have named another scheduler
                write_text(folder / name, text)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if not some_are_better:
        raise ConfigError(f"no fitted sampler is better than diffusers' solvers, so {folder} stays as it is.")
    return found
