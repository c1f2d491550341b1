"""What the commands that sample images are told. Imports the support of options alone, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..support.errors import ConfigError
from ..support.option_sets import OptionSet
from ..support.options import FINITE, SEED, OptionGroup, at_least, one_of, option

SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {  # diffusers' class, and its options, by name; "ddpm" is ours
    "ddpm": ("AlphaDDPMScheduler", {}),
    "stock-ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm-solver++": ("DPMSolverMultistepScheduler", {}),
    "sde-dpm-solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
FORMATS = ("auto", "png", "npy", "tiff", "parquet")


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """The model, and how it is sampled."""

    title: ClassVar[str] = "model and sampling"

    model: str = option(help="Folder or Hub repository of a DDPM pipeline, conditional or not.")
    scheduler: str = option("keep", f"Sampler: keep (the model's own), {', '.join(SCHEDULERS)}.", one_of(("keep", *SCHEDULERS)))
    num_inference_steps: int | None = option(
        None,
        "Reverse steps per image. By default as of a call of the pipeline: of the fitted sampler of most steps, or else the "
        "full chain.",
        at_least(1),
    )
    guidance_scale: float = option(1.0, "Guidance scale of a conditional model; 1 is none.", FINITE)
    batch_size: int = option(64, "Images per network call of a process.", at_least(1))
    seed: int = option(0, "Seed of everything random. Image i depends on the seed and i alone.", SEED)
    num_cpu_threads: int | None = option(None, "CPU threads per process.", at_least(1))


@dataclass(frozen=True)
class RequestOptions(OptionGroup):
    """What a conditional model is asked for."""

    title: ClassVar[str] = "condition"

    class_labels: str | None = option(
        None, "Classes to sample in turn, names or ids separated by '|'. By default all classes of the model."
    )
    prompts: str | None = option(None, "Prompts to sample in turn, separated by '|', or a .txt file with one per line.")
    condition_vector: str | None = option(
        None, "Numbers to sample for in turn, as 30,0.5|40,0.5 for a model of two; a place left empty is not told."
    )
    condition_images: str | None = option(
        None, "Folder (or other data) of condition images to sample for in turn, in the order of their names."
    )
    condition_masks: str | None = option(
        None,
        "The same of masks, for a model that inpaints: white where the condition image of the same name is unknown; one mask "
        "alone goes with all.",
    )

    def check(self) -> None:
        if self.class_labels is not None and self.prompts is not None:
            raise ConfigError("--class_labels and --prompts belong to different models; drop one.")


@dataclass(frozen=True)
class OutputOptions(OptionGroup):
    """How many images are sampled, and where they go."""

    title: ClassVar[str] = "output"

    output_dir: str = option(help="Folder for the images: a new folder, or one with the same settings to continue.")
    num_images: int = option(1024, "Number of images. They are numbered from 0.", at_least(1))
    format: str = option(
        "auto",
        "png, npy or tiff (one file per image, in the units of the model's data), parquet (all PNGs in one file), or auto: png "
        "where it holds the images (8 bits of 1, 3 or 4 channels, 16 bits of 1), else npy.",
        one_of(FORMATS),
    )
    preview_channels: str | None = option(
        None,
        "Channels that preview.png shows, counted from 1: one, or three as RGB, such as 3,2,1. By default all, of more than 4 "
        "the first three, and of 2 the first.",
    )


@dataclass(frozen=True, init=False)
class GenerationOptions(OptionSet):
    """All options of `generate`: `GenerationOptions(model="ddpm-digits", output_dir="images", num_images=50_000)`."""

    sampling: SamplingOptions
    request: RequestOptions
    output: OutputOptions


def parse_options(argv: Sequence[str]) -> GenerationOptions:
    """The options that a command line asks for. Raises ConfigError if it cannot be understood."""
    return GenerationOptions.parse(argv, "Sample many images: any number of them, each a function of the seed.")
