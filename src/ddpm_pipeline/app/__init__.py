"""A model in the browser, as `python -m ddpm_pipeline.app MODEL` or as a Space. Names are imported on first use."""

from typing import TYPE_CHECKING

from ..support.extras import lazy_exports

if TYPE_CHECKING:
    from .options import AppOptions
    from .server import serve
    from .space import write_space

_MODULES = {"AppOptions": ".options", "serve": ".server", "write_space": ".space"}
__all__ = [*_MODULES]
__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="app")
