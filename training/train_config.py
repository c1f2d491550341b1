"""What a training run is told: one dataclass, from which the flags, the YAML keys and `--help` follow.

Flags override the file that `--config` names. Imports transformers' argument parser and the package's names of objectives.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ddpm_pipeline.objectives import HYBRID_BOUND_WEIGHT, OBJECTIVES, TIMESTEP_SAMPLINGS

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = CONFIGS / "digits.yaml"  # the main job: used where neither --config nor --dataset is given

MIXED_PRECISIONS = ("no", "bf16", "fp16")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
CONDITIONS = ("none", "class", "text")
REPORT_TO = ("none", "tensorboard", "wandb")
TRAINABLE_VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class ConfigError(ValueError):
    """An option that cannot be used; the message names it, what is allowed, and what to do."""


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class TrainingConfig:
    """A run's options. A whole run is determined by these, the data and the number of processes."""

    # data
    dataset: str = _option(
        "digits",
        "Images to train on: 'digits' (built in), a Hub data set, a folder of images, parquet files, or a folder saved "
        "by Dataset.save_to_disk. Without --dataset and --config the digits recipe runs.",
    )
    dataset_config: str | None = _option(None, "Configuration of a Hub data set.")
    split: str = _option("train", "Split of the data set.")
    image_column: str | None = _option(None, "Column with the images; found by its type if not given.")
    resolution: int | None = _option(None, "Side of the square images in pixels; the data's own if all share one.")
    channels: int | None = _option(None, "1 (grey), 3 (RGB) or 4 (RGBA); the data's own if not given.")
    random_flip: bool = _option(False, "Mirror half of the images left to right.")
    cache_dir: str | None = _option(
        None, "Where preprocessed images are cached; the datasets library's cache if not given."
    )
    preprocessing_num_workers: int | None = _option(None, "Processes that preprocess the images once.")
    max_bad_fraction: float = _option(
        0.01,
        "Share of rows that may be left out, and listed in skipped.jsonl, because their image cannot be read or the label or "
        "caption is missing that --condition needs; more end the run.",
    )
    streaming: bool = _option(
        False,
        "Read the data as they are needed, instead of preprocessing them once; needs --resolution and --max_train_steps.",
    )
    shuffle_buffer: int = _option(
        10_000, "Rows of a stream that each reading process shuffles at a time (fewer, if they are above 256 MB)."
    )
    dataloader_num_workers: int = _option(0, "Processes that read batches ahead, for each training process.")

    # conditions
    condition: str = _option("none", "What images are drawn for: none, class (labels) or text (captions).")
    label_column: str | None = _option(None, "Column with class labels; the only ClassLabel column if not given.")
    text_column: str | None = _option(None, "Column with captions, strings or lists of them.")
    caption_templates: str | None = _option(
        None, "YAML file with wordings for the labels, where there is no --text_column (docs/conditions.md)."
    )
    condition_dropout: float = _option(0.1, "Share of images trained without their condition, for guidance.")
    word_dropout: float = _option(0.0, "Share of a caption's words left out at each use; never the name of the class.")
    text_encoder: str | None = _option(
        None,
        "'small' (made from the captions and trained with the UNet; the default), or the Hub name or folder of a "
        "transformers text model.",
    )
    train_text_encoder: bool = _option(False, "Train a loaded text encoder too, instead of keeping it frozen.")
    preview_prompts: str | None = _option(
        None, "Prompts of previews, separated by '|'; from the captions if not given."
    )
    preview_guidance: float = _option(2.0, "Guidance scale of previews and of samples.png, with a condition.")

    # model
    model: str = _option("auto", "UNet: a preset (tiny, 32, 64, 128, 256), 'auto' (by resolution), or a config file.")
    dropout: float | None = _option(None, "Dropout in the UNet; the preset's own if not given.")
    init_from: str | None = _option(
        None, "Hub repository or folder of a DDPM pipeline to go on from (weights and schedule)."
    )

    # diffusion; what is not given is that of --init_from, else the default of the scheduler
    num_train_timesteps: int | None = _option(None, "T, the number of diffusion steps (default 1000).")
    beta_schedule: str | None = _option(None, "linear (default), scaled_linear, squaredcos_cap_v2, sigmoid or laplace.")
    beta_start: float | None = _option(None, "First beta of the linear-like schedules (default 0.0001).")
    beta_end: float | None = _option(None, "Last beta of the linear-like schedules (default 0.02).")
    prediction_type: str | None = _option(None, "What the UNet predicts: epsilon (default), sample or v_prediction.")
    variance_type: str | None = _option(
        None, "Variance of the reverse process: fixed_small (default), fixed_large, or learned_range (by the UNet)."
    )
    rescale_betas_zero_snr: bool | None = _option(
        None, "Rescale the schedule to zero terminal signal (not with epsilon)."
    )
    objective: str | None = _option(
        None,
        "What is minimised: simple (the squared error), hybrid (and beside it the bound, for the variance alone), or bound "
        "(the variational bound). hybrid for learned_range, else simple, if not given.",
    )
    bound_weight: float = _option(HYBRID_BOUND_WEIGHT, "Weight of the bound, in bits per dimension, in hybrid.")
    timestep_sampling: str = _option(
        "uniform", "How timesteps are drawn: uniform, stratified over the batch, or by importance (for bound)."
    )
    snr_gamma: float | None = _option(
        None, "Min-SNR weighting of the squared error with this gamma; 5 is usual. Off if not given."
    )

    # optimisation
    batch_size: int = _option(128, "Images an update, over all processes and accumulation steps.")
    gradient_accumulation_steps: int = _option(1, "Forward passes an update, for batches that do not fit in memory.")
    max_train_steps: int | None = _option(None, "Optimiser updates. Overrides --num_train_epochs.")
    num_train_epochs: int = _option(100, "Passes over the data, where --max_train_steps is not given.")
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler: str = _option("cosine", f"Schedule of the learning rate, by updates: {', '.join(LR_SCHEDULERS)}.")
    lr_warmup_steps: int = _option(500, "Updates over which the learning rate rises to its peak.")
    adam_beta1: float = _option(0.9, "AdamW's decay of the mean of gradients.")
    adam_beta2: float = _option(0.999, "AdamW's decay of the mean of squared gradients.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    weight_decay: float = _option(0.0, "AdamW's weight decay.")
    max_grad_norm: float = _option(1.0, "Gradients are scaled down to this norm; its value before that is logged.")
    ema_decay: float = _option(
        0.9999, "Highest decay of the moving average of the weights that is saved; 0 turns it off."
    )
    ema_power: float = _option(0.75, "The decay rises as 1 - (1 + step)^-power; 2/3 suits long runs, 3/4 short ones.")

    # hardware
    mixed_precision: str | None = _option(None, "no, bf16 or fp16; what `accelerate launch` was told if not given.")
    gradient_checkpointing: bool = _option(False, "Recompute activations to save memory.")
    compile: bool = _option(False, "torch.compile the UNet.")
    channels_last: bool = _option(False, "Keep the UNet's weights and images in channels-last memory order.")
    num_cpu_threads: int | None = _option(
        None, "Threads on the CPU, each process; all cores are shared out if not given."
    )
    seed: int = _option(0, "Everything random follows from it.")

    # results
    output_dir: str | None = _option(None, "Folder for the model; ddpm-NAME for a data set called NAME if not given.")
    overwrite: bool = _option(False, "Remove an earlier run's files from the output folder and start anew.")
    resume: str | None = _option(None, "'latest' or a checkpoint folder: go on from there. 'latest' may find none.")
    max_train_time: float | None = _option(
        None, "Minutes after which the run writes a checkpoint and ends, as by a signal (docs/training.md)."
    )
    checkpoint_every: int = _option(1000, "Updates between checkpoints; 0 writes none.")
    checkpoints_total_limit: int = _option(2, "Checkpoints to keep, at least 1.")
    preview_every: int = _option(1000, "Updates between preview pictures; 0 draws none.")
    preview_images: int = _option(64, "Images in a preview.")
    preview_inference_steps: int = _option(100, "Reverse steps of a preview.")
    eval_every: int = _option(0, "Updates between evaluations of the averaged weights; 0: none (docs/evaluation.md).")
    eval_images: int = _option(64, "Images of the data that such an evaluation is of.")
    eval_calls: int = _option(50, "Network calls an image that it takes, at least 3.")
    eval_samples: int = _option(
        0, "Images drawn for FID, KID, precision and recall at each evaluation; 0 for none, else at least 5."
    )
    eval_features: str = _option(
        "auto", "Judge of these: digits, inception, MODULE:FUNCTION, or auto (digits for digits)."
    )
    num_samples: int = _option(64, "Images in the final samples.png, drawn over the full chain.")
    log_every: int = _option(50, "Updates between lines of the log.")
    report_to: str = _option("none", "Tracker: none, tensorboard or wandb.")
    push_to_hub: bool = _option(False, "Push the model, its card and samples to the Hub.")
    hub_model_id: str | None = _option(
        None, "Repository to push to, owner/name; the output folder's name in your own account if not given."
    )
    hub_private: bool = _option(False, "Make the repository private, where it is made anew.")
    hub_license: str | None = _option(None, "The model's licence for its card, as the Hub spells it (apache-2.0).")
    push_every: int = _option(0, "Updates between pushes in the background during training; 0 pushes only at the end.")
    push_logs: bool = _option(False, "Push metrics.jsonl as well.")

    def __post_init__(self) -> None:
        for name, low in {
            "batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "checkpoints_total_limit": 1,
            "log_every": 1, "preview_images": 1, "preview_inference_steps": 1, "num_samples": 1, "seed": 0,
            "lr_warmup_steps": 0, "push_every": 0, "checkpoint_every": 0, "preview_every": 0, "dataloader_num_workers": 0,
            "eval_every": 0, "eval_images": 1, "eval_calls": 3, "eval_samples": 0, "shuffle_buffer": 1,
        }.items():  # fmt: skip
            self._require(name, getattr(self, name) >= low, f"at least {low}")
        positive_time = self.max_train_time is None or 0 < self.max_train_time < math.inf
        self._require("max_train_time", positive_time, "a number of minutes above 0")
        for name in ("resolution", "max_train_steps", "num_cpu_threads", "preprocessing_num_workers"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "ema_power"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "a number of at least 0")
        self._require("dropout", self.dropout is None or 0 <= self.dropout < 1, "at least 0 and below 1")
        self._require("snr_gamma", self.snr_gamma is None or 0 < self.snr_gamma < math.inf, "a number above 0")
        self._require("channels", self.channels in (None, 1, 3, 4), "1, 3 or 4")
        self._require("lr_scheduler", self.lr_scheduler in LR_SCHEDULERS, f"one of {', '.join(LR_SCHEDULERS)}")
        self._require("report_to", self.report_to in REPORT_TO, f"one of {', '.join(REPORT_TO)}")
        allowed = (None, *MIXED_PRECISIONS)
        self._require("mixed_precision", self.mixed_precision in allowed, f"one of {', '.join(MIXED_PRECISIONS)}")
        if self.variance_type is not None and self.variance_type not in TRAINABLE_VARIANCES:
            raise ConfigError(
                f"--variance_type {self.variance_type} is not one of {', '.join(TRAINABLE_VARIANCES)}; 'analytic' is measured "
                "after training, by ddpm_pipeline.likelihood.estimate_analytic_variance."
            )
        allowed_objectives = (None, *OBJECTIVES)
        self._require("objective", self.objective in allowed_objectives, f"one of {', '.join(OBJECTIVES)}")
        self._require("bound_weight", 0 < self.bound_weight < math.inf, "a number above 0")
        known_sampling = self.timestep_sampling in TIMESTEP_SAMPLINGS
        self._require("timestep_sampling", known_sampling, f"one of {', '.join(TIMESTEP_SAMPLINGS)}")
        if self.objective == "bound" and self.snr_gamma is not None:
            raise ConfigError("--snr_gamma weights the squared error, which --objective bound does not have; drop one.")
        self._require("eval_samples", self.eval_samples == 0 or self.eval_samples >= 5, "0 or at least 5")
        if self.eval_samples and (self.streaming or not self.eval_every):
            clash = "--streaming, for it compares with all of the data" if self.streaming else "--eval_every 0"
            raise ConfigError(f"--eval_samples {self.eval_samples} does not go with {clash}; leave one out.")
        if self.eval_every and self.condition != "none":
            raise ConfigError(
                "--eval_every measures models without a condition; leave it out, or use --condition none."
            )
        self._require("condition", self.condition in CONDITIONS, f"one of {', '.join(CONDITIONS)}")
        for name in ("condition_dropout", "word_dropout", "max_bad_fraction"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._require("preview_guidance", math.isfinite(self.preview_guidance), "a finite number")
        text_options = ("text_column", "caption_templates", "text_encoder", "train_text_encoder", "preview_prompts")
        if self.condition != "text" and (given := [name for name in text_options if getattr(self, name)]):
            raise ConfigError(
                f"--{given[0]} is of use with --condition text only, and this is --condition {self.condition}."
            )
        if not self.push_to_hub and (self.push_every or self.hub_model_id):
            flag = "push_every" if self.push_every else "hub_model_id"
            raise ConfigError(f"--{flag} {getattr(self, flag)} has no effect without --push_to_hub; add it.")
        if self.streaming and self.resolution is None:
            raise ConfigError(
                "--streaming needs --resolution: what sizes images have is not known before they are read."
            )
        if self.streaming and self.max_train_steps is None:
            raise ConfigError(
                "--streaming needs --max_train_steps: how many images make an epoch is not known before they are read."
            )
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other: go on with the run, or start anew.")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"--{name} {getattr(self, name)} must be {allowed}.")

    def to_yaml(self) -> str:
        """Every option with its value, as a file that `--config` takes."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def parse_config(argv: Sequence[str]) -> TrainingConfig:
    """The configuration that the command line asks for; ConfigError where it cannot be understood.

    The file's entries are put before the flags, so that both are read, typed and checked in one way, and the last wins.
    """
    parser = HfArgumentParser(
        TrainingConfig, description=__doc__.splitlines()[0], allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Options from a YAML file; flags override them.")
    argv = list(argv)
    chosen = _value_of(argv, "--config")
    if chosen is None and _value_of(argv, "--dataset") is None:
        chosen = str(DEFAULT_CONFIG)
    tokens = (_tokens_of_file(Path(chosen)) if chosen else []) + argv
    try:
        namespace, unknown = parser.parse_known_args(tokens)
    except SystemExit as error:  # argparse has printed what is wrong; --help ends with 0
        raise error
    except Exception as error:
        raise ConfigError(str(error)) from error
    if unknown:
        raise ConfigError(_unknown_option(unknown[0].split("=")[0]))
    values = vars(namespace)
    del values["config"]
    return TrainingConfig(**values)


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value given for a flag, as `--flag value` or `--flag=value`."""
    value = None
    for token, following in zip_longest(argv, argv[1:]):
        if token == flag:
            value = following
        elif token.startswith(f"{flag}="):
            value = token.split("=", 1)[1]
    return value


def _tokens_of_file(path: Path) -> list[str]:
    try:
        options = yaml.safe_load(path.read_text("utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}. Recipes are in {CONFIGS}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--config {path} must hold `option: value` lines, not a {type(options).__name__}.")
    names = {entry.name for entry in fields(TrainingConfig)}
    tokens = []
    for name, value in options.items():
        if name not in names:
            raise ConfigError(f"{path}: {_unknown_option(f'--{name}')}")
        if value is not None:
            tokens.append(f"--{name}={value}")
    return tokens


def _unknown_option(flag: str) -> str:
    names = [f"--{entry.name}" for entry in fields(TrainingConfig)] + ["--config"]
    near = difflib.get_close_matches(flag, names, n=1, cutoff=0.5)
    return f"unknown option {flag}.{f' Did you mean {near[0]}?' if near else ''} All options: --help."


def options_table() -> str:
    """The options as a Markdown table, for the docs."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for entry in fields(TrainingConfig):
        default = "" if entry.default in (None, MISSING) else f"`{entry.default}`"
        lines.append(f"| `--{entry.name}` | {default} | {entry.metadata['help']} |")
    return "\n".join(lines) + "\n"
