"""What a run is of besides its options: its data, condition, network and schedule. A checkpoint holds it, and a run that
resumes from the checkpoint compares. Called by the loop and by `export`, which writes it.
"""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..data.mapped import ImageSet
from ..scheduling_alpha_ddpm import AlphaDDPMScheduler
from ..tables_alpha_ddpm import OWN_KEY

if TYPE_CHECKING:
    from .conditions import Condition

DATA = "data"  # what may change if the user accepts it


def identity_of(data: ImageSet, condition: "Condition", unet: Any, scheduler: AlphaDDPMScheduler) -> dict[str, Any]:
    """What has to be the same on resuming, as JSON values by the names that messages use."""
    images = "a stream" if data.num_images is None else f"{data.num_images} images"
    held_out = "" if data.held_out is None else f", and {len(data.held_out)} held out, {data.held_out.fingerprint}"
    unet_config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    schedule = {name: value for name, value in scheduler.config.items() if not name.startswith("_") or name == OWN_KEY}
    return {
        DATA: f"{images}, {data.fingerprint}{held_out}",
        "image column": data.roles.image,
        "condition's column": data.roles.needed,
        "value range": data.value_range.to_json(),
        **condition.identity(),
        **json.loads(json.dumps({"UNet": unet_config, "scheduler": schedule}, default=lambda array: array.tolist())),
    }


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two identities, as "class names 2 was 'cat' and is 'dog'". A key that one of them lacks is not
    compared, since versions of the libraries differ in theirs.
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in before:
            if key in now:
                yield from changes(before[key], now[key], f"{name} {key}".strip())
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from changes(*pair, f"{name} {index}")
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    if not isinstance(value, list):
        return repr(value)
    return f"{len(value)} values ({', '.join(map(str, value[:10]))}{', ...' if len(value) > 10 else ''})"
