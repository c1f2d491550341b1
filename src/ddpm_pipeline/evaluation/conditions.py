"""The classes or captions of the data's images: what a conditional model is asked for, and what likelihoods are given."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..conditioning_alpha_ddpm import tokenize
from ..data import ConditionColumns, ImageData
from ..generation.drawing import UNCONDITIONAL, Request
from ..generation.pipelines import Pipeline, condition_of
from ..support.draws import image_indices
from ..support.errors import ConfigError
from .options import ConditionOptions

NAME = "{name}"  # stands for the class name in a caption template


def columns_of(pipe: Pipeline, options: ConditionOptions) -> ConditionColumns:
    """The columns of the data that the model's condition is read from. Raises ConfigError for options that do not fit it."""
    kind = condition_of(pipe)
    unused = {"none": ("label_column", "text_column", "caption_template"), "class": ("text_column", "caption_template")}
    for name in unused.get(kind, ()):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name} does not fit a model whose condition is {kind!r}; drop it.")
    return ConditionColumns(kind, options.label_column, options.text_column)


class DataConditions:
    """The conditions of the data's images, by their indices. Raises ConfigError if the data have none that the model knows."""

    def __init__(self, pipe: Pipeline, data: ImageData, options: ConditionOptions):
        self.pipe, self.data, self.kind, self.template = pipe, data, condition_of(pipe), options.caption_template
        if self.kind == "class":
            self.ids = _ids_of_classes(pipe, data)
        elif self.kind == "text" and data.text_column is None and (self.template is None or data.label_column is None):
            raise ConfigError(
                f"the model takes texts, and no column of {data.name} is read as its captions; name one of {data.columns} with "
                "--text_column, or make captions of class names with --caption_template 'a picture of {name}'."
            )

    def of(self, indices: Sequence[int]) -> list[Any]:
        """The model's class ids, or the captions, of images with these indices: of several captions the first."""
        if self.kind == "class":
            return [self.ids[label] for label in self.data.column(self.data.label_column, indices).tolist()]
        if self.data.text_column is not None:
            captions = self.data.column(self.data.text_column, indices)
            return [caption if isinstance(caption, str) else next(filter(None, caption), "") for caption in captions]
        names = self.data.class_names
        return [
            self.template.replace(NAME, names[label]) for label in self.data.column(self.data.label_column, indices).tolist()
        ]

    @torch.no_grad()
    def inputs(self, indices: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """The same as arguments of the UNet, tensors [B, ...]."""
        if self.kind == "none":
            return {}
        if self.kind == "class":
            return {"class_labels": torch.tensor(self.of(indices))}
        tokens = tokenize(self.pipe.tokenizer, self.of(indices))
        states = self.pipe.text_encoder(**{name: ids.to(self.pipe.device) for name, ids in tokens.items()})[0]
        return {"encoder_hidden_states": states.to(self.pipe.unet.dtype)}

    def request(self, count: int, seed: int, guidance_scale: float) -> Request:
        """A request for images with the conditions of the data, each as often as there, in a random order."""
        if self.kind == "none":
            return UNCONDITIONAL
        values = self.of(image_indices(seed, len(self.data), 0, count))
        return Request({"prompt" if self.kind == "text" else "class_labels": values}, guidance_scale)


def _ids_of_classes(pipe: Pipeline, data: ImageData) -> list[int]:
    """The model's id of each class of the data: that of the same name or, in a model without names, the same id."""
    if data.label_column is None:
        raise ConfigError(
            f"the model takes classes, and {data.name} has no label column that is found automatically; name one of "
            f"{data.columns} with --label_column."
        )
    known, names = {name: label for label, name in pipe.id2label.items()}, data.class_names
    if not known and len(names) <= pipe.unet.config.num_class_embeds:
        return list(range(len(names)))
    if unknown := [name for name in names if name not in known]:
        classes = ", ".join(map(repr, list(known)[:10])) or f"{pipe.unet.config.num_class_embeds} ids without names"
        raise ConfigError(f"{data.name} has the class {unknown[0]!r}, which the model does not know; it knows {classes}.")
    return [known[name] for name in names]
