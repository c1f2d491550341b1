"""Training a diffusion model: `train(TrainingOptions(dataset="photos", resolution=64))`, or the command of this package.

Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_LAZY = {"TrainingOptions": "options", "train": "loop"}
__all__ = ["TrainingOptions", "train"]

if TYPE_CHECKING:
    from .loop import train
    from .options import TrainingOptions


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
