"""Training a diffusion model: `train(TrainingOptions(dataset="photos", resolution=64))`, or the command of this package."""

from typing import TYPE_CHECKING

from ..support.extras import lazy_exports

_MODULES = {"TrainingOptions": ".options", "export_checkpoint": ".export", "train": ".loop"}
__all__ = ["TrainingOptions", "export_checkpoint", "train"]

if TYPE_CHECKING:
    from .export import export_checkpoint
    from .loop import train
    from .options import TrainingOptions

__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="train")
