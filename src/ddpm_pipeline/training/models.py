"""The UNet and the schedule that a run starts from: a preset, a config file, or an existing pipeline."""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ..data.options import parse_resolution, shown_size
from ..generation.pipelines import condition_of, load_pipeline
from ..scheduling_alpha_ddpm import LEARNED_VARIANCE_TYPES, AlphaDDPMScheduler
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from ..tables_alpha_ddpm import OWN_KEY
from .conditions import Condition
from .export import built, is_checkpoint, pipeline_of
from .options import DiffusionOptions, ModelOptions

logger = logging.getLogger(__name__)


def _blocks(*channels: int, attention: int | None = None, **config: Any) -> dict[str, Any]:
    """The config of a UNet2DModel with these channels by level, and attention at one of the levels."""
    kinds = ["Attn" if level == attention else "" for level in range(len(channels))]
    return {
        "block_out_channels": channels,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        **config,
    }


# Largest resolution that each preset is meant for, and its UNet2DModel. `small` and `medium` are for people without a GPU;
# timesteps scale their features and shift them (docs/training.md has what was tried). The presets from 32 on are the networks
# of Ho et al. 2020 (appendix B), the 64-pixel one between its neighbours.
_FOR_CPUS: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 8, "resnet_time_scale_shift": "scale_shift"}
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    "tiny": (16, _blocks(32, 64, layers_per_block=1, norm_num_groups=8, add_attention=False)),
    "small": (32, _blocks(32, 64, 128, attention=2, **_FOR_CPUS)),
    "medium": (64, _blocks(64, 128, 256, attention=2, **_FOR_CPUS)),
    "32": (32, _blocks(128, 256, 256, 256, attention=1, dropout=0.1)),
    "64": (64, _blocks(128, 256, 256, 256, attention=2)),
    "128": (128, _blocks(128, 128, 256, 256, 512, attention=3)),
    "256": (256, _blocks(128, 128, 256, 256, 512, 512, attention=4)),
}
FOR_CPUS = ("small", "medium")  # never chosen by `auto`, so that a run does not depend on the machine

UNet = UNet2DModel | UNet2DConditionModel


def sample_size_of(size: tuple[int, int]) -> int | list[int]:
    """A size as UNets state theirs: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def sides_of(sample_size: Any) -> tuple[int, int]:
    """(height, width) of what a UNet states."""
    return tuple(sample_size) if isinstance(sample_size, list | tuple) else (sample_size, sample_size)


def build_model(
    model: ModelOptions, diffusion: DiffusionOptions, size: tuple[int, int], channels: int, condition: Condition | None = None
) -> tuple[UNet, AlphaDDPMScheduler]:
    """The UNet for images [B, channels, *size] and its scheduler. Raises ConfigError if preset, config file or
    `--init_from` cannot be used, or do not fit the images.
    """
    condition = condition or Condition()
    what = f"--init_from {model.init_from}" if model.init_from else f"the model ({model.model}) or its schedule"
    try:
        if model.init_from is not None:
            unet, scheduler = _from_pipeline(model, diffusion.schedule, condition)
        else:
            schedule = dict(diffusion.schedule)
            if condition.variance_type and diffusion.objective != "simple":  # which trains no variance
                schedule.setdefault("variance_type", condition.variance_type)
            outputs = channels * (1 + (schedule.get("variance_type") in LEARNED_VARIANCE_TYPES))
            inputs = channels + condition.input_channels
            images = {"sample_size": sample_size_of(size), "in_channels": inputs, "out_channels": outputs}
            config = _unet_config(model, images, condition)
            if diffusion.variance_type is None and config["out_channels"] == channels:  # as the config file says
                schedule.pop("variance_type", None)
            unet, scheduler = built(partial(condition.unet_class.from_config, config)), AlphaDDPMScheduler(**schedule)
        _check_fits(unet.config, scheduler.config.variance_type, size, channels, condition.input_channels)
        needs = {"num_class_embeds": None, "class_embed_type": None, **condition.unet_config()}
        for name, need in needs.items():
            if (has := unet.config.get(name)) != need:
                raise ConfigError(
                    f"{model.init_from or model.model}: the UNet has {name}={has}, and this --condition with these data needs "
                    f"{need}; use a model made for that, or the --condition and the classes that this one was made for."
                )
        _check_timesteps(unet.config, len(scheduler))
        _check_runs(unet, (channels + condition.input_channels, *size), condition)
    except ConfigError:
        raise
    except Exception as error:  # a UNet raises many types for settings that do not go together
        raise ConfigError(f"{what} cannot be used: {describe_exception(error)}") from error
    objective_for(diffusion.objective, scheduler)
    return unet, scheduler


def objective_for(objective: str | None, scheduler: AlphaDDPMScheduler) -> str:
    """The objective asked for, or by default the one that trains what the scheduler needs. Raises ConfigError if it cannot."""
    variance_type = scheduler.config.variance_type
    learned = variance_type in LEARNED_VARIANCE_TYPES
    objective = objective or ("hybrid" if learned else "simple")
    if objective == "simple" and learned:
        raise ConfigError(
            f"--objective simple does not train the UNet's variance, which variance_type={variance_type} needs; use hybrid "
            "or bound."
        )
    if objective == "hybrid" and not learned:
        raise ConfigError(
            f"--objective hybrid trains a learned variance, and this run has variance_type={variance_type}; add "
            "--variance_type learned_range, or use simple or bound."
        )
    return objective


def _from_pipeline(model: ModelOptions, schedule: dict[str, Any], condition: Condition) -> tuple[UNet, AlphaDDPMScheduler]:
    """The UNet and the scheduler of a model or a checkpoint; what options change about them is said."""
    source = model.init_from
    pipe = pipeline_of(source) if is_checkpoint(source) else load_pipeline(source, "--init_from")
    if (made_for := condition_of(pipe)) != condition.options.condition:
        raise ConfigError(
            f"--init_from {source} was trained with --condition {made_for}, and this is --condition "
            f"{condition.options.condition}; use the same, or another model to start from."
        )
    own, described = pipe.unet.config.get(OWN_KEY) or {}, condition.described()
    for name in ("condition_image", "condition_vector", "value_range"):
        now = described[name].to_json() if name in described else None
        if name in own and own[name] != now:
            logger.warning("%s of %s was %s and is %s", name, source, own[name], now)
    if model.model != "auto":
        logger.warning("--model %s has no effect: the network is that of --init_from %s", model.model, source)
    for name, value in schedule.items():
        if (before := pipe.scheduler.config.get(name)) != value:
            logger.warning("--%s %s replaces %s, with which %s was trained", name, value, before, source)
    if schedule.keys() & {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps"}:
        schedule = {"trained_betas": None, **schedule}  # flags of the schedule take the place of stored values
    scheduler = AlphaDDPMScheduler.from_config(pipe.scheduler.config, fitted_samplers=None, **schedule)  # of other weights
    return _adapted(pipe.unet.float(), model, condition), scheduler


def _adapted(unet: UNet, model: ModelOptions, condition: Condition) -> UNet:
    """The UNet with the dropout that was asked for, and with the embeddings of the data's classes, found by their names."""
    changed = {} if model.dropout is None else {"dropout": model.dropout}
    own = (unet.config.get(OWN_KEY) or {}).get("class_names")
    names = own if condition.names is None else condition.names
    if own is None and names is not None:
        logger.warning("%s does not name its classes: they are taken in their order", model.init_from)
    if own and names != own:
        changed["num_class_embeds"] = len(names) + 1
    if all(unet.config.get(name) == value for name, value in changed.items()) and names == (own or names):
        return unet
    fresh, weights = type(unet).from_config({**unet.config, **changed}), unet.state_dict()
    if own and names != own:
        rows, known = fresh.class_embedding.weight.detach().clone(), weights["class_embedding.weight"]
        rows[-1] = known[-1]  # of no class
        for row, name in enumerate(names):
            if name in own:
                rows[row] = known[own.index(name)]
        weights["class_embedding.weight"] = rows
        new, gone = ([name for name in some if name not in others] for some, others in ((names, own), (own, names)))
        logger.warning("classes of %s are found by name; new: %s; left out: %s", model.init_from, new, gone)
    fresh.load_state_dict(weights)
    return fresh


def preset_for(size: tuple[int, int]) -> str:
    """The preset that `auto` takes for images of this size. Raises ConfigError if none is meant for it."""
    meant = [name for name, (largest, _) in PRESETS.items() if max(size) <= largest and name not in FOR_CPUS]
    if not meant:
        raise ConfigError(
            f"no preset is meant for {shown_size(size)} pixels; name a preset or a UNet2DModel config file with --model."
        )
    return meant[0]


def preset_for_cpus(model: ModelOptions, size: tuple[int, int]) -> str | None:
    """The preset that suits a CPU better than the one that `auto` has taken for images of this size."""
    if model.model != "auto" or model.init_from or max(size) <= PRESETS["tiny"][0]:
        return None
    return next((name for name in FOR_CPUS if max(size) <= PRESETS[name][0]), None)


def _unet_config(model: ModelOptions, images: dict[str, Any], condition: Condition) -> dict[str, Any]:
    dropout = {} if model.dropout is None else {"dropout": model.dropout}
    if model.model == "auto" or model.model in PRESETS:
        size = sides_of(images["sample_size"])
        preset = PRESETS[preset_for(size) if model.model == "auto" else model.model][1]
        if condition.unet_class is UNet2DConditionModel:
            preset = _with_cross_attention(preset)
        return {**preset, **images, **dropout, **condition.unet_config()}
    path = Path(model.model)
    path = path / "config.json" if path.is_dir() else path
    try:
        stored = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--model {model.model} is neither a preset (auto, {', '.join(PRESETS)}) nor a config file: {error.strerror}."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--model {path} is not a JSON file: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"--model {path} must hold the config of a {condition.unet_class.__name__}, a JSON object.")
    if (made_for := stored.get("_class_name", condition.unet_class.__name__)) != condition.unet_class.__name__:
        raise ConfigError(f"--model {path} is of a {made_for}, and this --condition needs a {condition.unet_class.__name__}.")
    stored = {name: value for name, value in stored.items() if value is not None or name not in images}
    if "sample_size" in stored and sides_of(stored["sample_size"]) == sides_of(images["sample_size"]):
        stored["sample_size"] = images["sample_size"]  # in the form that pipelines take
    return {**images, **condition.unet_config(), **stored, **dropout}


def _with_cross_attention(preset: dict[str, Any]) -> dict[str, Any]:
    """The same network as a UNet2DConditionModel: its attention sees the text states too, at least at the lowest level. Of more
    than two levels the upper ones hear of the text as well, since the states are pooled and added to the embedding of the
    timestep (Saharia et al. 2022, "Imagen", §D.1), which scales and shifts the features (Dhariwal & Nichol 2021, §3).
    """
    down = [block.replace("Attn", "CrossAttn") for block in preset["down_block_types"]]
    up = [block.replace("Attn", "CrossAttn") for block in preset["up_block_types"]]
    if not any("Attn" in block for block in down):
        down[-1], up[0] = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4, "resnet_time_scale_shift": "scale_shift"}
    pooled = pooled if len(down) > 2 else {}
    kept = {name: value for name, value in preset.items() if name != "add_attention"}  # the middle always attends
    return {**kept, **pooled, "down_block_types": tuple(down), "up_block_types": tuple(up)}


def _check_runs(unet: UNet, image: tuple[int, int, int], condition: Condition) -> None:
    """Raises what a UNet like this one raises for a batch as training makes it, tried without memory."""
    with torch.device("meta"), torch.no_grad():
        like = type(unet).from_config(unet.config)
        timesteps = torch.zeros(2, dtype=torch.int64)
        shape = tuple(like(torch.zeros(2, *image), timesteps, **condition.probe(2, like)).sample.shape)
    if shape[2:] != image[1:]:
        raise ConfigError(f"the UNet makes images of {shape[2:]} pixels from {image[1:]}; use a --model that keeps the size.")


def _check_timesteps(config: Any, num_train_timesteps: int) -> None:
    """Raises ConfigError if the UNet's embedding does not take the timesteps 0..T-1: "fourier" takes their logarithm."""
    kind, most = config.get("time_embedding_type"), config.get("num_train_timesteps") or 0
    if kind == "fourier" or (kind == "learned" and most < num_train_timesteps):
        raise ConfigError(
            f"time_embedding_type={kind} of the UNet{f' for {most} timesteps' if kind == 'learned' else ''} does not take the "
            f"timesteps 0 to {num_train_timesteps - 1}; use 'positional'."
        )


def _check_fits(config: Any, variance_type: str, size: tuple[int, int], channels: int, beside: int) -> None:
    """Raises ConfigError if a UNet with this config does not fit the images or the variance. `beside` are the channels of the
    condition image.
    """
    levels = len(config.block_out_channels) - 1
    if any(side % 2**levels for side in size):
        lower, upper = ([round(side / 2**levels) * 2**levels for side in size] for round in (math.floor, math.ceil))
        nearest = " or ".join(str(parse_resolution(sides)) for sides in (lower, upper) if all(sides))
        raise ConfigError(
            f"--resolution {parse_resolution(size)} does not fit this UNet, which takes multiples of {2**levels}; use "
            f"{nearest}, or a --model with fewer levels."
        )
    if not config.norm_eps > 0:
        raise ConfigError(f"norm_eps={config.norm_eps} of the UNet must be above 0, since a root is taken of it.")
    if (taken := config.in_channels) != channels + beside:
        made_for = (config.get(OWN_KEY) or {}).get("condition_image")
        fix = f"use --channels {taken}" if not (beside or made_for) else "use a model that was made for this condition image"
        found = f"{channels} channels{f' and their condition image {beside}' if beside else ''}"
        raise ConfigError(f"the images have {found} and the UNet takes {taken}; {fix}.")
    if config.sample_size is not None and (made_for := sides_of(config.sample_size)) != size:
        found = f"images of {shown_size(made_for)} pixels, not {shown_size(size)}"
        raise ConfigError(f"the UNet is made for {found}; use --resolution {parse_resolution(made_for)}.")
    learned = variance_type in LEARNED_VARIANCE_TYPES
    if config.out_channels != channels * (1 + learned):
        raise ConfigError(
            f"the UNet has {config.out_channels} output channels for images of {channels}, and variance_type={variance_type} "
            f"needs {channels * (1 + learned)}; use --variance_type "
            f"{'fixed_small, or a UNet with twice the channels' if learned else 'learned_range if it has twice as many'}."
        )
