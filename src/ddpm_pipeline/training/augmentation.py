"""Non-leaking augmentation (Jun et al. 2020; Karras et al. 2022, appendix F.2): images are moved now and then, and the network
is told how, by parameters that are zero for images as they are. Sampling says nothing, and so gives images as they are.

The augmentations are those of Karras et al. The parameters enter through a linear map without bias, which is trained with the
UNet and then left away: the saved UNet is that of an ordinary run.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..support.draws import BatchSlice, RandomStream

NUM_PARAMETERS = 9  # mirrored, upside down, scale, rotation (cos - 1, sin), stretch (2), shift (right, down)
SCALE_STD = STRETCH_STD = 0.2  # of logarithms to base 2
SHIFT_STD = 0.125  # of width and height


def draw_parameters(where: BatchSlice, probability: float) -> np.ndarray:
    """The parameters of b images, float64 [b, 9]: each of six augmentations with this probability, the others zero.

    Unlike that of Karras et al., the stretch is the angle-doubled vector of its direction, times its strength: a stretch along
    an axis is a squeeze across it, and either has the same parameters.
    """
    drawn = where.uniforms(RandomStream.AUGMENTATION, 13)
    happens, numbers = drawn[:, :6] < probability, drawn[:, 6:]
    angles = 2 * np.pi * numbers[:, 0]
    scale, stretch, shift = (_normal_pairs(numbers[:, start : start + 2]) for start in (1, 3, 5))
    columns = [np.ones(len(drawn)), np.ones(len(drawn)), scale[:, 0], np.cos(angles) - 1, np.sin(angles), *stretch.T, *shift.T]
    return np.stack(columns, axis=1) * happens[:, [0, 1, 2, 3, 3, 4, 4, 5, 5]]


def flips_of(parameters: np.ndarray) -> np.ndarray:
    """Which images are mirrored, as `Views` has it: bool [b, 2], upside down and left to right."""
    return parameters[:, 1::-1] != 0


def motions_of(parameters: np.ndarray) -> np.ndarray:
    """What the other parameters do, as `Views` has it: float64 [b, 2, 3]."""
    scale, cos, sin, *stretch, right, down = parameters[:, 2:].T
    cos = cos + 1
    a, b = -STRETCH_STD * np.log(2) * np.stack(stretch)  # the inverse of exp([[a, b], [b, -a]]), since motions go backwards
    strength = np.hypot(a, b)
    grown = np.where(strength > 0, np.sinh(strength) / np.where(strength > 0, strength, 1), 1)
    stretching = np.array([[np.cosh(strength) + grown * a, grown * b], [grown * b, np.cosh(strength) - grown * a]])
    turning = np.array([[cos, -sin], [sin, cos]]) * 2 ** (-SCALE_STD * scale)
    linear = np.einsum("ijn,jkn->nik", turning, stretching)
    return np.concatenate([linear, SHIFT_STD * np.stack([right, down], axis=1)[:, :, None]], axis=2)


class AugmentedNetwork(nn.Module):
    """The network in training: the UNet's time embedding is shifted by a linear function of the parameters, zero at first."""

    def __init__(self, network: nn.Module, unet: Any):
        super().__init__()
        self.network = network  # calls the UNet, or is it
        self.weight = nn.Parameter(torch.zeros(unet.time_embedding.linear_2.out_features, NUM_PARAMETERS))
        self._shift: Tensor | None = None  # during a call
        unet.time_embedding.register_forward_hook(self._shifted)

    def forward(self, sample: Tensor, timesteps: Tensor, augmentation: Tensor | None = None, **inputs: Tensor) -> Any:
        """`augmentation` are the parameters, [B, 9]; without them the images are as they were."""
        self._shift = None if augmentation is None else functional.linear(augmentation, self.weight)
        try:
            return self.network(sample, timesteps, **inputs)
        finally:
            self._shift = None

    def _shifted(self, module: nn.Module, arguments: Any, embedding: Tensor) -> Tensor | None:
        return None if self._shift is None else embedding + self._shift.to(embedding.dtype)


def _normal_pairs(uniform: np.ndarray) -> np.ndarray:
    """Pairs of numbers in [0, 1) as pairs of standard normal ones, [b, 2] (Box and Muller 1958)."""
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 0])), 2 * np.pi * uniform[:, 1]
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
