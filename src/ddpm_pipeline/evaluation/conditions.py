"""The conditions of the data's images: what a conditional model is asked for, what likelihoods are given, and how near samples
come to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..conditioning_alpha_ddpm import tokenize
from ..data import ConditionColumns, ImageData
from ..encoding_alpha_ddpm import WithConditionImage, embedding_width, image_condition, vector_condition
from ..generation.drawing import Request
from ..generation.pipelines import Pipeline, condition_of
from ..support.draws import RandomStream, seeds
from ..support.errors import ConfigError
from ..support.masks import inpainting_masks
from .digits import NUM_CLASSES
from .likeness import likeness
from .options import ConditionOptions

NAME = "{name}"  # stands for the class name in a caption template
FITTING = {  # kinds of conditions by the option that says where they are
    "label_column": {"class", "text"},
    "text_column": {"text"},
    "caption_template": {"text"},
    "condition_column": {"image", "vector"},
}


def columns_of(pipe: Pipeline, options: ConditionOptions) -> ConditionColumns:
    """The columns of the data that the model's condition is read from. Raises ConfigError for options that do not fit it."""
    kind, image, vector = condition_of(pipe), image_condition(pipe.unet), vector_condition(pipe.unet)
    for name, kinds in FITTING.items():
        if getattr(options, name) is not None and not kinds & {*kind.split("+")}:
            raise ConfigError(f"--{name} does not fit a model whose condition is {kind!r}; drop it.")
    column = options.condition_column
    if vector is not None and image is None:
        column = column or ",".join(vector.names)
    if image is not None and image.task is None and column is None:
        raise ConfigError("the model takes condition images; name their column or folder with --condition_column.")
    read = {"condition_column": column, "condition_classes": image.classes if image else None}
    return ConditionColumns(kind, options.label_column, options.text_column, **read)


class DataConditions:
    """The conditions of the data's images, by their indices. Raises ConfigError if the data have none that the model knows."""

    def __init__(self, pipe: Pipeline, data: ImageData, options: ConditionOptions, seed: int):
        self.pipe, self.data, self.kinds, self.template = pipe, data, condition_of(pipe).split("+"), options.caption_template
        self.image, self.vector = image_condition(pipe.unet), vector_condition(pipe.unet)
        if "class" in self.kinds:
            self.ids = _ids_of_classes(pipe, data)
        elif "text" in self.kinds and data.text_column is None and (self.template is None or data.label_column is None):
            raise ConfigError(
                f"the model takes texts, and no column of {data.name} is read as its captions; name one of {data.columns} with "
                "--text_column, or make captions of class names with --caption_template 'a picture of {name}'."
            )
        if self.vector is not None and (unknown := [name for name in self.vector.names if name not in data.vector_names]):
            told = ", ".join(data.vector_names)
            raise ConfigError(f"the model takes the number {unknown[0]!r}, and {data.name} has {told}; see --condition_column.")
        partners = None if self.image is None or self.image.task else data.condition_images
        if partners is not None and partners.channels != self.image.channels:
            found = f"{self.image.channels} channels, and those of {data.name} have {partners.channels}"
            raise ConfigError(f"the model takes condition images of {found}; name others with --condition_column.")
        if self.image is not None and self.image.task == "inpaint":
            self.mask_seeds = seeds(seed, RandomStream.INPAINTING_MASK, 0, len(data))

    @property
    def network(self) -> nn.Module:
        """What predicts the noise, called with `inputs`."""
        return self.pipe.unet if self.image is None else WithConditionImage(self.pipe.unet)

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Of several captions of an image the first."""
        if self.data.text_column is not None:
            captions = self.data.column(self.data.text_column, indices)
            return [caption if isinstance(caption, str) else next(filter(None, caption), "") for caption in captions]
        names = self.data.class_names
        return [self.template.replace(NAME, names[label]) for label in self.labels(indices)]

    def labels(self, indices: Sequence[int]) -> list[int]:
        """The data's own."""
        return self.data.column(self.data.label_column, indices).tolist()

    def classes(self, indices: Sequence[int]) -> list[int]:
        """The model's ids."""
        return [self.ids[label] for label in self.labels(indices)]

    def numbers(self, indices: Sequence[int]) -> torch.Tensor:
        """In the order of the model's names, float32 [B, K]; NaN where one is not told."""
        return self.data.vector(indices)[:, [self.data.vector_names.index(name) for name in self.vector.names]]

    def images(self, indices: Sequence[int]) -> torch.Tensor:
        """Condition images as they are stored, or what they are made of, [B, k, H, W]."""
        return self.data.pixels(indices) if self.image.task else self.data.condition_images.pixels(self.data.rows_of(indices))

    def masks(self, indices: Sequence[int]) -> torch.Tensor | None:
        """Where images to inpaint are unknown, bool [B, 1, H, W]: of each image always the same."""
        return inpainting_masks(self.mask_seeds[indices], self.data.size) if self.image.task == "inpaint" else None

    @torch.no_grad()
    def inputs(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The conditions as arguments of `network`, tensors [B, ...]."""
        found = {}
        if "class" in self.kinds:
            found["class_labels"] = torch.tensor(self.classes(indices))
        if self.vector is not None:
            found["class_labels"] = self.vector.encode(self.numbers(indices), embedding_width(self.pipe.unet))
        if "text" in self.kinds:
            tokens = tokenize(self.pipe.tokenizer, self.captions(indices))
            states = self.pipe.text_encoder(**{name: ids.to(self.pipe.device) for name, ids in tokens.items()})[0]
            found["encoder_hidden_states"] = states.to(self.pipe.unet.dtype)
        if self.image is not None:
            found["condition_image"] = self.image.encode(self.images(indices), self.masks(indices))
        return found

    def request(self, indices: Sequence[int], guidance_scale: float) -> Request:
        """A request for an image with the conditions of each of these."""
        arguments: dict[str, Sequence[Any]] = {}
        if "class" in self.kinds:
            arguments["class_labels"] = self.classes(indices)
        if self.vector is not None:
            arguments["condition_vector"] = self.numbers(indices).tolist()
        if "text" in self.kinds:
            arguments["prompt"] = self.captions(indices)
        if self.image is not None:
            arguments["condition_image"] = _OneByOne(self._for_the_pipeline, indices)
            if self.image.task == "inpaint":
                arguments["condition_mask"] = _OneByOne(self.masks, indices)
        return Request(arguments, guidance_scale)

    def _for_the_pipeline(self, indices: Sequence[int]) -> torch.Tensor:
        """Condition images; floats, which it takes for fractions of white, as such."""
        images = self.images(indices)
        return self.image.value_range.normalize(images) / 2 + 0.5 if images.is_floating_point() else images

    def followed(self, pixels: torch.Tensor, indices: Sequence[int], digits: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """How near samples, in own units [B, C, H, W], come to the images whose conditions were asked for, [B] each: PSNR and
        SSIM for condition images, also of bicubic interpolation where these are smaller, and whether the `digits` that a
        classifier sees, [B] or None, are those of the images. Empty for unconditional models.
        """
        found = {}
        if self.image is not None:
            images, samples = map(self.data.value_range.normalize, (self.data.pixels(indices), pixels))
            found = likeness(samples, images)
            if self.image.factor:
                bicubic = likeness(self.inputs(indices)["condition_image"], images)
                found |= {f"bicubic_{name}": values for name, values in bicubic.items()}
        if digits is not None and self.kinds != ["none"] and self.data.class_names == list(map(str, range(NUM_CLASSES))):
            found["class_accuracy"] = (digits == torch.tensor(self.labels(indices))).double()
        return found


@dataclass(frozen=True)
class _OneByOne(Sequence):
    """Images of the data, each read when it is asked for."""

    read: Callable[[Sequence[int]], torch.Tensor]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self.read([self.indices[place]])[0]


def _ids_of_classes(pipe: Pipeline, data: ImageData) -> list[int]:
    """The model's id of each class of the data: that of the same name or, in a model without names, the same id."""
    if data.label_column is None:
        raise ConfigError(
            f"the model takes classes, and {data.name} has no label column that is found automatically; name it with "
            f"--label_column. Its columns besides images: {', '.join(data.columns) or 'none'}."
        )
    known, names = {name: label for label, name in pipe.id2label.items()}, data.class_names
    if not known and len(names) <= pipe.unet.config.num_class_embeds:
        return list(range(len(names)))
    if unknown := [name for name in names if name not in known]:
        classes = ", ".join(map(repr, list(known)[:10])) or f"{pipe.unet.config.num_class_embeds} ids without names"
        raise ConfigError(f"{data.name} has the class {unknown[0]!r}, which the model does not know; it knows {classes}.")
    return [known[name] for name in names]
