"""Judge of the digits recipe: how good and how varied are drawn images of scikit-learn's handwritten digits?

The judge is a small classifier of real digits that generators never see in training. Samples are good when it is sure
of them (mean top probability), varied when every class has its share, and true to the data when its penultimate
features are distributed as those of the real digits (Fréchet distance, read beside the distance between two disjoint
halves of the real data). A nearest-neighbour figure tells samples from copies of training images.

Images are `[B, 1, 8, 8]` in `[-1, 1]` throughout. Imports torch, scikit-learn and, for the command, diffusers; nothing
from the package, so that it may judge any pipeline folder:

    python benchmarks/digits_judge.py ddpm-digits --num_images 1024 --seed 0 --output judgement.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ddpm_pipeline.evaluation.digits import NUM_CLASSES, fit_digits_classifier, load_digits_images
from ddpm_pipeline.support.provenance import provenance


@dataclass(frozen=True)
class Judgement:
    """What the judge says of N images. Probabilities and shares in [0, 1]; distances at least 0.

    `nearest_neighbour_ratio` is the median Euclidean distance of an image to its nearest real digit, divided by the
    median distance of a real digit to the nearest other one: near 1 for fresh draws, near 0 for copies.
    """

    num_images: int
    mean_top_probability: float
    class_shares: tuple[float, ...]  # one a class, summing to 1
    frechet_distance: float  # of the images to all real digits
    frechet_distance_of_halves: float  # of real halves to each other, mean over random splits
    frechet_ratio: float  # the former by the latter
    nearest_neighbour_ratio: float
    copied_share: float  # of images nearer to a real digit than 99 % of real digits are to another
    classifier_accuracy: float  # on held-out real digits
    classifier_top_probability: float  # on held-out real digits


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to features `[N, F]` and `[M, F]`, in float64.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a^½ Σ_b Σ_a^½)^½), by eigenvalues of symmetric matrices, which stay real where
    a covariance is singular.
    """
    features_a, features_b = features_a.double(), features_b.double()
    covariance_a, covariance_b = torch.cov(features_a.T), torch.cov(features_b.T)
    root_a = _symmetric_root(covariance_a)
    overlap = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    shift = (features_a.mean(dim=0) - features_b.mean(dim=0)).square().sum()
    return (shift + covariance_a.trace() + covariance_b.trace() - 2 * overlap).clamp(min=0).item()


def _symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """Square root of a symmetric positive semi-definite matrix."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    return (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T


@lru_cache(maxsize=1)
def frechet_distance_of_halves(num_splits: int = 20, seed: int = 0) -> float:
    """Fréchet distance between disjoint random halves of the real digits, mean over splits: the unit of the ratio."""
    images, _ = load_digits_images()
    features = fit_digits_classifier().features(images)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(num_splits):
        first, second = torch.randperm(len(images), generator=generator).chunk(2)
        distances.append(frechet_distance(features[first], features[second]))
    return sum(distances) / num_splits


def nearest_distances(images: torch.Tensor, references: torch.Tensor, leave_one_out: bool = False) -> torch.Tensor:
    """Euclidean distance `[N]` of each of N images to the nearest of the references, over pixels in [-1, 1].

    With `leave_one_out` the two are the same set, and an image is not its own neighbour.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the faster way loses the digits of small distances
    distances = torch.cdist(images.flatten(1).double(), references.flatten(1).double(), compute_mode=exact)
    if leave_one_out:
        distances.fill_diagonal_(torch.inf)
    return distances.min(dim=1).values


def judge(images: torch.Tensor) -> Judgement:
    """Judge images `[N, 1, 8, 8]` in [-1, 1] against the real digits; N well above 64, better 1,024."""
    real_images, _ = load_digits_images()
    if images.ndim != 4 or images.shape[1:] != real_images.shape[1:]:
        raise ValueError(f"images have shape {tuple(images.shape)}; the judge wants [N, 1, 8, 8], values in [-1, 1].")
    classifier = fit_digits_classifier()
    if len(images) <= classifier.num_features:
        raise ValueError(
            f"{len(images)} images are too few for a covariance of {classifier.num_features} features; "
            "draw more, 1,024 for a figure to report."
        )
    images = images.float().cpu()
    top_probability, predicted = classifier(images).softmax(dim=1).max(dim=1)
    distance = frechet_distance(classifier.features(images), classifier.features(real_images))
    to_real = nearest_distances(images, real_images)
    among_real = nearest_distances(real_images, real_images, leave_one_out=True)
    return Judgement(
        num_images=len(images),
        mean_top_probability=top_probability.double().mean().item(),
        class_shares=tuple((predicted.bincount(minlength=NUM_CLASSES).double() / len(images)).tolist()),
        frechet_distance=distance,
        frechet_distance_of_halves=frechet_distance_of_halves(),
        frechet_ratio=distance / frechet_distance_of_halves(),
        nearest_neighbour_ratio=(to_real.median() / among_real.median()).item(),
        copied_share=(to_real < among_real.quantile(0.01)).double().mean().item(),
        classifier_accuracy=classifier.held_out_accuracy,
        classifier_top_probability=classifier.held_out_top_probability,
    )


def draw_images(
    folder: str | Path, num_images: int, seed: int = 0, num_steps: int = 1000, batch_size: int = 256
) -> torch.Tensor:
    """Draw images `[N, 1, 8, 8]` in [-1, 1] from a saved pipeline; batch k has the generator of seed + k."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(desc="Drawing")
    batches = []
    for index, start in enumerate(range(0, num_images, batch_size)):
        arrays = pipeline(
            batch_size=min(batch_size, num_images - start),
            generator=torch.Generator().manual_seed(seed + index),
            num_inference_steps=num_steps,
            output_type="np",
        ).images  # [B, 8, 8, 1] in [0, 1]
        batches.append(torch.from_numpy(arrays).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(batches)


def main() -> None:
    """Draw from a pipeline folder, judge, print the judgement as JSON and write it where asked."""
    parser = argparse.ArgumentParser(description="Judge a pipeline trained on scikit-learn's digits.")
    parser.add_argument("folder", help="a saved pipeline folder, as DiffusionPipeline.from_pretrained takes it")
    parser.add_argument("--num_images", type=int, default=1024, help="how many images to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first batch; the next have seed + 1, ...")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the sampling chain")
    parser.add_argument("--batch_size", type=int, default=256, help="images drawn at once")
    parser.add_argument("--output", type=Path, help="JSON file to write; printed only, where left out")
    arguments = parser.parse_args()

    images = draw_images(arguments.folder, arguments.num_images, arguments.seed, arguments.steps, arguments.batch_size)
    command = f"python benchmarks/digits_judge.py {Path(arguments.folder).name} --num_images {arguments.num_images}"
    command += f" --seed {arguments.seed} --steps {arguments.steps}"
    found = {"command": command, **provenance(torch.device("cpu")), **asdict(judge(images))}
    report = json.dumps(found, indent=2)
    print(report)
    if arguments.output:
        arguments.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
