"""Pipelines to draw from: loaded from a folder or the Hub, with the sampler that was asked for. Imports diffusers and torch."""

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..support.errors import ConfigError

SCHEDULERS: dict[str, type] = {
    "ddpm": AlphaDDPMScheduler,
    "stock-ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def load_pipeline(model: str) -> AlphaDDPMPipeline:
    """The unconditional pipeline in a folder or Hub repository. Raises ConfigError where it is none."""
    try:
        pipe = AlphaDDPMPipeline.from_pretrained(model)
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"--model {model} cannot be loaded as an unconditional DDPM pipeline: {error}") from error
    if not isinstance(pipe.unet, UNet2DModel) or pipe.unet.config.num_class_embeds or pipe.unet.config.class_embed_type:
        raise ConfigError(
            f"--model {model} has a conditional network; this command draws and judges unconditional ones."
        )
    if missing := [name for name, weight in pipe.unet.named_parameters() if weight.is_meta]:
        raise ConfigError(f"--model {model} has no weights for {', '.join(missing[:3])} of its network; save it anew.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def use_scheduler(pipe: AlphaDDPMPipeline, name: str) -> None:
    """Put one of SCHEDULERS into the pipeline, of the same configuration; "keep" leaves its own."""
    if name == "keep":
        return
    if name not in SCHEDULERS:
        raise ConfigError(f"--scheduler {name} is not one of keep, {', '.join(SCHEDULERS)}.")
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)


def default_steps(pipe: AlphaDDPMPipeline, num_inference_steps: int | None) -> int:
    return num_inference_steps or pipe.scheduler.config.num_train_timesteps
