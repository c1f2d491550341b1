"""The reverse loop that all pipelines share, with classifier-free guidance.

A pipeline turns its condition into arguments of the UNet; everything else is here and in `editing_alpha_ddpm.py`. The
functions take the UNet, the scheduler and tensors, and no pipeline. Travels inside model repositories.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from .editing_alpha_ddpm import AlphaDDPMEditing, Batch, Edit, keep, start_chain
from .samplers_alpha_ddpm import Steps, reverse_step, set_timesteps
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, OWN_KEY, Generators, check_generators, standard_normal

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_INPUTS = ("latents", "pred_original_sample", "image")  # the last is what `latents` was called once


@dataclass
class AlphaDDPMOutput(ImagePipelineOutput):
    """`images` as asked for and, with `output_trajectory=True`, x_T first and x_0 last: [S + 1, B, C, H, W], on the CPU."""

    trajectory: Tensor | None = None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022). Raises ValueError for values outside their ranges."""

    scale: float = 1.0  # 1 is none
    rescale: float = 0.0  # 0 to 1: how much of the contrast that guidance adds is undone
    interval: tuple[float, float] = (0.0, 1.0)  # start and end as fractions of the chain, from noise to image

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale)):
            raise ValueError(f"guidance_scale={self.scale!r} must be a finite number; 1 turns guidance off.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale!r} must be from 0 (none) to 1.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            allowed = "0 <= start <= end <= 1, fractions of the chain from noise (0) to image (1)"
            raise ValueError(f"guidance_interval={self.interval!r} must be a start and an end with {allowed}.")

    @property
    def in_use(self) -> bool:
        return self.scale != 1 and self.interval[0] < self.interval[1]

    def covers(self, share: float) -> bool:
        """Whether the step that begins at fraction `share` of the chain lies in the interval."""
        return self.interval[0] <= share < self.interval[1]


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told: keyword arguments, tensors [B, ...], those of the unconditional half, and the guidance."""

    kwargs: dict[str, Tensor]
    null_kwargs: dict[str, Tensor] | None = None  # None if nothing can be guided
    guidance: Guidance = Guidance()


@dataclass(frozen=True)
class Output:
    """What a call returns and shows on the way. Raises ValueError for unknown names."""

    type: str = "pil"
    as_dict: bool = True
    trajectory: bool = False  # also return all x_t
    callback: Callable[[Any, int, Tensor, dict], dict] | None = None  # called as (pipe, index, timestep, tensors)
    callback_inputs: Sequence[str] = ("latents", "image")

    def __post_init__(self) -> None:
        if self.type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if unknown := sorted(set(self.callback_inputs) - set(CALLBACK_INPUTS)):
            raise ValueError(f"callback_on_step_end_tensor_inputs={unknown} are not in {', '.join(CALLBACK_INPUTS)}.")

    def call_back(self, pipe: Any, index: int, t: Tensor, x: Tensor, step: Any) -> Tensor:
        """Show a step to the callback, if any, and return x [B, C, H, W] or what replaces it."""
        if self.callback is None:
            return x
        tensors = {"latents": x, "image": x, "pred_original_sample": getattr(step, "pred_original_sample", None)}
        returned = self.callback(pipe, index, t, {name: tensors[name] for name in self.callback_inputs}) or {}
        return next((returned[name] for name in ("latents", "image") if returned.get(name, x) is not x), x)


def guide(unconditional: Tensor, conditional: Tensor, channels: int, scale: float, rescale: float = 0.0) -> Tensor:
    """u + scale (c - u) (Ho & Salimans 2022, eq. 6) for network outputs [B, C or 2C, H, W] and images of C channels.

    The same for noise, x_0 and v, which are affine in one another at a given x_t. A variance half stays the conditional one's.
    `rescale` moves each image's standard deviation towards that of the conditional prediction (Lin et al. 2023, eq. 15, 16).
    """
    u, c = unconditional[:, :channels], conditional[:, :channels]
    guided = u + scale * (c - u)
    if rescale:
        dims = tuple(range(1, guided.ndim))
        shrink = c.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        guided = guided * (rescale * shrink + (1 - rescale))
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def describe_conditions(unet: Any, *, class_names: Sequence[str] | None = None, condition_dropout: float | None = None) -> None:
    """Record what the UNet's conditions mean in its config, where it survives stock classes.

    With N `class_names`, embedding N of the UNet means "no class". `condition_dropout` is the fraction of training images
    whose condition was left out; at 0 the unconditional half of guidance was never trained.
    """
    settings = {"class_names": list(class_names) if class_names else None, "condition_dropout": condition_dropout}
    unet.register_to_config(**{OWN_KEY: {name: value for name, value in settings.items() if value is not None}})


def network_outputs(unet: Any, scheduler: Any, x: Tensor, t: Tensor, *conditions: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the network says of x [B, C, H, W] under each of the conditions, in one batch and the precision of the chain."""
    model_input = scheduler.scale_model_input(x, t).to(unet.dtype)
    kwargs = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
    return unet(torch.cat([model_input] * len(conditions)), t, **kwargs).sample.to(x.dtype).chunk(len(conditions))


def usable_channels(scheduler: Any, output: Tensor, channels: int) -> Tensor:
    """The output without a variance half [B, C, ...] that the scheduler would not use, or cut off three channels only."""
    is_ddpm = isinstance(scheduler, DDPMScheduler) or hasattr(scheduler, "p_mean_variance")
    learned = is_ddpm and scheduler.config.variance_type in LEARNED_VARIANCE_TYPES
    return output[:, :channels] if output.shape[1] == 2 * channels and not learned else output


def predict(unet: Any, scheduler: Any, x: Tensor, t: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
    """The network's output, guided by `scale`."""
    null_kwargs, channels = conditioning.null_kwargs, x.shape[1]
    if scale != 1 and null_kwargs is not None:
        unconditional, conditional = network_outputs(unet, scheduler, x, t, null_kwargs, conditioning.kwargs)
        output = guide(unconditional, conditional, channels, scale, conditioning.guidance.rescale)
    else:
        (output,) = network_outputs(unet, scheduler, x, t, conditioning.kwargs)
    return usable_channels(scheduler, output, channels)


def to_images(x: Tensor, output_type: str) -> Any:
    """x_0 [B, C, H, W] in [-1, 1] as one of OUTPUT_TYPES; "latent" is x_0 itself."""
    if output_type == "latent":
        return x
    x = (x / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    array = x.cpu().permute(0, 2, 3, 1).float().numpy()  # [B, C, H, W] -> [B, H, W, C]
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array


class AlphaDDPMSampling(AlphaDDPMEditing):
    """Mixed into a `DiffusionPipeline` with a `unet` and a `scheduler`."""

    _callback_tensor_inputs: ClassVar = list(CALLBACK_INPUTS)
    _guidance_scale, _num_timesteps, _interrupt = 1.0, 0, False

    @property
    def guidance_scale(self) -> float:
        """That of the call. A callback may change the guidance of the steps to come by `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps that the call goes through; with an image, the last `strength` of the chain's."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the call, by `_interrupt = True`: its images are as far as they had come."""
        return self._interrupt

    @staticmethod
    def _own_scheduler(scheduler: Any) -> Any:
        return AlphaDDPMScheduler.from_config(scheduler.config) if isinstance(scheduler, DDPMScheduler) else scheduler

    def _sample(
        self, batch: Batch, conditioning: Conditioning, edit: Edit, output: Output, generator: Generators, steps: Steps
    ) -> AlphaDDPMOutput | tuple:
        """The reverse chain, from noise or from a noised image, to images."""
        scheduler, guidance = self.scheduler, conditioning.guidance
        timesteps = set_timesteps(scheduler, steps)
        following = [*timesteps[1:], None]  # None is clean data
        start = start_chain(scheduler, edit, batch, self._start_noise(edit.latents, batch.size, generator), generator)
        x, frames = start.x, [start.x.cpu()] if output.trajectory else []
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance.scale, len(timesteps) - start.first, False

        for index, t in enumerate(self.progress_bar(timesteps[start.first :])):
            at = start.first + index
            for repeat in range(1 if following[at] is None else start.passes):
                if repeat:  # RePaint goes back to t, so that painted and kept pixels come to fit each other
                    x = scheduler.forward_step(x, t, standard_normal(x.shape, x, generator))
                scale = self.guidance_scale if guidance.covers(at / len(timesteps)) else 1.0
                model_output = predict(self.unet, scheduler, x, t, conditioning, scale)
                step = reverse_step(scheduler, model_output, t, x, generator)
                x = keep(scheduler, step.prev_sample, start, following[at], generator)
            x = output.call_back(self, index, t, x, step)
            if output.trajectory:
                frames.append(x.cpu())
            if self.interrupt:
                break

        images = to_images(x, output.type)
        self.maybe_free_model_hooks()
        result = AlphaDDPMOutput(images=images, trajectory=torch.stack(frames) if frames else None)
        return result if output.as_dict else result.to_tuple()

    def _start_noise(self, latents: Tensor | None, size: int, generator: Generators) -> Tensor:
        """`latents`, or z ~ N(0, I), [B, C, H, W]. Raises ValueError for another number of them or of generators."""
        check_generators(generator, size)
        if latents is None:
            return self._noise(self._shape(size), generator)
        if len(latents) != size:
            raise ValueError(f"{len(latents)} latents for {size} images; give one per image.")
        return latents

    @property
    def _own_settings(self) -> dict[str, Any]:
        return self.unet.config.get(OWN_KEY) or {}

    def _warn_if_never_unconditional(self) -> None:
        if self._own_settings.get("condition_dropout") == 0:
            problem = "but this one was trained without condition dropout: expect poor images"
            fix = "Use guidance_scale=1, or train with --condition_dropout 0.1."
            warnings.warn(f"guidance needs the model without its condition, {problem}. {fix}", stacklevel=4)
