"""evaluate on images of any size, depth and number of channels, and on models of images and numbers as conditions."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from data_helpers import encoded, parquet
from ddpm_pipeline import AlphaDDPMImageToImagePipeline, AlphaDDPMPipeline, AlphaDDPMScheduler, describe_conditions
from ddpm_pipeline.data import ConditionColumns, DataOptions, load_images
from ddpm_pipeline.encoding_alpha_ddpm import ImageCondition, VectorCondition, embedding_width
from ddpm_pipeline.evaluation import EvaluationOptions, ImageQuality, evaluate, run
from ddpm_pipeline.evaluation.digits import fit_digits_classifier
from ddpm_pipeline.evaluation.figures import measurements
from ddpm_pipeline.evaluation.likeness import likeness
from ddpm_pipeline.likelihood import bits_per_dim
from ddpm_pipeline.ranges_alpha_ddpm import ValueRange
from ddpm_pipeline.support.draws import RandomStream, image_indices, seeds
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.support.masks import inpainting_masks
from helpers import tiny_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the FID of so few images
SEED, STEPS, COUNT, SAMPLES = 5, 4, 3, 6


class Flat(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def scheduler() -> AlphaDDPMScheduler:
    return AlphaDDPMScheduler(num_train_timesteps=STEPS, beta_start=0.02, beta_end=0.6)


def evaluated(pipe, folder: Path, dataset: Path | str, **more) -> dict:
    pipe.save_pretrained(folder / "model")
    given = {
        "model": str(folder / "model"), "dataset": str(dataset), "cache_dir": str(folder / "cache"), "batch_size": 4,
        "seed": SEED, "num_likelihood_images": COUNT, "num_images": SAMPLES, "num_cpu_threads": 1,
        "output": str(folder / "e.json"),
    }  # fmt: skip
    return evaluate(EvaluationOptions(**given | more))


def bits(pipe, images: torch.Tensor, num_bins, **conditions) -> float:
    """Of images of which each has the noise that evaluate gives it. `condition` channels join x_t."""
    beside = conditions.pop("condition", torch.empty(len(images), 0, *images.shape[2:]))

    def network(x, t, **kwargs):
        return pipe.unet(torch.cat([x.float(), beside], dim=1), t, **kwargs)

    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds(SEED, RandomStream.NOISE, 0, COUNT)]
    how = {"generator": generators, "num_bins": num_bins, "model_kwargs": conditions, "progress": False}
    return bits_per_dim(network, scheduler(), images, **how).total.mean().item()


def sampled(pipe, **call) -> torch.Tensor:
    """The images that evaluate samples, in [-1, 1]."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds(SEED, RandomStream.PREVIEW, 0, SAMPLES)]
    return pipe(generator=generators, num_inference_steps=STEPS, output_type="pt", **call).images * 2 - 1


@pytest.mark.parametrize(
    ("values", "num_bins"),
    [
        (ValueRange((200, 150), (4000, 3000), "uint16"), [3801, 2851]),  # as percentiles that were measured in training
        (ValueRange((-0.5,), (2.5,), "float32"), None),
    ],
    ids=["uint16", "float32"],
)
def test_images_of_any_shape_and_depth_are_read_as_the_models_were(tmp_path, monkeypatch, values, num_bins):
    monkeypatch.setattr(run, "feature_extractor", lambda *_, **__: Flat())
    rng, (low, high) = np.random.default_rng(0), (values.low[0], values.high[0])
    arrays = (low + (high - low) * rng.uniform(-0.1, 1.1, (8, 8, 12, 2))).clip(0).astype(values.dtype)  # some beyond the range
    (tmp_path / "tiles").mkdir()
    for number, array in enumerate(arrays):
        np.save(tmp_path / "tiles" / f"{number}.npy", array)
    unet = tiny_unet(sample_size=(8, 12), in_channels=2, out_channels=2)
    describe_conditions(unet, value_range=values)
    pipe = AlphaDDPMPipeline(unet, scheduler())
    found = evaluated(pipe, tmp_path, tmp_path / "tiles", resolution="8x12")
    x = values.normalize(torch.from_numpy(arrays).movedim(-1, 1))
    assert found["bits_per_dim"]["total"] == pytest.approx(bits(pipe, x[image_indices(SEED, 8, 0, COUNT)], num_bins), rel=1e-6)
    assert found["bits_per_dim"].get("num_bins") == num_bins and ("density" in found["bits_per_dim"]) == (num_bins is None)
    metric = ImageQuality(Flat(), seed=SEED)
    metric.update(x, real=True)
    metric.update(values.normalize(torch.from_numpy(values.restore(sampled(pipe, batch_size=SAMPLES)))), real=False)
    assert found["quality"]["fid"] == pytest.approx(metric.compute().fid, rel=1e-4)
    settings = measurements(found)[0].settings
    assert settings.get("num_bins") == num_bins and ("density" in settings) == (num_bins is None)
    with pytest.raises(ConfigError, match=r"--resolution 8 differs from the model's, 8x12"):
        evaluated(pipe, tmp_path, tmp_path / "tiles", resolution=8)


def test_inception_is_refused_for_channels_that_it_does_not_see(tmp_path, capsys):
    (tmp_path / "tiles").mkdir()
    np.save(tmp_path / "tiles" / "a.npy", np.zeros((8, 8, 5), np.uint8))
    pipe = AlphaDDPMPipeline(tiny_unet(in_channels=5, out_channels=5), scheduler())
    assert "quality" not in evaluated(pipe, tmp_path, tmp_path / "tiles", num_likelihood_images=1)
    assert "1 or 3 channels, not 5; name your own with --features MODULE:FUNCTION" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not 5"):
        evaluated(pipe, tmp_path, tmp_path / "tiles", features="inception")


@pytest.mark.parametrize("task", ["downscale:2", "inpaint"])
def test_samples_for_images_are_compared_with_the_images_themselves(tmp_path, task):
    condition = ImageCondition(1, task=task)
    unet = tiny_unet(in_channels=1 + condition.input_channels)
    describe_conditions(unet, condition_image=condition, condition_dropout=0.1)
    pipe = AlphaDDPMImageToImagePipeline(unet, scheduler())
    found = evaluated(pipe, tmp_path, "digits", split="train[:40]")
    data = load_images(DataOptions("digits", split="train[:40]", cache_dir=str(tmp_path / "cache")), ConditionColumns("class"))
    masks = None
    if task == "inpaint":
        masks = inpainting_masks(seeds(SEED, RandomStream.INPAINTING_MASK, 0, 40), (8, 8))

    def of(places):
        pixels = data.pixels(places)
        return ValueRange().normalize(pixels), condition.encode(pixels, None if masks is None else masks[places])

    x, encoded_images = of(image_indices(SEED, 40, 0, COUNT))
    assert found["bits_per_dim"]["total"] == pytest.approx(bits(pipe, x, 256, condition=encoded_images), rel=1e-6)

    places = image_indices(SEED, 40, 0, SAMPLES)
    images, encoded_images = of(places)
    asked = {"condition_image": list(data.pixels(places))} | ({} if masks is None else {"condition_mask": list(masks[places])})
    samples = ((sampled(pipe, **asked) + 1) * 127.5).round() / 127.5 - 1
    for name, values in likeness(samples, images).items():
        assert found["conditions"][name] == pytest.approx(values.mean().item(), rel=1e-5), name
        error = values.std().item() / math.sqrt(SAMPLES)
        assert found["conditions"][f"{name}_standard_error"] == pytest.approx(error, rel=1e-4)
    predicted = fit_digits_classifier()(samples).argmax(dim=1)
    accuracy = (predicted == data.column("label", places)).double().mean().item()
    assert found["conditions"]["class_accuracy"] == pytest.approx(accuracy)
    on_card = {one.metric: one for one in measurements(found)}
    assert on_card["PSNR"].num_images == SAMPLES and on_card["PSNR"].standard_error is not None
    assert ("bicubic" in on_card["PSNR"].settings) == (task != "inpaint")
    if task != "inpaint":
        assert found["conditions"]["bicubic_psnr"] == pytest.approx(likeness(encoded_images, images)["psnr"].mean().item())


def test_label_maps_and_numbers_are_read_from_the_data(tmp_path):
    """A label map of three classes, and two numbers that the data have in another order."""
    rng = np.random.default_rng(0)
    pictures, maps = rng.integers(0, 256, (6, 8, 8), np.uint8), rng.integers(0, 3, (6, 8, 8), np.uint8)
    angle, age = rng.normal(size=6).astype(np.float32), rng.normal(40, 10, size=6).astype(np.float32)
    partners = [{"bytes": encoded(one), "path": None} for one in maps]
    partners = pa.array(partners, pa.struct({"bytes": "binary", "path": "string"}))
    path = parquet(tmp_path / "pairs.parquet", [encoded(one) for one in pictures], mask=partners, angle=angle, age=age)
    image, vector = ImageCondition(1, classes=3), VectorCondition(("age", "angle"), (40.0, 0.0), (10.0, 1.0))
    unet = tiny_unet(in_channels=4, class_embed_type="identity")
    describe_conditions(unet, condition_image=image, condition_vector=vector, condition_dropout=0.1)
    pipe = AlphaDDPMImageToImagePipeline(unet, scheduler())
    column = "angle,age,mask"
    found = evaluated(pipe, tmp_path, path, image_column="image", condition_column=column, features="digits")
    places = image_indices(SEED, 6, 0, COUNT)
    x, one_hot = ValueRange().normalize(torch.from_numpy(pictures[places])[:, None]), np.eye(3, dtype=np.float32)[maps[places]]
    told = torch.from_numpy(np.stack([age, angle], axis=1)[places])
    labels = vector.encode(told, embedding_width(unet))
    expected = bits(pipe, x, 256, condition=torch.from_numpy(one_hot).movedim(-1, 1), class_labels=labels)
    assert found["bits_per_dim"]["total"] == pytest.approx(expected, rel=1e-6)
    assert found["conditions"]["num_images"] == SAMPLES and "class_accuracy" not in found["conditions"]
    with pytest.raises(ConfigError, match="takes condition images; name"):
        evaluated(pipe, tmp_path, path, image_column="image")
    with pytest.raises(ConfigError, match=r"takes the number 'age', and pairs.* has angle"):
        evaluated(pipe, tmp_path, path, image_column="image", condition_column="angle,mask")


def test_condition_images_are_read_with_the_range_that_the_model_knows(tmp_path, monkeypatch):
    def fail(weights):
        raise FileNotFoundError("no weights")

    monkeypatch.setattr("ddpm_pipeline.evaluation.features.InceptionFeatures", fail)
    rng, values = np.random.default_rng(0), ValueRange((-1.0,), (3.0,), "float32")
    for name, arrays in {"photos": rng.integers(0, 256, (6, 8, 8), np.uint8), "depth": rng.normal(1, 1, (6, 8, 8))}.items():
        (tmp_path / name).mkdir()
        for number, array in enumerate(arrays):
            np.save(tmp_path / name / f"{number}.npy", array if name == "photos" else array.astype(np.float32))
    unet = tiny_unet(in_channels=2)
    describe_conditions(unet, condition_image=ImageCondition(1, value_range=values), condition_dropout=0.1)
    pipe = AlphaDDPMImageToImagePipeline(unet, scheduler())
    found = evaluated(pipe, tmp_path, tmp_path / "photos", condition_column=str(tmp_path / "depth"), features="auto")

    def of(places, folder: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.load(tmp_path / folder / f"{place}.npy") for place in places]))[:, None]

    places = image_indices(SEED, 6, 0, COUNT)
    beside = values.normalize(of(places, "depth"))
    expected = bits(pipe, ValueRange().normalize(of(places, "photos")), 256, condition=beside)
    assert found["bits_per_dim"]["total"] == pytest.approx(expected, rel=1e-6)

    places = image_indices(SEED, 6, 0, SAMPLES)
    samples = sampled(pipe, condition_image=list(values.normalize(of(places, "depth")) / 2 + 0.5))
    expected = likeness(((samples + 1) * 127.5).round() / 127.5 - 1, ValueRange().normalize(of(places, "photos")))
    assert found["conditions"]["psnr"] == pytest.approx(expected["psnr"].mean().item(), rel=1e-4)
    assert "quality" not in found  # without Inception, the pairs are compared all the same
