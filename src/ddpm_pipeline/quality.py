"""How good and how varied generated images are: FID, KID and IS on torchmetrics, and k-nearest-neighbour precision/recall.

All figures come from one set of features, in float64, and carry the number of images they are of. Images are uint8
[B, C, H, W] throughout, as they are in files. Imports torch, torchmetrics and safetensors; called by
training/evaluate.py.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DISTANCE_ROWS = 2048  # images whose distances to all others are held at a time


class Quality(NamedTuple):  # torchmetrics takes results apart, and refuses frozen dataclasses
    """What `ImageQuality.compute` says. Inception scores are NaN for an extractor without logits."""

    num_real: int
    num_generated: int
    fid: float  # Fréchet distance of the features' Gaussians, >= 0 up to rounding
    kid: float  # squared maximum mean discrepancy, unbiased: may be below 0
    kid_std: float  # over subsets
    kid_subset_size: int
    inception_score: float
    inception_score_std: float  # over splits
    precision: float  # share of generated images within the real images' manifold (Kynkäänniemi et al. 2019)
    recall: float  # share of real images within the generated images' manifold
    num_neighbours: int


class ImageQuality(Metric):
    """Features of real and generated images, gathered over processes, and the figures that follow from them.

    Processes add contiguous shares of the images, in rank order; the figures are then those of one process.

    Args:
        extractor: a module from images [B, C, H, W] in [-1, 1] to features [B, F]. Where it has a method `features`, that
            is called instead and the module itself gives logits, for the Inception score; a method
            `features_and_logits` gives both at once.
        num_neighbours: k of precision and recall.
        kid_subsets, kid_subset_size: as in torchmetrics; subsets are no larger than half of the smaller set.
        splits: parts of the generated images that the Inception score is averaged over.
        seed: of the subsets and splits.
    """

    full_state_update = False

    def __init__(
        self,
        extractor: nn.Module,
        *,
        num_neighbours: int = 3,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        splits: int = 10,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.extractor = extractor
        self.num_neighbours, self.splits, self.seed = num_neighbours, splits, seed
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        for state in ("real_features", "generated_features", "generated_logits"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: torch.Tensor, real: bool) -> None:
        """Add images, uint8 [B, C, H, W]. Raises ValueError for another type or shape."""
        features, logits = extract(self.extractor, images)
        if real:
            self.real_features.append(features)
        else:
            self.generated_features.append(features)
            if logits is not None:
                self.generated_logits.append(logits)

    def add_real_features(self, features: torch.Tensor) -> None:
        """Add features [N, F] of real images that were extracted before."""
        self.real_features.append(features)

    def compute(self) -> Quality:
        """All figures, in float64. Raises ValueError for fewer images of a kind than k + 2, or broken features."""
        real, generated = _joined(self.real_features).double(), _joined(self.generated_features).double()
        fewest = min(len(real), len(generated))
        if fewest < self.num_neighbours + 2:
            raise ValueError(
                f"{len(real)} real and {len(generated)} generated images are too few; give at least "
                f"{self.num_neighbours + 2} of each, and thousands for a figure to report."
            )
        if not (real.isfinite().all() and generated.isfinite().all()):
            raise ValueError("some features are NaN or infinite: the images or the extractor are broken.")
        if fewest <= real.shape[1]:
            warnings.warn(
                f"{fewest} images give a covariance of {real.shape[1]} features that is singular; the FID of so few is "
                "far from that of many.",
                stacklevel=2,
            )
        logits = _joined(self.generated_logits).double() if len(self.generated_logits) else None
        subset_size = max(2, min(self.kid_subset_size, fewest // 2))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns of the memory that features take
            torch.manual_seed(self.seed)  # torchmetrics permutes by the global generator
            fid = frechet_distance(real, generated)
            kid, kid_std = _kernel_distance(real, generated, self.kid_subsets, subset_size)
            score, score_std = _inception_score(logits, min(self.splits, len(generated)))
        precision, recall = precision_recall(real, generated, self.num_neighbours)
        return Quality(
            num_real=len(real),
            num_generated=len(generated),
            fid=fid,
            kid=kid,
            kid_std=kid_std,
            kid_subset_size=subset_size,
            inception_score=score,
            inception_score_std=score_std,
            precision=precision,
            recall=recall,
            num_neighbours=self.num_neighbours,
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


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """|μ_r - μ_g|² + tr(Σ_r + Σ_g - 2(Σ_r Σ_g)^½) of features [N, F], by torchmetrics in float64 throughout."""
    metric = FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False)
    metric.to(real.device)
    centre = real.double().mean(dim=0)  # the distance does not change, and sums of squares keep their digits
    metric.update(real.double() - centre, real=True)
    metric.update(generated.double() - centre, real=False)
    return float(metric.compute())


def _kernel_distance(
    real: torch.Tensor, generated: torch.Tensor, subsets: int, subset_size: int
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018): mean and deviation over subsets."""
    metric = KernelInceptionDistance(
        _Given(real.shape[1]), subsets=subsets, subset_size=subset_size, sync_on_compute=False
    )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    mean, deviation = metric.compute()
    return float(mean), float(deviation)


def _inception_score(logits: torch.Tensor | None, splits: int) -> tuple[float, float]:
    """exp E KL(p(class|image) ‖ p(class)) (Salimans et al. 2016): mean and deviation over splits."""
    if logits is None:
        return float("nan"), float("nan")
    metric = InceptionScore(_Given(logits.shape[1]), splits=splits, sync_on_compute=False)
    metric.update(logits)
    mean, deviation = metric.compute()
    return float(mean), float(deviation)


class _Given(nn.Module):
    """Stands in torchmetrics for an extractor, where the images are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _joined(state: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """A list state as one tensor; torchmetrics has joined it already after gathering."""
    if isinstance(state, torch.Tensor):
        return state
    return torch.cat(state) if state else torch.empty(0, 1)


# ---- precision and recall -----------------------------------------------------------------------------


def precision_recall(real: torch.Tensor, generated: torch.Tensor, num_neighbours: int = 3) -> tuple[float, float]:
    """Kynkäänniemi et al. 2019, eq. 2: a point is in a set's manifold if within the k-th neighbour distance of one of it."""
    return (
        _share_inside(generated, real, num_neighbours),
        _share_inside(real, generated, num_neighbours),
    )


def _share_inside(points: torch.Tensor, manifold: torch.Tensor, num_neighbours: int) -> float:
    radii = torch.cat(
        [
            # the nearest of all is the point itself
            _distances(rows, manifold).kthvalue(num_neighbours + 1, dim=1).values
            for rows in manifold.split(DISTANCE_ROWS)
        ]
    )
    inside = [(_distances(rows, manifold) <= radii).any(dim=1) for rows in points.split(DISTANCE_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [N, M] of points [N, F] and [M, F]; by differences, as products lose a point's distance 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


# ---- reference features, cached ------------------------------------------------------------------------


def cached_features(
    cache_dir: str | Path, fingerprint: str, extractor: nn.Module, compute: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Features [N, F] of the data with this fingerprint, from `cache_dir` or else computed and kept there.

    The key is the data's fingerprint and a digest of the extractor's class and weights, so that neither can be mistaken.
    """
    path = Path(cache_dir) / f"features-{fingerprint}-{extractor_digest(extractor)}.safetensors"
    if path.is_file():
        return load_file(path)["features"]
    features = compute().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({"features": features}, temporary)
    os.replace(temporary, path)
    return features


def extractor_digest(extractor: nn.Module) -> str:
    """16 hex digits of an extractor's class and weights."""
    digest = hashlib.sha256(type(extractor).__qualname__.encode())
    for name, value in sorted(extractor.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- Inception, the optional extra -----------------------------------------------------------------------


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


_HOW_TO_SUPPLY = (
    f"download {INCEPTION_URL} (95 MB) where there is a network, and pass its path (--inception_weights in evaluate.py), or "
    "put it into torch.hub's folder of checkpoints."
)
