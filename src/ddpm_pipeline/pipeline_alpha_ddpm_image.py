"""Images from images: a mask to a picture, low resolution to high, grey to colour, one modality to another.

The condition joins x_t at the UNet's input (Saharia et al. 2022, "Palette: Image-to-Image Diffusion Models"). diffusers calls
such a condition `image` where nothing else is an image, and names it apart where `image` is what the chain starts from, as
ControlNet's `control_image`; here it is `condition_image`. Travels inside model repositories as `pipeline.py`. Imports every
sibling that travels with it.
"""

# ruff: noqa: F401
from .conditioning_alpha_ddpm import Conditioned
from .editing_alpha_ddpm import Batch
from .encoding_alpha_ddpm import ImageCondition, image_condition
from .modular_alpha_ddpm import AlphaDDPMImageToImageBlocks
from .pictures_alpha_ddpm import Images
from .pipeline_alpha_ddpm import AlphaDDPMPipeline
from .ranges_alpha_ddpm import ValueRange
from .samplers_alpha_ddpm import Steps
from .sampling_alpha_ddpm import AlphaDDPMSampling
from .scheduling_alpha_ddpm import AlphaDDPMScheduler
from .scheduling_fitted_alpha_ddpm import our_scheduler
from .stock_format import StockFormatMixin
from .tables_alpha_ddpm import Generators


class AlphaDDPMImageToImagePipeline(AlphaDDPMPipeline):
    """Image generation for a condition that is an image, also together with class labels or numbers.

    Called as `AlphaDDPMPipeline`, with:

    - `condition_image`: one for all images, or one per image, in the forms that `image` takes, `image` itself being where the
      chain starts. A label map is integers or a PIL image of class ids. For "downscale:F" it is the picture of 1/F of
      the model's height and width (or one of full size, which is downscaled first), for "gray" a picture in grey (or
      in colour, made grey), for "inpaint" the picture to complete. Without it, images are sampled as from what
      training saw with the condition dropped.
    - `condition_mask`: for "inpaint", white (1) where the picture is unknown; what it shows there is not looked at.

    Saved as stock's `DDPMPipeline`, which loads it but cannot be told its condition.

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


# diffusers' loader wants a single pipeline class in this module, also where it runs that of every local folder
for other in ("AlphaDDPMPipeline", "AlphaDDPMTextToImagePipeline"):
    globals().pop(other, None)
