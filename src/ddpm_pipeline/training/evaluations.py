"""Evaluations on the way: loss and bits/dim of training images and of held-out ones, quality of samples, the best checkpoint.

Images, noise and timesteps are the same every time, so that the figures of one run can be compared image by image.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from ..data.mapped import ImageData, ImageSet
from ..evaluation.features import real_features, seen
from ..evaluation.figures import likelihood_of
from ..generation.drawing import sample_values
from ..support.draws import RandomStream, image_indices, seeds, uniform
from .jobs import Run, best_checkpoint, not_essential, sampling_calls, save_checkpoint
from .stop import in_any_process
from .validation import Evaluation, standard_error

logger = logging.getLogger(__name__)

Objective = Callable[..., torch.Tensor]  # losses [b] of a network, a micro-batch and timesteps [b]
LOSS_CALLS = 8  # network calls per image for its loss
FIGURES = ("fid", "kid", "precision", "recall")


def evaluate_and_keep(run: Run, objective: Objective, done: int) -> bool:
    """Evaluate the EMA weights, and write a checkpoint if they are the best of held-out images; whether the run shall stop."""
    stopping = run.in_main_process(partial(evaluate, objective=objective), done)
    if run.options.run.keep_best:
        best = run.validation and run.validation.best
        if in_any_process(run.accelerator, best is not None and best.step == done)[0]:
            run.checkpoints.best = done
            save_checkpoint(run, done)
    return stopping


def eval_calls(run: Run) -> int:
    """Network calls times images of an evaluation."""
    watching, kinds = run.options.watching, 1 if run.data.held_out is None else 2
    likelihood = kinds * watching.eval_images * (watching.eval_calls + LOSS_CALLS)
    sampled = [(watching.eval_samples, run.preview_steps)] if watching.eval_samples else []
    return likelihood + sampling_calls(run, *sampled)


def evaluate(run: Run, done: int, objective: Objective) -> None:
    """Log loss and bits/dim of images, and FID, KID, precision and recall of samples."""
    figures: dict[str, float] = {}
    for measure in (partial(likelihoods, done=done, objective=objective), *([quality] if run.extractor is not None else [])):
        with not_essential("an evaluation"):
            figures |= measure(run)
    if figures:
        run.telemetry.log(figures, done)


def likelihoods(run: Run, done: int, objective: Objective) -> dict[str, float]:
    """`eval_loss` and `eval_bits_per_dim` of training images, and `validation_...` of as many held-out ones, with standard
    errors; says when the model has begun to memorise.
    """
    count, data = run.options.watching.eval_images, run.data
    if data.held_out is None:
        return _means("eval", per_image(run, objective, data, count))
    count = min(count, len(data.held_out))
    train, held_out = (per_image(run, objective, images, count) for images in (data, data.held_out))
    found = Evaluation(done, held_out["bits_per_dim"], float(train["bits_per_dim"].mean()))
    logger.info("update %d: held-out bits/dim %s, those of training images %.4f", done, found, found.train)
    if math.isfinite(found.mean) and run.validation.add(found):
        best = run.validation.best
        logger.warning(
            "the model has begun to memorise: held-out bits/dim rose from %.4f (update %d) to %.4f, while those of "
            "training images fell from %.4f to %.4f; %s", best.mean, best.step, found.mean, best.train, found.train,
            best_checkpoint(run),
        )  # fmt: skip
    return _means("eval", train) | _means("validation", held_out)


def _means(name: str, figures: dict[str, np.ndarray]) -> dict[str, float]:
    found = {}
    for figure, values in figures.items():
        found[f"{name}_{figure}"] = float(values.mean())
        if len(values) > 1:
            found[f"{name}_{figure}_error"] = standard_error(values)
    return found


@torch.no_grad()
def per_image(run: Run, objective: Objective, data: ImageSet, count: int) -> dict[str, np.ndarray]:
    """The training loss at LOSS_CALLS timesteps, one in each part of the chain, and the bound over the full chain, estimated
    from a few timesteps; of `count` images (or all) under their conditions, float64 [n].
    """
    watching, seed, device = run.options.watching, run.options.run.seed, run.accelerator.device
    if not isinstance(data, ImageData):
        data = data.stored(count, run.options.data.cache_dir)
    indices = image_indices(seed, len(data), 0, min(count, len(data)))
    count, pixels = len(indices), data.pixels(indices)
    inputs = run.condition.unet_inputs(run.condition.request_like(data, indices, seed))
    how = {"num_evaluated": watching.eval_calls, "batch_size": run.batch_size, "progress": False, "model_kwargs": inputs}
    noise_seeds = seeds(seed, RandomStream.NOISE, 0, count)
    network = run.condition.denoiser(run.pipe.unet)
    bits = likelihood_of(network, run.scheduler, pixels, data.value_range, noise_seeds, **how).total
    within, losses = torch.from_numpy(uniform(seed, RandomStream.TIMESTEP, 0, count)), torch.zeros(LOSS_CALLS, count)
    for call in range(LOSS_CALLS):
        timesteps = ((call + within) / LOSS_CALLS * len(run.scheduler)).long().clamp(max=len(run.scheduler) - 1)
        noise_seeds = seeds(seed, RandomStream.NOISE, call, count)
        for start in range(0, count, run.batch_size):
            rows = slice(start, start + run.batch_size)
            batch = {"pixels": pixels[rows], "noise_seeds": noise_seeds[rows]}
            conditioned = partial(network, **{name: value[rows].to(device) for name, value in inputs.items()})
            losses[call, rows] = objective(conditioned, batch, timesteps[rows].to(device)).float().cpu()
    return {"loss": losses.double().mean(dim=0).numpy(), "bits_per_dim": bits.numpy()}


def quality(run: Run) -> dict[str, float]:
    """Of samples over the previews' steps, with the conditions of the data, compared with all of it, in this process alone."""
    from ..evaluation.quality import ImageQuality  # seconds of imports, which runs without samples to judge spare

    watching, seed, pipe, extractor = run.options.watching, run.options.run.seed, run.preview_pipe, run.extractor
    request = run.condition.request_like(run.data, image_indices(seed, len(run.data), 0, watching.eval_samples), seed)
    measured = ImageQuality(extractor, seed=seed, sync_on_compute=False).to(pipe.device)
    measured.add_real_features(real_features(run.data, extractor, run.options.data.cache_dir).to(pipe.device))
    for start in range(0, watching.eval_samples, run.batch_size):
        batch = range(start, min(start + run.batch_size, watching.eval_samples))
        images = torch.from_numpy(sample_values(pipe, batch, seed, run.preview_steps, request))
        measured.update(seen(images.to(pipe.device), run.data.value_range), real=False)
    figures = measured.compute()._asdict()
    return {f"eval_{name}": figures[name] for name in FIGURES if not math.isnan(figures[name])}
