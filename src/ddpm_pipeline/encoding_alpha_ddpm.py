"""Conditions as a UNet gets them: images as further channels of its input, numbers in its time embedding.

Training, likelihoods and pipelines all encode here. The settings stand in the UNet's config, where stock classes keep them.
Travels inside model repositories.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot, pad

from .pictures_alpha_ddpm import LUMA
from .ranges_alpha_ddpm import Settings, ValueRange
from .tables_alpha_ddpm import OWN_KEY, check_integer

TASKS = ("downscale:F", "gray", "inpaint")
MAX_CHANNELS = 1024  # of a condition, or classes of a label map
VOID = 255  # in label maps of 3 to 255 classes: none of them; in those of 2, white, which is class 1
NOT_TOLD = 2000.0  # label of a single number that is left out; the others lie in 0..1000
SLOWEST, FASTEST = math.pi / 8, 4 * math.pi  # angular frequencies of an attribute's features, per standard deviation


@dataclass(frozen=True)
class ImageCondition(Settings):
    """A condition that is an image, which the UNet gets as channels beside those of x_t. All zeros mean that it is left out.

    Label maps become one channel of {0, 1} per class, other images are in [-1, 1]. With a task, the condition is made of the
    image itself: at 1/F of its resolution, in grey, or with a part left out. Raises ValueError for settings that do not fit.
    """

    channels: int  #: as stored, 1 for label maps; with a task, those of the image itself
    classes: int | None = None  #: of a label map, whose values are 0..classes-1
    value_range: ValueRange = field(default_factory=ValueRange)
    task: str | None = None  #: one of TASKS, such as "downscale:2"

    def __post_init__(self) -> None:
        if not isinstance(self.value_range, ValueRange):
            vars(self).update(value_range=ValueRange.from_json(self.value_range))
        ranges, problem = len(self.value_range.low), None
        check_integer("condition_image: channels", self.channels, 1, MAX_CHANNELS)
        check_integer("condition_image: classes", 2 if self.classes is None else self.classes, 2, MAX_CHANNELS)
        if self.classes and (self.channels, self.task) != (1, None):
            problem = f"a label map has one channel and no task, not {self.channels} and {self.task!r}"
        elif not (self.task in (None, "gray", "inpaint") or self.factor):
            problem = f"task={self.task!r} is not one of {', '.join(TASKS)}, with an integer F from 2 on"
        elif ranges not in (1, self.channels) or (self.task == "gray" and (self.channels, ranges) != (3, 1)):
            problem = f"task={self.task!r} cannot have {self.channels} channels with {ranges} ranges of values"
        if problem:
            raise ValueError(f"condition_image: {problem}.")

    @property
    def factor(self) -> int | None:
        """F of "downscale:F"."""
        name, _, factor = str(self.task).partition(":")
        return int(factor) if name == "downscale" and factor.isdecimal() and 2 <= int(factor[:6]) <= MAX_CHANNELS else None

    @property
    def input_channels(self) -> int:
        """Channels that the UNet gets beside those of x_t."""
        return 1 if self.task == "gray" else self.classes or self.channels + (self.task == "inpaint")

    def encode(self, raw: Tensor, mask: Tensor | None = None) -> Tensor:
        """Conditions, or with a task whole images, [B, channels, H, W] in their own type, as float32 [B, input_channels, H, W].

        `mask`, bool [B, 1, H, W], is where an image to inpaint is unknown. Where a label map is VOID, no class is 1. Raises
        ValueError for labels beyond the classes.
        """
        if self.classes is None:
            return self.arrange(self.value_range.normalize(raw), mask)
        ids = raw[:, 0].long()
        void = (ids == VOID) & (self.classes <= VOID)
        ids = ids.masked_fill(void, 1)
        if not 0 <= ids.min() <= ids.max() < self.classes:
            found = f"labels from {ids.min()} to {ids.max()}"
            raise ValueError(f"the condition image has {found}; this model's label maps have 0 to {self.classes - 1}.")
        encoded = one_hot(ids, self.classes).movedim(-1, 1).float()
        return encoded if self.classes == 2 else encoded.masked_fill_(void[:, None], 0)

    def arrange(self, x: Tensor, mask: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """As `encode`, from values in [-1, 1]; images of 1/F of `size` (height, width) or in grey are taken as they are."""
        if self.task == "gray" and x.shape[1] == 3:
            return self._rounded((x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True))
        if self.task == "inpaint":
            known = (~mask).to(x)
            return torch.cat([x * known, known], dim=1)  # nothing known is the condition left out
        if not self.factor:
            return x
        height, width = size = size or x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images of {height}x{width} pixels cannot be downscaled by {self.factor} without a remainder.")
        if x.shape[-2:] == size:
            low = (height // self.factor, width // self.factor)
            x = self._rounded(interpolate(x, low, mode="bicubic", antialias=True).clamp(-1, 1))
        return interpolate(x, size, mode="bicubic").clamp(-1, 1)

    def _rounded(self, x: Tensor) -> Tensor:
        """With the levels of the data, which a picture made elsewhere has too."""
        if (bins := self.value_range.num_bins) is None:
            return x
        half = (torch.as_tensor(bins, device=x.device).view(-1, 1, 1) - 1) / 2
        return ((x + 1) * half).round() / half - 1


@dataclass(frozen=True)
class VectorCondition(Settings):
    """Numbers with names, which the UNet gets standardised, and each of which can be left out.

    A single one is encoded as a timestep is (`class_embed_type="timestep"`). Several become sines and cosines, each attribute
    in a block of its own, that are added to the time embedding ("identity"). Raises ValueError for settings that do not fit.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]  #: of the training data
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        names = tuple(self.names)
        if (
            isinstance(self.names, str)
            or not names
            or not all(isinstance(name, str) and name for name in names)
            or len(set(names)) != len(names)
        ):
            raise ValueError(f"condition_vector: names={names!r} must be different strings, at least one.")
        mean, std = (tuple(float(value) for value in values) for values in (self.mean, self.std))
        if not (len(mean) == len(std) == len(names) and all(map(math.isfinite, mean + std)) and min(std) > 0):
            raise ValueError(f"condition_vector: mean={mean} and std={std} must be finite, std above 0, one each per name.")
        vars(self).update(names=names, mean=mean, std=std)

    @property
    def class_embed_type(self) -> str:
        """What the UNet's config must have."""
        return "timestep" if len(self.names) == 1 else "identity"

    def encode(self, values: Tensor, width: int) -> Tensor:
        """Values [B, K], NaN where left out, as the UNet's `class_labels`: float32 [B], or [B, width] for several.

        `width` is that of the UNet's time embedding, at least 2 per attribute.
        """
        mean, std = (torch.tensor(moment, dtype=torch.float64, device=values.device) for moment in (self.mean, self.std))
        z = (values - mean) / std
        if len(self.names) == 1:
            return torch.where(z.isnan(), NOT_TOLD, (500 + 125 * z).clamp(0, 1000))[:, 0].float()
        pairs = width // (2 * len(self.names))
        phases = z[:, :, None] * torch.logspace(math.log2(SLOWEST), math.log2(FASTEST), pairs, base=2).to(z)
        features = torch.cat([phases.sin(), phases.cos()], dim=2).nan_to_num(0).flatten(1).float()  # [B, K * 2 * pairs]
        return pad(features, (0, width - features.shape[1]))


class WithConditionImage(torch.nn.Module):
    """A UNet called as (sample, timesteps, condition_image=encoded, ...), the condition joining x_t at its input."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timesteps: Tensor, condition_image: Tensor | None = None, **kwargs: Any) -> Any:
        """Without a condition image [B, input_channels, H, W], it is left out."""
        if condition_image is None:
            missing = self.unet.config.in_channels - sample.shape[1]
            condition_image = sample.new_zeros(len(sample), missing, *sample.shape[2:])
        return self.unet(torch.cat([sample, condition_image.to(sample)], dim=1), timesteps, **kwargs)


def numbers_in_own_precision(unet: Any) -> AbstractContextManager:
    """Within, a UNet reads a number as its condition in the precision of its weights; diffusers (0.42) leaves it in float32."""
    if unet.config.get("class_embed_type") != "timestep" or unet.dtype == torch.float32:
        return nullcontext()
    return unet.class_embedding.register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(layer.linear_1.weight.dtype),))


def own_settings(unet: Any) -> Mapping[str, Any]:
    """What this package keeps in the UNet's config. Raises ValueError if it is no object."""
    settings = unet.config.get(OWN_KEY) or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"{OWN_KEY}={settings!r} in the UNet's config must be a dict; describe_conditions writes it.")
    return settings


def image_condition(unet: Any) -> ImageCondition | None:
    """The UNet's, None if it has none. Raises ValueError for malformed settings, as the following do."""
    return _stored(unet, "condition_image", ImageCondition)


def vector_condition(unet: Any) -> VectorCondition | None:
    return _stored(unet, "condition_vector", VectorCondition)


def value_range(unet: Any) -> ValueRange:
    """What -1 and 1 mean in the units of the data the UNet was trained on."""
    return _stored(unet, "value_range", ValueRange) or ValueRange()


def _stored(unet: Any, name: str, kind: type[Settings]) -> Any:
    stored = own_settings(unet).get(name)
    return None if stored is None else kind.from_json(stored)


def image_channels(unet: Any) -> int:
    """Channels of x_t: those of the UNet's input without those of its condition image."""
    condition = image_condition(unet)
    return unet.config.in_channels - (condition.input_channels if condition else 0)


def embedding_width(unet: Any) -> int:
    """Of the UNet's time embedding."""
    return unet.config.get("time_embedding_dim") or 4 * unet.config.block_out_channels[0]


def check_conditions(unet: Any) -> None:
    """Raise ValueError if the config describes a condition that the UNet cannot have, or has one that it does not describe."""
    vector, channels, embed_type = vector_condition(unet), image_channels(unet), unet.config.get("class_embed_type")
    if channels < 1 or unet.config.get("out_channels", channels) not in (channels, 2 * channels):
        taken = f"{unet.config.in_channels} channels, {unet.config.in_channels - channels} of them for a condition image"
        fix = "it must give as many as are left, or twice; describe_conditions(unet, condition_image=...) sets them apart"
        raise ValueError(f"the UNet takes {taken}, and gives {unet.config.get('out_channels')}; {fix}.")
    if embed_type != (vector and vector.class_embed_type):
        fix = "one number takes 'timestep', several 'identity'; describe_conditions(unet, condition_vector=...) names them"
        numbers = len(vector.names) if vector else 0
        raise ValueError(f"the UNet has class_embed_type={embed_type!r}, and its config names {numbers} numbers; {fix}.")
    if vector and embedding_width(unet) < 2 * len(vector.names):
        raise ValueError(f"{len(vector.names)} attributes need a time embedding of width {2 * len(vector.names)} or more.")
    if len(value_range(unet).low) not in (1, channels):
        raise ValueError(f"the UNet's config has {len(value_range(unet).low)} value ranges for {channels} channels.")
