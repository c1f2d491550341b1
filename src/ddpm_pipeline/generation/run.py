"""Sampling in bulk: `generate(GenerationOptions(model="ddpm-digits", output_dir="images", num_images=50_000))`.

Image i is a function of the model, the sampler, the seed and i, whatever the number of processes. A run that was stopped
continues where it was.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from ..data.images import array_to_image
from ..support.atomic import atomic_file, write_text
from ..support.errors import ConfigError
from ..support.pictures import save_picture
from ..support.provenance import weights_digest
from ..support.sharing import my_batches
from .drawing import sample_uint8
from .options import GenerationOptions, OutputOptions
from .pipelines import default_steps, load_pipeline, scheduler_for

SETTINGS_FILE = "generation.json"
PARQUET_FILE = "images.parquet"


def generate(options: GenerationOptions) -> Path:
    """Sample the images that the folder lacks, and return the folder.

    Raises ConfigError for a model, sampler or folder that cannot be used.
    """
    accelerator, sampling, output = Accelerator(), options.sampling, options.output
    if sampling.num_cpu_threads:
        torch.set_num_threads(sampling.num_cpu_threads)
    pipe = load_pipeline(sampling.model).to(accelerator.device)
    pipe.scheduler = scheduler_for(pipe, sampling.scheduler)
    steps = default_steps(pipe, sampling.num_inference_steps)
    settings = {
        "weights": weights_digest(pipe.unet),
        "scheduler": json.loads(pipe.scheduler.to_json_string()),
        "num_inference_steps": steps,
        "seed": sampling.seed,
    }
    todo = [_prepare(output, settings) if accelerator.is_main_process else None]
    broadcast_object_list(todo)  # one list, since files appear while other processes still look
    if isinstance(todo[0], str):
        raise ConfigError(todo[0])
    folder, missing, count = Path(output.output_dir), todo[0], output.num_images
    accelerator.print(f"{count - len(missing)} of {count} images exist already", file=sys.stderr)
    mine = _share(missing, sampling.batch_size, accelerator)
    for batch in tqdm(mine, disable=not (missing and accelerator.is_main_process), desc="batches"):
        for number, image in zip(batch, sample_uint8(pipe, batch, sampling.seed, steps), strict=True):
            save_picture(array_to_image(image.permute(1, 2, 0).numpy()), _path(folder, number))
    accelerator.wait_for_everyone()
    if output.format == "parquet" and accelerator.is_main_process and missing:
        _to_parquet(folder, count)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _prepare(output: OutputOptions, settings: dict[str, Any]) -> list[int] | str:
    """The numbers of the images that the folder lacks, or what is wrong with the folder."""
    folder = Path(output.output_dir)
    path, whole = folder / SETTINGS_FILE, folder / PARQUET_FILE
    if path.is_file():
        if json.loads(path.read_text("utf-8")) != settings:
            return f"--output_dir {folder} holds images of another model, sampler, number of steps or seed; name another."
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return f"--output_dir {folder} holds something that this command did not write; name a new folder."
    write_text(path, json.dumps(settings, indent=2) + "\n")
    if whole.is_file():
        stored = pq.read_metadata(whole).num_rows
        if stored >= output.num_images:
            return []
        return f"--output_dir {folder} has {PARQUET_FILE} with {stored} images; to get {output.num_images}, remove it."
    return [number for number in range(output.num_images) if not _path(folder, number).is_file()]


def _share(missing: list[int], batch_size: int, accelerator: Accelerator) -> list[list[int]]:
    """This process's batches of the missing images. The main process samples alone where there are fewer than processes."""
    if len(missing) < accelerator.num_processes:
        return [missing] if missing and accelerator.is_main_process else []
    batch_size = min(batch_size, -(-len(missing) // accelerator.num_processes))
    return [[missing[place] for place in batch] for batch in my_batches(len(missing), batch_size, accelerator)]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _to_parquet(folder: Path, count: int) -> None:
    """The PNGs as one file that the datasets library reads as images; they are removed once it is complete."""
    paths = [_path(folder, number) for number in range(count)]
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = pa.table({"image": rows, "number": range(count)})
    features = {"info": {"features": {"image": {"_type": "Image"}, "number": {"_type": "Value", "dtype": "int64"}}}}
    with atomic_file(folder / PARQUET_FILE) as temporary:
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), temporary)
    for path in paths:
        path.unlink()
