"""What an evaluation is told. Imports the options of data and generation alone, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..data.options import RESIZE, HeldOutDataOptions, parse_resolution
from ..generation.options import SamplingOptions
from ..support.errors import ConfigError
from ..support.option_sets import OptionSet
from ..support.options import Allowed, OptionGroup, at_least, one_of, option

FEWEST_IMAGES = 5  # that ImageQuality takes with its three neighbours

# fmt: off


@dataclass(frozen=True)
class EvaluationDataOptions(HeldOutDataOptions):
    """The images that the model is compared with."""

    dataset: str = option(help="Images to compare with: 'digits', 'cats', a Hub data set, a folder, or parquet files.")
    split: str = option("train", "Split of the data set. A likelihood to report is one of held-out images.")
    resolution: int | str | None = option(
        None, "Height and width of the images. Only the model's own will do.", parse=parse_resolution)
    resize: str | None = option(
        None, "How images get this size: crop, pad, stretch or none, as for training. By default as the training run did whose "
        "record is in the model's folder, or else crop.", one_of(RESIZE))
    channels: int | None = option(None, "Channels of the images. Only the model's own will do.", at_least(1))
    streaming: bool = option(
        False, "Read only as many images as --num_images or --num_likelihood_images asks for, whichever is larger.")
    validation_split: str | None = option(
        None, "Images that the model was not trained on, as in training: a split, a folder or file (with a / in its path), or "
        "a share (10%). The others are then its training images, and what it has memorised of these is measured.")

    def check(self) -> None:
        super().check()
        if self.streaming and self.validation_split:
            raise ConfigError("--validation_split looks for the nearest of all training images; drop it, or --streaming.")


@dataclass(frozen=True)
class ConditionOptions(OptionGroup):
    """Where the conditions of a conditional model come from."""

    title: ClassVar[str] = "condition"

    label_column: str | None = option(None, "Column of class labels. By default the only ClassLabel column.")
    text_column: str | None = option(None, "Column of captions, for a text-to-image model. Of several, the first counts.")
    caption_template: str | None = option(
        None, "Caption with {name} in place of the class name, for a text-to-image model and data with labels alone.",
        Allowed("a text with {name}", lambda value: "{name}" in value))
    condition_column: str | None = option(
        None, "Column or folder of the condition images, or columns of numbers, a,b,c, or both, a,b,mask. Numbers are by "
        "default in the columns that the model's have their names from.")

    def check(self) -> None:
        if self.text_column is not None and self.caption_template is not None:
            raise ConfigError("--caption_template makes captions from class labels; drop it, or --text_column.")


@dataclass(frozen=True)
class LikelihoodOptions(OptionGroup):
    title: ClassVar[str] = "likelihood"

    num_likelihood_images: int = option(256, "Dataset images to evaluate in bits per dimension; 0 for none.", at_least(0))
    likelihood_steps: int | None = option(None, "Steps of the evaluated chain. By default all of the model's.", at_least(1))
    likelihood_calls: int | None = option(
        None, "Network calls per image, for an estimate from a stratified subset of the steps. By default all.", at_least(3))
    two_term: bool = option(False, "Evaluate the bound in the report's two-term form as well.")
    num_bins: int | None = option(
        None, "Levels of a value, for bits per dimension. By default those of the model's data: 256 of 8 bits, 65,536 of 16, "
        "none of floats, which have a density.", at_least(2))

    def check(self) -> None:
        if self.two_term and self.likelihood_calls is not None:
            raise ConfigError("--two_term follows the whole chain; drop it, or --likelihood_calls.")


@dataclass(frozen=True)
class QualityOptions(OptionGroup):
    title: ClassVar[str] = "sample quality"

    num_images: int = option(
        1024, "Images to sample for FID, KID, precision and recall; 0 for none.",
        Allowed(f"0 or at least {FEWEST_IMAGES}", lambda value: value == 0 or value >= FEWEST_IMAGES))
    features: str = option(
        "auto", "Feature extractor: digits, cats, inception, MODULE:FUNCTION, or auto (digits for the digits, cats for the "
        "cats, else inception, or no samples where that is not installed).")
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
    condition: ConditionOptions
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
