"""Evaluation of any unconditional DDPM pipeline: `evaluate(EvaluationOptions(model="ddpm-digits", dataset="digits"))`.

The figures go to evaluation.json and into the model card's metadata. They do not depend on the number of processes.
"""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data import ImageData, load_images, open_stream
from ..data.skipped import SHOWN, describe
from ..generation.drawing import sample_uint8
from ..generation.pipelines import default_steps, load_pipeline, scheduler_for
from ..hub import record_evaluation
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..support.atomic import write_text
from ..support.draws import RandomStream, image_indices, seeds
from ..support.errors import ConfigError
from ..support.provenance import provenance
from ..support.sharing import my_batches
from .features import feature_extractor, real_features
from .figures import likelihood_of, measurements, summary
from .options import EvaluationOptions
from .quality import ImageQuality


def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Bits per dimension of images and the quality of samples; the results as they are written to evaluation.json.

    Raises ConfigError or DataError for a model, data or feature extractor that cannot be used.
    """
    began = time.monotonic()
    accelerator, sampling = Accelerator(), options.sampling
    if sampling.num_cpu_threads:
        torch.set_num_threads(sampling.num_cpu_threads)
    pipe, quality = load_pipeline(sampling.model).to(accelerator.device), options.quality
    sampler, extractor = scheduler_for(pipe, sampling.scheduler), None
    if quality.num_images:  # before anything that takes long, in case it cannot be used
        extractor = feature_extractor(quality.features, options.data.dataset, quality.inception_weights)
    with accelerator.main_process_first():
        data = _open_images(options, pipe.unet.config)
    if accelerator.is_main_process and data.skipped:
        first = "; ".join(map(describe, data.skipped[:SHOWN]))
        print(f"warning: {len(data.skipped)} rows cannot be used and are skipped: {first}", file=sys.stderr)
    about = {"model": Path(sampling.model).name, "dataset": data.name, "split": options.data.split}
    results = about | {"skipped_rows": len(data.skipped)}
    if options.likelihood.num_likelihood_images:
        results["bits_per_dim"] = _bits_per_dim(pipe, data, options, accelerator)
    if extractor is not None:
        pipe.scheduler = sampler
        results["quality"] = _quality(pipe, extractor.to(accelerator.device), data, options, accelerator)
    results |= {
        "seed": sampling.seed,
        "batch_size": sampling.batch_size,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - began, 1),
        **provenance(accelerator.device),
    }
    if accelerator.is_main_process:
        _write(options, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _open_images(options: EvaluationOptions, unet: Any) -> ImageData:
    """The data at the size of the model's images; of a stream the first images, as many as are needed."""
    size = unet.sample_size if isinstance(unet.sample_size, int) else unet.sample_size[0]
    own = {"resolution": size, "channels": unet.in_channels}
    for name, value in own.items():
        if (given := getattr(options.data, name)) not in (None, value):
            raise ConfigError(f"--{name} {given} differs from the model's, {value}; leave it out.")
    data = replace(options.data, **own)
    if not data.streaming:
        return load_images(data)
    count = max(options.quality.num_images, options.likelihood.num_likelihood_images)
    return open_stream(data).stored(count, data.cache_dir)


def _bits_per_dim(
    pipe: AlphaDDPMPipeline, data: ImageData, options: EvaluationOptions, accelerator: Accelerator
) -> dict[str, Any]:
    """The likelihood of the first images of a random order of the data."""
    likelihood, seed, batch_size = options.likelihood, options.sampling.seed, options.sampling.batch_size
    count, main = min(likelihood.num_likelihood_images, len(data)), accelerator.is_main_process
    chosen, noise_seeds = image_indices(seed, len(data), 0, count), seeds(seed, RandomStream.NOISE, 0, count)
    names = ["total", "prior", "diffusion", "decoder", "standard_error", *(["two_term"] if likelihood.two_term else [])]
    rows: dict[str, list[float]] = {name: [] for name in names}
    for batch in tqdm(my_batches(count, batch_size, accelerator), disable=not main, desc="likelihood"):
        part = likelihood_of(
            pipe.unet, pipe.scheduler, data.pixels(chosen[batch]), noise_seeds[batch],
            num_inference_steps=likelihood.likelihood_steps, num_evaluated=likelihood.likelihood_calls,
            two_term=likelihood.two_term, num_bins=likelihood.num_bins, batch_size=batch_size, progress=main,
        )  # fmt: skip
        for name in names:
            rows[name] += getattr(part, name).tolist()
    chain = likelihood.likelihood_steps or len(pipe.scheduler)
    return {
        **summary({name: gather_object(values) for name, values in rows.items()}),
        "steps": chain,
        "network_calls": min(likelihood.likelihood_calls or chain, chain),
        "num_bins": likelihood.num_bins,
        "variance_type": pipe.scheduler.config.variance_type,
    }


def _quality(
    pipe: AlphaDDPMPipeline, extractor: nn.Module, data: ImageData, options: EvaluationOptions, accelerator: Accelerator
) -> dict[str, Any]:
    """FID, KID, precision and recall of samples, compared with all of the data."""
    sampling, steps = options.sampling, default_steps(pipe, options.sampling.num_inference_steps)
    quality = ImageQuality(extractor, seed=sampling.seed).to(accelerator.device)
    with accelerator.main_process_first():
        reference = real_features(data, extractor, options.data.cache_dir)
    share = reference.tensor_split(accelerator.num_processes)[accelerator.process_index]
    quality.add_real_features(share.to(accelerator.device))
    batches = my_batches(options.quality.num_images, sampling.batch_size, accelerator)
    for batch in tqdm(batches, disable=not accelerator.is_main_process, desc="sampling"):
        quality.update(sample_uint8(pipe, batch, sampling.seed, steps).to(accelerator.device), real=False)
    figures = {name: value for name, value in quality.compute()._asdict().items() if not math.isnan(value)}  # as in JSON
    return figures | {"steps": steps, "scheduler": type(pipe.scheduler).__name__, "features": type(extractor).__name__}


def _write(options: EvaluationOptions, results: dict[str, Any]) -> None:
    folder, output = Path(options.sampling.model), options.results.output
    path = Path(output) if output else (folder if folder.is_dir() else Path()) / "evaluation.json"
    write_text(path, json.dumps(results, indent=2) + "\n")
    if options.results.update_card and (folder / "README.md").is_file():
        record_evaluation(folder, measurements(results))
