"""How good and how varied are sampled images of scikit-learn's handwritten digits?

    python benchmarks/digits_quality.py ddpm-digits --num_images 1024 --seed 0 --output quality.json

A small classifier of real digits, which generators never see in training, is the feature extractor. Samples are good when
it is sure of them (mean top probability), varied when every class has its share, and true to the data when its penultimate
features are distributed as those of the real digits (Fréchet distance, read beside the distance between two disjoint
halves of the real data). A nearest-neighbour figure tells samples from copies of training images.

Images are [B, 1, 8, 8] in [-1, 1]. Any pipeline folder will do.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ddpm_pipeline.evaluation.digits import NUM_CLASSES, fit_digits_classifier, load_digits_images
from ddpm_pipeline.evaluation.quality import frechet_distance, frechet_distance_of_halves
from ddpm_pipeline.support.provenance import provenance


@dataclass(frozen=True)
class DigitsQuality:
    """The figures of N images. Probabilities and shares in [0, 1]; distances at least 0.

    `nearest_neighbour_ratio` is the median Euclidean distance of an image to its nearest real digit, divided by the
    median distance of a real digit to the nearest other one: near 1 for new images, near 0 for copies.
    """

    num_images: int
    mean_top_probability: float
    class_shares: tuple[float, ...]  # one per class, summing to 1
    frechet_distance: float  # of the images to all real digits
    frechet_distance_of_halves: float  # of real halves to each other, mean over random splits
    frechet_ratio: float  # the former by the latter
    nearest_neighbour_ratio: float
    copied_share: float  # of images nearer to a real digit than 99 % of real digits are to another
    classifier_accuracy: float  # on held-out real digits
    classifier_top_probability: float  # on held-out real digits


def nearest_distances(images: torch.Tensor, references: torch.Tensor, leave_one_out: bool = False) -> torch.Tensor:
    """Euclidean distance [N] of each of N images to the nearest of the references, over pixels in [-1, 1].

    With `leave_one_out` the two are the same set, and an image is not its own neighbour.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the faster way loses the digits of small distances
    distances = torch.cdist(images.flatten(1).double(), references.flatten(1).double(), compute_mode=exact)
    if leave_one_out:
        distances.fill_diagonal_(torch.inf)
    return distances.min(dim=1).values


def quality_of(images: torch.Tensor) -> DigitsQuality:
    """The figures of images [N, 1, 8, 8] in [-1, 1] beside the real digits; N well above 64, better 1,024."""
    real_images, _ = load_digits_images()
    if images.ndim != 4 or images.shape[1:] != real_images.shape[1:]:
        raise ValueError(f"images have shape {tuple(images.shape)}; give [N, 1, 8, 8] with values in [-1, 1].")
    classifier = fit_digits_classifier()
    if len(images) <= classifier.num_features:
        raise ValueError(
            f"{len(images)} images are too few for a covariance of {classifier.num_features} features; sample more, 1,024 "
            "for a figure to report."
        )
    images = images.float().cpu()
    top_probability, predicted = classifier(images).softmax(dim=1).max(dim=1)
    real_features = classifier.features(real_images)
    distance = frechet_distance(real_features, classifier.features(images))
    of_halves = frechet_distance_of_halves(real_features)
    to_real = nearest_distances(images, real_images)
    among_real = nearest_distances(real_images, real_images, leave_one_out=True)
    return DigitsQuality(
        num_images=len(images),
        mean_top_probability=top_probability.double().mean().item(),
        class_shares=tuple((predicted.bincount(minlength=NUM_CLASSES).double() / len(images)).tolist()),
        frechet_distance=distance,
        frechet_distance_of_halves=of_halves,
        frechet_ratio=distance / of_halves,
        nearest_neighbour_ratio=(to_real.median() / among_real.median()).item(),
        copied_share=(to_real < among_real.quantile(0.01)).double().mean().item(),
        classifier_accuracy=classifier.held_out_accuracy,
        classifier_top_probability=classifier.held_out_top_probability,
    )


def sample_images(
    folder: str | Path, num_images: int, seed: int = 0, num_steps: int = 1000, batch_size: int = 256
) -> torch.Tensor:
    """Images [N, 1, 8, 8] in [-1, 1] from a saved pipeline; batch k has the generator of seed + k."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(desc="sampling")
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
    """Samples from a pipeline folder, prints the figures as JSON and writes them to --output."""
    parser = argparse.ArgumentParser(description="Measure a pipeline that was trained on scikit-learn's digits.")
    parser.add_argument("folder", help="a saved pipeline folder, as DiffusionPipeline.from_pretrained takes it")
    parser.add_argument("--num_images", type=int, default=1024, help="number of images to sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first batch; the next have seed + 1, ...")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the sampling chain")
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch")
    parser.add_argument("--output", type=Path, help="JSON file; by default the figures are only printed")
    arguments = parser.parse_args()

    images = sample_images(arguments.folder, arguments.num_images, arguments.seed, arguments.steps, arguments.batch_size)
    command = f"python benchmarks/digits_quality.py {Path(arguments.folder).name} --num_images {arguments.num_images}"
    command += f" --seed {arguments.seed} --steps {arguments.steps}"
    found = {"command": command, **provenance(torch.device("cpu")), **asdict(quality_of(images))}
    report = json.dumps(found, indent=2)
    print(report)
    if arguments.output:
        arguments.output.write_text(report + "\n")


if __name__ == "__main__":
    main()
