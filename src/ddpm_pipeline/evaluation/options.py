"""What an evaluation is told. Imports the options of data and generation alone, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..data.options import CHANNELS, DataOptions
from ..generation.options import SamplingOptions
from ..support.errors import ConfigError
from ..support.option_sets import OptionSet
from ..support.options import Allowed, OptionGroup, at_least, one_of, option

FEWEST_IMAGES = 5  # that ImageQuality takes with its three neighbours

# fmt: off


@dataclass(frozen=True)
class EvaluationDataOptions(DataOptions):
    """The images that the model is compared with."""

    dataset: str = option(help="Images to compare with: 'digits', a Hub data set, a folder, or parquet files.")
    split: str = option("train", "Split of the data set. A likelihood to report is one of held-out images.")
    resolution: int | None = option(None, "Height and width of the images. Only the model's own will do.", at_least(1))
    channels: int | None = option(None, "Channels of the images. Only the model's own will do.", one_of(CHANNELS))
    streaming: bool = option(
        False, "Read only as many images as --num_images or --num_likelihood_images asks for, whichever is larger.")


@dataclass(frozen=True)
class LikelihoodOptions(OptionGroup):
    title: ClassVar[str] = "likelihood"

    num_likelihood_images: int = option(256, "Dataset images to evaluate in bits per dimension; 0 for none.", at_least(0))
    likelihood_steps: int | None = option(None, "Steps of the evaluated chain. By default all of the model's.", at_least(1))
    likelihood_calls: int | None = option(
        None, "Network calls per image, for an estimate from a stratified subset of the steps. By default all.", at_least(1))
    two_term: bool = option(False, "Evaluate the bound in the report's two-term form as well.")
    num_bins: int = option(256, "Levels of a pixel, for bits per dimension.", at_least(2))


@dataclass(frozen=True)
class QualityOptions(OptionGroup):
    title: ClassVar[str] = "sample quality"

    num_images: int = option(
        1024, "Images to sample for FID, KID, precision and recall; 0 for none.",
        Allowed(f"0 or at least {FEWEST_IMAGES}", lambda value: value == 0 or value >= FEWEST_IMAGES))
    features: str = option(
        "auto", "Feature extractor: digits, inception, MODULE:FUNCTION, or auto (digits for the digits, else inception).")
    inception_weights: str | None = option(None, "File of Inception weights. By default they are downloaded.")


@dataclass(frozen=True)
class ResultOptions(OptionGroup):
    title: ClassVar[str] = "results"

    output: str | None = option(None, "JSON file. By default evaluation.json in the model's folder, or in this one.")
    update_card: bool = option(True, "Write the figures into README.md in the model's folder.")


# fmt: on


@dataclass(frozen=True, init=False)
class EvaluationOptions(OptionSet):
    """All options of `evaluate`: `EvaluationOptions(model="ddpm-digits", dataset="digits", num_images=5000)`."""

    sampling: SamplingOptions
    data: EvaluationDataOptions
    likelihood: LikelihoodOptions
    quality: QualityOptions
    results: ResultOptions

    def check(self) -> None:
        if not self.quality.num_images and not self.likelihood.num_likelihood_images:
            raise ConfigError("--num_images 0 and --num_likelihood_images 0 leave nothing to evaluate.")


def parse_options(argv: Sequence[str]) -> EvaluationOptions:
    """The options that a command line asks for. Raises ConfigError if it cannot be understood."""
    figures = "bits per dimension of the data's images, and FID, KID, precision and recall of samples"
    return EvaluationOptions.parse(argv, f"Evaluate a model: {figures}.")
