"""From any source of images to batches of tensors: `open_data` reads what a `DataOptions` names.

Names are imported on first use, because options need neither torch nor datasets.
"""

from typing import TYPE_CHECKING

from ..support.errors import DataError
from ..support.extras import lazy_exports

_MODULES = {
    **dict.fromkeys(("ConditionColumns", "DataOptions"), ".options"),
    "ImageData": ".mapped",
    "load_images": ".condition_images",
    **dict.fromkeys(("StreamData", "open_data", "open_stream"), ".streamed"),
}
__all__ = ["DataError", *_MODULES]

if TYPE_CHECKING:
    from .condition_images import load_images
    from .mapped import ImageData
    from .options import ConditionColumns, DataOptions
    from .streamed import StreamData, open_data, open_stream

__getattr__, __dir__ = lazy_exports(__name__, _MODULES, extra="train")
