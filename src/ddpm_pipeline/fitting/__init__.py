"""Samplers of few steps, fitted to a model by linear least squares: `fit_sampler(pipe)`. Names are imported on first use."""

from typing import TYPE_CHECKING

from ..support.extras import lazy_exports

if TYPE_CHECKING:
    from .options import FittingOptions
    from .run import fit
    from .samplers import SamplerFit, fit_sampler

_MODULES = {"FittingOptions": ".options", "SamplerFit": ".samplers", "fit": ".run", "fit_sampler": ".samplers"}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="train")
