"""Draw many images: `accelerate launch training/generate.py --model FOLDER_OR_REPO --num_images 50000 --seed 0`.

Image i is a function of the model, the sampler, the seed and i, whatever the batch size or the number of processes. A run
that was stopped goes on where it was.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ..generation.drawing import sample_uint8
from ..generation.pipelines import SCHEDULERS, default_steps, load_pipeline, use_scheduler
from ..support.errors import ConfigError
from ..support.provenance import weights_digest
from ..support.sharing import my_batches

SETTINGS_FILE = "generation.json"
PARQUET_FILE = "images.parquet"


@dataclass(frozen=True)
class GenerateConfig:
    """What is drawn, and where to."""

    model: str = field(metadata={"help": "Folder or Hub repository of an unconditional DDPM pipeline."})
    output_dir: str = field(metadata={"help": "Folder for the images: a new one, or one of the same settings."})
    num_images: int = field(default=1024, metadata={"help": "Images to draw, numbers 0 to this - 1."})
    seed: int = field(default=0, metadata={"help": "Image i is a function of it and i."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Length of the chain; all of it by default."}
    )
    scheduler: str = field(default="keep", metadata={"help": f"Sampler: keep (the model's), {', '.join(SCHEDULERS)}."})
    batch_size: int = field(default=64, metadata={"help": "Images drawn at once by a process."})
    format: str = field(default="png", metadata={"help": "png (one file an image) or parquet (one file of all)."})
    num_cpu_threads: int | None = field(default=None, metadata={"help": "Threads on the CPU, each process."})

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.seed < 0:
            raise ConfigError(f"--seed {self.seed} must be at least 0.")
        if self.format not in ("png", "parquet"):
            raise ConfigError(f"--format {self.format} is not one of png, parquet.")


def generate(config: GenerateConfig) -> Path:
    """Draw what is missing; the folder. Raises ConfigError for a model, sampler or folder that cannot be used."""
    accelerator = Accelerator()
    if config.num_cpu_threads:
        torch.set_num_threads(config.num_cpu_threads)
    pipe = load_pipeline(config.model).to(accelerator.device)
    use_scheduler(pipe, config.scheduler)
    folder = Path(config.output_dir)
    steps = default_steps(pipe, config.num_inference_steps)
    settings = {
        "weights": weights_digest(pipe.unet),
        "scheduler": json.loads(pipe.scheduler.to_json_string()),
        "num_inference_steps": steps,
        "seed": config.seed,
    }
    todo = [_prepare(folder, settings, config) if accelerator.is_main_process else None]
    broadcast_object_list(todo)  # one list, as files appear while others still look
    if isinstance(todo[0], str):
        raise ConfigError(todo[0])
    missing: list[int] = todo[0]
    accelerator.print(
        f"{config.num_images - len(missing)} of {config.num_images} images are there already", file=sys.stderr
    )
    if missing:
        batch_size = min(config.batch_size, -(-len(missing) // accelerator.num_processes))
        mine = [] if len(missing) < accelerator.num_processes else my_batches(len(missing), batch_size, accelerator)
        if not mine and accelerator.is_main_process:
            mine = [range(len(missing))]
        for batch in tqdm(mine, disable=not accelerator.is_main_process, desc="batches"):
            numbers = [missing[position] for position in batch]
            for number, image in zip(numbers, sample_uint8(pipe, numbers, config.seed, steps), strict=True):
                _save(image, _path(folder, number))
    accelerator.wait_for_everyone()
    if config.format == "parquet" and accelerator.is_main_process and missing:
        _to_parquet(folder, config.num_images)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder


def _prepare(folder: Path, settings: dict, config: GenerateConfig) -> list[int] | str:
    """The numbers of images still to be drawn, or what is wrong with the folder."""
    path = folder / SETTINGS_FILE
    if path.is_file():
        if json.loads(path.read_text()) != settings:
            return (
                f"--output_dir {folder} holds images of another model, sampler, number of steps or seed; name another."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return f"--output_dir {folder} holds something that this command did not write; name a new folder."
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")
    whole = folder / PARQUET_FILE
    if whole.is_file():
        stored = pq.read_metadata(whole).num_rows
        if stored >= config.num_images:
            return []
        return f"--output_dir {folder} has {PARQUET_FILE} with {stored} images; remove it to draw {config.num_images}."
    return [number for number in range(config.num_images) if not _path(folder, number).is_file()]


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.png"


def _save(image: torch.Tensor, path: Path) -> None:
    """uint8 [C, H, W] to a PNG, whole or not at all."""
    array = image.permute(1, 2, 0).numpy()  # [C, H, W] -> [H, W, C]
    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(temporary, format="PNG")
    os.replace(temporary, path)


def _to_parquet(folder: Path, count: int) -> None:
    """The PNGs as one file that the datasets library reads as images; they are removed when it is whole."""
    paths = [_path(folder, number) for number in range(count)]
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    table = pa.table({"image": rows, "number": range(count)})
    features = {"info": {"features": {"image": {"_type": "Image"}, "number": {"_type": "Value", "dtype": "int64"}}}}
    temporary = folder / f".{PARQUET_FILE}.tmp"
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), temporary)
    os.replace(temporary, folder / PARQUET_FILE)
    for path in paths:
        path.unlink()


def parse(argv: list[str]) -> GenerateConfig:
    parser = HfArgumentParser(GenerateConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    return GenerateConfig(**vars(parser.parse_args(argv)))
