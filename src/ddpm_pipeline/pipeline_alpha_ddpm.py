"""Images from noise by the reverse process of DDPM: the report's figure 3.3 as a diffusers pipeline.

Travels inside model repositories as `pipeline.py`, for those who trust a repository and do not have the package. Imports
every sibling that travels with it, because diffusers' loader copies only what this file itself imports.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from .conditioning_alpha_ddpm import ClassLabels, Conditioned, ConditionVector
from .editing_alpha_ddpm import Batch
from .encoding_alpha_ddpm import image_condition  # noqa: F401, travels as well
from .modular_alpha_ddpm import AlphaDDPMBlocks
from .pictures_alpha_ddpm import Images
from .ranges_alpha_ddpm import ValueRange  # noqa: F401
from .samplers_alpha_ddpm import Steps
from .sampling_alpha_ddpm import AlphaDDPMOutput, AlphaDDPMSampling, Guidance, Output
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .scheduling_fitted_alpha_ddpm import our_scheduler
from .stock_format import StockFormatMixin
from .tables_alpha_ddpm import Generators

# diffusers runs the pipeline.py of every local folder in one and the same module, where it wants to find a single class
for other in ("AlphaDDPMTextToImagePipeline", "AlphaDDPMImageToImagePipeline"):
    globals().pop(other, None)


class AlphaDDPMPipeline(StockFormatMixin, Conditioned, AlphaDDPMSampling, DiffusionPipeline):
    """Image generation, unconditional, for class labels or for numbers.

    Loads any repository of diffusers' `DDPMPipeline`; a `DDPMScheduler` becomes an `AlphaDDPMScheduler` of the same config, or
    an `AlphaDDPMFittedScheduler` if it holds fitted samplers; any other stays as it is. What the pipeline saves names the stock
    classes, so that it loads with diffusers alone.

    Args:
        unet: the noise predictor, from images [B, C, H, W] and a timestep to [B, C, H, W], or 2C for a learned variance.
        scheduler: any diffusers scheduler that works with DDPM models.
    """

    model_cpu_offload_seq = "unet"
    _stock_class = "DDPMPipeline"
    _scheduler_class = AlphaDDPMScheduler
    _blocks_class = AlphaDDPMBlocks

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler):
        super().__init__()
        if unet is not None:  # `from_pretrained(..., unet=None)` loads part of a pipeline
            self._check_model(unet)
        self.register_modules(unet=unet, scheduler=our_scheduler(scheduler))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents", "image"),
        class_labels: ClassLabels | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        image: Images | None = None,
        strength: float | None = None,
        mask_image: Images | None = None,
        num_resamples: int = 1,
        output_trajectory: bool = False,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        condition_vector: ConditionVector | None = None,
        guidance_conditions: str | Sequence[str] | None = None,
        denormalize: bool = False,
        condition_image: Images | None = None,
        condition_mask: Images | None = None,
    ) -> AlphaDDPMOutput | tuple:
        """Sample images.

        Args:
            batch_size: number of images, at least 1; the default is one, or one per class label or image.
            generator: one for all images, or a list of one per image, which then does not depend on the others.
            num_inference_steps: length of the chain. By default every timestep the model was trained on; of a model with fitted
                samplers, from noise, the most steps that one was fitted for (docs/fitted_sampler.md).
            output_type: "pil" images (of 1, 3 or 4 channels, in 8 bits), "np" [B, H, W, C] or "pt" [B, C, H, W], both in
                [0, 1], or "latent", x_0 as it is.
            return_dict: return an `AlphaDDPMOutput` rather than a tuple.
            callback_on_step_end: called as `callback(pipe, index, timestep, tensors)` after each step; "latents" in the dict
                that it returns replace the current ones, and `pipe._interrupt = True` ends the chain.
            callback_on_step_end_tensor_inputs: names in `tensors`: "latents" (x_s, [B, C, H, W], in about [-1, 1]; formerly
                "image") and "pred_original_sample" (the x_0 predicted at this step).
            class_labels: one class for all images, or one per image: ids, names (see `id2label`), or None for no class.
            guidance_scale: 1 is none; above 1, images are pushed towards their condition, for twice the network's batch.
            guidance_rescale: from 0 to 1, how much of the contrast that guidance adds is undone (Lin et al. 2023).
            guidance_interval: start and end of guidance as fractions of the chain, noise being 0 (Kynkäänniemi et al. 2024).
            image: start from this picture, noised, instead of pure noise: PIL, array [B, H, W, C] or tensor [B, C, H, W] in
                [0, 1] (uint8: 0..255; of other types see `pictures_alpha_ddpm.py`), or integers of the type of the model's
                data, such as int16, in their own units; a single one, or one per image.
            strength: fraction of the chain to run on `image`, from 0 (unchanged) to 1; by default 0.5, or 1 with a mask.
            mask_image: white (1) where `image` is painted anew, black (0) where its pixels are kept.
            num_resamples: with a mask, passes per step, for a better fit of old and new (Lugmayr et al. 2022); 1 is none.
            output_trajectory: also return all x_t, `trajectory` [S + 1, B, C, H, W], and the x_0 predicted at each step,
                `predictions` [S, B, C, H, W] (None if the sampler does not give it), both on the CPU.
            num_images_per_prompt: images per class label or image; those of one are neighbours.
            latents: the noise N(0, I) to start from, or to noise `image` with, [B, C, H, W], in place of the generator's.
            timesteps, sigmas: the chain itself, noise first, in place of `num_inference_steps`, for schedulers that take it.
            condition_vector: the model's attributes for all images, or a list of them, one per image: a number, several in
                order, or a dict by name, in the units of the training data. None, NaN and what a dict lacks are not told.
            guidance_conditions: what guidance strengthens: "class_labels", "condition_vector", single attributes of it, or
                "condition_image"; by default all that the call is told.
            denormalize: numbers are in the units of the model's data (`value_range`) rather than in [0, 1], those of `image`
                and `condition_image` as well as those of "np" and "pt", which come back as float32.
            condition_image, condition_mask: see `AlphaDDPMImageToImagePipeline`; other models take none.

        Raises ValueError for a value that cannot be used, before any image is sampled.
        """
        self._check_model(self.unet)  # it may have been replaced
        encoded = self._condition_images(condition_image, condition_mask, denormalize)
        told = self._told(class_labels, condition_vector, guidance_conditions, encoded)
        steps = Steps(num_inference_steps, timesteps, sigmas)
        callback_inputs = callback_on_step_end_tensor_inputs
        output = Output(output_type, return_dict, output_trajectory, callback_on_step_end, callback_inputs, denormalize)
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        edit = self._edit(image, strength, mask_image, num_resamples, latents, denormalize)
        batch = Batch.of(told.prompts(batch_size), num_images_per_prompt, edit)
        return self._sample(batch, self._conditioning(told, batch, guidance), edit, output, generator, steps)
