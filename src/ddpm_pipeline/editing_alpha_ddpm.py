"""Where a reverse chain starts: noise, a noised image, a mask; and mixtures of images and forward trajectories.

The functions take the scheduler and tensors, and no pipeline. Travels inside model repositories. Defines no pipeline class,
because the Hub's loader wants one per repository.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .encoding_alpha_ddpm import image_channels, value_range
from .pictures_alpha_ddpm import Images, read_masks, read_values
from .ranges_alpha_ddpm import ValueRange
from .samplers_alpha_ddpm import (
    Steps,
    check_start,
    checked_generators,
    next_timesteps,
    order_of,
    reserved,
    seed_own_noise,
    set_timesteps,
)
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .tables_alpha_ddpm import Generators, check_integer, plain, standard_normal


@dataclass(frozen=True)
class Edit:
    """What a call starts from, with as many rows each as were given. Raises ValueError if they do not fit one another."""

    image: Tensor | None = None  # x_0, [N, C, H, W]
    strength: float | None = None  # fraction of the chain to run; by default 0.5, or 1 with a mask
    kept: Tensor | None = None  # where pixels are kept, bool [N, 1, H, W]
    num_resamples: int = 1  # passes per step, with a mask
    latents: Tensor | None = None  # z ~ N(0, I) to start from or to noise the image with, [B, C, H, W]

    def __post_init__(self) -> None:
        vars(self).update(strength=plain(self.strength), num_resamples=plain(self.num_resamples))
        for name, value in (("strength", self.strength), ("mask_image", self.kept)):
            if self.image is None and value is not None:
                raise ValueError(f"{name} needs an image; pass image= as well.")
        number = self.strength is None or isinstance(self.strength, int | float)
        if not (number and 0 <= (self.strength or 0) <= 1):
            raise ValueError(f"strength={self.strength!r} must be from 0 (the image unchanged) to 1 (only noise left).")
        check_integer("num_resamples", self.num_resamples, 1)
        if self.num_resamples > 1 and self.kept is None:
            raise ValueError(f"num_resamples={self.num_resamples} works with a mask_image only; leave it at 1.")

    def first_step(self, num_steps: int) -> int:
        """Index of the first step to run: the last `strength` of the chain's steps."""
        if self.image is None:
            return 0
        strength = (0.5 if self.kept is None else 1.0) if self.strength is None else self.strength
        return num_steps - math.floor(num_steps * strength + 1e-9)  # 0.29 * 100 is 28.999...


@dataclass(frozen=True)
class Batch:
    """How many images a call gives: `per_prompt` neighbours for each of `prompts` prompts, labels or images."""

    prompts: int
    per_prompt: int = 1

    @classmethod
    def of(cls, prompts: int | None, per_prompt: int, edit: Edit) -> "Batch":
        """That of `prompts`, or, where these may be any number (None), of as many as there are images, masks or latents."""
        per_prompt = plain(per_prompt)
        check_integer("num_images_per_prompt", per_prompt, 1)
        if prompts is None:
            prompts = max(len(x) for x in (edit.image, edit.kept, [0]) if x is not None)
            if prompts == 1 and edit.latents is not None:
                prompts = max(1, len(edit.latents) // per_prompt)
        return cls(prompts, per_prompt)

    @property
    def size(self) -> int:
        return self.prompts * self.per_prompt

    def spread(self, rows: Tensor | None, what: str) -> Tensor | None:
        """One row, one per prompt or one per image, as one per image, [B, ...]."""
        if rows is None or len(rows) == self.size:
            return rows
        return expanded(rows, self.prompts, what).repeat_interleave(self.per_prompt, dim=0)


@dataclass
class Chain:
    """A reverse chain in its scheduler: where it starts, and what it keeps of the image it starts from."""

    scheduler: Any
    generator: Generators
    x: Tensor  # [B, C, H, W] before the step of index `first`
    first: int
    passes: int = 1  # per step
    original: Tensor | None = None  # x_0, [B, C, H, W]
    kept: Tensor | None = None  # where its pixels are kept, bool [B, 1, H, W]
    finite: list[Tensor] = field(default_factory=list)  # whether each step's network output and x are, bool [2]

    @cached_property
    def steps(self) -> list[tuple[int, Tensor]]:
        """Index and timestep of each network call."""
        return list(enumerate(self.scheduler.timesteps))[self.first :]

    @cached_property
    def following(self) -> dict[int, Tensor | None]:
        return next_timesteps(self.scheduler)

    def repeats(self, index: int) -> range:
        """How often to go through a step. The last, into clean data, cannot be repeated."""
        return range(1 if self.following.get(index) is None else self.passes)

    def again(self, repeat: int, x: Tensor, t: Tensor) -> Tensor:
        """x_t; for a repeat noised back from x_s, so that painted and kept pixels come to fit each other (RePaint)."""
        return self.scheduler.forward_step(x, t, standard_normal(x.shape, x, self.generator)) if repeat else x

    def keep(self, x: Tensor, index: int) -> Tensor:
        """x_s after the step of this index, with kept pixels put back, unless x_s is the inside of a step."""
        return self.keep_at(self.following[index], x) if index in self.following else x

    def keep_at(self, t: Tensor | None, x: Tensor) -> Tensor:
        """x_t with kept pixels drawn from q(x_t | x_0), or x_0's for clean data, t = None (Lugmayr et al. 2022, eq. 8)."""
        if self.kept is None:
            return x
        if t is None:
            return torch.where(self.kept, self.original, x)
        noise = standard_normal(x.shape, x, self.generator)
        return torch.where(self.kept, self.scheduler.add_noise(self.original, noise, t.repeat(len(x))), x)

    def watch(self, model_output: Tensor, x: Tensor) -> None:
        """Note whether a step's tensors are finite. Read at the end, they cost a single wait for the device."""
        self.finite.append(torch.stack([model_output.isfinite().all(), x.isfinite().all()]))


def start_chain(scheduler: Any, edit: Edit, batch: Batch, noise: Tensor, generator: Generators) -> Chain:
    """Noise, or the image noised to the first timestep of the chain that is run. `noise` ~ N(0, I) is [B, C, H, W].

    Raises ValueError if the sampler cannot start there.
    """
    timesteps, order = scheduler.timesteps, order_of(scheduler)
    first = edit.first_step(len(timesteps[::order])) * order
    original, kept = batch.spread(edit.image, "images"), batch.spread(edit.kept, "masks")
    if first >= len(timesteps):
        return Chain(scheduler, generator, original, len(timesteps))
    check_start(scheduler, first, edit.num_resamples)
    seed_own_noise(scheduler, generator)
    if hasattr(scheduler, "set_begin_index"):  # before add_noise, which reads it
        scheduler.set_begin_index(first)
    if original is None or (kept is not None and first == 0):
        x = noise * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(original, noise, timesteps[first].repeat(len(original)))
    chain = Chain(scheduler, generator, x, first, edit.num_resamples, original, kept)
    return replace(chain, x=chain.keep_at(timesteps[first], x))


class AlphaDDPMEditing:
    """Mixed into a `DiffusionPipeline` with a `unet` and a `scheduler`."""

    def _edit(
        self, image: Any, strength: float | None, mask_image: Any, num_resamples: int, latents: Any, denormalize: bool = False
    ) -> Edit:
        """The arguments of a call that say what it starts from, as tensors."""
        image = None if image is None else self._images_in(image, denormalize)
        kept = None if mask_image is None else self._kept_pixels(mask_image)
        return Edit(image, strength, kept, num_resamples, None if latents is None else self._latents_in(latents))

    def _latents_in(self, latents: Any) -> Tensor:
        """z ~ N(0, I) as given, in the precision of the chain."""
        if isinstance(latents, list | tuple):
            latents = torch.stack([torch.as_tensor(each) for each in latents])
        latents, (_, *shape) = torch.as_tensor(latents), self._shape(1)
        fits = latents.ndim == 4 and list(latents.shape[1:]) == shape and latents.is_floating_point()
        if not (fits and latents.isfinite().all()):
            found = f"{latents.dtype} of shape {tuple(latents.shape)}"
            needed = f"finite floats of shape (images, {', '.join(map(str, shape))}), drawn from N(0, 1)"
            raise ValueError(f"latents are {found}; this model takes {needed}.")
        return latents.to(self._execution_device, self._chain_dtype)

    def _shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        if size is None:
            fix = "unet.register_to_config(sample_size=(height, width))"
            raise ValueError(f"the UNet's config has no sample_size, so that the images have none; set it with {fix}.")
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, image_channels(self.unet), height, width

    @property
    def _chain_dtype(self) -> torch.dtype:
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    def _images_in(self, images: Images, denormalize: bool = False) -> Tensor:
        """[N, C, H, W] in [-1, 1] on the device; with `denormalize`, of numbers in the data's own units."""
        _, channels, height, width = self._shape(1)
        x = self._values_in(images, "image", channels, value_range(self.unet), denormalize)
        if x.shape[1:] != (channels, height, width):
            needed = f"this model needs {(channels, height, width)} as (channels, height, width)"
            raise ValueError(f"image has shape {tuple(x.shape[1:])}; {needed}: resize or crop it first.")
        return x

    def _values_in(self, images: Images, what: str, channels: int, values: ValueRange, denormalize: bool) -> Tensor:
        """[N, channels, H, W] of any size, in [-1, 1] on the device."""
        return read_values(images, what, channels, values, denormalize).to(self._execution_device, self._chain_dtype)

    def _kept_pixels(self, mask: Images, what: str = "mask_image") -> Tensor:
        """Where pixels are kept, bool [N, 1, H, W]: black (0) is kept and white (1) is painted."""
        painted, needed = read_masks(mask, what), (1, *self._shape(1)[2:])
        if painted.shape[1:] != needed:
            raise ValueError(f"{what} has shape {tuple(painted.shape[1:])}, not {needed}.")
        return (~painted).to(self._execution_device)

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
    ) -> Any:
        """Mix two images in latent noise and denoise the mixtures (Ho et al. 2020, figure 8).

        Both are noised to timestep `at`, mixed as (1 - weight) a + weight b, and denoised; all weights share one noise. The
        higher `at`, the freer the result. Raises ValueError for arguments outside their ranges.

        Args:
            a, b: one image each.
            at: timestep 0..T-1; in a shorter chain, its first timestep at or below `at`.
            weights: weights of `b`, each in [0, 1]; one image comes back per weight, as the call returns it.
            generator: a single one, for the shared noise.
            num_inference_steps: length of the whole chain, which is run from `at` on.
            options: further arguments of the call, such as the condition, or `timesteps` in place of that length.
        """
        own_units = bool(options.get("denormalize"))
        a, b = self._images_in(a, own_units), self._images_in(b, own_units)
        if (len(a), len(b)) != (1, 1):
            raise ValueError(f"interpolate takes one image a and one image b, not {len(a)} and {len(b)}.")
        weights, at = list(plain(weights)), plain(at)
        if not weights or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights={weights!r} must be numbers from 0 (image a) to 1 (image b), at least one.")
        check_integer("at", at, 0, self.scheduler.config.num_train_timesteps - 1)
        steps = Steps(num_inference_steps, options.get("timesteps"), options.get("sigmas"))
        with reserved(self.scheduler):
            timesteps = set_timesteps(self.scheduler, steps)[:: order_of(self.scheduler)]
        if not (remaining := int((timesteps <= at).sum())):
            raise ValueError(f"at={at} is below the last timestep of this chain, {timesteps[-1]}; use more steps.")
        weight = torch.tensor(weights, device=a.device, dtype=a.dtype).view(-1, 1, 1, 1)
        mixtures = (1 - weight) * a + weight * b  # as mixing x_t, because the noise is shared
        seed = torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu").item()
        return self(
            image=value_range(self.unet).denormalize(mixtures) if own_units else (mixtures / 2 + 0.5).clamp(0, 1),
            strength=remaining / len(timesteps),
            generator=[torch.Generator(self._execution_device).manual_seed(seed) for _ in mixtures],
            num_inference_steps=num_inference_steps,
            **options,
        )

    @torch.no_grad()
    def forward_trajectory(
        self, image: Images, timesteps: Sequence[int], generator: Generators = None, denormalize: bool = False
    ) -> Tensor:
        """x_t of the forward process at `timesteps`, each from the one before (report eq. 4.3, figure 3.4).

        Timestep -1 is the image itself, in [-1, 1]; `denormalize` is that of the call. Returns [len(timesteps), B, C, H, W].
        Raises ValueError if the timesteps are not ascending within -1..T-1.
        """
        x = self._images_in(image, denormalize)
        scheduler = AlphaDDPMScheduler.from_config(self.scheduler.config)
        return scheduler.forward_trajectory(x, plain(timesteps), checked_generators(generator, len(x)))


def expanded(batch: Tensor, batch_size: int, what: str) -> Tensor:
    """One row, or one per image, [1 or B, ...], as [B, ...]."""
    if len(batch) not in (1, batch_size):
        raise ValueError(f"{len(batch)} {what} for a batch of {batch_size}; give 1 or {batch_size}.")
    return batch.expand(batch_size, *batch.shape[1:])
