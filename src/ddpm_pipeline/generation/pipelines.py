"""Pipelines to sample from, loaded from a folder or the Hub, and their samplers. Imports diffusers and the pipelines."""

from typing import Any

import diffusers

from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.errors import ConfigError
from .options import SCHEDULERS


def load_pipeline(model: str) -> AlphaDDPMPipeline:
    """The unconditional pipeline in a folder or Hub repository. Raises ConfigError if there is none."""
    try:
        pipe = AlphaDDPMPipeline.from_pretrained(model)
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"--model {model} cannot be loaded as an unconditional DDPM pipeline: {error}") from error
    config = pipe.unet.config
    if not isinstance(pipe.unet, diffusers.UNet2DModel) or config.num_class_embeds or config.class_embed_type:
        raise ConfigError(f"--model {model} is a conditional model; this command takes unconditional ones only.")
    if missing := [name for name, weight in pipe.unet.named_parameters() if weight.is_meta]:
        raise ConfigError(f"--model {model} has no weights for {', '.join(missing[:3])} of its UNet; save it again.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_for(pipe: AlphaDDPMPipeline, name: str) -> Any:
    """The sampler of this name in `SCHEDULERS`, with the configuration of the pipeline's own, which is called "keep"."""
    if name == "keep":
        return pipe.scheduler
    scheduler_class = AlphaDDPMScheduler if name == "ddpm" else getattr(diffusers, SCHEDULERS[name])
    return scheduler_class.from_config(pipe.scheduler.config)


def default_steps(pipe: AlphaDDPMPipeline, num_inference_steps: int | None) -> int:
    return num_inference_steps or pipe.scheduler.config.num_train_timesteps
