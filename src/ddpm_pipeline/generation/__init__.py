"""Images sampled from seeds: in bulk by `generate(GenerationOptions(...))`, or in memory. Names are imported on first use."""

from typing import TYPE_CHECKING

from ..support.extras import lazy_exports

if TYPE_CHECKING:
    from .drawing import Request, sample, sample_in_batches, sample_uint8
    from .options import GenerationOptions
    from .pipelines import load_pipeline, scheduler_for
    from .run import generate

_MODULES = {
    "GenerationOptions": ".options",
    "Request": ".drawing",
    "generate": ".run",
    "load_pipeline": ".pipelines",
    "sample": ".drawing",
    "sample_in_batches": ".drawing",
    "sample_uint8": ".drawing",
    "scheduler_for": ".pipelines",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="train")
