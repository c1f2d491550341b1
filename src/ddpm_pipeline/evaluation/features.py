"""Feature extractors that images are judged by, and the features of real images, cached. Imports torch and safetensors.

An extractor is a module from images [B, C, H, W] in [-1, 1] to features [B, F].
"""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.mapped import ImageData
from ..support.errors import ConfigError
from ..support.provenance import weights_digest
from .digits import fit_digits_classifier

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
REAL_BATCH = 256  # images whose features are extracted at once
_HOW_TO_SUPPLY = (
    f"download {INCEPTION_URL} (95 MB) where there is a network, and pass its path (--inception_weights in evaluate.py), or "
    "put it into torch.hub's folder of checkpoints."
)


def extract(extractor: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features [B, F] and, where the extractor has them, logits [B, classes] of uint8 images [B, C, H, W]."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; give uint8 [B, C, H, W].")
    scaled = images.to(torch.float32) / 127.5 - 1
    if hasattr(extractor, "features_and_logits"):
        return extractor.features_and_logits(scaled)
    if hasattr(extractor, "features"):
        return extractor.features(scaled), extractor(scaled)
    return extractor(scaled), None


def feature_extractor(name: str, dataset: str, inception_weights: str | None, option: str = "--features") -> nn.Module:
    """The network that quality is judged by: "digits", "inception", or MODULE:FUNCTION that returns one.

    Raises ConfigError, with the `option` that named it, where it cannot be used.
    """
    if name == "auto":
        name = "digits" if dataset == "digits" else "inception"
    if name == "inception":
        try:
            return InceptionFeatures(inception_weights)
        except (ModuleNotFoundError, FileNotFoundError) as error:
            raise ConfigError(f"{option} inception: {error}") from error
    if name == "digits":
        return fit_digits_classifier()
    module, _, function = name.partition(":")
    try:
        extractor: Any = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{option} {name}: {error}. Use auto, digits, inception, or MODULE:FUNCTION, where the function returns a "
            "torch module from images [B, C, H, W] in [-1, 1] to features [B, F]."
        ) from error
    return extractor.eval()


def real_features(data: ImageData, extractor: nn.Module, cache_dir: str | None) -> torch.Tensor:
    """Features [N, F] of all of the data, from the cache by its fingerprint."""

    def compute() -> torch.Tensor:
        rows = [range(start, min(start + REAL_BATCH, len(data))) for start in range(0, len(data), REAL_BATCH)]
        with torch.no_grad():
            device = next(iter(extractor.state_dict().values()), torch.empty(0)).device
            return torch.cat([extract(extractor, data.pixels(batch).to(device))[0].cpu() for batch in rows])

    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "ddpm_pipeline"
    return cached_features(folder, data.fingerprint, extractor, compute)


def cached_features(
    cache_dir: str | Path, fingerprint: str, extractor: nn.Module, compute: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Features [N, F] of the data with this fingerprint, from `cache_dir` or else computed and kept there.

    The key is the data's fingerprint and a digest of the extractor's class and weights, so that neither can be mistaken.
    """
    path = Path(cache_dir) / f"features-{fingerprint}-{weights_digest(extractor)}.safetensors"
    if path.is_file():
        return load_file(path)["features"]
    features = compute().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({"features": features}, temporary)
    os.replace(temporary, path)
    return features


class InceptionFeatures(nn.Module):
    """The 2048 pool features and the logits of the Inception network that published FIDs use, by torch-fidelity.

    Args:
        weights: its weights file, INCEPTION_FILE; by default as cached or downloaded by torch.hub.

    Raises:
        ModuleNotFoundError: without the extra `inception`.
        FileNotFoundError: without the weights: neither given, nor cached, nor to be downloaded.
    """

    num_features = 2048

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        try:
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise ModuleNotFoundError(
                "Inception features need torch-fidelity and torchvision: pip install 'ddpm-pipeline[inception]'; or give "
                "another feature extractor."
            ) from error
        if weights is not None and not Path(weights).is_file():
            raise FileNotFoundError(f"the Inception weights {weights} are not a file; {_HOW_TO_SUPPLY}")
        try:
            self.network = NoTrainInceptionV3(
                name="inception-v3-compat",
                features_list=["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
        except (OSError, RuntimeError) as error:  # URLError is an OSError
            raise FileNotFoundError(f"the Inception weights cannot be had ({error}); {_HOW_TO_SUPPLY}") from error

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, 2048] and [B, 1008] of images [B, 1 or 3, H, W] in [-1, 1]."""
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        features, logits = self.network._torch_fidelity_forward(pixels)
        return features.flatten(1), logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.features_and_logits(images)[0]
