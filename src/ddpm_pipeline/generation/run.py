"""Sampling in bulk: `generate(GenerationOptions(model="ddpm-digits", output_dir="images", num_images=50_000))`.

Image i is a function of the model, the sampler, what is asked for, the seed and i. Batches are those of the numbers, whichever
are missing and whatever the number of processes, so that a run that was stopped continues with the same bytes.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..encoding_alpha_ddpm import value_range
from ..support.atomic import write_text
from ..support.errors import ConfigError
from ..support.pictures import BY_DEFAULT, Display, grid, save_picture
from ..support.provenance import weights_digest
from ..support.sharing import forgotten_accelerator
from .drawing import sample_values, step_bar
from .files import ImageFiles
from .folder import check_still_there, prepare, to_parquet
from .options import GenerationOptions, OutputOptions
from .pipelines import Pipeline, condition_of, load_pipeline, scheduler_for, steps_of
from .requests import request_of

PREVIEWED = 64  # images in preview.png


@forgotten_accelerator()
def generate(options: GenerationOptions) -> Path:
    """Sample the images that the folder lacks, and return the folder.

    Raises ConfigError for a model, sampler, request or folder that cannot be used.
    """
    accelerator, sampling, output = Accelerator(), options.sampling, options.output
    if sampling.num_cpu_threads:
        torch.set_num_threads(sampling.num_cpu_threads)
    pipe = load_pipeline(sampling.model).to(accelerator.device)
    pipe.scheduler = scheduler_for(pipe, sampling.scheduler)
    steps = steps_of(pipe.scheduler, sampling.num_inference_steps)
    with accelerator.main_process_first():  # the others find its cache of condition images
        request, told = request_of(pipe, options)
    files, display = _files_of(pipe, output)
    folder, count, todo = Path(output.output_dir), output.num_images, [None]
    if accelerator.is_main_process:
        todo = [prepare(folder, count, _settings(pipe, sampling.seed, steps) | told, files)]
    broadcast_object_list(todo)  # one list, since files appear while other processes still look
    if isinstance(todo[0], str):
        raise ConfigError(todo[0])
    missing = set(todo[0])
    if accelerator.is_main_process:
        print(f"{count - len(missing)} of {count} images exist already; {steps} steps per image", file=sys.stderr)
    mine = _share(missing, count, sampling.batch_size, accelerator)
    with step_bar(len(mine), steps, bool(missing) and accelerator.is_main_process) as shown:
        for batch in mine:
            images = sample_values(pipe, batch, sampling.seed, steps, request, **shown)
            check_still_there(folder)
            for number, image in zip(batch, images, strict=True):
                if number in missing:
                    files.write(image, files.path(folder, number))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(folder, count, files, display)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _files_of(pipe: Pipeline, output: OutputOptions) -> tuple[ImageFiles, Display | None]:
    """The files, and how a preview shows their images, which no viewer shows as they are. Raises ConfigError."""
    values, (_, *shape) = value_range(pipe.unet), pipe._shape(1)
    files = ImageFiles(output.format, tuple(shape), values)
    try:
        display = Display.parse(output.preview_channels, values.dtype != "uint8")
        display.words(files.shape[0])
    except ValueError as error:
        raise ConfigError(f"--preview_channels {error}.") from error
    return files, None if files.are_pictures and display == BY_DEFAULT else display


def _finish(folder: Path, count: int, files: ImageFiles, display: Display | None) -> None:
    """preview.png of the first images, if they are displayed, and preview.txt that says how; the parquet file, if asked for."""
    paths = [files.path(folder, number) for number in range(min(count, PREVIEWED))]
    if display is not None and all(path.is_file() for path in paths):  # else they are in a parquet file already
        images = np.stack([*map(files.read, paths)])
        x = files.value_range.normalize(torch.from_numpy(images))
        save_picture(grid(x / 2 + 0.5, display=display), folder / "preview.png")
        if words := display.words(files.shape[0]):
            print(f"preview.png shows {words}", file=sys.stderr)
            write_text(folder / "preview.txt", f"shown: {words}\n")
    if files.format == "parquet":
        to_parquet(folder, count, files)


def _settings(pipe: Pipeline, seed: int, steps: int) -> dict[str, Any]:
    """What the bytes of the images depend on, besides what is asked for, as it is kept beside them."""
    settings = {
        "weights": weights_digest(pipe.unet),
        # with the name of its own class, where what we save names stock's
        "scheduler": json.loads(pipe.scheduler.to_json_string()) | {"_class_name": type(pipe.scheduler).__name__},
        "num_inference_steps": steps,
        "seed": seed,
    }
    if condition_of(pipe) == "text":
        settings["text_encoder"] = weights_digest(pipe.text_encoder)
    return settings


def _share(missing: set[int], count: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """This process's share of the batches of 0..count-1 in which an image is missing."""
    starts = sorted({number // batch_size * batch_size for number in missing})
    batches = [range(start, min(start + batch_size, count)) for start in starts]
    return batches[accelerator.process_index :: accelerator.num_processes]
