"""Where a run takes place: its processes, devices, threads and folder. Imports accelerate, psutil and torch."""

import os
import re
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from ..support.draws import RandomStream, seeds
from ..support.errors import ConfigError
from .options import OptimisationOptions, TrainingOptions

LONGEST_WAIT = timedelta(
    hours=12
)  # for the main process as it preprocesses and samples; if it dies, that shows at once
REPLICATED = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU, DistributedType.MULTI_MLU, DistributedType.MULTI_HPU,
)  # fmt: skip


def start_processes(options: TrainingOptions) -> tuple[Accelerator, TrainingOptions]:
    """The accelerator, and the options with the output folder and precision of this run.

    Raises ConfigError if weights would be sharded, or if the batch cannot be divided evenly.
    """
    folder = options.run.output_dir or default_output_dir(options.data.dataset)
    tracker = options.watching.report_to
    accelerator = Accelerator(
        mixed_precision=options.hardware.mixed_precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
    check_replicated(accelerator)
    check_batch_divides(options.optimisation, accelerator.num_processes)
    if accelerator.device.type == "cpu":
        torch.set_num_threads(options.hardware.num_cpu_threads or _cores_per_process(accelerator))
    return accelerator, options.with_values(output_dir=folder, mixed_precision=accelerator.mixed_precision)


def default_output_dir(dataset: str) -> str:
    """ddpm-NAME, from the last part of a data set's name or path."""
    name = re.sub(r"[^\w-]+", "-", Path(dataset.rstrip("/")).stem).strip("-")
    return f"ddpm-{name or 'model'}"


def check_replicated(accelerator: Accelerator) -> None:
    """Raises ConfigError if each process would hold only a part of the weights, since EMA and samples need whole ones."""
    if accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which shards weights; use MULTI_GPU (every "
            "preset fits on one device), by `accelerate config` or --multi_gpu."
        )


def check_batch_divides(options: OptimisationOptions, world_size: int) -> None:
    """Raises ConfigError if processes and accumulation steps cannot have equal micro-batches."""
    divisor = world_size * options.gradient_accumulation_steps
    if options.batch_size % divisor:
        raise ConfigError(
            f"--batch_size {options.batch_size} cannot be divided among {world_size} processes x "
            f"{options.gradient_accumulation_steps} accumulation steps; use a multiple of {divisor}."
        )


def _cores_per_process(accelerator: Accelerator) -> int:
    """`accelerate launch` sets one thread per process unless told otherwise, which leaves other CPU cores idle."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(available, psutil.cpu_count(logical=False) or available)
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))


def seed_weights(seed: int) -> None:
    """Initial weights come from torch's global generator; make them a function of the seed."""
    torch.manual_seed(int(seeds(seed, RandomStream.MODEL, 0, 1)[0]))


def seed_dropout(seed: int, step: int, accelerator: Accelerator) -> None:
    """Dropout draws from torch's global generator; make it a function of (seed, step, process)."""
    per_process = seeds(seed, RandomStream.DROPOUT, step, accelerator.num_processes)
    torch.manual_seed(int(per_process[accelerator.process_index]))
