"""Does a model copy its training images? Its likelihood of them beside that of held-out images, and how near samples come.

Each figure of samples stands beside the same one of held-out images, which nobody copied: chance is what these show. Functions
of tensors, called by `evaluate` with --validation_split and by benchmarks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

FEWEST = 2  # images of a kind
RARE = 0.01  # share of held-out images that lie within the distance below which a sample is unusually near
RESAMPLES = 500  # of the bootstrap
MOST_AT_ONCE, VALUES_AT_ONCE = 2048, 2**24  # images and their values that are compared at a time: 64 MB


class Nearest(NamedTuple):
    """The training image that is nearest to each of N images."""

    distances: Tensor  # Euclidean, float64 [N]
    indices: Tensor  # int64 [N]


def blocks(count: int, values_per_image: int) -> Iterator[range]:
    """0..count-1 in ranges that bound the memory of what is compared at a time."""
    size = max(1, min(MOST_AT_ONCE, VALUES_AT_ONCE // values_per_image))
    return (range(start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def nearest(images: Tensor, training: Iterable[Tensor], prepare: Callable[[Tensor], Tensor] = Tensor.float) -> Nearest:
    """The nearest of the training images, or of their features, to each of `images` [N, ...], both as `prepare` makes them
    floats; among equals the first.

    The training images come in parts [m, ...], such as `training.split(1000)`, and are counted through; memory is that of a
    part and a block. Distances are those of differences. Which image is nearest is found by products of float32, so of
    two that are nearest within their rounding it may be either.
    """
    distances = torch.full((len(images),), torch.inf, dtype=torch.float64)
    indices, start, centre = torch.zeros(len(images), dtype=torch.int64), 0, 0.0
    for part in training:
        part = prepare(part).flatten(1)
        centre = part.mean(dim=0) if start == 0 else centre  # of which products keep their digits
        centred = part - centre
        for rows in blocks(len(images), math.prod(images.shape[1:])):
            here = slice(rows.start, rows.stop)
            block = prepare(images[here]).flatten(1)
            candidates = torch.cdist(block - centre, centred).argmin(dim=1)
            found = (block - part[candidates]).norm(dim=1).cpu().double()
            closer = found < distances[here]
            distances[here] = torch.where(closer, found, distances[here])
            indices[here] = torch.where(closer, start + candidates.cpu(), indices[here])
        start += len(part)
    return Nearest(distances, indices)


def copying(samples: Tensor, held_out: Tensor, seed: int = 0) -> dict[str, float]:
    """How near samples lie to training images, beside held-out images: from their distances, [N] and [M], to the nearest one.

    - distance_ratio: the median of the samples' by the median of the held-out images'. About 1 for new images, 0 if half of
      them are copies. Its standard error is a bootstrap's, over both. Left out if the latter median is 0.
    - share_unusually_near: of the samples that are nearer than a share `chance` of the held-out images is, with a binomial
      standard error. `chance` is RARE or, for fewer than 99 held-out images, 1 / (M + 1): nearer than all of them. It is what
      this share is on average for as many new images, and chance_standard_error what M held-out images leave open of it.

    Meehan, Chaudhuri, Dasgupta 2020 (arXiv:2004.05675) compare the same distances by their ranks, and Carlini et al. 2023
    (arXiv:2301.13188) find copies by distances in pixels, Somepalli et al. 2023 (arXiv:2212.03860) in features, above the
    95th percentile of similarities among training images. Alaa et al. 2022 (arXiv:2102.08921) call a sample authentic that
    is farther from a training image than the next one is. `seed` is the bootstrap's. Raises ValueError for fewer than FEWEST
    of a kind.
    """
    if min(len(samples), len(held_out)) < FEWEST:
        raise ValueError(
            f"{len(samples)} samples and {len(held_out)} held-out images are too few; give {FEWEST} or more of each."
        )
    near, usual = (distances.double().sort().values.cpu().numpy() for distances in (samples, held_out))
    found, middle = {}, np.median(usual)
    if middle > 0:
        random = np.random.default_rng(seed)
        medians = [[np.median(random.choice(each, len(each))) for each in (near, usual)] for _ in range(RESAMPLES)]
        ratios = [of_samples / of_held_out for of_samples, of_held_out in medians if of_held_out > 0]
        found = {"distance_ratio": float(np.median(near) / middle), "distance_ratio_standard_error": float(np.std(ratios))}
    chance = max(RARE, 1 / (len(usual) + 1))
    limit = np.quantile(usual, chance, method="weibull")  # a new image is nearer with that probability, on average
    share = float((near < limit).mean())
    return {
        **found,
        "share_unusually_near": share,
        "share_unusually_near_standard_error": math.sqrt(share * (1 - share) / len(near)),
        "chance": chance,
        "chance_standard_error": math.sqrt(chance * (1 - chance) / (len(usual) + 2)),  # of an order statistic: Beta
    }


def likelihood_gap(training: Tensor, held_out: Tensor) -> dict[str, float]:
    """The mean bits per dimension of training images [N] and held-out images [M], how many more the latter take, and standard
    errors, where there are FEWEST images of both. Image i of both is evaluated with the same noise and timesteps, so what
    these add to both is in the difference no more.

    A model that knows its images by heart, beyond what they have in common with others, needs fewer bits for these alone (van
    den Burg and Williams 2021, arXiv:2106.03216).
    """
    kinds = {"training": training.double(), "held_out": held_out.double()}
    found = {f"num_{name}": len(bits) for name, bits in kinds.items()}
    found |= {name: bits.mean().item() for name, bits in kinds.items()}
    found["difference"] = found["held_out"] - found["training"]
    both, more = sorted(map(len, kinds.values()))
    if both < FEWEST:
        return found
    variances = {name: bits.var().item() / len(bits) for name, bits in kinds.items()}
    covariance = torch.stack([bits[:both] for bits in kinds.values()]).cov()[0, 1].item() / more
    variances["difference"] = max(0.0, sum(variances.values()) - 2 * covariance)
    return found | {f"{name}_standard_error": math.sqrt(variance) for name, variance in variances.items()}


def rank_correlations(truth: Sequence[float], figures: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Spearman's rank correlation of each figure with the truth, over the same models: 1 if it ranks them alike, -1 if in
    reverse. 0 for a figure that is always the same.
    """
    ranked = {name: torch.tensor([list(values), list(truth)], dtype=torch.float64) for name, values in figures.items()}
    return {name: float(spearman_corrcoef(*both)) for name, both in ranked.items()}
