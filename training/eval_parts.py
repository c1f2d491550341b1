"""What evaluate.py, generate.py and evaluation during training share: any pipeline, samplers, images by number, judges.

Imports diffusers, torch and the package.
"""

import importlib
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import diffusers
import torch
from accelerate import Accelerator
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import nn

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, __version__
from ddpm_pipeline.data.mapped import ImageData
from ddpm_pipeline.quality import InceptionFeatures, cached_features, extract
from ddpm_pipeline.support.draws import Stream, seeds
from train_config import ConfigError

REAL_BATCH = 256  # images whose features are extracted at once
SCHEDULERS: dict[str, type] = {
    "ddpm": AlphaDDPMScheduler,
    "stock-ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm-solver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def load_pipeline(model: str) -> AlphaDDPMPipeline:
    """The unconditional pipeline in a folder or Hub repository. Raises ConfigError where it is none."""
    try:
        pipe = AlphaDDPMPipeline.from_pretrained(model)
    except (OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"--model {model} cannot be loaded as an unconditional DDPM pipeline: {error}") from error
    if not isinstance(pipe.unet, UNet2DModel) or pipe.unet.config.num_class_embeds or pipe.unet.config.class_embed_type:
        raise ConfigError(
            f"--model {model} has a conditional network; this command draws and judges unconditional ones."
        )
    if missing := [name for name, weight in pipe.unet.named_parameters() if weight.is_meta]:
        raise ConfigError(f"--model {model} has no weights for {', '.join(missing[:3])} of its network; save it anew.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def use_scheduler(pipe: AlphaDDPMPipeline, name: str) -> None:
    """Put one of SCHEDULERS into the pipeline, of the same configuration; "keep" leaves its own."""
    if name == "keep":
        return
    if name not in SCHEDULERS:
        raise ConfigError(f"--scheduler {name} is not one of keep, {', '.join(SCHEDULERS)}.")
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)


def default_steps(pipe: AlphaDDPMPipeline, num_inference_steps: int | None) -> int:
    return num_inference_steps or pipe.scheduler.config.num_train_timesteps


@torch.no_grad()
def draw_uint8(pipe: AlphaDDPMPipeline, indices: Sequence[int], seed: int, steps: int) -> torch.Tensor:
    """The images with these numbers, uint8 [b, C, H, W] on the CPU; each a function of (seed, number) and the model.

    The first ones are those of a training run's samples.png, which draws with the run's seed. Raises ConfigError where the
    sampler gives values that are not numbers.
    """
    image_seeds = seeds(seed, Stream.PREVIEW, 0, max(indices) + 1)[list(indices)]
    generators = [torch.Generator(pipe.device).manual_seed(int(image_seed)) for image_seed in image_seeds]
    images = pipe(len(generators), generators, num_inference_steps=steps, output_type="pt").images
    if not images.isfinite().all():
        raise ConfigError(
            f"{type(pipe.scheduler).__name__} gives values that are not numbers in {steps} steps of this model; use fewer "
            "--num_inference_steps or another --scheduler (diffusers' multistep solvers do so where steps = T)."
        )
    return images.float().mul(255).round().to(torch.uint8).cpu()


def my_batches(count: int, batch_size: int, accelerator: Accelerator) -> list[range]:
    """This process's contiguous share of the batches of 0..count-1, which are the same however many processes there are.

    Raises ConfigError where a process would have nothing to do.
    """
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    if len(batches) < accelerator.num_processes:
        raise ConfigError(
            f"{count} images in batches of {batch_size} are {len(batches)} batches for {accelerator.num_processes} "
            "processes; use a smaller --batch_size or fewer processes."
        )
    bounds = [len(batches) * rank // accelerator.num_processes for rank in range(accelerator.num_processes + 1)]
    return batches[bounds[accelerator.process_index] : bounds[accelerator.process_index + 1]]


def feature_extractor(name: str, dataset: str, inception_weights: str | None, option: str = "--features") -> nn.Module:
    """The network that quality is judged by: "digits", "inception", or MODULE:FUNCTION that returns one.

    Raises ConfigError, with the `option` that named it, where it cannot be used.
    """
    if name == "auto":
        name = "digits" if dataset == "digits" else "inception"
    if name == "inception":
        try:
            return InceptionFeatures(inception_weights)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise ConfigError(f"{option} inception: {error}") from error
    if name == "digits":
        name = "digits_judge:fit_digits_classifier"
        sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    module, _, function = name.partition(":")
    try:
        extractor: Any = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{option} {name}: {error}. Use auto, digits, inception, or MODULE:FUNCTION, where the function returns a "
            "torch module from images [B, C, H, W] in [-1, 1] to features [B, F]."
        ) from error
    return extractor.eval()


def real_features(data: ImageData, extractor: nn.Module, cache_dir: str | None) -> torch.Tensor:
    """Features [N, F] of all of the data, from the cache by its fingerprint."""

    def compute() -> torch.Tensor:
        rows = [range(start, min(start + REAL_BATCH, len(data))) for start in range(0, len(data), REAL_BATCH)]
        with torch.no_grad():
            device = next(iter(extractor.state_dict().values()), torch.empty(0)).device
            return torch.cat([extract(extractor, data.pixels(batch).to(device))[0].cpu() for batch in rows])

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline"
    return cached_features(folder, data.fingerprint, extractor, compute)


def provenance(device: torch.device, *libraries: ModuleType) -> dict[str, Any]:
    """When, with what versions and on what processor a figure was measured; `libraries` are further ones that matter."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "ddpm-pipeline": __version__,
            **{library.__name__: library.__version__ for library in (torch, diffusers, *libraries)},
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
