"""Sampling in bulk: `generate(GenerationOptions(model="ddpm-digits", output_dir="images", num_images=50_000))`.

Image i is a function of the model, the sampler, what is asked for, the seed and i. Batches are those of the numbers, whichever
are missing and whatever the number of processes, so that a run that was stopped continues with the same bytes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..data.images import array_to_image
from ..pictures_alpha_ddpm import PIL_MODES
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from ..support.pictures import save_picture
from ..support.provenance import weights_digest
from .drawing import UNCONDITIONAL, Request, sample_uint8, step_bar
from .folder import check_still_there, image_path, prepare, to_parquet
from .options import GenerationOptions
from .pipelines import Pipeline, condition_of, load_pipeline, scheduler_for, steps_of


def generate(options: GenerationOptions) -> Path:
    """Sample the images that the folder lacks, and return the folder.

    Raises ConfigError for a model, sampler, request or folder that cannot be used.
    """
    accelerator, sampling, output = Accelerator(), options.sampling, options.output
    if sampling.num_cpu_threads:
        torch.set_num_threads(sampling.num_cpu_threads)
    pipe = load_pipeline(sampling.model).to(accelerator.device)
    pipe.scheduler = scheduler_for(pipe, sampling.scheduler)
    steps, request = steps_of(pipe.scheduler, sampling.num_inference_steps), request_of(pipe, options)
    channels, size = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    if channels not in PIL_MODES:
        raise ConfigError(f"--model {sampling.model} samples {channels} channels; PNG files hold 1, 3 or 4.")
    folder, count, todo = Path(output.output_dir), output.num_images, [None]
    if accelerator.is_main_process:
        kind = PIL_MODES[channels], (size, size) if isinstance(size, int) else tuple(size)[::-1]
        todo = [prepare(folder, count, _settings(pipe, sampling.seed, steps, request), kind)]
    broadcast_object_list(todo)  # one list, since files appear while other processes still look
    if isinstance(todo[0], str):
        raise ConfigError(todo[0])
    missing = set(todo[0])
    if accelerator.is_main_process:
        print(f"{count - len(missing)} of {count} images exist already; {steps} steps per image", file=sys.stderr)
    mine = _share(missing, count, sampling.batch_size, accelerator)
    with step_bar(pipe, len(mine), steps, bool(missing) and accelerator.is_main_process) as shown:
        for batch in mine:
            images = sample_uint8(pipe, batch, sampling.seed, steps, request, **shown)
            check_still_there(folder)
            for number, image in zip(batch, images, strict=True):
                if number in missing:
                    save_picture(array_to_image(image.permute(1, 2, 0).numpy()), image_path(folder, number))
    accelerator.wait_for_everyone()
    if output.format == "parquet" and accelerator.is_main_process:
        to_parquet(folder, count)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def request_of(pipe: Pipeline, options: GenerationOptions) -> Request:
    """What the model is asked for: the classes or prompts of the options in turn, or all classes. Raises ConfigError if the
    options do not fit the model.
    """
    asked, scale, kind = options.request, options.sampling.guidance_scale, condition_of(pipe)
    for name, fitting in (("class_labels", "class"), ("prompts", "text")):
        if getattr(asked, name) is not None and kind != fitting:
            raise ConfigError(f"--{name} does not fit --model {options.sampling.model}, whose condition is {kind!r}; drop it.")
    if kind == "text":
        return Request({"prompt": _prompts(asked.prompts)}, scale)
    if kind == "class":
        names = list(pipe.id2label.values())
        classes = range(len(names) or pipe.unet.config.num_class_embeds)
        words = [*classes] if asked.class_labels is None else [word.strip() for word in asked.class_labels.split("|")]
        labels = [int(word) if word not in names and str(word).isdecimal() else word for word in words]
        try:
            return Request({"class_labels": pipe._label_ids(labels)}, scale)
        except ValueError as error:
            raise ConfigError(f"--class_labels {asked.class_labels}: {error}") from error
    if scale != 1:
        raise ConfigError(f"--guidance_scale {scale} needs a conditional model, which --model {options.sampling.model} is not.")
    return UNCONDITIONAL


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


def _settings(pipe: Pipeline, seed: int, steps: int, request: Request) -> dict[str, Any]:
    """What the bytes of the images depend on, as it is kept beside them."""
    settings = {
        "weights": weights_digest(pipe.unet),
        "scheduler": json.loads(pipe.scheduler.to_json_string()),
        "num_inference_steps": steps,
        "seed": seed,
    }
    if request.arguments:
        values = {name: list(some) for name, some in request.arguments.items()}
        settings |= {**values, "guidance_scale": request.guidance_scale}
    if condition_of(pipe) == "text":
        settings["text_encoder"] = weights_digest(pipe.text_encoder)
    return settings


def _share(missing: set[int], count: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """This process's share of the batches of 0..count-1 in which an image is missing."""
    starts = sorted({number // batch_size * batch_size for number in missing})
    batches = [range(start, min(start + batch_size, count)) for start in starts]
    return batches[accelerator.process_index :: accelerator.num_processes]
