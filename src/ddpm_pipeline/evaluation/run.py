"""Evaluation of any DDPM pipeline: `evaluate(EvaluationOptions(model="ddpm-digits", dataset="digits"))`.

The figures go to evaluation.json and into the model card's metadata. They do not depend on the number of processes.
"""

import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data import ImageData, open_stream
from ..data.held_out import open_training_data
from ..data.options import parse_resolution
from ..data.skipped import SHOWN, describe
from ..encoding_alpha_ddpm import image_channels, image_condition, value_range
from ..generation.drawing import sample_values, step_bar
from ..generation.pipelines import Pipeline, condition_of, load_pipeline, sampler_name, scheduler_for, steps_of
from ..likelihood.bound import own_scheduler
from ..support.draws import RandomStream, image_indices, seeds
from ..support.errors import ConfigError, DataError
from ..support.provenance import provenance
from ..support.sharing import forgotten_accelerator, my_batches
from ..tables_alpha_ddpm import plain
from .cat_judge import judge_of
from .conditions import DataConditions, columns_of
from .copies import Samples, find_copies
from .digits import DigitsClassifier
from .features import feature_extractor, real_features, seen, try_extractor
from .figures import DENSITY, likelihood_of, means, summary
from .memorisation import likelihood_gap
from .options import EvaluationOptions
from .quality import ImageQuality
from .results import check_destinations, picture_file, resize_of, split_name, told_otherwise, write_results


@forgotten_accelerator()
def evaluate(options: EvaluationOptions) -> dict[str, Any]:
    """Bits per dimension of images and the quality of samples; the results as they are written to evaluation.json.

    Raises ConfigError or DataError for a model, data, a feature extractor or files that cannot be used, before anything that
    takes long.
    """
    began, options = time.monotonic(), options.with_values(resize=resize_of(options))
    accelerator, sampling = Accelerator(), options.sampling
    if sampling.num_cpu_threads:
        torch.set_num_threads(sampling.num_cpu_threads)
    if accelerator.is_main_process:
        check_destinations(options)
    pipe = load_pipeline(sampling.model).to(accelerator.device)
    subject = _open(pipe, options, accelerator)
    held_out, memorisation, pairs = subject.held_out, {"validation_split": options.data.validation_name}, None
    results = {
        "model": Path(sampling.model).resolve().name,
        "dataset": subject.data.name,
        "split": split_name(options.data),
        "skipped_rows": len(subject.data.skipped),
    }
    if options.likelihood.num_likelihood_images:
        found, of_training = _bits_per_dim(subject, options, accelerator)
        results["bits_per_dim"] = found
        error = f" ± {found['total_standard_error']:.2g}" if "total_standard_error" in found else ""
        # whatever becomes of the samples
        _tell(f"{found['total']:.4f}{error} bits/dim, of {found['num_images']} images", accelerator)
        if held_out is not None:
            _, of_held_out = _bits_per_dim(held_out, options, accelerator)
            memorisation["bits_per_dim"] = gap = likelihood_gap(of_training, of_held_out)
            _tell(f"{gap['held_out']:.4f} bits/dim, of {gap['num_held_out']} held-out images", accelerator)
    if options.quality.num_images and (subject.reference is not None or subject.conditions.image or held_out):
        sections, samples = _samples(subject, options, accelerator)
        results |= sections
        if held_out is not None:
            references = subject.reference, held_out.reference
            found, pairs = find_copies(samples, subject.data, references, sampling.seed, accelerator)
            _tell(f"the closest pairs, which show training images, are in {picture_file(options)}", accelerator)
            memorisation |= found
    if held_out is not None:
        results["memorisation"] = memorisation
    results |= {
        "seed": sampling.seed,
        "batch_size": sampling.batch_size,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - began, 1),
        **provenance(accelerator.device),
    }
    if accelerator.is_main_process:
        write_results(options, results, pairs)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    pipe: Pipeline
    data: ImageData
    conditions: DataConditions
    sampler: Any  # a scheduler
    extractor: nn.Module | None
    reference: torch.Tensor | None  # features of the data, [N, F]; None without an extractor
    held_out: "Subject | None" = None  # the same of images that the model was not trained on


def _open(pipe: Pipeline, options: EvaluationOptions, accelerator: Accelerator) -> Subject:
    """The model with its data, and the features of the data: all that can fail early."""
    sampler, quality = scheduler_for(pipe, options.sampling.scheduler), options.quality
    if options.sampling.guidance_scale != 1 and condition_of(pipe) == "none":
        raise ConfigError(f"--guidance_scale {options.sampling.guidance_scale} needs a conditional model; drop it.")
    if quality.num_images:  # for their errors
        steps_of(sampler, options.sampling.num_inference_steps)
        my_batches(quality.num_images, options.sampling.batch_size, accelerator)
    if (steps := options.likelihood.likelihood_steps) is not None and steps > len(pipe.scheduler):
        raise ConfigError(f"--likelihood_steps {steps} exceeds the {len(pipe.scheduler)} steps of the model's chain.")
    extractor = _extractor(pipe, options, accelerator)
    with accelerator.main_process_first():
        data = _open_images(options, pipe, accelerator)
    parts = [data] if data.held_out is None else [data, data.held_out]
    conditions = [DataConditions(pipe, images, options.condition, options.sampling.seed) for images in parts]
    if data.skipped:
        first = "; ".join(map(describe, data.skipped[:SHOWN]))
        _tell(f"warning: {len(data.skipped)} rows cannot be used and are skipped: {first}", accelerator)
    if other := told_otherwise(options):
        _tell(f"warning: the model was trained with {other}: what is held out here may be training images", accelerator)
    if extractor is not None:
        extractor = extractor.to(accelerator.device)
        try_extractor(extractor, data, f"--features {quality.features}")

    subject = None
    for images, of_images in reversed([*zip(parts, conditions, strict=True)]):
        if count := min(options.likelihood.num_likelihood_images, len(images)):
            my_batches(count, options.sampling.batch_size, accelerator)  # for its error
        reference = None
        if extractor is not None:
            with accelerator.main_process_first():
                reference = real_features(images, extractor, options.data.cache_dir)
        subject = Subject(pipe, images, of_images, sampler, extractor, reference, held_out=subject)
    return subject


def _extractor(pipe: Pipeline, options: EvaluationOptions, accelerator: Accelerator) -> nn.Module | None:
    """The feature extractor; None if no samples are asked for or if, by default, there is none."""
    quality = options.quality
    if not quality.num_images:
        return None
    try:
        channels = image_channels(pipe.unet)
        return feature_extractor(quality.features, options.data.dataset, quality.inception_weights, channels=channels)
    except ConfigError as error:
        in_pairs, divided = image_condition(pipe.unet) is not None, options.data.validation_split
        if quality.features != "auto" or not (options.likelihood.num_likelihood_images or in_pairs or divided):
            raise ConfigError(f"{str(error).rstrip('.')}; or evaluate the likelihood alone, with --num_images 0.") from error
        alone = "only the likelihood is evaluated (as with --num_images 0), and no samples"
        compared = "in pixels" if divided else "with their own images"
        _tell(f"warning: {f'samples are only compared {compared}' if in_pairs or divided else alone}: {error}", accelerator)
        return None


def _tell(line: str, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)


def _open_images(options: EvaluationOptions, pipe: Pipeline, accelerator: Accelerator) -> ImageData:
    """The data as the model's were, in size, channels and values; of a stream the first images, as many as are needed."""
    columns = columns_of(pipe, options.condition)
    own = {"resolution": parse_resolution(pipe.unet.config.sample_size), "channels": image_channels(pipe.unet)}
    for name, value in own.items():
        if (given := getattr(options.data, name)) not in (None, value):
            raise ConfigError(f"--{name} {given} differs from the model's, {value}; leave it out.")
    if options.data.value_range is not None:
        raise ConfigError(f"--value_range {options.data.value_range} is not needed: the model has its own; leave it out.")
    data, condition = replace(options.data, **own), image_condition(pipe.unet)
    ranges = value_range(pipe.unet), condition and condition.value_range
    try:
        if not data.streaming:
            return open_training_data(data, columns, 0, *ranges)
        count = max(options.quality.num_images, options.likelihood.num_likelihood_images)
        return open_stream(data, columns, *ranges).stored(count, data.cache_dir)
    except DataError as error:
        if options.condition.condition_column == (looked_for := columns.condition_column):
            raise
        told = f"The model's numbers are {looked_for}; say where the data have them with --condition_column."
        raise DataError(f"{error} {told}") from error


def _bits_per_dim(
    subject: Subject, options: EvaluationOptions, accelerator: Accelerator
) -> tuple[dict[str, Any], torch.Tensor]:
    """The likelihood of the first images of a random order of the data, and the total of each, [N]."""
    likelihood, seed, batch_size = options.likelihood, options.sampling.seed, options.sampling.batch_size
    pipe, data = subject.pipe, subject.data
    count, main = min(likelihood.num_likelihood_images, len(data)), accelerator.is_main_process
    chosen, noise_seeds = image_indices(seed, len(data), 0, count), seeds(seed, RandomStream.NOISE, 0, count)
    network, num_bins = subject.conditions.network, likelihood.num_bins or data.value_range.num_bins
    names = ["total", "prior", "diffusion", "decoder", "standard_error", *(["two_term"] if likelihood.two_term else [])]
    rows: dict[str, list[float]] = {name: [] for name in names}
    how: dict[str, Any] = {
        "num_inference_steps": likelihood.likelihood_steps, "num_evaluated": likelihood.likelihood_calls,
        "two_term": likelihood.two_term, "num_bins": num_bins, "batch_size": batch_size, "progress": main,
    }  # fmt: skip
    for batch in tqdm(my_batches(count, batch_size, accelerator), disable=not main or None, desc="likelihood"):
        images = data.pixels(chosen[batch]), data.value_range
        how["model_kwargs"] = subject.conditions.inputs(chosen[batch])
        try:
            part = likelihood_of(network, pipe.scheduler, *images, noise_seeds[batch], **how)
        except ValueError as error:
            raise ConfigError(f"the likelihood cannot be evaluated: {error}") from error
        for name in names:
            rows[name] += getattr(part, name).tolist()
    rows = {name: gather_object(values) for name, values in rows.items()}
    chain = likelihood.likelihood_steps or len(pipe.scheduler)
    section = {
        **summary(rows),
        "steps": chain,
        "network_calls": min(likelihood.likelihood_calls or chain, chain),
        **({"density": DENSITY} if num_bins is None else {"num_bins": plain(num_bins)}),
        "variance_type": own_scheduler(pipe.scheduler).config.variance_type,
    }
    return section, torch.tensor(rows["total"], dtype=torch.float64)


def _samples(subject: Subject, options: EvaluationOptions, accelerator: Accelerator) -> tuple[dict[str, Any], Samples]:
    """Samples asked for with the conditions of the data: their quality, compared with all of the data, by features, and how
    near each comes to its condition.
    """
    pipe, data, sampling, count = subject.pipe, subject.data, options.sampling, options.quality.num_images
    steps, main = steps_of(subject.sampler, sampling.num_inference_steps), accelerator.is_main_process
    pipe.scheduler = subject.sampler
    places = image_indices(sampling.seed, len(data), 0, count)
    request = subject.conditions.request(places, sampling.guidance_scale)
    quality = None
    if subject.reference is not None:
        quality = ImageQuality(subject.extractor, seed=sampling.seed).to(accelerator.device)
        share = subject.reference.tensor_split(accelerator.num_processes)[accelerator.process_index]
        quality.add_real_features(share.to(accelerator.device))
    batches, columns, parts = my_batches(count, sampling.batch_size, accelerator), defaultdict(list), []
    judge = judge_of(options.data, data, subject.conditions)
    _tell(f"sampling {count} images over {steps} steps; --num_images and --num_inference_steps change that", accelerator)
    with step_bar(len(batches), steps, main) as shown:
        for batch in batches:
            pixels, digits = torch.from_numpy(sample_values(pipe, batch, sampling.seed, steps, request, **shown)), None
            parts.append(pixels)
            if quality is not None:
                quality.update(seen(pixels.to(accelerator.device), data.value_range), real=False)
            if isinstance(subject.extractor, DigitsClassifier):
                digits = quality.generated_logits[-1].argmax(dim=1).cpu()
            for name, values in subject.conditions.followed(pixels, places[batch], digits).items():
                columns[name] += values.tolist()
            if judge is not None:
                judge.add(pixels, places[batch])
    how = {"steps": steps, "scheduler": sampler_name(pipe.scheduler)}
    how |= {"guidance_scale": request.guidance_scale} if request.arguments else {}
    features, sections = None if quality is None else torch.cat(quality.generated_features), {}
    if quality is not None:
        figures = {name: value for name, value in quality.compute()._asdict().items() if not math.isnan(value)}  # as in JSON
        sections["quality"] = figures | how | {"features": type(subject.extractor).__name__}
    if columns:
        figures = means({name: gather_object(values) for name, values in columns.items()})
        sections["conditions"] = {"num_images": count} | figures | how
    if judge is not None:
        sections["cats"] = judge.section(gather_object(judge.rows)) | how
    return sections, Samples(torch.cat(parts), features, how)
