"""Pipelines to sample from, loaded from a folder or the Hub, and their samplers. Imports diffusers and the pipelines."""

from inspect import signature
from pathlib import Path
from typing import Any

import diffusers

from ..encoding_alpha_ddpm import image_condition, vector_condition
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..pipeline_alpha_ddpm_image import AlphaDDPMImageToImagePipeline
from ..pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
from ..samplers_alpha_ddpm import Steps, default_steps, general_sampler_of, set_timesteps
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from ..tables_alpha_ddpm import OWN_KEY
from .options import SCHEDULERS

Pipeline = AlphaDDPMPipeline | AlphaDDPMTextToImagePipeline

LATENT = ("vae", "vqvae", "movq")  # components of pipelines whose UNet denoises no images


def load_pipeline(model: str, option: str = "--model") -> Pipeline:
    """The pipeline in a folder or Hub repository, which an option names, of the class for its conditions. Raises ConfigError if
    there is none, or none that images can be sampled from.
    """
    named = f"{option} {model}"
    try:
        index = AlphaDDPMPipeline.load_config(model)
        text = (index.get("text_encoder") or [None])[0] is not None
        pipe = (AlphaDDPMTextToImagePipeline if text else _class_without_text(model)).from_pretrained(model)
    except Exception as error:  # the loaders of three libraries raise many types
        sought = "" if Path(model).is_dir() else " is no folder here, and so was looked for on the Hub; it"
        raise ConfigError(f"{named}{sought} cannot be loaded as a DDPM pipeline: {describe_exception(error)}") from error
    config = pipe.unet.config
    try:
        general_sampler_of(pipe.scheduler)
    except ValueError as error:  # its network was trained on another process
        raise ConfigError(f"{named} is no DDPM: {error}") from error
    if latent := [name for name in LATENT if name in index]:
        raise ConfigError(f"{named} denoises latents (it has a {latent[0]}), not images; name a pixel-space DDPM.")
    if not isinstance(pipe.unet, diffusers.UNet2DConditionModel if text else diffusers.UNet2DModel):
        raise ConfigError(f"{named} has a {type(pipe.unet).__name__}, which is neither unconditional nor for its text.")
    if not config.sample_size:
        raise ConfigError(f"{named}: unet/config.json has no sample_size; add the height and width of its images.")
    if missing := [name for name, weight in pipe.unet.named_parameters() if weight.is_meta]:
        raise ConfigError(f"{named} has no weights for {', '.join(missing[:3])} of its UNet; save it again.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _class_without_text(model: str) -> type[AlphaDDPMPipeline]:
    try:
        settings = diffusers.UNet2DModel.load_config(model, subfolder="unet").get(OWN_KEY) or {}
    except OSError:  # all files of early repositories are at their top
        settings = {}
    return AlphaDDPMImageToImagePipeline if "condition_image" in settings else AlphaDDPMPipeline


def condition_of(pipe: Pipeline) -> str:
    """What the model's images are conditioned on, as --condition names it: none, class, text, image, vector, class+image or
    vector+image.
    """
    if isinstance(pipe, AlphaDDPMTextToImagePipeline):
        return "text"
    unet = pipe.unet
    kinds = {"class": unet.config.num_class_embeds, "vector": vector_condition(unet), "image": image_condition(unet)}
    return "+".join(kind for kind, found in kinds.items() if found) or "none"


def scheduler_for(pipe: Pipeline, name: str) -> Any:
    """The sampler of this name in `SCHEDULERS`, with the configuration of the pipeline's own, which is called "keep"."""
    if name == "keep":
        return pipe.scheduler
    if name == "ddpm":
        return AlphaDDPMScheduler.from_config(pipe.scheduler.config)
    class_name, options = SCHEDULERS[name]
    return stock_scheduler(class_name, pipe.scheduler, **options)


def stock_scheduler(class_name: str, scheduler: Any, **options: Any) -> Any:
    """diffusers' scheduler of this class with the configuration of another, and with its betas if few know their schedule."""
    if scheduler.config.get("beta_schedule") in ("sigmoid", "laplace"):
        options["trained_betas"] = AlphaDDPMScheduler.from_config(scheduler.config).betas.tolist()
    return getattr(diffusers, class_name).from_config(scheduler.config, **options)


def sampler_name(scheduler: Any) -> str:
    """The class of a scheduler, and its algorithm if not the default: "DPMSolverMultistepScheduler, sde-dpmsolver++"."""
    name, algorithm = type(scheduler).__name__, signature(type(scheduler).__init__).parameters.get("algorithm_type")
    chosen = scheduler.config.get("algorithm_type")
    return name if algorithm is None or chosen in (None, algorithm.default) else f"{name}, {chosen}"


def steps_of(scheduler: Any, num_inference_steps: int | None) -> int:
    """The number of steps; by default as of a call of the pipeline. Raises ConfigError if the sampler cannot take that many."""
    steps = num_inference_steps or default_steps(scheduler)
    try:
        set_timesteps(type(scheduler).from_config(scheduler.config), Steps(steps))
    except ValueError as error:
        raise ConfigError(f"--num_inference_steps {steps}, --scheduler: {error}") from error
    return steps
