"""What a sampler, any diffusers scheduler in a pipeline, can do with a DDPM model, and how it is asked to.

A DDPM model predicts noise, x_0 or v of x_t = √ᾱ_t x_0 + √(1-ᾱ_t) z̃ at timesteps 0..T-1. Travels inside model repositories.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from .tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, Generators, check_generators, check_integer, plain

logger = logging.get_logger(__name__)  # diffusers' verbosity shows it


@dataclass(frozen=True)
class Sampler:
    """What a scheduler can do besides the whole chain from noise to image."""

    middle: bool = True  # begins in the middle of its chain, with a noised image
    sample_prediction: bool = True  # reads networks that predict x_0
    thresholding: bool = True  # dynamic thresholding of x_0, where the config asks for it
    learned_variance: bool = False  # takes the variance half of the network's output
    resamples: bool = False  # goes back a step, for RePaint


UNTHRESHOLDED = Sampler(thresholding=False)
NOISE_OR_V = Sampler(sample_prediction=False, thresholding=False)
# By the names of classes, since a scheduler's code may have been loaded from a repository
SAMPLERS = {
    "AlphaDDPMScheduler": Sampler(learned_variance=True, resamples=True),
    "DDIMScheduler": Sampler(),
    "DPMSolverMultistepScheduler": Sampler(),
    "EulerDiscreteScheduler": UNTHRESHOLDED,
    "EulerAncestralDiscreteScheduler": NOISE_OR_V,
    "HeunDiscreteScheduler": UNTHRESHOLDED,
    "UniPCMultistepScheduler": Sampler(),
    "DDPMScheduler": Sampler(learned_variance=True),
    "DDPMParallelScheduler": Sampler(learned_variance=True),
    "DDIMParallelScheduler": Sampler(),
    "DEISMultistepScheduler": Sampler(),
    "DPMSolverSDEScheduler": NOISE_OR_V,
    "DPMSolverSinglestepScheduler": Sampler(),
    "KDPM2AncestralDiscreteScheduler": NOISE_OR_V,
    "KDPM2DiscreteScheduler": NOISE_OR_V,
    "LCMScheduler": Sampler(),
    "LMSDiscreteScheduler": UNTHRESHOLDED,
    "PNDMScheduler": replace(NOISE_OR_V, middle=False),  # its first steps are of another kind than the rest
    "SASolverScheduler": Sampler(),
    "TCDScheduler": UNTHRESHOLDED,
}
NAMED = 6  # of SAMPLERS, in messages
NEEDED = ("set_timesteps", "step", "add_noise", "scale_model_input", "init_noise_sigma")


@dataclass(frozen=True)
class Steps:
    """The chain a call asks for: the number of its steps, or its timesteps or sigmas, noise first."""

    count: int | None = None
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None

    def __post_init__(self) -> None:
        given = {name: plain(value) for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given; give the number of steps, timesteps or sigmas.")
        vars(self).update(given)
        for name, levels in given.items():
            if name != "count" and not _descends(levels):
                raise ValueError(f"{name}={levels!r} must be strictly descending numbers of at least 0, noise first.")


def _descends(levels: Any) -> bool:
    numbers = isinstance(levels, list) and len(levels) > 0 and all(isinstance(level, int | float) for level in levels)
    return numbers and levels[-1] >= 0 and all(high > low for high, low in pairwise(levels))


def general_sampler_of(scheduler: Any) -> Sampler:
    """What a scheduler can do with some DDPM model. Raises ValueError if it cannot sample from any."""
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    known = next((SAMPLERS[base.__name__] for base in type(scheduler).__mro__ if base.__name__ in SAMPLERS), None)
    foreign = type(scheduler).__module__.startswith("diffusers.") or not all(hasattr(scheduler, name) for name in NEEDED)
    if known is None and foreign:
        raise ValueError(f"{kind} cannot sample from a DDPM model; {advice(kind)}.")
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ValueError(f"{kind} is set to flow matching, which a DDPM model does not do; {advice(kind)}.")
    known = known or Sampler()
    return replace(known, middle=False, resamples=False) if getattr(scheduler, "runs_whole", False) else known


def sampler_of(scheduler: Any) -> Sampler:
    """What a scheduler can do. Raises ValueError if its config, which is the model's, asks for what it cannot do."""
    sampler, kind, config = general_sampler_of(scheduler), type(scheduler).__name__, getattr(scheduler, "config", {})
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        problem = f"{kind} is set to a chain that ends without signal, of which a noise prediction says nothing"
        raise ValueError(f"{problem}; set rescale_betas_zero_snr=False, or use a model that predicts x_0 or v.")
    if config.get("prediction_type") == "sample" and not sampler.sample_prediction:
        problem = f"{kind} cannot use a model with prediction_type='sample'"
        raise ValueError(f"{problem}; {advice(kind, sample_prediction=True)}.")
    if config.get("thresholding") and not sampler.thresholding:
        problem = f"{kind} cannot do the thresholding that its config asks for"
        raise ValueError(f"{problem}; set thresholding=False, or {advice(kind, thresholding=True)}.")
    return sampler


def advice(kind: str, **wanted: bool) -> str:
    """Samplers of another kind that can do what is wanted, in words."""
    others = {name: sampler for name, sampler in SAMPLERS.items() if name != kind}
    able = [name for name, sampler in others.items() if all(getattr(sampler, key) == wanted[key] for key in wanted)]
    return f"use {', '.join(able[:NAMED])}"


def check_start(scheduler: Any, first: int, num_resamples: int) -> None:
    """Raise ValueError if the sampler cannot begin with its step of index `first`, or go over steps again."""
    sampler, kind = sampler_of(scheduler), type(scheduler).__name__
    if first and not sampler.middle:
        raise ValueError(f"{kind} cannot begin in the middle of its chain; use strength=1, or {advice(kind, middle=True)}.")
    if num_resamples > 1 and not sampler.resamples:
        raise ValueError(f"num_resamples={num_resamples} needs steps back, which {kind} lacks; {advice(kind, resamples=True)}.")


def default_steps(scheduler: Any, from_noise: bool = True) -> int:
    """Number of steps of a call that names none: from noise the largest that a sampler was fitted for, if any; otherwise T."""
    return (from_noise and getattr(scheduler, "most_fitted_steps", None)) or scheduler.config.num_train_timesteps


def set_timesteps(scheduler: Any, steps: Steps, from_noise: bool = False) -> Tensor:
    """Set the scheduler to the chain asked for, by default that of `default_steps`, and return its timesteps.

    They stay on the CPU, so that no step waits for the device. Raises ValueError if the scheduler cannot run the chain.
    """
    sampler_of(scheduler)
    kind, total = type(scheduler).__name__, scheduler.config.num_train_timesteps
    count = default_steps(scheduler, from_noise) if steps.count is None else steps.count
    check_integer("num_inference_steps", count, 1, total)
    try:
        if steps.timesteps is not None or steps.sigmas is not None:
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps  # slow to import

            retrieve_timesteps(scheduler, timesteps=steps.timesteps, sigmas=steps.sigmas)
            count = len(scheduler.timesteps)
        else:
            scheduler.set_timesteps(count)
            if steps.count is None and count < total:
                told = "%d steps, the most that a sampler was fitted for; num_inference_steps=%d is the full chain"
                logger.info(told, count, total)
    except Exception as error:  # whatever a scheduler stumbles over
        given = [f"{name}={value}" for name, value in vars(steps).items() if value is not None and name != "count"]
        asked = given[0] if given else f"{count} steps"
        raise ValueError(f"{kind} cannot run {asked} ({error}); choose others, or {advice(kind)}.") from error
    lowest, highest = float(scheduler.timesteps.min()), float(scheduler.timesteps.max())
    if not 0 <= lowest <= highest <= total - 1:
        problem = f"{kind} cannot run {count} steps: they have timesteps from {lowest:g} to {highest:g}, outside 0..{total - 1}"
        raise ValueError(f"{problem}; set steps_offset=0, choose another num_inference_steps, or {advice(kind)}.")
    levels = getattr(scheduler, "sigmas", scheduler.timesteps)[: len(scheduler.timesteps)]
    if order_of(scheduler) == 1 and sampler_of(scheduler).middle and (levels[1:] == levels[:-1]).any():
        problem = f"{kind} cannot run {count} steps: two of them would have the same noise"
        raise ValueError(f"{problem}; choose fewer num_inference_steps, timestep_spacing='trailing', or {advice(kind)}.")
    return scheduler.timesteps


def order_of(scheduler: Any) -> int:
    """Network calls per step: with 2, every other timestep belongs to the inside of a step."""
    return getattr(scheduler, "order", 1)


def next_timesteps(scheduler: Any) -> dict[int, Tensor | None]:
    """By the index of each network call that completes a step, the timestep of the next step; None is clean data."""
    timesteps, order = scheduler.timesteps, order_of(scheduler)
    following = [*timesteps[1:], None]
    return {i: t for i, t in enumerate(following) if t is None or (i + 1) % order == 0}


def seed_own_noise(scheduler: Any, generator: Generators) -> None:
    """Seed the noise of a sampler that takes no generator, such as DPMSolverSDEScheduler, from the generator of the call."""
    if not hasattr(scheduler, "noise_sampler_seed") or scheduler.config.noise_sampler_seed is not None:
        return
    each = generator if isinstance(generator, list) else [generator]
    seeds = [torch.randint(2**62, (), generator=g, device=g.device if g else "cpu").item() for g in each]
    scheduler.noise_sampler_seed = seeds if isinstance(generator, list) else seeds[0]


def reverse_step(scheduler: Any, model_output: Tensor, t: Tensor, x: Tensor, generator: Generators) -> Any:
    """One step of the reverse process: an output with `prev_sample` and, for most samplers, `pred_original_sample`."""
    parameters = signature(scheduler.step).parameters
    options = {"generator": generator} if "generator" in parameters else {}
    if "order" in parameters:  # LMS takes the whole history for granted, also where a chain begins in the middle
        options["order"] = min(len(scheduler.derivatives) + 1, parameters["order"].default)
    return scheduler.step(model_output, t, x, **options)


def takes_variance(scheduler: Any) -> bool:
    """Whether a step takes the variance half of the network's output; others ignore a DDPM config's `variance_type`."""
    return sampler_of(scheduler).learned_variance and scheduler.config.variance_type in LEARNED_VARIANCE_TYPES


def checked_generators(generator: Any, count: int) -> Generators:
    """None, a generator, or a list of one per image. Raises TypeError for anything else, ValueError for another number."""
    each = list(generator) if isinstance(generator, list | tuple) else [generator]
    for found in each:
        if not isinstance(found, torch.Generator) and generator is not None:
            fix = "give torch.Generator().manual_seed(0), or a list of one such per image"
            raise TypeError(f"generator={generator!r} is no torch.Generator; {fix}.")
    check_generators(each if isinstance(generator, tuple) else generator, count)
    return each if isinstance(generator, tuple) else generator


_busy: weakref.WeakSet = weakref.WeakSet()
_lock = threading.Lock()


@contextmanager
def reserved(scheduler: Any) -> Iterator[None]:
    """Keep the scheduler, which holds the state of a chain, for one chain at a time. Raises RuntimeError if it is in use."""
    with _lock:
        if scheduler in _busy:
            problem = "this pipeline's scheduler is in the middle of another call, from a callback or another thread"
            raise RuntimeError(f"{problem}; give each its own pipeline, with a copy.deepcopy of the scheduler.")
        _busy.add(scheduler)
    try:
        yield
    finally:
        _busy.discard(scheduler)
