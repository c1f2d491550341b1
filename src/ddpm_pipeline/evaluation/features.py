"""Feature extractors that images are compared by, and the features of real images, cached.

An extractor is a module from images [B, C, H, W] in [-1, 1] to features [B, F].
"""

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..data import ImageData
from ..ranges_alpha_ddpm import ValueRange
from ..support.atomic import atomic_file
from ..support.errors import ConfigError
from ..support.exceptions import describe_exception
from ..support.extras import needs_extra
from ..support.provenance import weights_digest
from .cat_judge import CatFeatures
from .digits import fit_digits_classifier
from .options import FEWEST_IMAGES

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
REAL_BATCH = 256  # images whose features are extracted at once
_HOW_TO_SUPPLY = (
    f"Download {INCEPTION_URL} (95 MB) on a machine with network access, then pass its path (--inception_weights of "
    "evaluate.py) or put the file into torch.hub's checkpoint folder."
)

_WHAT_TO_NAME = (
    "Use auto, digits, cats, inception, or MODULE:FUNCTION, where the function takes no arguments and returns a torch module "
    "from images [B, C, H, W] in [-1, 1] to features [B, F]."
)


def extract(extractor: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features [B, F] of images [B, C, H, W], uint8 or float32 in [-1, 1], and logits [B, classes] if the extractor has them.

    An extractor with logits has a method `features_and_logits`, or a method `features` while the module itself gives logits.
    Raises ValueError for images of another type or shape, and if the extractor fails or gives anything but features [B, F].
    """
    eight_bits, name = images.dtype == torch.uint8, f"the feature extractor {type(extractor).__name__}"
    if images.ndim != 4 or not (eight_bits or (images.dtype == torch.float32 and not (images.abs() > 1).any())):
        needed = "give uint8 [B, C, H, W], or float32 in [-1, 1]"
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; {needed}.")
    scaled = images.to(torch.float32) / 127.5 - 1 if eight_bits else images
    try:
        with torch.no_grad():
            if hasattr(extractor, "features_and_logits"):
                features, logits = extractor.features_and_logits(scaled)
            elif hasattr(extractor, "features"):
                features, logits = extractor.features(scaled), extractor(scaled)
            else:
                features, logits = extractor(scaled), None
    except (Exception, SystemExit) as error:  # it may be the user's code, which may raise or end in any way
        raise ValueError(f"{name} fails on images {list(images.shape)}: {describe_exception(error)}.") from error
    features = _checked(features, name, "features", images)
    return features, None if logits is None else _checked(logits, name, "logits", images)


def _checked(values: Any, name: str, what: str, images: torch.Tensor) -> torch.Tensor:
    """Features or logits [B, F], float32 or float64. Raises ValueError if they are something else."""
    if not isinstance(values, torch.Tensor) or values.is_complex():
        given = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"{name} gives {given} as {what}, not a tensor of real numbers [B, F].")
    if values.ndim != 2 or len(values) != len(images) or not values.shape[1]:
        advice = "; average maps [B, F, h, w] with .mean(dim=(2, 3))" if values.ndim == 4 else ""
        given = f"{what} {list(values.shape)} of {len(images)} images"
        raise ValueError(f"{name} gives {given}, not [{len(images)}, F]{advice}.")
    return values if values.dtype == torch.float64 else values.float()


def seen(pixels: torch.Tensor, value_range: ValueRange) -> torch.Tensor:
    """Images in own units as `extract` takes them: 8 bits as they are, others at their full depth as float32 in [-1, 1]."""
    return pixels if value_range.is_whole_type and pixels.dtype == torch.uint8 else value_range.normalize(pixels)


def feature_extractor(
    name: str, dataset: str, inception_weights: str | None, option: str = "--features", channels: int = 3
) -> nn.Module:
    """The extractor of this name for images of so many channels: "digits", "cats", "inception", MODULE:FUNCTION that returns
    one, or "auto" by the data set.

    Raises ConfigError, which names the `option` it came from, if it cannot be used.
    """
    if name == "digits" or (name == "auto" and dataset == "digits"):
        return fit_digits_classifier()
    if name == "cats" or (name == "auto" and dataset == "cats" and channels == 3):
        return CatFeatures()
    if name in ("inception", "auto"):
        if channels not in (1, 3):
            advice = f"name your own with {option} MODULE:FUNCTION, which may choose channels for it (docs/evaluation.md)"
            raise ConfigError(f"{option} inception: it sees pictures of 1 or 3 channels, not {channels}; {advice}.")
        try:
            return InceptionFeatures(inception_weights)
        except (ImportError, FileNotFoundError) as error:
            raise ConfigError(f"{option} inception: {error}") from error
    try:
        return _made_by_the_user(name)
    except (Exception, SystemExit) as error:  # it is the user's code, which may raise or end in any way
        why = str(error) if type(error) is ConfigError else describe_exception(error)
        raise ConfigError(f"{option} {name}: {why}. {_WHAT_TO_NAME}") from error


def _made_by_the_user(name: str) -> nn.Module:
    """What FUNCTION in MODULE gives."""
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ConfigError("it is no name of an extractor")
    with _current_folder_searched():
        function = getattr(importlib.import_module(module_name), function_name, None)
        if not callable(function):
            raise ConfigError(f"{module_name} has no function {function_name}")
        extractor = function()
    if not isinstance(extractor, nn.Module):
        raise ConfigError(f"{function_name}() returned a {type(extractor).__name__}, not a torch module")
    return extractor.eval()


@contextlib.contextmanager
def _current_folder_searched() -> Iterator[None]:
    """Within, modules that are found nowhere else are looked for in the current folder, which scripts do not search."""

    class Here:
        @staticmethod
        def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
            return PathFinder.find_spec(name, path or [str(Path.cwd())], target)

    sys.meta_path.append(Here)
    try:
        yield
    finally:
        sys.meta_path.remove(Here)


def try_extractor(extractor: nn.Module, data: ImageData, option: str) -> None:
    """Extract the features of two images of noise like those of the data, and of one alone, so that what fails does so before a
    run. Raises ConfigError, which names the `option`, then, for features that are not finite, random or the same for both
    images, and for too few data.
    """
    if len(data) < FEWEST_IMAGES:
        needed = f"sample quality needs at least {FEWEST_IMAGES}, and thousands for a figure to report"
        raise ConfigError(f"{option}: {data.name} has {len(data)} images; {needed}. Evaluate the likelihood alone.")
    shape = (2, data.channels, *data.size)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    try:
        features, again, _ = (_finite_features(extractor, images) for images in (noise, noise, noise[:1]))
        if not torch.allclose(features, again, rtol=1e-3):
            raise ConfigError("it gives other features each time; turn off what is random in it, such as dropout.")
        if torch.equal(features[0], features[1]):
            raise ConfigError("it gives the same features for different images.")
    except ValueError as error:
        raise ConfigError(f"{option}: {error} {_WHAT_TO_NAME}") from error


def real_features(data: ImageData, extractor: nn.Module, cache_dir: str | None) -> torch.Tensor:
    """Features [N, F] of all images of the data, from the cache, or else computed and kept there.

    The key is the data's fingerprint, the extractor's class and weights, and what it makes of the first images, so that neither
    can be mistaken. Raises ConfigError if features cannot be had or are not finite.
    """
    rows = range(len(data))
    first = _finite_features(extractor, seen(data.pixels(rows[:2]), data.value_range))
    behaviour = hashlib.sha256(first.numpy().tobytes()).hexdigest()[:8]
    name = f"features-{data.fingerprint}-{weights_digest(extractor)}-{behaviour}.safetensors"
    path = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline" / name
    if path.is_file():
        return load_file(path)["features"]
    batches = (seen(data.pixels(rows[start : start + REAL_BATCH]), data.value_range) for start in rows[::REAL_BATCH])
    features = torch.cat([_finite_features(extractor, batch) for batch in batches])
    with atomic_file(path) as temporary:
        save_file({"features": features.contiguous()}, temporary)
    return features


def _finite_features(extractor: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Features [B, F], on the CPU. Raises ConfigError if there are none, or if some are not finite."""
    device = next(iter(extractor.state_dict().values()), torch.empty(0)).device
    try:
        features = extract(extractor, images.to(device))[0].cpu()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not features.isfinite().all():
        raise ConfigError(f"the feature extractor {type(extractor).__name__} gives NaN or infinite features.")
    return features


class InceptionFeatures(nn.Module):
    """The 2048 pool features and the logits of the Inception network that published FIDs use, by torch-fidelity.

    `weights` is its weights file, INCEPTION_FILE; by default torch.hub finds it in its cache or downloads it.

    Raises:
        ImportError: if the extra `inception` is not installed.
        FileNotFoundError: if the weights are neither given nor cached, and cannot be downloaded.
    """

    num_features = 2048

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        with needs_extra("inception", "the Inception feature extractor"):
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"the Inception weights {weights} are not a file. {_HOW_TO_SUPPLY}")
        try:
            path = None if weights is None else str(weights)
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], path)
        except Exception as error:  # of the network, of a damaged file, of other weights
            raise FileNotFoundError(f"the Inception weights could not be loaded ({error}). {_HOW_TO_SUPPLY}") from error

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 2048] and [B, 1008] of images [B, 1 or 3, H, W] in [-1, 1], of which it sees 8 bits."""
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        features, logits = self.network._torch_fidelity_forward(pixels)
        return features.flatten(1), logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features_and_logits(images)[0]
