"""The reverse loop that all pipelines share, with classifier-free guidance.

A pipeline turns its condition into arguments of the UNet; everything else is here and in `editing_alpha_ddpm.py`. The
functions take the UNet, the scheduler and tensors, and no pipeline. Travels inside model repositories.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.guiders import BaseGuidance
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .editing_alpha_ddpm import AlphaDDPMEditing, Batch, Chain, Edit, start_chain
from .encoding_alpha_ddpm import (
    ImageCondition,
    VectorCondition,
    WithConditionImage,
    check_conditions,
    image_channels,
    numbers_in_own_precision,
    own_settings,
    value_range,
)
from .pictures_alpha_ddpm import PIL_MODES, tensor_to_pictures
from .ranges_alpha_ddpm import ValueRange
from .samplers_alpha_ddpm import Steps, advice, checked_generators, reserved, reverse_step, set_timesteps, takes_variance
from .tables_alpha_ddpm import OWN_KEY, Generators, plain, warn

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
CALLBACK_INPUTS = ("latents", "pred_original_sample", "image")  # the last is what `latents` was called once


@dataclass
class AlphaDDPMOutput(ImagePipelineOutput):
    """`images` as asked for and, with `output_trajectory=True`, what S steps went through, in about [-1, 1] on the CPU."""

    trajectory: Tensor | None = None  # x_T first and x_0 last, [S + 1, B, C, H, W]
    predictions: Tensor | None = None  # the x_0 predicted at each step, [S, B, C, H, W]; None if the sampler does not give it


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022). Raises ValueError for values outside their ranges."""

    scale: float = 1.0  # 1 is none
    rescale: float = 0.0  # 0 to 1: how much of the contrast that guidance adds is undone
    interval: Sequence[float] = (0.0, 1.0)  # start and end as fractions of the chain, from noise to image

    def __post_init__(self) -> None:
        vars(self).update({name: plain(value) for name, value in vars(self).items()})
        if not (_is_number(self.scale) and math.isfinite(self.scale)):
            raise ValueError(f"guidance_scale={self.scale!r} must be a finite number; 1 turns guidance off.")
        if not (_is_number(self.rescale) and 0 <= self.rescale <= 1):
            raise ValueError(f"guidance_rescale={self.rescale!r} must be from 0 (none) to 1.")
        pair = isinstance(self.interval, list) and len(self.interval) == 2 and all(map(_is_number, self.interval))
        if not (pair and 0 <= self.interval[0] <= self.interval[1] <= 1):
            allowed = "0 <= start <= end <= 1, fractions of the chain from noise (0) to image (1)"
            raise ValueError(f"guidance_interval={self.interval!r} must be a start and an end with {allowed}.")

    @property
    def in_use(self) -> bool:
        return self.scale != 1 and self.interval[0] < self.interval[1]

    def covers(self, share: float) -> bool:
        """Whether the step that begins at fraction `share` of the chain lies in the interval."""
        return self.interval[0] <= share < self.interval[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    denormalize: bool = False  # in the data's own units rather than [0, 1]

    def __post_init__(self) -> None:
        if self.denormalize and self.type not in ("np", "pt"):
            raise ValueError(f"denormalize=True gives numbers; use output_type='np' or 'pt', not {self.type!r}.")
        if self.type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(
                f"callback_on_step_end={self.callback!r} must be a function (pipe, index, timestep, tensors) -> dict."
            )
        if unknown := [name for name in self._tensor_inputs if name not in CALLBACK_INPUTS]:
            raise ValueError(f"callback_on_step_end_tensor_inputs={unknown} are not in {', '.join(CALLBACK_INPUTS)}.")

    @property
    def _tensor_inputs(self) -> list[str]:
        names = getattr(self.callback, "tensor_inputs", self.callback_inputs)  # diffusers' PipelineCallbacks bring their own
        return [names] if isinstance(names, str) else list(names)

    def call_back(self, pipe: Any, index: int, t: Tensor, x: Tensor, step: Any) -> Tensor:
        """Show a step to the callback, if any, and return x [B, C, H, W] or what replaces it."""
        if self.callback is None:
            return x
        tensors = {"latents": x, "image": x, "pred_original_sample": getattr(step, "pred_original_sample", None)}
        returned = self.callback(pipe, index, t, {name: tensors[name] for name in self._tensor_inputs}) or {}
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


def describe_conditions(
    unet: Any,
    *,
    class_names: Sequence[str] | None = None,
    condition_dropout: float | None = None,
    condition_image: ImageCondition | None = None,
    condition_vector: VectorCondition | None = None,
    value_range: ValueRange | None = None,
) -> None:
    """Record what the UNet's conditions and values mean in its config, where it survives stock classes.

    With N `class_names`, embedding N of the UNet means "no class". `condition_dropout` is the fraction of training images
    whose condition was left out; at 0 the unconditional half of guidance was never trained. `value_range` is what -1 and 1
    mean in the data's units, by default 0 and 255 of 8 bits. Raises ValueError if this UNet cannot have such conditions; its
    config then stays as it was.
    """
    described = {"condition_image": condition_image, "condition_vector": condition_vector}
    if value_range != ValueRange():
        described["value_range"] = value_range
    settings = {"class_names": list(class_names) if class_names else None, "condition_dropout": condition_dropout}
    settings |= {name: value and value.to_json() for name, value in described.items()}
    before = unet.config
    unet.register_to_config(**{OWN_KEY: {name: value for name, value in settings.items() if value is not None}})
    try:
        check_unet(unet)
    except ValueError:
        unet._internal_dict = before  # diffusers' name of the config
        raise


def network_outputs(unet: Any, scheduler: Any, x: Tensor, t: Tensor, *conditions: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the network says of x [B, C, H, W] under each of the conditions, in one batch and the precision of the chain."""
    model_input = scheduler.scale_model_input(x, t).to(unet.dtype)
    kwargs = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
    network = WithConditionImage(unet) if "condition_image" in kwargs else unet
    with numbers_in_own_precision(unet):
        output = network(torch.cat([model_input] * len(conditions)), t, **kwargs).sample
    return output.to(x.dtype).chunk(len(conditions))


def usable_channels(scheduler: Any, output: Tensor, channels: int) -> Tensor:
    """The output without a variance half [B, C, ...] that the scheduler would not use, or cut off three channels only."""
    return output[:, :channels] if output.shape[1] == 2 * channels and not takes_variance(scheduler) else output


def predict(unet: Any, scheduler: Any, x: Tensor, t: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
    """The network's output, guided by `scale`."""
    null_kwargs, channels = conditioning.null_kwargs, x.shape[1]
    if scale != 1 and null_kwargs is not None:
        unconditional, conditional = network_outputs(unet, scheduler, x, t, null_kwargs, conditioning.kwargs)
        output = guide(unconditional, conditional, channels, scale, conditioning.guidance.rescale)
    else:
        (output,) = network_outputs(unet, scheduler, x, t, conditioning.kwargs)
    return usable_channels(scheduler, output, channels)


def guided_output(unet: Any, scheduler: Any, x: Tensor, t: Tensor, guider: BaseGuidance, conditions: dict) -> Tensor:
    """The network's output, guided by one of diffusers' guiders. `conditions` are pairs, the unconditional half last."""
    batches, channels = guider.prepare_inputs(conditions), x.shape[1]
    kwargs = [{name: batch[name] for name in conditions} for batch in batches]
    if type(guider).prepare_models is BaseGuidance.prepare_models:  # in one batch, the unconditional half first as in `predict`
        outputs = network_outputs(unet, scheduler, x, t, *kwargs[::-1])[::-1]
    else:  # the guider changes the network from one to the next
        outputs = []
        for condition in kwargs:
            guider.prepare_models(unet)
            outputs += network_outputs(unet, scheduler, x, t, condition)
            guider.cleanup_models(unet)
    for batch, output in zip(batches, outputs, strict=True):
        batch.noise_pred = output[:, :channels]
    output = torch.cat([guider(batches)[0], outputs[0][:, channels:]], dim=1)  # a variance half is not guided
    return usable_channels(scheduler, output, channels)


def to_images(x: Tensor, output_type: str, own: ValueRange | None = None) -> Any:
    """x_0 [B, C, H, W] in [-1, 1] as one of OUTPUT_TYPES, in [0, 1] or in the units of `own`; "latent" is x_0 itself."""
    if output_type == "latent":
        return x
    if output_type == "pil":
        return tensor_to_pictures(x)
    x = own.denormalize(x) if own else (x / 2 + 0.5).clamp(0, 1)
    return x if output_type == "pt" else x.cpu().permute(0, 2, 3, 1).float().numpy()  # [B, H, W, C]


def check_finite(chain: Chain, unet: Any) -> None:
    """Raise FloatingPointError if a step's network output or x was not finite."""
    wrong = (~torch.stack(chain.finite)).nonzero() if chain.finite else []  # [steps, 2]
    if not len(wrong):
        return
    index, by_sampler = wrong[0].tolist()
    kind, (_, t) = type(chain.scheduler).__name__, chain.steps[index]
    if by_sampler:
        cause = f"the sampler's own step; use another num_inference_steps, or {advice(kind)}"
    elif not all(weight.isfinite().all() for weight in unet.parameters()):
        cause = "the UNet, whose weights are not finite; load another checkpoint"
    elif unet.dtype == torch.float16:
        cause = "the UNet, in float16; use bfloat16 or float32, as in pipe.to(dtype=torch.float32)"
    else:
        cause = f"the UNet's output; use a guidance_scale nearer 1 or more num_inference_steps, or {advice(kind)}"
    where = f"step {index + 1} of {len(chain.steps)} (timestep {t.item():g})"
    raise FloatingPointError(f"{kind} produced NaN or infinite values at {where}. They came from {cause}.")


def check_unet(unet: Any) -> None:
    """Raise ValueError if a UNet is wrapped, or its config describes conditions that it cannot have."""
    if isinstance(unet, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        raise ValueError(f"the unet is wrapped in {type(unet).__name__}, which a pipeline cannot use; give unet.module.")
    check_conditions(unet)
    settings, embeddings = own_settings(unet), unet.config.get("num_class_embeds") or 0
    names, dropout = settings.get("class_names"), settings.get("condition_dropout")
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"class_names={names!r} in the UNet's config must be a list of strings, one per class.")
    if len(names or []) > embeddings:
        raise ValueError(
            f"the UNet's config has {len(names)} class_names for num_class_embeds={embeddings}; give one per class."
        )
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout <= 1):
        raise ValueError(f"condition_dropout={dropout!r} in the UNet's config must be from 0 to 1.")


def check_shown(unet: Any, output: Output) -> None:
    """Raise ValueError if PIL has no pictures of the model's number of channels, and they are asked for."""
    if output.type == "pil" and (channels := image_channels(unet)) not in PIL_MODES:
        raise ValueError(f"output_type='pil' cannot show the {channels} channels of this model; use 'pt' or 'np'.")


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

    @property
    def value_range(self) -> ValueRange:
        """What -1 and 1 of the model, or 0 and 1 of its pictures, mean in the units of its data."""
        return value_range(self.unet)

    def _sample(
        self, batch: Batch, conditioning: Conditioning, edit: Edit, output: Output, generator: Generators, steps: Steps
    ) -> AlphaDDPMOutput | tuple:
        """The reverse chain, from noise or from a noised image, to images."""
        check_shown(self.unet, output)
        generator = checked_generators(generator, batch.size)
        with reserved(self.scheduler):
            set_timesteps(self.scheduler, steps, from_noise=edit.image is None)
            noise = self._start_noise(edit.latents, batch.size, generator)
            chain = start_chain(self.scheduler, edit, batch, noise, generator)
            x, *watched = self._denoise(chain, conditioning, output)
        self.maybe_free_model_hooks()
        images = to_images(x, output.type, self.value_range if output.denormalize else None)
        result = AlphaDDPMOutput(images, *(torch.stack(each) if each else None for each in watched))
        return result if output.as_dict else result.to_tuple()

    def _denoise(self, chain: Chain, conditioning: Conditioning, output: Output) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """x_0 [B, C, H, W] and, if asked for, all x_t and the x_0 predicted on the way."""
        scheduler, guidance, total = self.scheduler, conditioning.guidance, len(self.scheduler.timesteps)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance.scale, len(chain.steps), False
        x, frames, predictions = chain.x, [chain.x.cpu()] if output.trajectory else [], []

        for index, t in self.progress_bar(chain.steps):
            for repeat in chain.repeats(index):
                x = chain.again(repeat, x, t)
                scale = self.guidance_scale if guidance.covers(index / total) else 1.0
                model_output = predict(self.unet, scheduler, x, t, conditioning, scale)
                step = reverse_step(scheduler, model_output, t, x, chain.generator)
                x = chain.keep(step.prev_sample, index)
            x = output.call_back(self, index - chain.first, t, x, step)
            chain.watch(model_output, x)
            if output.trajectory:
                frames.append(x.cpu())
                predicted = getattr(step, "pred_original_sample", None)
                predictions += [] if predicted is None else [predicted.cpu()]
            if self.interrupt:
                break
        check_finite(chain, self.unet)
        return x, frames, predictions

    def _start_noise(self, latents: Tensor | None, size: int, generator: Generators) -> Tensor:
        """`latents`, or z ~ N(0, I), [B, C, H, W], in float32 or better: only the network computes in half precision. Raises
        ValueError for another number of them.
        """
        if latents is None:
            return randn_tensor(self._shape(size), generator=generator, device=self._execution_device, dtype=self._chain_dtype)
        if len(latents) != size:
            raise ValueError(f"{len(latents)} latents for {size} images; give one per image.")
        return latents

    def _warn_if_never_unconditional(self) -> None:
        if own_settings(self.unet).get("condition_dropout") == 0:
            problem = "but this one was trained without condition dropout: expect poor images"
            fix = "Use guidance_scale=1, or train with --condition_dropout 0.1."
            warn(f"guidance needs the model without its condition, {problem}. {fix}", stacklevel=4)
