"""Likelihoods and sample quality of a pipeline: bits per dimension, FID, KID, precision and recall.

`evaluate(EvaluationOptions(model="ddpm-digits", dataset="digits"))` computes all of them. Names are imported on first use.
"""

from typing import TYPE_CHECKING

from ..support.extras import lazy_exports

if TYPE_CHECKING:
    from .features import feature_extractor, real_features
    from .figures import likelihood_of
    from .options import EvaluationOptions
    from .quality import ImageQuality, Quality, frechet_distance, precision_recall
    from .run import evaluate

_MODULES = {
    "EvaluationOptions": ".options",
    "ImageQuality": ".quality",
    "Quality": ".quality",
    "evaluate": ".run",
    "feature_extractor": ".features",
    "frechet_distance": ".quality",
    "likelihood_of": ".figures",
    "precision_recall": ".quality",
    "real_features": ".features",
}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="eval")
