"""Images from images: a mask to a picture, low resolution to high, grey to colour, one modality to another.

The condition joins x_t at the UNet's input (Saharia et al. 2022, "Palette: Image-to-Image Diffusion Models"). diffusers calls
such a condition `image` where nothing else is an image, and names it apart where `image` is what the chain starts from, as
ControlNet's `control_image`; here it is `condition_image`. Travels inside model repositories as `pipeline.py`. Imports every
sibling that travels with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .conditioning_alpha_ddpm import ClassLabels, ConditionVector, Told
from .editing_alpha_ddpm import Batch
from .encoding_alpha_ddpm import ImageCondition, image_condition
from .modular_alpha_ddpm import AlphaDDPMImageToImageBlocks
from .pictures_alpha_ddpm import Images
from .pipeline_alpha_ddpm import AlphaDDPMPipeline
from .ranges_alpha_ddpm import ValueRange  # noqa: F401
from .samplers_alpha_ddpm import Steps
from .sampling_alpha_ddpm import AlphaDDPMOutput, Guidance, Output
from .scheduling_alpha_ddpm import AlphaDDPMScheduler  # noqa: F401
from .stock_format import StockFormatMixin  # noqa: F401
from .tables_alpha_ddpm import Generators


class AlphaDDPMImageToImagePipeline(AlphaDDPMPipeline):
    """Image generation for a condition that is an image, also with class labels or numbers.

    Saved as `DDPMPipeline`, under which it loads, but which cannot be told its condition.

    Args:
        unet: the noise predictor, from images and encoded conditions [B, C + k, H, W] and a timestep to [B, C, H, W], or 2C
            for a learned variance. Its config says what the condition is: see `describe_conditions` and `ImageCondition`.
        scheduler: any diffusers scheduler that works with DDPM models.
    """

    _blocks_class = AlphaDDPMImageToImageBlocks
    _takes_image = True

    @property
    def image_condition(self) -> ImageCondition:
        """What `condition_image` is: its channels or classes, or the task."""
        return image_condition(self.unet)

    @torch.no_grad()
    def __call__(
        self,
        condition_image: Images | None = None,
        condition_mask: Images | None = None,
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
    ) -> AlphaDDPMOutput | tuple:
        """Sample `num_images_per_prompt` images per condition image; those of one are neighbours.

        Args:
            condition_image: one for all images, or one per image, in the forms that `image` takes. A label map is integers
                or a PIL image of class ids. For "downscale:F" it is the picture of 1/F of the model's height and width (or
                one of full size, which is downscaled first), for "gray" a picture in grey (or in colour, made grey), for
                "inpaint" the picture to complete. Without it, images are sampled as if it had been dropped in training.
            condition_mask: for "inpaint", white (1) where the picture is unknown; its pixels there are not looked at.

        The other arguments are those of `AlphaDDPMPipeline`, `image` being where the chain starts. Raises ValueError for a
        value that cannot be used, before any image is sampled.
        """
        self._check_model(self.unet)  # it may have been replaced
        labels = None if class_labels is None else self._label_ids(class_labels)
        given = self._condition_images(condition_image, condition_mask, denormalize)
        told = Told(labels, self._vectors(condition_vector), given, self._guided(guidance_conditions))
        call_back = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        output = Output(output_type, return_dict, output_trajectory, *call_back, denormalize)
        guidance, steps = (
            Guidance(guidance_scale, guidance_rescale, guidance_interval),
            Steps(num_inference_steps, timesteps, sigmas),
        )
        edit = self._edit(image, strength, mask_image, num_resamples, latents, denormalize)
        batch = Batch.of(told.prompts(batch_size), num_images_per_prompt, edit)
        return self._sample(batch, self._conditioning(told, batch, guidance), edit, output, generator, steps)


# diffusers' loader wants a single pipeline class in this module, also where it runs that of every local folder
for other in ("AlphaDDPMPipeline", "AlphaDDPMTextToImagePipeline"):
    globals().pop(other, None)
