"""The UNet and the schedule that a run starts from: a preset, a config file, or somebody's pipeline.

Imports diffusers, torch and the package.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from huggingface_hub.utils import HFValidationError

from ..scheduling_alpha_ddpm import LEARNED_VARIANCE_TYPES, AlphaDDPMScheduler
from ..support.errors import ConfigError
from .conditions import Conditions
from .options import TrainingConfig

# Sides of images up to which a preset is meant, and its UNet2DModel. From 32 on these are the networks of Ho et al. 2020
# (appendix B), the 64-pixel one between its neighbours.
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (
        16,
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "add_attention": False,
        },
    ),
    "32": (
        32,
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "dropout": 0.1,
        },
    ),
    "64": (
        64,
        {
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        },
    ),
    "128": (
        128,
        {
            "block_out_channels": (128, 128, 256, 256, 512),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        },
    ),
    "256": (
        256,
        {
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        },
    ),
}

SCHEDULE_OPTIONS = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "variance_type",
    "rescale_betas_zero_snr",
)


def build_model(
    config: TrainingConfig, resolution: int, channels: int, conditions: Conditions | None = None
) -> tuple[UNet2DModel | UNet2DConditionModel, AlphaDDPMScheduler]:
    """The UNet for images [B, channels, resolution, resolution] and its scheduler.

    Raises ConfigError where preset, config file or `--init_from` cannot be used, or do not fit the images.
    """
    conditions = conditions or Conditions()
    schedule = {name: value for name in SCHEDULE_OPTIONS if (value := getattr(config, name)) is not None}
    try:
        if config.init_from is not None:
            unet, scheduler = _from_pipeline(config.init_from, schedule, conditions)
        else:
            unet = conditions.unet_class.from_config(_unet_config(config, resolution, channels, conditions))
            scheduler = AlphaDDPMScheduler(**schedule)
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, NotImplementedError, HFValidationError) as error:
        what = f"--init_from {config.init_from}" if config.init_from else f"the model ({config.model}) or its schedule"
        raise ConfigError(f"{what} cannot be used: {error}") from error
    _check_fit(unet, scheduler, config, resolution, channels, conditions)
    objective_for(config, scheduler)
    return unet, scheduler


def objective_for(config: TrainingConfig, scheduler: AlphaDDPMScheduler) -> str:
    """The objective asked for, or the one that trains what the scheduler needs. Raises ConfigError where it cannot."""
    learned = scheduler.config.variance_type in LEARNED_VARIANCE_TYPES
    objective = config.objective or ("hybrid" if learned else "simple")
    if objective == "simple" and learned:
        raise ConfigError(
            f"--objective simple does not train the variance that variance_type={scheduler.config.variance_type} has the UNet "
            "learn; use hybrid or bound."
        )
    if objective == "hybrid" and not learned:
        raise ConfigError(
            f"--objective hybrid trains a learned variance, and this run has variance_type={scheduler.config.variance_type}; "
            "add --variance_type learned_range, or use simple or bound."
        )
    return objective


def _from_pipeline(
    source: str, schedule: dict[str, Any], conditions: Conditions
) -> tuple[UNet2DModel | UNet2DConditionModel, AlphaDDPMScheduler]:
    pipe = conditions.pipeline_class.from_pretrained(source, low_cpu_mem_usage=False)
    if not isinstance(pipe.unet, conditions.unet_class):
        raise ConfigError(
            f"--init_from {source} has a {type(pipe.unet).__name__}; with this --condition a "
            f"{conditions.unet_class.__name__} is trained."
        )
    if schedule.keys() & {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps"}:
        schedule = {"trained_betas": None, **schedule}  # flags of the schedule take the place of stored values
    return pipe.unet.float(), AlphaDDPMScheduler.from_config(pipe.scheduler.config, **schedule)


def _unet_config(config: TrainingConfig, resolution: int, channels: int, conditions: Conditions) -> dict[str, Any]:
    out_channels = channels * (2 if config.variance_type in LEARNED_VARIANCE_TYPES else 1)
    images = {"sample_size": resolution, "in_channels": channels, "out_channels": out_channels}
    dropout = {} if config.dropout is None else {"dropout": config.dropout}
    if config.model == "auto" or config.model in PRESETS:
        preset = PRESETS[_preset_for(config.model, resolution)][1]
        if conditions.unet_class is UNet2DConditionModel:
            preset = _with_cross_attention(preset)
        return {**preset, **images, **dropout, **conditions.unet_config()}
    path = Path(config.model)
    path = path / "config.json" if path.is_dir() else path
    try:
        stored = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--model {config.model} is no preset (auto, {', '.join(PRESETS)}), and as a file: {error.strerror}."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--model {path} is not a JSON file: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"--model {path} must hold a {conditions.unet_class.__name__}'s config, an object.")
    return {"sample_size": resolution, **images, **conditions.unet_config(), **stored, **dropout}


def _with_cross_attention(preset: dict[str, Any]) -> dict[str, Any]:
    """The same network as a UNet2DConditionModel: its attention sees the text states too, at least at the lowest level."""
    down = [block.replace("Attn", "CrossAttn") for block in preset["down_block_types"]]
    up = [block.replace("Attn", "CrossAttn") for block in preset["up_block_types"]]
    if not any("Attn" in block for block in down):
        down[-1], up[0] = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    kept = {name: value for name, value in preset.items() if name != "add_attention"}  # the middle always attends
    return {**kept, "down_block_types": tuple(down), "up_block_types": tuple(up)}


def _preset_for(name: str, resolution: int) -> str:
    if name != "auto":
        return name
    for preset, (largest, _) in PRESETS.items():
        if resolution <= largest:
            return preset
    raise ConfigError(
        f"no preset is meant for {resolution} pixels; give --model a preset or a UNet2DModel config file."
    )


def _check_fit(
    unet: UNet2DModel | UNet2DConditionModel,
    scheduler: AlphaDDPMScheduler,
    config: TrainingConfig,
    resolution: int,
    channels: int,
    conditions: Conditions,
) -> None:
    levels = len(unet.config.block_out_channels) - 1
    if resolution % 2**levels:
        low = resolution // 2**levels * 2**levels
        raise ConfigError(
            f"a resolution of {resolution} cannot be halved {levels} times, as this UNet does; use --resolution "
            f"{f'{low} or ' if low else ''}{low + 2**levels}, or a --model with fewer levels."
        )
    if unet.config.in_channels != channels:
        raise ConfigError(
            f"the images have {channels} channels and the UNet takes {unet.config.in_channels}; "
            f"use --channels {unet.config.in_channels}."
        )
    learned = scheduler.config.variance_type in LEARNED_VARIANCE_TYPES
    if unet.config.out_channels != channels * (1 + learned):
        raise ConfigError(
            f"the UNet gives {unet.config.out_channels} channels for images of {channels}, and "
            f"variance_type={scheduler.config.variance_type} needs {channels * (1 + learned)}; use --variance_type "
            f"{'fixed_small or a UNet with twice the channels' if learned else 'learned_range where it has twice as many'}."
        )
    sample_size = unet.config.sample_size
    if sample_size not in (None, resolution) and tuple(_pair(sample_size)) != (resolution, resolution):
        raise ConfigError(f"the UNet draws images of {sample_size} pixels; use --resolution {_pair(sample_size)[0]}.")
    for name, needed in {"num_class_embeds": None, **conditions.unet_config()}.items():
        has = unet.config.get(name)
        if has != needed:
            raise ConfigError(
                f"{config.init_from or config.model}: the UNet has {name}={has}, and --condition {config.condition} with "
                f"these data needs {needed}."
            )


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
