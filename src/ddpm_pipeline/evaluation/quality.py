"""How good and how varied generated images are: FID, KID and IS on torchmetrics, and k-nearest-neighbour precision/recall.

All figures come from one set of features, in float64, and carry the number of images they are of. Images are uint8
[B, C, H, W] throughout, as they are in files. Imports torch, torchmetrics and safetensors; called by
training/evaluate.py.
"""

import warnings
from typing import NamedTuple

import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from .features import extract

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
