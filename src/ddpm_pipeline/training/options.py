"""What a training run is told: groups of options, from which flags, YAML keys and `--help` follow.

Flags override the file or recipe that `--config` names. Imports no torch, so that mistakes are reported at once.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..data.options import ConditionColumns, TrainingDataOptions
from ..fitting.options import HELD_OUT_EVERY
from ..support.errors import ConfigError
from ..support.option_sets import OptionSet, value_of
from ..support.options import BELOW_ONE, FINITE, POSITIVE, SEED, Allowed, OptionGroup, at_least, one_of, option

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT_RECIPE = "digits"  # the main job: used where neither --config nor --dataset is given

CONDITIONS = ("none", "class", "text", "image", "vector", "class+image", "vector+image")
DERIVED = re.compile(r"gray|inpaint|downscale:([2-9]|[1-9]\d+)")  # what `--condition_from` makes of an image
OBJECTIVES = ("simple", "hybrid", "bound")
TIMESTEP_SAMPLINGS = ("uniform", "stratified", "importance")
TRAINABLE_VARIANCES = ("fixed_small", "fixed_large", "learned_range")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")  # accelerate's
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
POLYNOMIAL_END = 1e-7  # the rate at which diffusers' schedule of this name ends
MOST_WARMUP = 500  # updates, by default
HYBRID_BOUND_WEIGHT = 0.001  # λ of L_simple + λ L_vlb (Nichol & Dhariwal 2021, §3.1), L_vlb in bits per dimension

# an option that neither the trained model nor a resumed run depends on
_free = partial(option, on_resume="tell", in_recipe=False)

# fmt: off


@dataclass(frozen=True)
class ConditionOptions(OptionGroup):
    title: ClassVar[str] = "condition"

    condition: str = option(
        "none", "What images are conditioned on: none, class, text, image, vector (numbers), class+image or vector+image.",
        one_of(CONDITIONS))
    condition_column: str | None = option(
        None, "Where the condition of image and vector models is: a column of images or a folder of images with the same "
        "names; columns of numbers, a,b,c; for vector+image both, a,b,mask (docs/data.md).")
    condition_classes: int | None = option(
        None, "Classes of condition images that are label maps: pixels hold ids 0 to N-1, which the UNet sees one-hot.",
        at_least(2))
    condition_from: str | None = option(
        None, "Make the condition image of the image itself: downscale:F (smaller by the factor F), gray, or inpaint (parts "
        "masked at random).",
        Allowed("downscale:F with a whole number F from 2, gray or inpaint", DERIVED.fullmatch))
    label_column: str | None = option(
        None, "Column with class labels. By default the only ClassLabel column, else one called label.")
    text_column: str | None = option(
        None, "Column with captions (strings or lists of them). By default one called text, unless they are made of labels.")
    caption_templates: str | None = option(
        None, "YAML file of caption templates for class labels, in place of --text_column (docs/conditions.md).")
    condition_dropout: float = option(
        0.1, "Share of images trained without their condition, for classifier-free guidance.", BELOW_ONE)
    word_dropout: float = option(
        0.0, "Share of a caption's words dropped at each use. Class names are never dropped.", BELOW_ONE)
    text_encoder: str | None = option(
        None, "'small' (the default: built from the captions and trained with the UNet), or the Hub name or folder of a "
        "transformers text model.")
    train_text_encoder: bool = option(False, "Train a loaded text encoder as well instead of freezing it.")
    preview_prompts: str | None = _free(None, "Prompts for previews, separated by '|'. By default captions of the data.")
    preview_guidance: float = _free(2.0, "Guidance scale for previews and samples.png of a conditional model.", FINITE)

    def check(self) -> None:
        text_only = ("text_column", "caption_templates", "text_encoder", "train_text_encoder", "preview_prompts")
        if self.condition != "text" and (given := [name for name in text_only if getattr(self, name)]):
            raise ConfigError(f"--{given[0]} needs --condition text, and this is --condition {self.condition}.")
        if self.label_column and not {"class", "text"} & self.parts:
            raise ConfigError(f"--label_column {self.label_column} has no effect without --condition class or text; add one.")
        self._check_sources()
        others = [name for name in ("caption_templates", "label_column") if self.text_column and getattr(self, name)]
        if others:
            raise ConfigError(f"--text_column and --{others[0]} are two sources of captions; drop one.")

    def _check_sources(self) -> None:
        """Raises ConfigError unless it is clear what a condition of images or numbers is made of."""
        for name, fitting in {"column": "image or vector", "classes": "image", "from": "image"}.items():
            if (value := getattr(self, f"condition_{name}")) and not {*fitting.split(" or ")} & self.parts:
                raise ConfigError(f"--condition_{name} {value} needs --condition {fitting}, not {self.condition}.")
        if "image" in self.parts and "vector" not in self.parts and bool(self.condition_column) == bool(self.condition_from):
            raise ConfigError(
                f"--condition {self.condition} needs one source of the condition images: --condition_column with a column or a "
                "folder, or --condition_from downscale:F, gray or inpaint."
            )
        if "vector" in self.parts and not self.condition_column:
            raise ConfigError(f"--condition {self.condition} needs --condition_column with columns of numbers: a,b,c.")
        if len(names := self.columns.condition_names) != len(set(names)):
            raise ConfigError(f"--condition_column {self.condition_column} names a column twice; name each once.")
        if self.condition_classes and self.condition_from:
            raise ConfigError(
                f"--condition_classes {self.condition_classes} is for label maps, and --condition_from {self.condition_from} "
                "makes none; drop one."
            )

    @property
    def parts(self) -> set[str]:
        """The kinds of condition that are combined."""
        return {*self.condition.split("+")}

    @property
    def columns(self) -> ConditionColumns:
        """What is read beside the images: nothing for a condition image that is made of the image itself."""
        read = [kind for kind in self.condition.split("+") if not (kind == "image" and self.condition_from)]
        columns, captions = (self.label_column, self.text_column), self.caption_templates is not None
        return ConditionColumns("+".join(read) or "none", *columns, captions, self.condition_column, self.condition_classes)


@dataclass(frozen=True)
class ModelOptions(OptionGroup):
    title: ClassVar[str] = "model"

    model: str = option(
        "auto", "UNet: 'auto' (a preset by resolution: tiny, 32, 64, 128 or 256), a preset by name (also small and medium, "
        "for CPUs), or a config file (docs/training.md).")
    dropout: float | None = option(None, "Dropout in the UNet. By default the preset's own.", BELOW_ONE)
    init_from: str | None = option(
        None, "Hub repository or folder of a DDPM pipeline, or a run's checkpoint, to fine-tune (weights and schedule).",
        on_resume="tell")


@dataclass(frozen=True)
class DiffusionOptions(OptionGroup):
    """An option of the schedule that is not given is that of --init_from, or else the scheduler's default."""

    title: ClassVar[str] = "diffusion"

    num_train_timesteps: int | None = option(None, "T, the number of diffusion steps (default 1000).")
    beta_schedule: str | None = option(None, "linear (default), scaled_linear, squaredcos_cap_v2, sigmoid or laplace.")
    beta_start: float | None = option(None, "First beta of the linear, scaled_linear and sigmoid schedules (default 0.0001).")
    beta_end: float | None = option(None, "Last beta of the linear, scaled_linear and sigmoid schedules (default 0.02).")
    prediction_type: str | None = option(None, "What the UNet predicts: epsilon (default), sample or v_prediction.")
    variance_type: str | None = option(
        None, "Variance of the reverse process: fixed_small (default), fixed_large, or learned_range (by the UNet; "
        "default of text models, which diffusers' IFPipeline samples with a learned variance only).")
    rescale_betas_zero_snr: bool | None = option(None, "Rescale the schedule to zero terminal SNR (not with epsilon).")
    objective: str | None = option(
        None, "Loss: simple (squared error), bound (the variational bound), or hybrid (squared error, and the bound for the "
        "variance alone). By default hybrid with learned_range, else simple.", one_of(OBJECTIVES))
    bound_weight: float = option(
        HYBRID_BOUND_WEIGHT, "Weight of the bound in the hybrid loss, in bits per dimension.", POSITIVE)
    timestep_sampling: str = option(
        "uniform", "How timesteps are sampled: uniform, stratified over the batch, or importance (for the bound).",
        one_of(TIMESTEP_SAMPLINGS))
    snr_gamma: float | None = option(
        None, "Gamma of Min-SNR weighting of the squared error, usually 5. By default there is no weighting.", POSITIVE)

    def check(self) -> None:
        if self.variance_type is not None and self.variance_type not in TRAINABLE_VARIANCES:
            raise ConfigError(
                f"--variance_type {self.variance_type} is not one of {', '.join(TRAINABLE_VARIANCES)}; 'analytic' is measured "
                "after training, by ddpm_pipeline.likelihood.estimate_analytic_variance."
            )
        if self.objective == "bound" and self.snr_gamma is not None:
            raise ConfigError("--snr_gamma weights the squared error, which --objective bound does not use; drop one.")

    @property
    def schedule(self) -> dict[str, Any]:
        """The scheduler's configuration, as far as it was given."""
        names = [entry.name for entry in fields(self)]
        given = names[: names.index("objective")]
        return {name: value for name in given if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class OptimisationOptions(OptionGroup):
    title: ClassVar[str] = "optimisation"

    batch_size: int = option(128, "Images per optimizer update, summed over processes and accumulation steps.", at_least(1))
    gradient_accumulation_steps: int = option(
        1, "Micro-batches per update and process, for batches that do not fit in memory.", at_least(1))
    max_train_steps: int | None = option(
        None, "Optimizer updates. Overrides --num_train_epochs.", at_least(1), on_resume="tell")
    num_train_epochs: int = option(
        100, "Passes over the data, if --max_train_steps is not given.", at_least(1), on_resume="tell")
    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.", POSITIVE)
    lr_scheduler: str = option(
        "cosine", f"Learning-rate schedule over updates: {', '.join(LR_SCHEDULERS)}.", one_of(LR_SCHEDULERS))
    lr_warmup_steps: int | None = option(
        None, "Updates over which the learning rate rises to its peak. By default a tenth of all, at most 500.", at_least(0))
    adam_beta1: float = option(0.9, "AdamW's decay of the gradient mean.", BELOW_ONE)
    adam_beta2: float = option(0.999, "AdamW's decay of the squared-gradient mean.", BELOW_ONE)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", POSITIVE)
    weight_decay: float = option(0.0, "AdamW's weight decay.", at_least(0))
    max_grad_norm: float = option(1.0, "Gradient norm above which gradients are scaled down to it.", POSITIVE)
    ema_decay: float = option(
        0.9999, "Highest decay of the EMA of the weights, which is what is saved; 0 turns it off.", BELOW_ONE)
    ema_power: float = option(
        0.75, "The EMA decay rises as 1 - (1 + step)^-power; use 2/3 for long runs, 3/4 for short ones.", POSITIVE)

    def check(self) -> None:
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"--batch_size {self.batch_size} cannot be divided into --gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} micro-batches; use a multiple of {self.gradient_accumulation_steps}."
            )
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise ConfigError(
                f"--lr_warmup_steps {self.lr_warmup_steps} has no effect with --lr_scheduler constant; use "
                "constant_with_warmup."
            )
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ConfigError(
                f"--learning_rate {self.learning_rate:g} must be above {POLYNOMIAL_END:g}, at which --lr_scheduler polynomial "
                "ends; use linear, which ends at 0."
            )
        if self.max_train_steps is not None and self.warmup_steps >= self.max_train_steps:
            raise ConfigError(
                f"--lr_warmup_steps {self.lr_warmup_steps} is not below the number of updates, {self.max_train_steps}, so that "
                f"the learning rate would never reach --learning_rate; use fewer, or leave it out for "
                f"{min(MOST_WARMUP, self.max_train_steps // 10)}."
            )

    @property
    def warmup_steps(self) -> int:
        """The warm-up of a run whose number of updates is known."""
        default = 0 if self.lr_scheduler == "constant" else min(MOST_WARMUP, self.max_train_steps // 10)
        return default if self.lr_warmup_steps is None else self.lr_warmup_steps


@dataclass(frozen=True)
class HardwareOptions(OptionGroup):
    title: ClassVar[str] = "hardware"

    mixed_precision: str | None = option(
        None, "no, bf16 or fp16. By default what `accelerate launch` was told.", one_of(("no", "bf16", "fp16")))
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.", on_resume="tell")
    compile: bool = option(False, "Compile the UNet with torch.compile.")
    channels_last: bool = option(
        False, "Keep the UNet's weights and images in channels-last memory format.", on_resume="tell")
    num_cpu_threads: int | None = _free(
        None, "CPU threads per process. By default the cores are divided among the processes.", at_least(1))
    autotune: bool = option(
        False, "Try before a new run which of the options here and which --gradient_accumulation_steps are fastest, and use "
        "them where no value is given (docs/training.md).", on_resume="allow", in_recipe=False)


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    title: ClassVar[str] = "run"

    seed: int = option(0, "Seed of everything random.", SEED)
    output_dir: str | None = option(
        None, "Folder for the model. By default ddpm-NAME for a data set called NAME.", on_resume="allow", in_recipe=False)
    overwrite: bool = option(
        False, "Start anew in the output folder of an earlier run, whose files go once the new run has begun.",
        on_resume="allow", in_recipe=False)
    resume: str | None = option(
        None, "Resume from 'latest' or from a checkpoint folder. If there is no checkpoint yet, 'latest' starts a new run.",
        on_resume="allow", in_recipe=False)
    accept_changed_data: bool = option(
        False, "Resume although images, labels or captions are not those of the checkpoint.", on_resume="allow",
        in_recipe=False)
    max_train_time: float | None = _free(
        None, "Minutes after which the run writes a checkpoint and stops, as it does on a signal (docs/training.md).",
        Allowed("a number of minutes above 0", POSITIVE.holds))
    checkpoint_every: int = _free(1000, "Updates between checkpoints; 0 writes none.", at_least(0))
    checkpoints_total_limit: int = _free(2, "Number of checkpoints to keep.", at_least(1))
    keep_best: bool = _free(
        False, "Write a checkpoint whenever the held-out bits/dim are the lowest so far, and keep that one beside the others.")

    fit_noises: int = _free(
        48, "Images solved for, from noise, to fit the finished model samplers of few steps (docs/fitted_sampler.md); 0 fits "
        "none.", Allowed(f"0 or at least {HELD_OUT_EVERY}", lambda value: value == 0 or value >= HELD_OUT_EVERY))

    def check(self) -> None:
        if self.resume and self.overwrite:
            raise ConfigError("--resume and --overwrite exclude each other: continue the run, or start anew.")


@dataclass(frozen=True)
class WatchingOptions(OptionGroup):
    title: ClassVar[str] = "watching"

    preview_every: int = _free(1000, "Updates between preview pictures; 0 makes none.", at_least(0))
    preview_images: int = _free(64, "Images per preview.", at_least(1))
    preview_channels: str | None = _free(
        None, "Channels that pictures show, counted from 1: one, or three as RGB, such as 3,2,1. By default all, of more "
        "than 4 the first three, and of 2 the first.")
    preview_inference_steps: int = _free(
        20, "Steps of DPM-Solver++ for previews and evaluations, at most the full chain.", at_least(1))
    eval_every: int = _free(
        0, "Updates between evaluations of the EMA weights; 0 makes none or, with --validation_split, ten in a run "
        "(docs/evaluation.md).", at_least(0))
    eval_images: int = _free(
        64, "Number of training images, and of held-out ones, used in each evaluation.", at_least(1))
    eval_calls: int = _free(50, "Network calls per image for the bits/dim of each evaluation.", at_least(3))
    eval_samples: int = _free(
        0, "Images sampled in each evaluation for FID, KID, precision and recall; 0 samples none.",
        Allowed("0 or at least 5", lambda value: value == 0 or value >= 5))
    eval_features: str = _free(
        "auto", "Feature extractor for these: digits, cats, inception, MODULE:FUNCTION, or auto (digits for the digits, cats "
        "for the cats).")
    num_samples: int = _free(64, "Images in the final samples.png.", at_least(1))
    sample_inference_steps: int | None = _free(
        None, "Reverse steps for samples.png. By default as of a call of the pipeline: of the fitted sampler of most steps, or "
        "else the full chain.", at_least(1))
    log_every: int = _free(50, "Updates between log lines.", at_least(1))
    report_to: str = _free(
        "none", f"Tracker: none; tensorboard or wandb, which get pictures too; {', '.join(TRACKERS[2:])}.",
        one_of(("none", *TRACKERS)))


@dataclass(frozen=True)
class HubOptions(OptionGroup):
    title: ClassVar[str] = "hub"

    push_to_hub: bool = _free(False, "Push the model, its card and samples to the Hub.")
    hub_model_id: str | None = _free(
        None, "Repository to push to, owner/name. By default the output folder's name in your own account.")
    hub_private: bool = _free(False, "Make the repository private if the push creates it.")
    hub_license: str | None = _free(None, "Licence of the model, as the Hub spells it (apache-2.0).")
    push_every: int = _free(0, "Updates between background pushes; 0 pushes only at the end.", at_least(0))
    push_logs: bool = _free(False, "Push metrics.jsonl as well.")

    def check(self) -> None:
        for name in ("push_every", "hub_model_id", "hub_private", "push_logs"):
            if getattr(self, name) and not self.push_to_hub:
                raise ConfigError(f"--{name} {getattr(self, name)} has no effect without --push_to_hub; add it.")


# fmt: on


@dataclass(frozen=True, init=False)
class TrainingOptions(OptionSet):
    """All options of a run. A run is determined by these, the data and the number of processes::

        TrainingOptions(dataset="photos", resolution=64, max_train_steps=20_000)
        TrainingOptions(config="digits_text", max_train_steps=500)  # a recipe of the package, or a YAML file

    Raises ConfigError for options that cannot be used.
    """

    data: TrainingDataOptions
    condition: ConditionOptions
    model: ModelOptions
    diffusion: DiffusionOptions
    optimisation: OptimisationOptions
    hardware: HardwareOptions
    run: RunOptions
    watching: WatchingOptions
    hub: HubOptions

    def check(self) -> None:
        if self.data.streaming and self.optimisation.max_train_steps is None:
            raise ConfigError("--streaming needs --max_train_steps: an epoch's length is unknown before it is read.")
        if self.watching.eval_samples and not (self.watching.eval_every or self.data.validation_split):
            raise ConfigError(f"--eval_samples {self.watching.eval_samples} has no effect with --eval_every 0; drop one.")
        if self.run.keep_best and self.data.validation_split is None:
            raise ConfigError("--keep_best goes by held-out images; add --validation_split, such as 10%.")
        if self.data.streaming and self.watching.eval_samples:
            raise ConfigError(
                f"--eval_samples {self.watching.eval_samples} does not work with --streaming, since it compares with all of "
                "the data; drop one."
            )

    @classmethod
    def merged(cls, stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's warm-up is meant for its schedule: a run that is made too short for it or constant has the default one."""
        steps, options = given.get("max_train_steps"), super().merged(stored, given)
        too_short = isinstance(steps, int) and steps <= (stored.get("lr_warmup_steps") or 0)
        unfit = too_short or given.get("lr_scheduler") == "constant"
        return options | {"lr_warmup_steps": None} if unfit and "lr_warmup_steps" not in given else options

    @classmethod
    def config_file(cls, config: str | Path) -> Path:
        """The file that `--config` names: a file, or a recipe of the package by its name. Raises ConfigError for neither."""
        path = Path(config)
        recipe = RECIPES / f"{path.stem}.yaml"
        if not (path.is_file() or path.suffix or len(path.parts) > 1) and recipe.is_file():
            return recipe
        if not path.exists():
            raise ConfigError(f"--config {path}: there is no such file or recipe. Recipes are {', '.join(recipes())}.")
        return path


def recipes() -> list[str]:
    """The names that --config takes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.endswith("_captions"))


def parse_options(argv: Sequence[str]) -> TrainingOptions:
    """The options that a command line asks for. Raises ConfigError where it cannot be understood."""
    config = value_of(argv, "--config")
    if config is None and value_of(argv, "--dataset") is None:
        config = DEFAULT_RECIPE
    description = "Train a diffusion model. Without --dataset and --config the digits recipe runs."
    help = f"Recipe ({', '.join(recipes())}) or YAML file of options; flags override it."
    return TrainingOptions.parse(argv, description, config, config=help)
