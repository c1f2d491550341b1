"""Feature extractors that images are compared by, and the features of real images, cached.

An extractor is a module from images [B, C, H, W] in [-1, 1] to features [B, F].
"""

import importlib
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..data import ImageData
from ..support.atomic import atomic_file
from ..support.errors import ConfigError
from ..support.extras import needs_extra
from ..support.provenance import weights_digest
from .digits import fit_digits_classifier

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
REAL_BATCH = 256  # images whose features are extracted at once
_HOW_TO_SUPPLY = (
    f"Download {INCEPTION_URL} (95 MB) on a machine with network access, then pass its path (--inception_weights of "
    "evaluate.py) or put the file into torch.hub's checkpoint folder."
)


def extract(extractor: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features [B, F] of uint8 images [B, C, H, W], and logits [B, classes] if the extractor has them.

    An extractor with logits has a method `features_and_logits`, or a method `features` while the module itself gives logits.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; give uint8 [B, C, H, W].")
    scaled = images.to(torch.float32) / 127.5 - 1
    if hasattr(extractor, "features_and_logits"):
        return extractor.features_and_logits(scaled)
    if hasattr(extractor, "features"):
        return extractor.features(scaled), extractor(scaled)
    return extractor(scaled), None


def feature_extractor(name: str, dataset: str, inception_weights: str | None, option: str = "--features") -> nn.Module:
    """The extractor of this name: "digits", "inception", MODULE:FUNCTION that returns one, or "auto" by the data set.

    Raises ConfigError, which names the `option` it came from, if it cannot be used.
    """
    if name == "digits" or (name == "auto" and dataset == "digits"):
        return fit_digits_classifier()
    if name in ("inception", "auto"):
        try:
            return InceptionFeatures(inception_weights)
        except (ImportError, FileNotFoundError) as error:
            raise ConfigError(f"{option} inception: {error}") from error
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)().eval()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{option} {name}: {error}. Use auto, digits, inception, or MODULE:FUNCTION, where the function returns a "
            "torch module from images [B, C, H, W] in [-1, 1] to features [B, F]."
        ) from error


def real_features(data: ImageData, extractor: nn.Module, cache_dir: str | None) -> torch.Tensor:
    """Features [N, F] of all images of the data, from the cache, or else computed and kept there.

    The key is the data's fingerprint and a digest of the extractor's class and weights, so that neither can be mistaken.
    """
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline"
    path = folder / f"features-{data.fingerprint}-{weights_digest(extractor)}.safetensors"
    if path.is_file():
        return load_file(path)["features"]
    device, rows = next(iter(extractor.state_dict().values()), torch.empty(0)).device, range(len(data))
    batches = (data.pixels(rows[start : start + REAL_BATCH]).to(device) for start in rows[::REAL_BATCH])
    with torch.no_grad():
        features = torch.cat([extract(extractor, batch)[0].cpu() for batch in batches])
    with atomic_file(path) as temporary:
        save_file({"features": features.contiguous()}, temporary)
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
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise FileNotFoundError(f"the Inception weights could not be loaded ({error}). {_HOW_TO_SUPPLY}") from error

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 2048] and [B, 1008] of images [B, 1 or 3, H, W] in [-1, 1]."""
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        features, logits = self.network._torch_fidelity_forward(pixels)
        return features.flatten(1), logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features_and_logits(images)[0]
