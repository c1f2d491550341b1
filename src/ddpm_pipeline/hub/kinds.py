"""What the configs of a model say of it, for its card: the kind of model, its images and their values, and calls that sample.

Imports the standard library alone. Called by `card`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import INDEX, read_object

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OWN_KEY = "_alpha_ddpm"  # of our settings in a UNet's config
DEPTHS = {"uint8": "8-bit integers", "uint16": "16-bit integers", "int16": "signed 16-bit integers", "float32": "floats"}


@dataclass(frozen=True)
class Kind:
    """What the card of one kind of model says."""

    conditional: str = ""
    example: str = ""  # arguments of a call
    our_class: str = "AlphaDDPMPipeline"
    our_blocks: str = "AlphaDDPMBlocks"
    pipeline_tag: str = "unconditional-image-generation"
    plain_class: str = "DiffusionPipeline"
    why_plain_cannot_sample: str = ""
    condition: str = ""  # a sentence on what the condition is
    imports: str = ""  # of the example, as code, and
    setup: str = ""  # what it names


NO_CLASS = " the model loads, but it cannot be told a class, so it cannot sample images"
NO_NUMBERS = " the model loads, but it cannot be told numbers, so it cannot sample images"
NO_IMAGE = " the model loads, but it cannot be told a condition image, and what it samples without means nothing"
NO_VARIANCE = " the model loads, but diffusers' `IFPipeline` samples with a learned variance only, which this model lacks"
UNCONDITIONAL = Kind()
CLASS = Kind(" class-conditional", "class_labels=[0], guidance_scale=2.0", why_plain_cannot_sample=NO_CLASS)
TEXT = Kind(
    " text-conditional", '"what it should show", guidance_scale=2.0', "AlphaDDPMTextToImagePipeline", "AlphaDDPMTextBlocks",
    "text-to-image", "AutoPipelineForText2Image",
)  # fmt: skip
FIXED_TEXT = replace(TEXT, why_plain_cannot_sample=NO_VARIANCE)


@dataclass(frozen=True)
class ModelFacts:
    """A model by its configs."""

    kind: Kind
    unet: Mapping[str, Any]
    schedule: Mapping[str, Any]

    @property
    def channels(self) -> int:
        """Of the images, without those of a condition image."""
        beside = (self.unet.get(OWN_KEY) or {}).get("condition_image")
        task = beside and beside["task"]
        encoded = 1 if task == "gray" else beside["classes"] or beside["channels"] + (task == "inpaint") if beside else 0
        return self.unet.get("in_channels", 3) - encoded

    @property
    def images(self) -> str:
        """Such as "RGB 32x48", height first."""
        colours, size = {1: "grey", 3: "RGB", 4: "RGBA"}.get(self.channels, f"{self.channels}-channel"), self._size
        return f"{colours} {size[0]}x{size[1]}" if all(size) else colours

    @property
    def values(self) -> str:
        """A sentence on the values of the images; "" for 8 bits from 0 to 255."""
        found = (self.unet.get(OWN_KEY) or {}).get("value_range")
        return _values(found, "Their values are") if found else ""

    def call(self, arguments: str, steps: int, own_units: bool = False) -> str:
        """Code of a call that samples an image, or an array of what PIL has no pictures of."""
        how = f"{arguments}{', ' if arguments else ''}num_inference_steps={steps}"
        if own_units or self.channels not in (1, 3, 4):
            what, units = ("values", ", denormalize=True") if own_units else ("images", "")
            return f'{what} = pipe({how}, output_type="np"{units}).images  # [1, height, width, channels]'
        return f"image = pipe({how}).images[0]"

    def plain_call(self, arguments: str, steps: int) -> str:
        """The same for diffusers alone, whose text pipeline takes the size of square images only from the model."""
        height, width = self._size
        size = f", height={height}, width={width}" if self.kind.plain_class == TEXT.plain_class and height != width else ""
        return "" if self.kind.why_plain_cannot_sample else self.call(arguments + size, steps)

    @property
    def _size(self) -> Sequence[int | None]:
        """Height and width."""
        size = self.unet.get("sample_size")
        return size if isinstance(size, list | tuple) else (size, size)


def facts_of(model: "DiffusionPipeline | Path") -> ModelFacts:
    """Of a pipeline, or of the folder of one. Raises ValueError if it is none."""
    if isinstance(model, Path):
        files = (INDEX, "unet/config.json", "scheduler/scheduler_config.json")
        index, unet, schedule = (read_object(model / name) for name in files)
    else:
        index, unet, schedule = json.loads(model.to_json_string()), model.unet.config, model.scheduler.config
    if "text_encoder" in index:
        learned = schedule.get("variance_type") in ("learned", "learned_range")
        return ModelFacts(TEXT if learned else FIXED_TEXT, unet, schedule)
    kind = CLASS if unet.get("num_class_embeds") or unet.get("class_embed_type") else UNCONDITIONAL
    own = unet.get(OWN_KEY) or {}
    if vector := own.get("condition_vector"):
        told = {name: float(f"{mean:.4g}") for name, mean in zip(vector["names"], vector["mean"], strict=True)}
        example, condition = f"condition_vector={told}, guidance_scale=2.0", f"It is conditioned on numbers: {', '.join(told)}."
        kind = Kind(" conditional", example, why_plain_cannot_sample=NO_NUMBERS, condition=condition)
    return ModelFacts(_with_image(kind, image) if (image := own.get("condition_image")) else kind, unet, schedule)


def _with_image(kind: Kind, image: Mapping[str, Any]) -> Kind:
    """A kind of model that takes a condition image as well."""
    name, _, factor = (image["task"] or "").partition(":")
    what = {
        "downscale": f"the image at 1/{factor} of its height and width",
        "gray": "the image in grey",
        "inpaint": "the image with a part left out",
    }.get(name, f"an image of {image['channels']} channel{'s' * (image['channels'] > 1)}")
    what = f"a label map of classes 0 to {image['classes'] - 1}" if image["classes"] else what
    depth = image["value_range"]["dtype"]
    is_picture = image["classes"] or (image["channels"], depth) in ((1, "uint8"), (3, "uint8"), (4, "uint8"), (1, "uint16"))
    reading = 'Image.open("condition.png")' if is_picture else 'np.load("condition.npy")'
    setup, example = f"condition_image = {reading}  # {what}", "condition_image=condition_image"
    if name == "inpaint":
        setup += '\ncondition_mask = Image.open("mask.png")  # white where it is left out'
        example += ", condition_mask=condition_mask"
    values = "" if image["classes"] or name or depth == "uint8" else _values(image["value_range"], "Its values are")
    return replace(
        kind,
        conditional=" conditional",
        example=f"{example}, {kind.example or 'guidance_scale=2.0'}",
        our_class="AlphaDDPMImageToImagePipeline",
        our_blocks="AlphaDDPMImageToImageBlocks",
        pipeline_tag="image-to-image",
        why_plain_cannot_sample=NO_IMAGE,
        condition=" ".join(filter(None, (kind.condition, f"The condition image is {what}.", values))),
        imports="from PIL import Image" if is_picture else "import numpy as np",
        setup=setup,
    )


def _values(values: Mapping[str, Any], begin: str) -> str:
    each = ", each channel in a range of its own" if len(values["low"]) > 1 else ""
    return f"{begin} {DEPTHS[values['dtype']]} from {min(values['low']):g} to {max(values['high']):g}{each}."
