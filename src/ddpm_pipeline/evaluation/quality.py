"""How good and how varied generated images are: FID, KID and IS by torchmetrics, and k-nearest-neighbour precision/recall.

All figures follow from one set of features, in float64. Images are [B, C, H, W], uint8 as in files, or float32 in [-1, 1]
for greater depths.
"""

import math
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
    """The figures of `ImageQuality`. Inception scores are NaN for an extractor without logits."""

    num_real: int
    num_generated: int
    fid: float  #: Fréchet distance of the features' Gaussians, >= 0 up to rounding
    kid: float  #: squared maximum mean discrepancy, unbiased: may be below 0
    kid_std: float  #: over subsets
    kid_subset_size: int
    inception_score: float
    inception_score_std: float  #: over splits
    precision: float  #: share of generated images within the real images' manifold (Kynkäänniemi et al. 2019)
    recall: float  #: share of real images within the generated images' manifold
    num_neighbours: int


class ImageQuality(Metric):
    """Gathers features of real and generated images over processes, and computes the figures that follow from them.

    Processes add contiguous shares of the images, in rank order; the figures are then those of one process.

    Args:
        extractor: a module from images [B, C, H, W] in [-1, 1] to features [B, F]; see `features.extract`.
        num_neighbours: k of precision and recall.
        kid_subsets, kid_subset_size: as in torchmetrics; a subset has at most half as many images as the smaller set.
        splits: parts of the generated images whose Inception scores are averaged.
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
        self.extractor, self.num_neighbours, self.splits, self.seed = extractor, num_neighbours, splits, seed
        self.kid_subsets, self.kid_subset_size = kid_subsets, kid_subset_size
        for state in ("real_features", "generated_features", "generated_logits"):
            self.add_state(state, [], dist_reduce_fx="cat")

    @torch.no_grad()
    def update(self, images: torch.Tensor, real: bool) -> None:
        """Add images [B, C, H, W], uint8 or float32 in [-1, 1]. Raises ValueError for another type or shape."""
        features, logits = extract(self.extractor, images)
        (self.real_features if real else self.generated_features).append(features)
        if logits is not None and not real:
            self.generated_logits.append(logits)

    def add_real_features(self, features: torch.Tensor) -> None:
        """Add features [N, F] of real images, extracted earlier."""
        self.real_features.append(features)

    def compute(self) -> Quality:
        """All figures. Raises ValueError for fewer than k + 2 images of a kind, and for features that are not finite."""
        real, generated, logits = map(_joined, (self.real_features, self.generated_features, self.generated_logits))
        fewest, needed = min(len(real), len(generated)), self.num_neighbours + 2
        if fewest < needed:
            given = f"{len(real)} real and {len(generated)} generated images"
            raise ValueError(f"{given} are too few; give at least {needed} of each, and thousands for a figure to report.")
        if not (real.isfinite().all() and generated.isfinite().all()):
            raise ValueError("some features are NaN or infinite: the images or the extractor are broken.")
        if fewest <= real.shape[1]:
            singular = f"{fewest} images give a singular covariance of {real.shape[1]} features"
            warnings.warn(f"{singular}; the FID of so few images is far from that of many.", stacklevel=2)
        subset_size = max(2, min(self.kid_subset_size, fewest // 2))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchmetrics warns of the memory that features take
            torch.manual_seed(self.seed)  # torchmetrics permutes by the global generator
            fid = frechet_distance(real, generated)
            alone = {"sync_on_compute": False}  # the features are those of all processes already
            kid = KernelInceptionDistance(_Given(real), subsets=self.kid_subsets, subset_size=subset_size, **alone)
            kid.update(real, real=True)
            kid.update(generated, real=False)
            kids = map(float, kid.compute())  # mean and deviation, Bińkowski et al. 2018
            scores = (math.nan, math.nan)
            if len(logits):  # exp E KL(p(class|image) ‖ p(class)), Salimans et al. 2016
                score = InceptionScore(_Given(logits), splits=min(self.splits, len(generated)), **alone)
                score.update(logits)
                scores = map(float, score.compute())
        covered = precision_recall(real, generated, self.num_neighbours)
        return Quality(len(real), len(generated), fid, *kids, subset_size, *scores, *covered, self.num_neighbours)


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """`|μ_r - μ_g|² + tr(Σ_r + Σ_g - 2(Σ_r Σ_g)^½)` of features [N, F], by torchmetrics in float64 throughout."""
    metric = FrechetInceptionDistance(_Given(real), sync_on_compute=False).to(real.device)
    centre = real.double().mean(dim=0)  # the distance does not change, and sums of squares keep their digits
    metric.update(real.double() - centre, real=True)
    metric.update(generated.double() - centre, real=False)
    return float(metric.compute())


def frechet_distance_of_halves(features: torch.Tensor, num_splits: int = 20, seed: int = 0) -> float:
    """Fréchet distance between disjoint random halves of features [N, F], mean over splits: what chance alone gives."""
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(features), generator=generator).chunk(2) for _ in range(num_splits)]
    return sum(frechet_distance(features[first], features[second]) for first, second in halves) / num_splits


class _Given(nn.Identity):
    """Stands in torchmetrics for an extractor, where the images are features [N, F] already."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        self.num_features = features.shape[1]


def _joined(state: list[torch.Tensor] | torch.Tensor) -> torch.Tensor:
    """A list state as one tensor in float64; torchmetrics has joined it already after gathering."""
    return (state if isinstance(state, torch.Tensor) else torch.cat(state) if state else torch.empty(0, 1)).double()


def precision_recall(real: torch.Tensor, generated: torch.Tensor, num_neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of features [N, F] (Kynkäänniemi et al. 2019, eq. 2).

    A point lies in a set's manifold if it is no farther from one of its points than that point's k-th neighbour is.
    """
    return _share_inside(generated, real, num_neighbours), _share_inside(real, generated, num_neighbours)


def _share_inside(points: torch.Tensor, manifold: torch.Tensor, num_neighbours: int) -> float:
    nearest = num_neighbours + 1  # with the point itself
    radii = [_distances(rows, manifold).kthvalue(nearest, dim=1).values for rows in manifold.split(DISTANCE_ROWS)]
    reach = torch.cat(radii)
    inside = [(_distances(rows, manifold) <= reach).any(dim=1) for rows in points.split(DISTANCE_ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances [N, M] of points [N, F] and [M, F]; by differences, as products lose a point's distance 0."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
