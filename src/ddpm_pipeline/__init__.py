"""DDPM for diffusers: scheduler, pipelines, likelihoods. Names are imported on first use, so that importing costs nothing."""

from typing import TYPE_CHECKING

from .support.extras import lazy_exports

__version__ = "0.1.0"

_MODULES = {
    "AlphaDDPMScheduler": ".scheduling_alpha_ddpm",
    "AlphaDDPMFittedScheduler": ".scheduling_fitted_alpha_ddpm",
    "Moments": ".scheduling_alpha_ddpm",
    "ReverseMoments": ".scheduling_alpha_ddpm",
    "Schedule": ".scheduling_alpha_ddpm",
    "AlphaDDPMPipeline": ".pipeline_alpha_ddpm",
    "AlphaDDPMTextToImagePipeline": ".pipeline_alpha_ddpm_text",
    "AlphaDDPMImageToImagePipeline": ".pipeline_alpha_ddpm_image",
    "AlphaDDPMBlocks": ".modular_alpha_ddpm",
    "AlphaDDPMImageToImageBlocks": ".modular_alpha_ddpm",
    "AlphaDDPMTextBlocks": ".modular_alpha_ddpm",
    "describe_conditions": ".sampling_alpha_ddpm",
    "ImageCondition": ".encoding_alpha_ddpm",
    "VectorCondition": ".encoding_alpha_ddpm",
    "ValueRange": ".ranges_alpha_ddpm",
    "pictures_to_tensor": ".pictures_alpha_ddpm",
    "tensor_to_pictures": ".pictures_alpha_ddpm",
    "grid": ".support.pictures",
    "strip": ".support.pictures",
    "save_gif": ".support.pictures",
    "save_strip": ".support.pictures",
    "plot_schedule": ".support.plots",
    "push_pipeline": ".hub",  # which the pipelines look up here, so that they work without the hub room as well
}
__all__ = ["__version__", *_MODULES]
__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="train")

if TYPE_CHECKING:
    from .encoding_alpha_ddpm import ImageCondition, VectorCondition
    from .hub import push_pipeline
    from .modular_alpha_ddpm import AlphaDDPMBlocks, AlphaDDPMImageToImageBlocks, AlphaDDPMTextBlocks
    from .pictures_alpha_ddpm import pictures_to_tensor, tensor_to_pictures
    from .pipeline_alpha_ddpm import AlphaDDPMPipeline
    from .pipeline_alpha_ddpm_image import AlphaDDPMImageToImagePipeline
    from .pipeline_alpha_ddpm_text import AlphaDDPMTextToImagePipeline
    from .ranges_alpha_ddpm import ValueRange
    from .sampling_alpha_ddpm import describe_conditions
    from .scheduling_alpha_ddpm import AlphaDDPMScheduler, Moments, ReverseMoments, Schedule
    from .scheduling_fitted_alpha_ddpm import AlphaDDPMFittedScheduler
    from .support.pictures import grid, save_gif, save_strip, strip
    from .support.plots import plot_schedule
