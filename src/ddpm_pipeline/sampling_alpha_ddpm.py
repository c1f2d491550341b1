"""What the pipelines share: the reverse loop with guidance, images to start from or to keep, trajectories, and saving.

A pipeline says what its condition is, as arguments of the UNet; everything else is here, once.
This file is also shipped inside model repositories, beside `pipeline.py`. It imports nothing but diffusers, numpy, PIL, torch
and its sibling, the scheduler, and defines no pipeline class, as the Hub's loader takes a file for one pipeline.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .tables_alpha_ddpm import LEARNED_VARIANCE_TYPES, OWN_KEY, Generators

OUTPUT_TYPES = ("pil", "np", "pt")
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
DEFAULT_STRENGTH = 0.5  # of an image that has no mask

Images = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image]


@dataclass
class AlphaDDPMOutput(ImagePipelineOutput):
    """`images` as asked for and, with `output_trajectory=True`, x_T first and x_0 last: [S + 1, B, C, H, W], on the CPU."""

    trajectory: torch.Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """What images are drawn for: arguments of the UNet, each a tensor [B, ...], and those of the unconditional half."""

    arguments: dict[str, torch.Tensor]
    null_arguments: dict[str, torch.Tensor] | None = None  # None where there is nothing to guide away from


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho & Salimans 2022): how much, how rescaled, and over which share of the chain."""

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise ValueError(f"guidance_scale={self.scale!r} must be a finite number; 1 is no guidance.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale!r} must be from 0 (none) to 1.")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ValueError(
                f"guidance_interval={self.interval!r} must be a start and an end with 0 <= start <= end <= 1, shares of the "
                "chain from noise (0) to image (1)."
            )

    @property
    def in_use(self) -> bool:
        return self.scale != 1 and self.interval[0] < self.interval[1]

    def at(self, share: float) -> bool:
        """Whether the step that begins at this share of the chain is guided."""
        return self.scale != 1 and self.interval[0] <= share < self.interval[1]


def guide(
    unconditional: torch.Tensor, conditional: torch.Tensor, channels: int, scale: float, rescale: float = 0.0
) -> torch.Tensor:
    """u + scale (c - u) (Ho & Salimans 2022, eq. 6), of network outputs [B, C or 2C, H, W] for images of C channels.

    Noise, x_0 and v are affine in one another at a given x_t, so this is the same guidance for each of them. The variance
    half, if any, is the conditional one's. `rescale` moves the deviation over each image towards that of the
    conditional prediction (Lin et al. 2023, eq. 15 and 16).
    """
    u, c = unconditional[:, :channels], conditional[:, :channels]
    guided = u + scale * (c - u)
    if rescale:
        dims = tuple(range(1, guided.ndim))
        shrink = c.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        guided = guided * (rescale * shrink + (1 - rescale))
    return torch.cat([guided, conditional[:, channels:]], dim=1)


def describe_conditions(
    unet: Any, *, class_names: Sequence[str] | None = None, condition_dropout: float | None = None
) -> None:
    """Put into the UNet's config what its conditions mean, so that it is saved with it and survives stock classes.

    With `class_names`, N of them, embedding N of the UNet is "no class". `condition_dropout` is the share of training
    images whose condition was left out; without any the unconditional half of guidance was never trained.
    """
    settings = {"class_names": list(class_names) if class_names else None, "condition_dropout": condition_dropout}
    unet.register_to_config(**{OWN_KEY: {name: value for name, value in settings.items() if value is not None}})


class AlphaDDPMSampling:
    """Mixed into a `DiffusionPipeline` with a `unet` and a `scheduler`."""

    _callback_tensor_inputs: ClassVar = ["image", "pred_original_sample"]

    @staticmethod
    def _own_scheduler(scheduler: Any) -> Any:
        return AlphaDDPMScheduler.from_config(scheduler.config) if isinstance(scheduler, DDPMScheduler) else scheduler

    # ---- drawing --------------------------------------------------------------------------------------

    def _draw(
        self,
        batch_size: int,
        condition: Condition,
        *,
        generator: Generators,
        num_inference_steps: int | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        guidance: Guidance,
        image: Images | None,
        strength: float | None,
        mask_image: Images | None,
        num_resamples: int,
        output_trajectory: bool,
    ) -> AlphaDDPMOutput | tuple:
        """The reverse chain from noise, or from a noised image, to images."""
        if num_inference_steps is None:
            num_inference_steps = self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps
        first = self._first_step(strength, image is not None, mask_image is not None, len(timesteps))
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        self._check_resampling(num_resamples, mask_image)

        original = None if image is None else self._images_in(image, batch_size)
        kept = None if mask_image is None else self._kept_pixels(original, mask_image, batch_size)
        if first == len(timesteps):
            x = original
        elif original is None or (kept is not None and first == 0):
            x = self._noise(self._shape(batch_size), generator) * self.scheduler.init_noise_sigma
        else:
            x = self._noised(original, timesteps[first], generator)
        if kept is not None and first < len(timesteps):
            x = self._with_kept_pixels(x, kept, timesteps[first], generator)

        trajectory = [x.cpu()] if output_trajectory else None
        step_options = self._step_options(generator)
        for index, t in enumerate(self.progress_bar(timesteps[first:]), start=first):
            following = timesteps[index + 1] if index + 1 < len(timesteps) else None  # None is clean data
            for repeat in range(num_resamples if following is not None else 1):
                if repeat:  # RePaint: back to t, so that what is painted and what is kept fit each other
                    x = self.scheduler.forward_step(x, t, self._noise(x.shape, generator))
                model_output = self._predict(x, t, condition, guidance, index / len(timesteps))
                step = self.scheduler.step(model_output, t, x, **step_options)
                x = step.prev_sample
                if kept is not None:
                    x = self._with_kept_pixels(x, kept, following, generator)
            if callback_on_step_end is not None:
                tensors = {"image": x, "pred_original_sample": getattr(step, "pred_original_sample", None)}
                chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                x = (callback_on_step_end(self, index, t, chosen) or {}).get("image", x)
            if trajectory is not None:
                trajectory.append(x.cpu())

        images = self._images_out(x, output_type)
        self.maybe_free_model_hooks()
        output = AlphaDDPMOutput(images=images, trajectory=None if trajectory is None else torch.stack(trajectory))
        return output if return_dict else output.to_tuple()

    def _predict(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        condition: Condition | None = None,
        guidance: Guidance | None = None,
        share: float = 0.0,
    ) -> torch.Tensor:
        """The network's output in the precision of the chain, with the channels that the scheduler can use."""
        condition, guidance = condition or Condition({}), guidance or Guidance()
        model_input = self.scheduler.scale_model_input(x, t).to(self.unet.dtype)
        if condition.null_arguments is not None and guidance.at(share):
            both = {name: torch.cat([condition.null_arguments[name], c]) for name, c in condition.arguments.items()}
            output = self.unet(torch.cat([model_input] * 2), t, **both).sample.to(x.dtype)
            unconditional, conditional = output.chunk(2)  # [2B, ...] -> 2 x [B, ...]
            output = guide(unconditional, conditional, x.shape[1], guidance.scale, guidance.rescale)
        else:
            output = self.unet(model_input, t, **condition.arguments).sample.to(x.dtype)
        if output.shape[1] == 2 * x.shape[1] and not self._scheduler_learns_variance:
            output = output.chunk(2, dim=1)[0]  # it has a variance of its own and wants the prediction only
        return output

    @property
    def _scheduler_learns_variance(self) -> bool:
        """Whether the scheduler takes a variance half as DDPM means it. Others keep the key of a DDPM config unread, or,
        like DPM-Solver, cut the half off themselves, for images of three channels only.
        """
        is_ddpm = isinstance(self.scheduler, DDPMScheduler) or hasattr(self.scheduler, "p_mean_variance")
        return is_ddpm and self.scheduler.config.variance_type in LEARNED_VARIANCE_TYPES

    def _noise(self, shape: Sequence[int], generator: Generators) -> torch.Tensor:
        """z ~ N(0, I) in float32: only the network computes in half precision, never the chain."""
        return randn_tensor(tuple(shape), generator=generator, device=self._execution_device, dtype=self._chain_dtype)

    def _noised(self, original: torch.Tensor, t: torch.Tensor, generator: Generators) -> torch.Tensor:
        """x_t from x_0 [B, C, H, W]."""
        return self.scheduler.add_noise(original, self._noise(original.shape, generator), t.repeat(len(original)))

    def _shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, self.unet.config.in_channels, height, width

    @property
    def _chain_dtype(self) -> torch.dtype:
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    def _step_options(self, generator: Generators) -> dict[str, Any]:
        """Some of diffusers' schedulers draw no noise and take no generator."""
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if accepts_generator else {}

    # ---- images to start from, and pixels to keep -----------------------------------------------------

    def _first_step(self, strength: float | None, has_image: bool, has_mask: bool, num_steps: int) -> int:
        """Where in the chain to begin: the last `strength` of its steps are taken."""
        if not has_image:
            if strength is not None or has_mask:
                raise ValueError(f"{'mask_image' if has_mask else 'strength'} needs an image; give image= as well.")
            return 0
        if strength is None:
            strength = 1.0 if has_mask else DEFAULT_STRENGTH
        if not 0 <= strength <= 1:
            raise ValueError(
                f"strength={strength!r} must be from 0 (the image as it is) to 1 (nothing but noise is left)."
            )
        return num_steps - math.floor(num_steps * strength + 1e-9)  # 0.29 * 100 is 28.999...

    def _check_resampling(self, num_resamples: int, mask_image: Images | None) -> None:
        if isinstance(num_resamples, bool) or not isinstance(num_resamples, int) or num_resamples < 1:
            raise ValueError(f"num_resamples={num_resamples!r} must be an integer of at least 1 (no resampling).")
        if num_resamples > 1 and mask_image is None:
            raise ValueError("num_resamples is of use with a mask_image only; leave it at 1.")
        if num_resamples > 1 and not hasattr(self.scheduler, "forward_step"):
            raise ValueError(
                f"num_resamples={num_resamples} needs a scheduler with forward_step, as AlphaDDPMScheduler has; "
                f"{type(self.scheduler).__name__} has none."
            )

    def _images_in(self, images: Images, batch_size: int | None = None) -> torch.Tensor:
        """[B, C, H, W] in [-1, 1] on the device; one image serves the whole batch."""
        _, channels, height, width = self._shape(1)
        x = _pixels(images, "image", channels)
        if x.shape[1:] != (channels, height, width):
            raise ValueError(
                f"image has shape {tuple(x.shape[1:])}; this model draws {(channels, height, width)} as (channels, height, "
                "width): resize or crop it first."
            )
        x = (x * 2 - 1).to(self._execution_device, self._chain_dtype)
        return x if batch_size is None else _expanded(x, batch_size, "images")

    def _kept_pixels(self, original: torch.Tensor, mask: Images, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_0, where it is kept: bool [B, 1, H, W]); black, or 0, is kept and white, or 1, is painted."""
        painted = _pixels(mask, "mask_image", 1)
        if painted.shape[1:] != (1, *original.shape[2:]):
            raise ValueError(
                f"mask_image has shape {tuple(painted.shape[1:])}; for this image it is {(1, *original.shape[2:])}."
            )
        return original, _expanded(painted < 0.5, batch_size, "masks").to(original.device)

    def _with_kept_pixels(
        self, x: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor], t: torch.Tensor | None, generator: Generators
    ) -> torch.Tensor:
        """x_t whose kept pixels are a draw of q(x_t | x_0), or x_0 itself where t is None (Lugmayr et al. 2022, eq. 8)."""
        original, is_kept = kept
        return torch.where(is_kept, original if t is None else self._noised(original, t, generator), x)

    @torch.no_grad()
    def interpolate(
        self,
        a: Images,
        b: Images,
        at: int,
        weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        **options: Any,
    ) -> AlphaDDPMOutput | tuple:
        """Mix two images in latent noise and denoise the mixtures (Ho et al. 2020, figure 8).

        Both are noised to timestep `at` by the same noise, mixed as (1 - weight) a + weight b, and taken back by the reverse
        process, whose noise is the same for every weight too. The higher `at`, the freer the result; 0 changes hardly
        anything.

        Args:
            a, b: one image each.
            at: timestep 0..T-1; in a shorter chain, its first timestep at or below `at`.
            weights: of `b`, one an image that comes back.
            generator: one; the noise is drawn from it once.
            num_inference_steps: length of the whole chain, of which the part from `at` on is run.
            options: anything else that a call takes, such as the condition.
        """
        ends = [self._images_in(image) for image in (a, b)]
        if any(len(end) != 1 for end in ends):
            raise ValueError(f"interpolate takes one image a and one image b, not {len(ends[0])} and {len(ends[1])}.")
        if not weights or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights={weights!r} must be numbers from 0 (image a) to 1 (image b), at least one.")
        total = self.scheduler.config.num_train_timesteps
        if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < total:
            raise ValueError(f"at={at!r} must be a timestep from 0 to {total - 1}.")
        self.scheduler.set_timesteps(num_inference_steps or total)
        timesteps = self.scheduler.timesteps
        remaining = int((timesteps <= at).sum())
        if not remaining:
            raise ValueError(f"at={at} is below the last timestep of this chain, {timesteps[-1]}; take more steps.")
        share = torch.tensor(list(weights), device=ends[0].device, dtype=ends[0].dtype).view(-1, 1, 1, 1)
        # with shared noise, mixing x_t and noising the mixture are the same
        mixtures = ((1 - share) * ends[0] + share * ends[1]) / 2 + 0.5
        seed = torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu").item()
        return self(
            **self._batch_option(len(mixtures), options),
            image=mixtures.clamp(0, 1),
            strength=remaining / len(timesteps),
            generator=[torch.Generator(self._execution_device).manual_seed(seed) for _ in mixtures],
            num_inference_steps=num_inference_steps,
            **options,
        )

    @torch.no_grad()
    def forward_trajectory(self, image: Images, timesteps: Sequence[int], generator: Generators = None) -> torch.Tensor:
        """x_t of the forward process at ascending `timesteps`, each from the one before (report eq. 4.3, figure 3.4).

        Timestep -1 is the image itself. Gives [len(timesteps), B, C, H, W], about [-1, 1] where little noise was added.
        """
        x = self._images_in(image)
        chain = [int(t) for t in timesteps]
        if not chain or sorted(set(chain)) != chain or chain[0] < -1:
            raise ValueError(f"timesteps={list(timesteps)} must be ascending integers, from -1 (the image) on.")
        _check_generators(generator, len(x))
        scheduler = AlphaDDPMScheduler.from_config(self.scheduler.config)  # a chain of its own; the pipeline's stays
        trajectory = [x] if chain[0] == -1 else []
        noisy = [t for t in chain if t >= 0]
        if noisy:
            scheduler.set_timesteps(timesteps=noisy[::-1])
        for t in noisy:
            x = scheduler.forward_step(x, t, self._noise(x.shape, generator))
            trajectory.append(x)
        return torch.stack(trajectory)

    # ---- input and output -----------------------------------------------------------------------------

    def _check_call(self, batch_size: int, generator: Any, output_type: str, callback_inputs: Any) -> None:
        _check_generators(generator, batch_size)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not one of {', '.join(OUTPUT_TYPES)}.")
        if unknown := sorted(set(callback_inputs) - set(self._callback_tensor_inputs)):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown} are not among {', '.join(self._callback_tensor_inputs)}."
            )

    def _warn_if_never_unconditional(self) -> None:
        if self._own_settings.get("condition_dropout") == 0:
            warnings.warn(
                "guidance needs the model without its condition, and this one was trained without condition dropout: "
                "expect poor images. Use guidance_scale=1, or train with --condition_dropout 0.1.",
                stacklevel=4,
            )

    @property
    def _own_settings(self) -> dict[str, Any]:
        return self.unet.config.get(OWN_KEY) or {}

    def _images_out(self, x: torch.Tensor, output_type: str) -> Any:
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        array = x.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array


def _check_generators(generator: Any, count: int) -> None:
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} images; give one, or a list of one an image.")


def _expanded(batch: torch.Tensor, batch_size: int, what: str) -> torch.Tensor:
    if len(batch) not in (1, batch_size):
        raise ValueError(f"{len(batch)} {what} for a batch of {batch_size}; give 1 or {batch_size}.")
    return batch.expand(batch_size, *batch.shape[1:])


def _pixels(images: Images, what: str, channels: int) -> torch.Tensor:
    """[N, C, H, W] in [0, 1] of PIL images, arrays [N, H, W, C] or [H, W(, C)], or tensors [N, C, H, W] or [C, H, W].

    Whole numbers are 0..255, truth values 0 and 1, floats [0, 1]: what the pipelines give out they take in.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, (list, tuple)):
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"{what} as a list must hold PIL images; give arrays or tensors as one batch.")
        if len({image.size for image in images}) > 1:
            raise ValueError(f"{what}: the images have different sizes, {sorted({image.size for image in images})}.")
        images = np.stack([np.asarray(image.convert(PIL_MODES[channels])) for image in images])
        images = images[..., None] if channels == 1 else images
    if isinstance(images, np.ndarray):
        images = images[..., None] if images.ndim == 2 else images
        images = images[None] if images.ndim == 3 else images
        if images.ndim != 4:
            raise ValueError(f"{what} has shape {images.shape}; an array is [N, H, W, C], [H, W, C] or [H, W].")
        images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # [N, H, W, C] -> [N, C, H, W]
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"{what} is a {type(images).__name__}; give PIL images, an array or a tensor.")
    while images.ndim in (2, 3):
        images = images[None]
    if images.ndim != 4:
        raise ValueError(f"{what} has shape {tuple(images.shape)}; a tensor is [N, C, H, W], [C, H, W] or [H, W].")
    if not images.is_floating_point():
        return images.float() / (1 if images.dtype == torch.bool else 255)
    if not (images.min() >= 0 and images.max() <= 1):  # also where there is a NaN
        raise ValueError(
            f"{what} holds values from {images.min():.3g} to {images.max():.3g}; floats must be in [0, 1], as output_type='pt' "
            "and 'np' give them."
        )
    return images
