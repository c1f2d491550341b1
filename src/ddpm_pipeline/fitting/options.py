"""Options of fitting samplers. Imports the options of generation alone, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import ClassVar

from ..generation.options import RequestOptions
from ..support.option_sets import OptionSet
from ..support.options import FINITE, SEED, Allowed, OptionGroup, at_least, option

LENGTHS = (4, 5, 7, 10, 15, 20)
LONG_STEPS, MOST_LONG_STEPS = 100, 400  # the memory for choosing timesteps grows as the cube: 24 bytes * 400³ = 1.5 GB
NUM_NOISES = 192
HELD_OUT_EVERY = 3  # every third noise is held out


def parse_lengths(text: str | Sequence[int]) -> tuple[int, ...]:
    """ "4,5,7" as (4, 5, 7), ascending. Raises ValueError unless these are distinct whole numbers above 0."""
    try:
        lengths = tuple(sorted(map(int, text.split(",")) if isinstance(text, str) else map(index, text)))
    except (TypeError, ValueError):
        lengths = ()
    if not lengths or lengths[0] < 1 or len(set(lengths)) != len(lengths):
        raise ValueError("whole numbers above 0 separated by commas, each once, such as 5,10,20")
    return lengths


@dataclass(frozen=True)
class FitOptions(OptionGroup):
    """The model, and how samplers are fitted to it."""

    title: ClassVar[str] = "model and fit"

    model: str = option(help="Folder of a DDPM pipeline. Its scheduler's config gets the fitted samplers.")
    num_inference_steps: str = option(
        ",".join(map(str, LENGTHS)), "Numbers of steps to fit a sampler for, separated by commas.", parse=parse_lengths
    )
    guidance_scale: float = option(1.0, "Guidance scale that the model will be sampled at; 1 turns guidance off.", FINITE)
    num_noises: int = option(
        NUM_NOISES, "Images to fit to. A third of them is held out to compare samplers on.", at_least(HELD_OUT_EVERY)
    )
    long_steps: int = option(
        LONG_STEPS,
        "Steps of the long solution, which the fitted samplers approximate.",
        Allowed(f"from 2 to {MOST_LONG_STEPS}", lambda value: 2 <= value <= MOST_LONG_STEPS),
    )
    batch_size: int = option(64, "Images per network call of a process.", at_least(1))
    seed: int = option(0, "Seed of the noise.", SEED)
    num_cpu_threads: int | None = option(None, "CPU threads per process.", at_least(1))


@dataclass(frozen=True, init=False)
class FittingOptions(OptionSet):
    """The options of `fit`: `FittingOptions(model="ddpm-digits", num_inference_steps="5,10")`."""

    sampling: FitOptions
    request: RequestOptions


def parse_options(argv: Sequence[str]) -> FittingOptions:
    """The options that a command line asks for. Raises ConfigError if it cannot be understood."""
    return FittingOptions.parse(argv, "Fit samplers of few steps to a model, and write them into its folder.")
