"""Where a reverse chain starts: noise, a noised image, a mask; and mixtures of images and forward trajectories.

Travels inside model repositories. Defines no pipeline class, because the Hub's loader wants one per repository.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .pictures_alpha_ddpm import Images, read_masks, read_pictures
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .tables_alpha_ddpm import Generators, check_generators, check_integer


@dataclass(frozen=True)
class Edit:
    """The arguments of a call that start it from an image. Raises ValueError if they do not fit one another."""

    image: Images | None = None  # PIL, array [B, H, W, C] or tensor [B, C, H, W]; one, or one per image
    strength: float | None = None  # fraction of the chain to run; by default 0.5, or 1 with a mask
    mask_image: Images | None = None  # white (1) is painted anew, black (0) is kept
    num_resamples: int = 1  # passes per step, with a mask

    def __post_init__(self) -> None:
        for name in ("strength", "mask_image"):
            if self.image is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs an image; pass image= as well.")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength!r} must be from 0 (the image unchanged) to 1 (only noise left).")
        check_integer("num_resamples", self.num_resamples, 1)
        if self.num_resamples > 1 and self.mask_image is None:
            raise ValueError(f"num_resamples={self.num_resamples} works with a mask_image only; leave it at 1.")

    def first_step(self, num_steps: int) -> int:
        """Index of the first step to run: the last `strength` of the chain's steps."""
        if self.image is None:
            return 0
        strength = (0.5 if self.mask_image is None else 1.0) if self.strength is None else self.strength
        return num_steps - math.floor(num_steps * strength + 1e-9)  # 0.29 * 100 is 28.999...


@dataclass(frozen=True)
class Start:
    """Where a chain starts, and what it keeps of the image it starts from."""

    x: Tensor  # [B, C, H, W] before the step of index `first`
    first: int
    passes: int = 1  # per step
    original: Tensor | None = None  # x_0, [B, C, H, W]
    kept: Tensor | None = None  # where its pixels are kept, bool [B, 1, H, W]


class AlphaDDPMEditing:
    """Mixed into a `DiffusionPipeline` with a `unet` and a `scheduler`."""

    def _start(self, edit: Edit, batch_size: int, generator: Generators) -> Start:
        """Noise, or the image noised to the first timestep of the chain that is run."""
        timesteps = self.scheduler.timesteps
        first = edit.first_step(len(timesteps))
        if hasattr(self.scheduler, "set_begin_index"):  # before add_noise, which reads it
            self.scheduler.set_begin_index(first)
        if edit.num_resamples > 1 and not hasattr(self.scheduler, "forward_step"):
            kind = type(self.scheduler).__name__
            raise ValueError(f"num_resamples above 1 needs AlphaDDPMScheduler's forward_step, which {kind} lacks.")
        original = None if edit.image is None else self._images_in(edit.image, batch_size)
        kept = None if edit.mask_image is None else self._kept_pixels(edit.mask_image, batch_size)
        if first == len(timesteps):
            return Start(original, first)
        if original is None or (kept is not None and first == 0):
            x = self._noise(self._shape(batch_size), generator) * self.scheduler.init_noise_sigma
        else:
            x = self._noised(original, timesteps[first], generator)
        start = Start(x, first, edit.num_resamples, original, kept)
        return replace(start, x=self._keep(x, start, timesteps[first], generator))

    def _keep(self, x: Tensor, start: Start, t: Tensor | None, generator: Generators) -> Tensor:
        """x_t with kept pixels drawn from q(x_t | x_0), or x_0's for clean data, t = None (Lugmayr et al. 2022, eq. 8)."""
        if start.kept is None:
            return x
        return torch.where(start.kept, start.original if t is None else self._noised(start.original, t, generator), x)

    def _noise(self, shape: Sequence[int], generator: Generators) -> Tensor:
        """z ~ N(0, I) in float32: only the network computes in half precision, never the chain."""
        return randn_tensor(tuple(shape), generator=generator, device=self._execution_device, dtype=self._chain_dtype)

    def _noised(self, original: Tensor, t: Tensor, generator: Generators) -> Tensor:
        return self.scheduler.add_noise(original, self._noise(original.shape, generator), t.repeat(len(original)))

    def _shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, self.unet.config.in_channels, height, width

    @property
    def _chain_dtype(self) -> torch.dtype:
        return torch.float64 if self.unet.dtype == torch.float64 else torch.float32

    def _images_in(self, images: Images, batch_size: int | None = None) -> Tensor:
        """[B, C, H, W] in [-1, 1] on the device; a single image is repeated for the batch."""
        _, channels, height, width = self._shape(1)
        x = read_pictures(images, "image", channels)
        if x.shape[1:] != (channels, height, width):
            needed = f"this model needs {(channels, height, width)} as (channels, height, width)"
            raise ValueError(f"image has shape {tuple(x.shape[1:])}; {needed}: resize or crop it first.")
        return expanded((x * 2 - 1).to(self._execution_device, self._chain_dtype), batch_size or len(x), "images")

    def _kept_pixels(self, mask: Images, batch_size: int) -> Tensor:
        """Where pixels are kept, bool [B, 1, H, W]: black (0) is kept and white (1) is painted."""
        painted, needed = read_masks(mask, "mask_image"), (1, *self._shape(1)[2:])
        if painted.shape[1:] != needed:
            raise ValueError(f"mask_image has shape {tuple(painted.shape[1:])}, not {needed}.")
        return expanded(~painted, batch_size, "masks").to(self._execution_device)

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
            options: further arguments of the call, such as the condition.
        """
        a, b = self._images_in(a), self._images_in(b)
        if (len(a), len(b)) != (1, 1):
            raise ValueError(f"interpolate takes one image a and one image b, not {len(a)} and {len(b)}.")
        if not weights or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights={weights!r} must be numbers from 0 (image a) to 1 (image b), at least one.")
        total = self.scheduler.config.num_train_timesteps
        check_integer("at", at, 0, total - 1)
        self.scheduler.set_timesteps(num_inference_steps or total)
        timesteps = self.scheduler.timesteps
        if not (remaining := int((timesteps <= at).sum())):
            raise ValueError(f"at={at} is below the last timestep of this chain, {timesteps[-1]}; use more steps.")
        weight = torch.tensor(list(weights), device=a.device, dtype=a.dtype).view(-1, 1, 1, 1)
        mixtures = ((1 - weight) * a + weight * b) / 2 + 0.5  # as mixing x_t, because the noise is shared
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
    def forward_trajectory(self, image: Images, timesteps: Sequence[int], generator: Generators = None) -> Tensor:
        """x_t of the forward process at `timesteps`, each from the one before (report eq. 4.3, figure 3.4).

        Timestep -1 is the image itself, in [-1, 1]. Returns [len(timesteps), B, C, H, W]. Raises ValueError if the timesteps
        are not ascending.
        """
        x = self._images_in(image)
        chain = [int(t) for t in timesteps]
        if not chain or sorted(set(chain)) != chain or chain[0] < -1:
            raise ValueError(f"timesteps={list(timesteps)} must be ascending integers from -1 (the image) on.")
        check_generators(generator, len(x))
        scheduler = AlphaDDPMScheduler.from_config(self.scheduler.config)  # leaves the pipeline's own chain as it is
        trajectory = [x] if chain[0] == -1 else []
        if noisy := [t for t in chain if t >= 0]:
            scheduler.set_timesteps(timesteps=noisy[::-1])
        for t in noisy:
            x = scheduler.forward_step(x, t, self._noise(x.shape, generator))
            trajectory.append(x)
        return torch.stack(trajectory)


def expanded(batch: Tensor, batch_size: int, what: str) -> Tensor:
    """One row, or one per image, [1 or B, ...], as [B, ...]."""
    if len(batch) not in (1, batch_size):
        raise ValueError(f"{len(batch)} {what} for a batch of {batch_size}; give 1 or {batch_size}.")
    return batch.expand(batch_size, *batch.shape[1:])
