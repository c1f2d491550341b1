"""Judge a model: `accelerate launch training/evaluate.py --model FOLDER_OR_REPO --dataset digits`.

Bits per dimension of the data's images, and FID, KID and precision/recall of drawn ones, for any unconditional DDPM
pipeline. The figures go to evaluation.json and into the model card's metadata. They do not depend on the number of
processes.
"""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ..data.mapped import ImageData, load_images, to_model_range
from ..data.skipped import SHOWN, describe
from ..data.streamed import open_stream
from ..evaluation.features import feature_extractor, real_features
from ..generation.drawing import sample_uint8
from ..generation.pipelines import SCHEDULERS, default_steps, load_pipeline, use_scheduler
from ..hub import Measurement, record_evaluation
from ..likelihood import BitsPerDim, bits_per_dim
from ..pipeline_alpha_ddpm import AlphaDDPMPipeline
from ..support.draws import Stream, image_indices, seeds
from ..support.errors import ConfigError
from ..support.provenance import provenance
from ..support.sharing import my_batches
from .quality import ImageQuality

FEWEST_IMAGES = 5  # that ImageQuality takes with its three neighbours


@dataclass(frozen=True)
class EvaluateConfig:
    """What is judged, against what, and how closely."""

    model: str = field(metadata={"help": "Folder or Hub repository of an unconditional DDPM pipeline."})
    dataset: str = field(
        metadata={"help": "Data set, as for train.py: 'digits', a Hub data set, a folder, parquet files."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    split: str = field(default="train", metadata={"help": "Split; held-out images give the honest likelihood."})
    image_column: str | None = field(default=None, metadata={"help": "Column with the images."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read no more of the data than the first images: --num_images or --num_likelihood_images."},
    )
    max_bad_fraction: float = field(
        default=0.01, metadata={"help": "Share of rows that may be left out because their image cannot be read."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where images and reference features are cached."})
    num_likelihood_images: int = field(
        default=256, metadata={"help": "Images of the data whose bits per dimension are evaluated; 0 for none."}
    )
    likelihood_steps: int | None = field(
        default=None, metadata={"help": "Length of the chain whose likelihood it is; all of it by default."}
    )
    likelihood_calls: int | None = field(
        default=None,
        metadata={"help": "Network calls an image, for an estimate from a stratified subset; all by default."},
    )
    two_term: bool = field(default=False, metadata={"help": "Also the bound in the report's two-term form."})
    num_bins: int = field(default=256, metadata={"help": "Levels of a pixel, for bits per dimension."})
    num_images: int = field(
        default=1024, metadata={"help": "Images drawn for FID, KID and precision/recall; 0 for none."}
    )
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Length of the chain they are drawn with; all of it by default."}
    )
    scheduler: str = field(default="keep", metadata={"help": f"Sampler: keep (the model's), {', '.join(SCHEDULERS)}."})
    features: str = field(
        default="auto",
        metadata={"help": "Judge of the images: digits, inception, MODULE:FUNCTION, or auto (digits for digits)."},
    )
    inception_weights: str | None = field(
        default=None, metadata={"help": "File of Inception weights; else downloaded."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images in a network call of a process."})
    seed: int = field(default=0, metadata={"help": "Everything random follows from it."})
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file of results; evaluation.json in the model's folder, or here."},
    )
    update_card: bool = field(default=True, metadata={"help": "Put the figures into README.md of the model's folder."})
    num_cpu_threads: int | None = field(default=None, metadata={"help": "Threads on the CPU, each process."})

    def __post_init__(self) -> None:
        for name, low in {
            "batch_size": 1,
            "seed": 0,
            "num_images": 0,
            "num_likelihood_images": 0,
            "num_bins": 2,
        }.items():
            if getattr(self, name) < low:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least {low}.")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"--max_bad_fraction {self.max_bad_fraction} must be at least 0 and below 1.")
        if 0 < self.num_images < FEWEST_IMAGES:
            raise ConfigError(
                f"--num_images {self.num_images} are too few to judge; give 0 for none, or at least {FEWEST_IMAGES}."
            )
        if not self.num_images and not self.num_likelihood_images:
            raise ConfigError("--num_images 0 and --num_likelihood_images 0 leave nothing to evaluate.")


# ---- parts ----------------------------------------------------------------------------------------


def likelihood_of(
    pipe: AlphaDDPMPipeline,
    data: ImageData,
    numbers: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    steps: int | None = None,
    calls: int | None = None,
    two_term: bool = False,
    num_bins: int = 256,
    progress: bool = False,
) -> BitsPerDim:
    """Bits per dimension of the images at these places of a random order of the data; each has noise of its own."""
    numbers = list(numbers)
    chosen = image_indices(seed, len(data), 0, max(numbers) + 1)[numbers]
    noise_seeds = seeds(seed, Stream.NOISE, 0, max(numbers) + 1)[numbers]
    return bits_per_dim(
        pipe.unet,
        pipe.scheduler,
        to_model_range(data.pixels(chosen)),
        num_inference_steps=steps,
        num_evaluated=calls,
        two_term=two_term,
        num_bins=num_bins,
        batch_size=batch_size,
        generator=[torch.Generator().manual_seed(int(noise_seed)) for noise_seed in noise_seeds],
        progress=progress,
    )


def summary(totals: dict[str, list[float]]) -> dict[str, Any]:
    """Means over images of bits/dim figures with the standard error of each mean, over the images."""
    columns = {name: torch.tensor(values, dtype=torch.float64) for name, values in totals.items()}
    count = len(columns["total"])
    result: dict[str, Any] = {"num_images": count}
    for name, values in columns.items():
        result[name] = values.mean().item()
    # images draw their own timesteps, so the spread of totals holds what a subset of timesteps adds
    if count > 1:
        result["total_standard_error"] = columns["total"].std().item() / math.sqrt(count)
    result["standard_error_of_one_image"] = columns.pop("standard_error").square().mean().sqrt().item()
    del result["standard_error"]
    return result


def open_images(config: EvaluateConfig, resolution: int, channels: int) -> ImageData:
    """The data to judge by; of a stream the first images, as many as are drawn or whose likelihood is evaluated."""
    options: dict[str, Any] = {
        "dataset_config": config.dataset_config, "split": config.split, "image_column": config.image_column,
        "resolution": resolution, "channels": channels, "cache_dir": config.cache_dir,
        "max_bad_fraction": config.max_bad_fraction,
    }  # fmt: skip
    if not config.streaming:
        return load_images(config.dataset, **options)
    count = max(config.num_images, config.num_likelihood_images)
    return open_stream(config.dataset, **options).stored(count, config.cache_dir)


def share(rows: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """This process's contiguous share of the rows."""
    return rows.tensor_split(accelerator.num_processes)[accelerator.process_index]


# ---- the run --------------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Judge as configured; the results, as written. Raises ConfigError or DataError for what cannot be used."""
    began = time.monotonic()
    accelerator = Accelerator()
    if config.num_cpu_threads:
        torch.set_num_threads(config.num_cpu_threads)
    main = accelerator.is_main_process
    pipe = load_pipeline(config.model).to(accelerator.device)
    own_scheduler = pipe.scheduler
    if config.num_images:  # before anything that takes long, for what cannot be used is said here
        use_scheduler(pipe, config.scheduler)
        extractor = feature_extractor(config.features, config.dataset, config.inception_weights).to(accelerator.device)
        pipe.scheduler = own_scheduler
    size = pipe.unet.config.sample_size
    with accelerator.main_process_first():
        data = open_images(config, size if isinstance(size, int) else size[0], pipe.unet.config.in_channels)
    if main and data.skipped:
        first = "; ".join(map(describe, data.skipped[:SHOWN]))
        print(f"warning: {len(data.skipped)} rows cannot be used and are left out: {first}", file=sys.stderr)
    results: dict[str, Any] = {
        "model": Path(config.model).name,
        "dataset": data.name,
        "split": config.split,
        "skipped_rows": len(data.skipped),
    }

    if config.num_likelihood_images:
        count = min(config.num_likelihood_images, len(data))
        rows: dict[str, list[float]] = {}
        names = ["total", "prior", "diffusion", "decoder", "standard_error", *(["two_term"] if config.two_term else [])]
        for batch in tqdm(my_batches(count, config.batch_size, accelerator), disable=not main, desc="likelihood"):
            part = likelihood_of(
                pipe, data, batch, seed=config.seed, batch_size=config.batch_size, steps=config.likelihood_steps,
                calls=config.likelihood_calls, two_term=config.two_term, num_bins=config.num_bins, progress=main,
            )  # fmt: skip
            for name in names:
                rows.setdefault(name, []).extend(getattr(part, name).tolist())
        gathered = {name: gather_object(values) for name, values in rows.items()}
        chain = config.likelihood_steps or len(own_scheduler)
        results["bits_per_dim"] = {
            **summary(gathered),
            "steps": chain,
            "network_calls": min(config.likelihood_calls or chain, chain),
            "num_bins": config.num_bins,
            "variance_type": own_scheduler.config.variance_type,
        }

    if config.num_images:
        use_scheduler(pipe, config.scheduler)
        steps = default_steps(pipe, config.num_inference_steps)
        quality = ImageQuality(extractor, seed=config.seed).to(accelerator.device)
        with accelerator.main_process_first():
            reference = real_features(data, extractor, config.cache_dir)
        quality.add_real_features(share(reference, accelerator).to(accelerator.device))
        for batch in tqdm(
            my_batches(config.num_images, config.batch_size, accelerator), disable=not main, desc="drawing"
        ):
            quality.update(sample_uint8(pipe, batch, config.seed, steps).to(accelerator.device), real=False)
        figures = quality.compute()._asdict()
        results["quality"] = {
            **{name: value for name, value in figures.items() if not math.isnan(value)},  # NaN is no JSON
            "steps": steps,
            "scheduler": type(pipe.scheduler).__name__,
            "features": type(extractor).__name__,
        }

    results |= {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "processes": accelerator.num_processes,
        "seconds": round(time.monotonic() - began, 1),
        **provenance(accelerator.device),
    }
    if main:
        _write(config, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def _write(config: EvaluateConfig, results: dict[str, Any]) -> None:
    folder = Path(config.model)
    path = Path(config.output) if config.output else (folder if folder.is_dir() else Path()) / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, path)
    readme = folder / "README.md"
    if config.update_card and readme.is_file():
        record_evaluation(folder, measurements(results))
    print(json.dumps(results, indent=2))


def measurements(results: dict[str, Any]) -> list[Measurement]:
    """The figures as the model card has them."""
    data = {"dataset": results["dataset"], "split": results["split"]}
    seed = {"seed": results["seed"]}
    measured = []
    if bits := results.get("bits_per_dim"):
        settings = {"steps": bits["steps"], "bound": "upper"} | seed
        measured.append(Measurement("bits/dim", bits["total"], bits["num_images"], settings=settings, **data))
    if quality := results.get("quality"):
        settings = {name: quality[name] for name in ("steps", "scheduler", "features")} | seed
        for name in ("FID", "KID", "precision", "recall"):
            figure = quality[name.lower()]
            measured.append(Measurement(name, figure, quality["num_generated"], settings=settings, **data))
    return measured


def parse(argv: list[str]) -> EvaluateConfig:
    parser = HfArgumentParser(EvaluateConfig, description=__doc__.splitlines()[0], allow_abbrev=False)
    return EvaluateConfig(**vars(parser.parse_args(argv)))
