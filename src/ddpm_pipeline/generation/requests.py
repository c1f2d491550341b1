"""What a model is asked for, from the options of `generate`: classes, prompts, numbers and condition images, each in turn."""

from pathlib import Path
from typing import Any

from ..encoding_alpha_ddpm import image_condition, vector_condition
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from .condition_images import ConditionImages
from .drawing import UNCONDITIONAL, Request
from .options import GenerationOptions, RequestOptions
from .pipelines import Pipeline, condition_of

OPTIONS = {"class_labels": "class", "prompts": "text", "condition_vector": "vector"}  # and kinds
OPTIONS |= {"condition_images": "image", "condition_masks": "image"}


def request_of(pipe: Pipeline, options: GenerationOptions) -> tuple[Request, dict[str, Any]]:
    """What the model is asked for, and the same as JSON values: what the options say in turn, or all classes.

    Raises ConfigError if the options do not fit the model, or lack what it needs.
    """
    asked, model, kind = options.request, options.sampling.model, condition_of(pipe)
    kinds, scale = kind.split("+"), options.sampling.guidance_scale
    for name, fitting in OPTIONS.items():
        if getattr(asked, name) is not None and fitting not in kinds:
            raise ConfigError(f"--{name} does not fit --model {model}, whose condition is {kind!r}; drop it.")
    if kind == "none":
        if scale != 1:
            raise ConfigError(f"--guidance_scale {scale} needs a conditional model, which --model {model} is not.")
        return UNCONDITIONAL, {}
    arguments: dict[str, Any] = {}
    if "text" in kinds:
        arguments["prompt"] = _prompts(asked.prompts)
    if "class" in kinds:
        arguments["class_labels"] = _labels(pipe, asked.class_labels)
    if "vector" in kinds:
        arguments["condition_vector"] = _vectors(pipe, asked.condition_vector)
    told = {**arguments, "guidance_scale": scale}
    if "image" in kinds:
        images = _images(pipe, asked)
        told |= {name: some.names for name, some in images.items()}
        told["condition_images"] = [some.data.fingerprint for some in images.values()]
        arguments |= images
    return Request(arguments, scale), told


def _labels(pipe: Pipeline, given: str | None) -> list[int]:
    names = list(pipe.id2label.values())
    classes = range(len(names) or pipe.unet.config.num_class_embeds)
    words = [*classes] if given is None else [word.strip() for word in given.split("|")]
    try:
        return pipe._label_ids([int(word) if word not in names and str(word).isdecimal() else word for word in words])
    except ValueError as error:
        raise ConfigError(f"--{error}") from error


def _vectors(pipe: Pipeline, given: str | None) -> list[dict[str, float]]:
    """Numbers by their names, without those that are left out."""
    condition = vector_condition(pipe.unet)
    if given is None:
        example = ",".join(f"{mean:.4g}" for mean in condition.mean)
        raise ConfigError(
            f"--condition_vector is required for a model of {', '.join(condition.names)}: numbers in this order, images "
            f"separated by '|', an empty place where one is left out; the means of its data are {example}."
        )
    try:
        rows = [[float(word) if word.strip() else None for word in words.split(",")] for words in given.split("|")]
        values = pipe._vectors(rows).tolist()
    except ValueError as error:
        needed = f"{','.join(condition.names)} of each image in finite numbers, with '|' between images"
        raise ConfigError(f"--condition_vector {given!r} must be {needed}.") from error
    return [{name: value for name, value in zip(condition.names, row, strict=True) if value == value} for row in values]


def _images(pipe: Pipeline, asked: RequestOptions) -> dict[str, ConditionImages]:
    """Condition images and, for inpainting, masks of what is unknown, by the pipeline's arguments."""
    task = image_condition(pipe.unet).task
    if asked.condition_images is None:
        raise ConfigError("--condition_images is required for a model of condition images: a folder of them.")
    if (task == "inpaint") != (asked.condition_masks is not None):
        needed = "is required to inpaint: a folder of masks, white where an image is unknown"
        raise ConfigError(f"--condition_masks {needed if task == 'inpaint' else 'is for models that inpaint; drop it'}.")
    found = {"condition_image": ConditionImages(pipe, asked.condition_images, "--condition_images")}
    if asked.condition_masks is not None:
        found["condition_mask"] = ConditionImages(pipe, asked.condition_masks, "--condition_masks", as_masks=True)
        names = [[Path(name).stem for name in some.names] for some in found.values()]
        if min(map(len, names)) > 1 and names[0] != names[1]:
            alone = sorted({*names[0]} ^ {*names[1]}) or names[1]
            fix = "give a mask the name of its image, or one mask for all"
            counts = f"{len(names[1])} masks for {len(names[0])} images"
            raise ConfigError(
                f"--condition_masks {asked.condition_masks}: {counts}, and the names do not match, such as {alone[0]!r}; {fix}."
            )
    return found


def _prompts(given: str | None) -> list[str]:
    if given is None:
        raise ConfigError("--prompts is required for a text-to-image model: prompts separated by '|', or a .txt file.")
    try:
        lines = Path(given).read_text("utf-8-sig").splitlines() if given.endswith(".txt") else given.split("|")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {given} cannot be read as UTF-8: {describe_exception(error)}") from error
    prompts = [line.strip() for line in lines if line.strip() or not given.endswith(".txt")]
    if not prompts:
        raise ConfigError(f"--prompts {given} holds no prompts; write one per line.")
    return prompts
