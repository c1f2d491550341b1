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

UNET = "unet/config.json"
OWN_KEY = "_alpha_ddpm"  # of our settings in the configs of UNet and scheduler
DEPTHS = {"uint8": "8-bit integers", "uint16": "16-bit integers", "int16": "signed 16-bit integers", "float32": "floats"}
PICTURES = ((1, "uint8"), (3, "uint8"), (4, "uint8"), (1, "uint16"))  # channels and types of the files that PIL opens


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
    own_units: bool = False  # the condition is floats, which a call takes in their units with `denormalize` only


NOT_TOLD = " the model loads, but it cannot be told {}, so it cannot sample images"
NO_IMAGE = " the model loads, but it cannot be told a condition image, and what it samples without means nothing"
NO_VARIANCE = " the model loads, but diffusers' `IFPipeline` samples with a learned variance only, which this model lacks"
NO_SAMPLER = " the model loads, but diffusers' `DDPMPipeline` cannot sample with the {} that it is saved with"
# Schedulers that it can, which need no scaling of the network's input, and take a generator
OF_PLAIN = ("DDPM", "DDIM", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "LCM", "TCD")
UNCONDITIONAL = Kind()
CLASS = Kind(" class-conditional", "class_labels=[0], guidance_scale=2.0", why_plain_cannot_sample=NOT_TOLD.format("a class"))
TEXT = Kind(
    " text-conditional", '"what it should show", guidance_scale=2.0', "AlphaDDPMTextToImagePipeline", "AlphaDDPMTextBlocks",
    "text-to-image", "AutoPipelineForText2Image",
)  # fmt: skip
FIXED_TEXT = replace(TEXT, why_plain_cannot_sample=NO_VARIANCE)


@dataclass(frozen=True)
class ModelFacts:
    """A model by its configs."""

    kind: Kind
    schedule: Mapping[str, Any]
    total: int  # timesteps
    size: tuple[int | None, int | None]  # height and width
    channels: int  # of the images, without those of a condition image
    values: str  # a sentence on the values of the images; "" for 8 bits from 0 to 255
    fitted: Sequence[int] = ()  # numbers of steps that a sampler was fitted for, ascending

    @property
    def images(self) -> str:
        """Such as "RGB 32x48", height first."""
        colours = {1: "grey", 3: "RGB", 4: "RGBA"}.get(self.channels, f"{self.channels}-channel")
        return f"{colours} {self.size[0]}x{self.size[1]}" if all(self.size) else colours

    def call(self, arguments: str, own_units: bool = False) -> str:
        """Code of a call that samples an image, or an array of what PIL has no pictures of, by the fitted sampler of most steps
        or else in 100 steps at most.
        """
        return self._call(arguments, max(self.fitted, default=min(100, self.total)), own_units or self.kind.own_units)

    @property
    def few_steps(self) -> str:
        """A sentence on the fitted samplers; "" without."""
        if not self.fitted:
            return ""
        lengths = " or ".join(filter(None, [", ".join(map(str, self.fitted[:-1])), str(self.fitted[-1])]))
        used = f"`num_inference_steps` of {lengths} uses a deterministic sampler that was fitted to this model"
        return f"{used}; without it, that of {self.fitted[-1]} steps is used. {self.total} steps are the full ancestral chain."

    def plain_call(self, arguments: str) -> str:
        """The same for diffusers alone, whose text pipeline takes the size of square images only from the model."""
        height, width = self.size
        size = f", height={height}, width={width}" if self.kind.plain_class == TEXT.plain_class and height != width else ""
        # DDPMPipeline takes 1000 steps by default, however many there are
        return "" if self.kind.why_plain_cannot_sample else self._call(arguments + size, self.total)

    def _call(self, arguments: str, steps: int, own_units: bool = False) -> str:
        how = f"{arguments}{', ' if arguments else ''}num_inference_steps={steps}"
        if own_units or self.channels not in (1, 3, 4):
            what, units = ("values", ", denormalize=True") if own_units else ("images", "")
            return f'{what} = pipe({how}, output_type="np"{units}).images  # [1, height, width, channels]'
        return f"image = pipe({how}).images[0]"


def facts_of(model: "DiffusionPipeline | Path") -> ModelFacts:
    """Of a pipeline, or of the folder of one. Raises ValueError if it is none, or its settings are malformed."""
    if isinstance(model, Path):
        index, unet, schedule = (read_object(model / name) for name in (INDEX, UNET, "scheduler/scheduler_config.json"))
    else:
        index, unet, schedule = json.loads(model.to_json_string()), model.unet.config, model.scheduler.config
    try:
        return _facts(index, unet, schedule)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"its settings ({OWN_KEY}, sample_size, in_channels) are malformed ({type(error).__name__}: {error})"
        raise ValueError(f"{model / UNET if isinstance(model, Path) else UNET}: {problem}; save the pipeline again.") from error


def _facts(index: Mapping[str, Any], unet: Mapping[str, Any], schedule: Mapping[str, Any]) -> ModelFacts:
    own, size, kind = unet.get(OWN_KEY) or {}, unet.get("sample_size"), UNCONDITIONAL
    channels, image, values = int(unet.get("in_channels", 3)), own.get("condition_image"), own.get("value_range")
    sampler = (index.get("scheduler") or ("", "DDPMScheduler"))[1]
    if "text_encoder" in index:
        kind = TEXT if schedule.get("variance_type") in ("learned", "learned_range") else FIXED_TEXT
    elif vector := own.get("condition_vector"):
        told = {name: float(f"{mean:.4g}") for name, mean in zip(vector["names"], vector["mean"], strict=True)}
        example, condition = f"condition_vector={told}, guidance_scale=2.0", f"It is conditioned on numbers: {', '.join(told)}."
        kind = Kind(" conditional", example, why_plain_cannot_sample=NOT_TOLD.format("numbers"), condition=condition)
    elif unet.get("num_class_embeds") or unet.get("class_embed_type"):
        kind = CLASS
    elif not sampler.startswith(OF_PLAIN):
        kind = replace(UNCONDITIONAL, why_plain_cannot_sample=NO_SAMPLER.format(sampler))
    if image:
        kind, channels = _with_image(kind, image), channels - _encoded_channels(image)
    if "text_encoder" not in index and not _guidable(own, unet):
        kind = replace(kind, example=kind.example.removesuffix("guidance_scale=2.0").removesuffix(", "))
    total, (height, width) = schedule.get("num_train_timesteps", 1000), size if isinstance(size, list | tuple) else (size, size)
    of_ours = (schedule.get(OWN_KEY) or {}) if sampler == "DDPMScheduler" else {}  # other schedulers only keep it
    fitted = sorted(map(int, of_ours.get("fitted_samplers") or ()))
    return ModelFacts(kind, schedule, int(total), (height, width), channels, _values(values, "Their") if values else "", fitted)


def _guidable(own: Mapping[str, Any], unet: Mapping[str, Any]) -> bool:
    """Whether the model was trained without its condition too and, of classes, has an embedding for none of them."""
    classes, names = unet.get("num_class_embeds") or 0, own.get("class_names") or ()
    return own.get("condition_dropout") != 0 and (not classes or 0 < len(names) < classes)


def _encoded_channels(image: Mapping[str, Any]) -> int:
    """Those of a condition image at the UNet's input."""
    return 1 if image["task"] == "gray" else image["classes"] or image["channels"] + (image["task"] == "inpaint")


def _with_image(kind: Kind, image: Mapping[str, Any]) -> Kind:
    """A kind of model that takes a condition image as well."""
    name, _, factor = (image["task"] or "").partition(":")
    what = {
        "downscale": f"the image at 1/{factor} of its height and width",
        "gray": "the image in grey",
        "inpaint": "the image with a part left out",
    }.get(name, f"an image of {image['channels']} channel{'s' * (image['channels'] > 1)}")
    what = f"a label map of classes 0 to {image['classes'] - 1}" if image["classes"] else what
    values = image["value_range"]
    is_picture = image["classes"] or (image["channels"], values["dtype"]) in PICTURES
    opened = 'Image.open("condition.png")' if is_picture else 'np.load("condition.npy")'
    setup, example = f"condition_image = {opened}  # {what}", "condition_image=condition_image"
    if name == "inpaint":
        setup += '\ncondition_mask = Image.open("mask.png")  # white where it is left out'
        example += ", condition_mask=condition_mask"
    imports = {"np.": "import numpy as np", "Image.": "from PIL import Image"}
    said = "" if image["classes"] or name or values["dtype"] == "uint8" else _values(values, "Its")
    return replace(
        kind,
        conditional=kind.conditional or " conditional",
        example=f"{example}, {kind.example or 'guidance_scale=2.0'}",
        our_class="AlphaDDPMImageToImagePipeline",
        our_blocks="AlphaDDPMImageToImageBlocks",
        pipeline_tag="image-to-image",
        why_plain_cannot_sample=NO_IMAGE,
        condition=" ".join(filter(None, (kind.condition, f"The condition image is {what}.", said))),
        imports="\n".join(line for used, line in imports.items() if used in setup),
        setup=setup,
        own_units=values["dtype"] == "float32" and not image["classes"],
    )


def _values(values: Mapping[str, Any], whose: str) -> str:
    each = ", each channel in a range of its own" if len(values["low"]) > 1 else ""
    return f"{whose} values are {DEPTHS[values['dtype']]} from {min(values['low']):g} to {max(values['high']):g}{each}."
