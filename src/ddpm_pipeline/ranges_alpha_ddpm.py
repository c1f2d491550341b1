"""What a model's -1 and 1 mean in the units of its data: the grey levels of 8 or 16 bits, Hounsfield units, reflectances.

Travels inside model repositories; imports no sibling.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

DEPTHS = ("uint8", "uint16", "int16", "float32")  # types of data, the shallowest first
TOPS = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}  # white, where black is 0


class Settings:
    """A dataclass that can be stored in a UNet's config."""

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # lists, as they are when read again

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Raises ValueError for what is not as stored."""
        known = [each.name for each in fields(cls)]
        try:
            if not isinstance(values, Mapping) or sorted(values) != sorted(known):
                raise TypeError(f"it needs {', '.join(known)}")
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{cls.__name__} in the UNet's config, {values!r}, is malformed: {error}") from error


@dataclass(frozen=True)
class ValueRange(Settings):
    """The values of the data that become -1 and 1, a pair for all channels or one for each; values beyond are clipped.

    Raises ValueError for an unknown type, pairs that are not ascending or exceed 32 bits, and integers without whole bounds.
    """

    low: tuple[float, ...] = (0.0,)
    high: tuple[float, ...] = (255.0,)
    dtype: str = "uint8"  #: of the data, one of DEPTHS

    def __post_init__(self) -> None:
        if self.dtype not in DEPTHS:
            raise ValueError(f"value_range: the type {self.dtype!r} is not one of {', '.join(DEPTHS)}.")
        low, high = (tuple(map(float, values)) for values in (self.low, self.high))
        vars(self).update(low=low, high=high)
        pairs = list(zip(low, high, strict=False))
        if not pairs or len(low) != len(high) or not all(0 < b - a <= np.finfo(np.float32).max for a, b in pairs):
            raise ValueError(f"value_range: low={low} and high={high} must be finite, low below high, in pairs.")
        if self.dtype == "float32":
            return
        limits = np.iinfo(self.dtype)
        if not all(value.is_integer() and limits.min <= value <= limits.max for value in low + high):
            raise ValueError(f"value_range: low={low} and high={high} must be whole numbers that {self.dtype} can hold.")

    @classmethod
    def of_type(cls, dtype: str) -> "ValueRange":
        """Black and white of a type: 0..255, 0..65535 or 0..1. Raises ValueError for int16, which has none."""
        if dtype not in TOPS:
            raise ValueError(f"value_range: {dtype} has no black and white of its own; give a low and a high value.")
        return cls((0.0,), (TOPS[dtype],), dtype)

    @property
    def num_bins(self) -> int | tuple[int, ...] | None:
        """Levels from low to high, of all channels or of each; None for floats, which have densities instead."""
        if self.dtype == "float32":
            return None
        levels = tuple(int(b - a) + 1 for a, b in zip(self.low, self.high, strict=True))
        return levels[0] if len(set(levels)) == 1 else levels

    def normalize(self, values: Tensor) -> Tensor:
        """Values [..., C, H, W] in own units as float32 in [-1, 1]; of 8 bits x / 127.5 - 1."""
        low, half = self._low_and_half(values.device)
        x = values.to(torch.float32).sub(low).div_(half).sub_(1)
        return x if self.is_whole_type else x.clamp_(-1, 1)

    def denormalize(self, x: Tensor) -> Tensor:
        """x [..., C, H, W] in [-1, 1], clipped to it, as float32 in own units, not rounded."""
        low, half = self._low_and_half(x.device)
        return x.to(torch.float32).clamp(-1, 1).add_(1).mul_(half).add_(low)

    def restore(self, x: Tensor) -> np.ndarray:
        """x [..., C, H, W] in [-1, 1] as an array of the data's own type, integers rounded."""
        values = self.denormalize(x).cpu().numpy()
        return values if self.dtype == "float32" else np.rint(values).astype(self.dtype)

    @property
    def is_whole_type(self) -> bool:
        """Whether the range is all that its unsigned type can hold, so that nothing is ever clipped."""
        return self.dtype in ("uint8", "uint16") and {*self.low} == {0.0} and {*self.high} == {TOPS[self.dtype]}

    def _low_and_half(self, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
        """Low, and half of the range: numbers, or float32 [C, 1, 1] where channels differ."""
        half = tuple((b - a) / 2 for a, b in zip(self.low, self.high, strict=True))
        if len(half) == 1:
            return self.low[0], half[0]
        return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.low, half))
