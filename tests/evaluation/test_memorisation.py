"""What a model has memorised: its figures for copies and for new images, and those of evaluate against direct calls."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from PIL import Image
from torch import nn

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, describe_conditions
from ddpm_pipeline.data.held_out import open_training_data
from ddpm_pipeline.data.options import UNCONDITIONAL, HeldOutDataOptions
from ddpm_pipeline.evaluation import EvaluationOptions, evaluate, likelihood_of, memorisation, run
from ddpm_pipeline.evaluation.digits import fit_digits_classifier
from ddpm_pipeline.evaluation.memorisation import copying, likelihood_gap, nearest, rank_correlations
from ddpm_pipeline.evaluation.results import resize_of, told_otherwise
from ddpm_pipeline.generation import load_pipeline, sample_uint8
from ddpm_pipeline.hub import TrainingFacts, build_card, export
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange
from ddpm_pipeline.support.draws import RandomStream, image_indices, seeds
from ddpm_pipeline.support.errors import ConfigError
from helpers import tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the FID of so few images
SEED, SPLIT, NUM_LIKELIHOOD, NUM_SAMPLES, STEPS = 3, "train[:200]", 40, 20, 4


# ---- the figures ----------------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [0.0, 1000.0])  # which products of float32 do not survive
def test_the_nearest_image_is_found_across_parts_and_blocks(monkeypatch, offset):
    monkeypatch.setattr(memorisation, "MOST_AT_ONCE", 7)
    images, training = (normal(count, 3, 5, 4, seed=count) + offset for count in (23, 50))
    images[4], images[9] = training[49], training[0]
    differences = (images[:, None].double() - training[None].double()).flatten(2).norm(dim=2)  # [23, 50]
    found = nearest(images, training.split(8))
    assert torch.equal(found.indices, differences.argmin(dim=1))
    assert torch.allclose(found.distances, differences.min(dim=1).values, rtol=1e-6)
    assert found.distances[[4, 9]].tolist() == [0, 0] and found.indices[[4, 9]].tolist() == [49, 0]
    halves = nearest(images, training.split(8), lambda x: x.float() / 2)
    assert torch.allclose(halves.distances, found.distances / 2)
    assert nearest(images, iter([training, training])).indices.max() < 50  # among equals the first
    assert len(nearest(images[:0], [training]).distances) == 0


def test_copies_are_told_from_new_images():
    training, held_out, new = (normal(count, 1, 4, 4, seed=count) for count in (600, 999, 1000))
    usual = nearest(held_out, training.split(100)).distances
    found = copying(nearest(training[:300], training.split(100)).distances, usual)
    assert (found["distance_ratio"], found["share_unusually_near"]) == (0, 1)
    assert (found["distance_ratio_standard_error"], found["share_unusually_near_standard_error"]) == (0, 0)
    found = copying(nearest(new, training.split(100)).distances, usual)
    assert abs(found["distance_ratio"] - 1) < 3 * found["distance_ratio_standard_error"] < 0.05
    spread = np.hypot(found["share_unusually_near_standard_error"], found["chance_standard_error"])
    assert abs(found["share_unusually_near"] - found["chance"]) < 3 * spread and found["chance"] == 0.01
    mixed = torch.cat([training[:100], new[:900]])  # one in ten is a copy
    found = copying(nearest(mixed, training.split(100)).distances, usual)
    assert abs(found["share_unusually_near"] - 0.109) < 3 * found["share_unusually_near_standard_error"]
    assert 0.9 < found["distance_ratio"] < 1  # which a median hardly shows


@pytest.mark.parametrize("num_held_out", [20, 500])
def test_chance_and_standard_errors_are_those_of_repeated_draws(monkeypatch, num_held_out):
    """Of new images, over 200 sets of them."""
    monkeypatch.setattr(memorisation, "RESAMPLES", 20)
    drawn = [[normal(count, seed=2 * i + k).abs() + 1 for k, count in enumerate((200, num_held_out))] for i in range(200)]
    found = [copying(*distances, seed=i) for i, distances in enumerate(drawn)]
    shares, ratios = (np.array([one[name] for one in found]) for name in ("share_unusually_near", "distance_ratio"))
    chance, of_chance = found[0]["chance"], found[0]["chance_standard_error"]
    assert chance == max(0.01, 1 / (num_held_out + 1))
    assert shares.mean() == pytest.approx(chance, abs=3 * shares.std() / 200**0.5)
    assert shares.std() == pytest.approx(np.hypot(of_chance, np.sqrt(chance * (1 - chance) / 200)), rel=0.2)
    assert ratios.std() == pytest.approx(np.mean([one["distance_ratio_standard_error"] for one in found]), rel=0.25)


def test_what_distances_cannot_tell():
    assert "distance_ratio" not in copying(torch.ones(5), torch.zeros(5))
    assert copying(torch.ones(5), torch.ones(5))["share_unusually_near"] == 0  # not nearer, but as near
    with pytest.raises(ValueError, match="1 samples and 5 held-out images are too few; give 2 or more of each"):
        copying(torch.ones(1), torch.ones(5))


@pytest.mark.parametrize("sizes", [(60, 60), (60, 25), (25, 60)])
def test_standard_errors_of_the_gap_are_those_of_repeated_draws(sizes):
    """Of images with the same noise at the same place."""
    found = []
    for seed in range(400):
        noise = normal(60, seed=seed)
        training, held_out = (normal(size, seed=1000 + seed + 500 * k) for k, size in enumerate(sizes))
        training, held_out = training + 2 * noise[: sizes[0]] + 3, held_out + 2 * noise[: sizes[1]] + 4
        found.append(likelihood_gap(training, held_out))
    for name, value in (("training", 3), ("held_out", 4), ("difference", 1)):
        values, errors = (np.array([one[end] for one in found]) for end in (name, f"{name}_standard_error"))
        assert values.mean() == pytest.approx(value, abs=3 * values.std() / 20)
        assert values.std() == pytest.approx(np.sqrt((errors**2).mean()), rel=0.15)
    assert (found[0]["num_training"], found[0]["num_held_out"]) == sizes
    if sizes == (60, 60):
        of_pairs = (held_out - training).double().std() / 60**0.5
        assert found[-1]["difference_standard_error"] == pytest.approx(of_pairs.item())
    assert "difference_standard_error" not in likelihood_gap(training, held_out[:1])


def test_rank_correlations():
    truth = [0.0, 0.1, 0.5, 0.9]
    figures = {"alike": [1, 2, 30, 31], "reverse": [4, 3, 2, -1], "ties": [1, 1, 2, 2], "constant": [5, 5, 5, 5]}
    found = rank_correlations(truth, figures)
    assert found == pytest.approx({"alike": 1, "reverse": -1, "ties": 0.8944, "constant": 0}, abs=1e-4)


# ---- evaluate -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "digits-model"
    pipe = AlphaDDPMPipeline(tiny_unet(), AlphaDDPMScheduler(num_train_timesteps=STEPS, beta_start=0.02, beta_end=0.6))
    export(pipe, folder, build_card(pipe, name="digits-model", training=TrainingFacts("digits", num_images=9)))
    return folder


def options_for(model: Path, cache: str, **more) -> EvaluationOptions:
    given = {
        "model": str(model), "dataset": "digits", "split": SPLIT, "validation_split": "10%", "cache_dir": cache,
        "batch_size": 8, "seed": SEED, "num_likelihood_images": NUM_LIKELIHOOD, "num_images": NUM_SAMPLES,
        "num_cpu_threads": 1,
    }  # fmt: skip
    return EvaluationOptions(**given | more)


@pytest.fixture(scope="module")
def results(model, cache) -> dict:
    return evaluate(options_for(model, cache))


@pytest.fixture(scope="module")
def data(cache):
    """As a run with the same --validation_split trains on them."""
    given = HeldOutDataOptions("digits", split=SPLIT, validation_split="10%", cache_dir=cache)
    return open_training_data(given, UNCONDITIONAL, 0)


def scaled(data) -> torch.Tensor:
    return data.value_range.normalize(data.pixels(range(len(data))))


def test_likelihoods_are_those_of_both_parts(model, results, data):
    pipe, found = load_pipeline(str(model)), results["memorisation"]["bits_per_dim"]
    assert found["training"] == results["bits_per_dim"]["total"] and len(data) + len(data.held_out) == 200
    count = len(data.held_out)
    assert 2 < count < NUM_LIKELIHOOD == found["num_training"] and found["num_held_out"] == count
    places, noise_seeds = image_indices(SEED, count, 0, count), seeds(SEED, RandomStream.NOISE, 0, count)
    images = data.held_out.pixels(places), data.value_range
    totals = likelihood_of(pipe.unet, pipe.scheduler, *images, noise_seeds, progress=False).total.double()
    assert found["held_out"] == pytest.approx(totals.mean().item(), rel=1e-6)
    assert found["held_out_standard_error"] == pytest.approx((totals.std() / count**0.5).item(), rel=1e-4)


def test_distances_are_those_of_samples_and_held_out_images(model, results, data):
    """In pixels mirror images count as well."""
    pipe = load_pipeline(str(model))
    samples = ValueRange().normalize(sample_uint8(pipe, range(NUM_SAMPLES), SEED, STEPS))
    training, classifier = scaled(data), fit_digits_classifier()
    both_ways = torch.cat([training, training.flip(-1)]).split(30)
    for name, see, of in (
        ("pixels", nn.Identity(), both_ways),
        ("features", classifier.features, [classifier.features(training)]),
    ):
        figures = results["memorisation"][name]
        expected = copying(*(nearest(see(images), of).distances for images in (samples, scaled(data.held_out))), SEED)
        assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-4), name
        assert (figures["num_samples"], figures["num_held_out"]) == (NUM_SAMPLES, len(data.held_out))


def test_results_are_in_json_and_card(model, cache, results):
    assert json.loads((model / "evaluation.json").read_text()) == results
    assert results["memorisation"]["steps"] == STEPS and results["memorisation"]["validation_split"] == "10%"
    card = (model / "README.md").read_text()
    for name in ("bits/dim, held-out minus training", *(f"{of}, {space}" for of in ("distance ratio", "unusually near")
                                                        for space in ("pixels", "features"))):  # fmt: skip
        assert f"| {name} | " in card
    assert card.count("](closest_pairs.png)") == 1 and "if nothing is copied" in card
    evaluate(options_for(model, cache, validation_split=None, num_images=0, num_likelihood_images=2))
    assert "closest_pairs.png" not in (model / "README.md").read_text()  # of which this evaluation says nothing


def _evaluate_in_a_fork(options: EvaluationOptions) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    evaluate(options)


def test_two_processes_find_the_same(model, cache, results, tmp_path):
    output, picture = tmp_path / "two.json", (model / "closest_pairs.png").read_bytes()
    debug_launcher(_evaluate_in_a_fork, (options_for(model, cache, output=str(output), update_card=False),), num_processes=2)
    two = json.loads(output.read_text())
    assert two["processes"] == 2 and two["memorisation"] == results["memorisation"]
    assert (tmp_path / "closest_pairs.png").read_bytes() == picture


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_model_that_copies_is_found_out(model, cache, data, tmp_path, monkeypatch, mirrored):
    copies = data.pixels(range(NUM_SAMPLES)).numpy()
    copies = copies[..., ::-1].copy() if mirrored else copies
    monkeypatch.setattr(run, "sample_values", lambda pipe, numbers, *how, **options: copies[list(numbers)])
    options = options_for(model, cache, num_likelihood_images=0, output=str(tmp_path / "e.json"), update_card=False)
    found = evaluate(options)["memorisation"]
    assert "bits_per_dim" not in found
    assert (found["pixels"]["distance_ratio"], found["pixels"]["share_unusually_near"]) == (0, 1)
    assert (found["features"]["share_unusually_near"] == 1) != mirrored
    picture = np.asarray(Image.open(tmp_path / "closest_pairs.png"))
    height = (picture.shape[0] - 4) // 4  # rows: samples and training images by pixels, and by features
    assert np.array_equal(picture[:height], picture[height : 2 * height])


def test_any_depth_and_number_of_channels_without_an_extractor(tmp_path, monkeypatch):
    """Raw values of 16 bits in five bands, held out in a file of their own."""
    images = np.random.default_rng(0).integers(-900, 900, size=(40, 8, 8, 5)).astype(np.int16)
    for number, image in enumerate(images):
        folder = tmp_path / ("tiles" if number < 30 else "held")
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{number:02}.npy", image)
    unet = tiny_unet(in_channels=5, out_channels=5)
    describe_conditions(unet, value_range=ValueRange((-1000,), (1000,), "int16"))
    AlphaDDPMPipeline(unet, AlphaDDPMScheduler(STEPS, beta_start=0.02, beta_end=0.6)).save_pretrained(tmp_path / "model")
    copies = images[:6].transpose(0, 3, 1, 2).copy()
    monkeypatch.setattr(run, "sample_values", lambda pipe, numbers, *how, **options: copies[list(numbers)])
    options = options_for(
        tmp_path / "model", str(tmp_path / "cache"), dataset=str(tmp_path / "tiles"), split="train", num_images=6,
        validation_split=str(tmp_path / "held"), num_likelihood_images=3,
    )  # fmt: skip
    results = evaluate(options)
    found = results["memorisation"]
    assert (found["pixels"]["distance_ratio"], found["pixels"]["share_unusually_near"]) == (0, 1)
    assert (found["pixels"]["chance"], found["validation_split"]) == (1 / 11, "held")
    assert "features" not in found and "quality" not in results and found["bits_per_dim"]["num_held_out"] == 3


def test_other_training_images_than_the_model_had_are_said(model, cache, tmp_path):
    options = options_for(tmp_path, cache)
    assert told_otherwise(options) == ""
    (tmp_path / "training_config.yaml").write_text("split: train[:200]\nvalidation_split: 10%\nrandom_crop: null\n")
    assert told_otherwise(options) == ""
    (tmp_path / "training_config.yaml").write_text("split: train\nvalidation_split: null\nrandom_resized_crop: 0.5\n")
    assert told_otherwise(options) == "--split train, --validation_split none, --random_resized_crop 0.5"
    assert told_otherwise(options.with_values(validation_split="train[200:]")) == "--split train"
    assert told_otherwise(options.with_values(validation_split=None)) == ""


def test_what_cannot_be_compared_is_said(model, cache):
    with pytest.raises(ConfigError, match=r"--validation_split looks for the nearest of all training images"):
        options_for(model, cache, streaming=True)
    with pytest.raises(ConfigError, match=r"--validation_split 100% must be above 0"):
        options_for(model, cache, validation_split="100%")


def test_images_are_resized_as_in_training(cache, tmp_path):
    options = options_for(tmp_path, cache)
    assert resize_of(options) == "crop"
    (tmp_path / "training_config.yaml").write_text("resize: pad\n")
    assert resize_of(options) == "pad" and resize_of(options.with_values(resize="stretch")) == "stretch"
