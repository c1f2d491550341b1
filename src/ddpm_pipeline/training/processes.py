"""Where a run takes place: its processes, devices, threads and folder. Imports accelerate, psutil and torch."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.overrides import TorchFunctionMode

from ..support.draws import RandomStream, seeds
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from . import trackers
from .options import TrainingOptions

LONGEST_WAIT = timedelta(hours=12)  # for the main process as it preprocesses and samples; its death shows at once
REPLICATED = (
    DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU, DistributedType.MULTI_MLU, DistributedType.MULTI_HPU,
)  # fmt: skip


def start_processes(options: TrainingOptions) -> tuple[Accelerator, TrainingOptions]:
    """The accelerator, and the options with the output folder and precision of this run. Raises ConfigError if weights would be
    sharded, since EMA and samples need whole ones, or if processes and accumulation steps cannot have equal micro-batches.
    """
    folder = options.run.output_dir or default_output_dir(options.data.dataset)
    precision, optimisation = options.hardware.mixed_precision, options.optimisation
    _check_environment(optimisation.gradient_accumulation_steps)
    tracker = None if options.watching.report_to == "none" else options.watching.report_to
    if tracker is not None and tracker not in map(str, get_available_trackers()):
        brings = f"'ddpm-pipeline[{tracker}]'" if tracker in trackers.SHOW else tracker  # an extra, or the library itself
        raise ConfigError(f"--report_to {tracker} needs a library that is not installed: pip install {brings}")
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    waiting = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    try:
        accelerator = Accelerator(
            mixed_precision=precision, log_with=tracker, project_dir=folder, kwargs_handlers=[buckets, waiting],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # `loop.update` divides, once
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"accelerate cannot start as its configuration or environment says: {describe_exception(error)} Change that with "
            "`accelerate config`, its flags or its variables ACCELERATE_...; --mixed_precision takes no, bf16 or fp16."
        ) from error
    if accelerator.distributed_type not in REPLICATED:
        raise ConfigError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which shards weights; use MULTI_GPU (every "
            "preset fits on one device), by `accelerate config` or --multi_gpu."
        )
    divisor = accelerator.num_processes * optimisation.gradient_accumulation_steps
    if optimisation.batch_size % divisor:
        raise ConfigError(
            f"--batch_size {optimisation.batch_size} cannot be divided among {accelerator.num_processes} processes x "
            f"{optimisation.gradient_accumulation_steps} accumulation steps; use a multiple of {divisor}."
        )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(options.hardware.num_cpu_threads or _cores_per_process(accelerator))
    return accelerator, options.with_values(output_dir=folder, mixed_precision=accelerator.mixed_precision)


@contextmanager
def enough_memory(options: TrainingOptions) -> Iterator[None]:
    """Within, a GPU whose memory does not suffice ends the run with a ConfigError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = ". ".join(str(error).split(". ")[:2])  # and how much, without pages of statistics
        optimisation = options.optimisation
        raise ConfigError(
            f"{why}: this network with --batch_size {optimisation.batch_size} needs more memory. Resume or start anew with "
            "--gradient_checkpointing True, or start anew with more --gradient_accumulation_steps (now "
            f"{optimisation.gradient_accumulation_steps}), --mixed_precision bf16, or a smaller --model."
        ) from error


def _check_environment(passes: int) -> None:
    """Raises ConfigError for what `accelerate launch` or its configuration says and training would do in another way."""
    told = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", str(passes))
    if told != str(passes):
        raise ConfigError(
            f"accelerate is told to accumulate {told} micro-batches per update (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), and "
            f"this run {passes}; unset it, or say the same with --gradient_accumulation_steps."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ConfigError(
            f"accelerate is told to compile with {backend} (ACCELERATE_DYNAMO_BACKEND, --dynamo_backend), which a resumed run "
            "would not know of; unset it and use --compile."
        )


def default_output_dir(dataset: str) -> str:
    """ddpm-NAME, from the last part of a data set's name or path."""
    name = re.sub(r"\.(parquet|arrow|zip|tar)$", "", Path(dataset).name, flags=re.IGNORECASE)  # scans.2023 is no scans
    name = re.sub(r"[^\w-]+", "-", name).strip("-")
    return f"ddpm-{name or 'model'}"


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
    own = int(seeds(seed, RandomStream.DROPOUT, step, accelerator.num_processes)[accelerator.process_index])
    if accelerator.device.type == "cpu":
        torch.default_generator.manual_seed(own)  # the line below also sees to devices that are not used, which takes longer
    else:
        torch.manual_seed(own)


class Float32Attention(TorchFunctionMode):
    """Within, attention is computed in float32 whatever the autocast, and given back in the type of the queries. On CPUs the
    backward pass of torch's bfloat16 kernel takes three to six times as long (`benchmarks/cpu_attention.py`).
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        floats = {
            name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in given.items()
        }
        with torch.autocast("cpu", enabled=False):
            return function(**floats).to(given["query"].dtype)


def attention_on(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """Within, attention is computed in the precision that is fastest there."""
    slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return Float32Attention() if slow else nullcontext()
