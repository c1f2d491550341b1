"""Models of condition images and numbers, asked by generate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from ddpm_pipeline import (
    AlphaDDPMImageToImagePipeline,
    AlphaDDPMPipeline,
    AlphaDDPMScheduler,
    ImageCondition,
    ValueRange,
    VectorCondition,
    describe_conditions,
)
from ddpm_pipeline.generation import GenerationOptions, generate
from ddpm_pipeline.generation.condition_images import ConditionImages
from ddpm_pipeline.generation.pipelines import condition_of, load_pipeline
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.errors import ConfigError
from helpers import tiny_unet

CONDITIONS: dict[str, Any] = {
    "image": {"condition_image": ImageCondition(3)},
    "class+image": {"condition_image": ImageCondition(1, classes=5), "class_names": ["cat", "dog"]},
    "vector": {"condition_vector": VectorCondition(("age",), (40.0,), (10.0,))},
    "vector+image": {
        "condition_vector": VectorCondition(("age", "angle"), (40.0, 0.5), (10.0, 0.2)),
        "condition_image": ImageCondition(1, task="downscale:2"),
    },
    "inpaint": {"condition_image": ImageCondition(1, task="inpaint")},
    "16 bits": {"condition_image": ImageCondition(1, value_range=ValueRange((0.0,), (4095.0,), "uint16"))},
    "bands": {"condition_image": ImageCondition(2, value_range=ValueRange((-1.0,), (3.0,), "float32"))},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Of grey images of 8x16 pixels, height first."""
    folders = {}
    for name, described in CONDITIONS.items():
        image, vector = described.get("condition_image"), described.get("condition_vector")
        unet = tiny_unet(
            in_channels=1 + (image.input_channels if image else 0), sample_size=(8, 16),
            num_class_embeds=3 if "class_names" in described else None,
            class_embed_type=vector.class_embed_type if vector else None,
        )  # fmt: skip
        describe_conditions(unet, condition_dropout=0.1, **described)
        folders[name] = str(tmp_path_factory.mktemp(name.replace("+", "-").replace(" ", "-")))
        pipeline = AlphaDDPMImageToImagePipeline if image else AlphaDDPMPipeline
        pipeline(unet, AlphaDDPMScheduler(4, beta_end=0.999)).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    """Folders with two images each."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    made = {
        "rgb": [generator.integers(0, 256, (8, 16, 3), dtype=np.uint8) for _ in range(2)],
        "labels": [generator.integers(0, 5, (8, 16), dtype=np.uint8) for _ in range(2)],
        "wide": [generator.integers(0, 5, (8, 20), dtype=np.uint8)],
        "beyond": [np.full((8, 16), 5, np.uint8)],
        "small": [generator.integers(0, 256, (4, 8), dtype=np.uint8) for _ in range(2)],
        "grey": [generator.integers(0, 256, (8, 16), dtype=np.uint8) for _ in range(2)],
        "16 bits": [generator.integers(0, 4096, (8, 16), dtype=np.uint16) for _ in range(2)],
        "bands": [generator.uniform(-1, 3, (8, 16, 2)).astype(np.float32) for _ in range(2)],
        "three": [np.zeros((8, 16), np.uint8)] * 3,
        "mixed": [np.zeros((4, 8), np.uint8), np.zeros((8, 16), np.uint8)],
        "masks": [np.where(np.arange(16) < 5, 255, 0).astype(np.uint8)[None].repeat(8, 0)],
    }
    for name, arrays in made.items():
        (folder / name).mkdir()
        for letter, array in zip("bac", arrays, strict=False):
            if name == "bands":
                np.save(folder / name / f"{letter}.npy", array)
            else:
                Image.fromarray(array).save(folder / name / f"{letter}.png")
    return {name: folder / name for name in made}


def sampled(model: str, folder: Path, count: int = 3, **options: Any) -> list[bytes]:
    given = GenerationOptions(model=model, output_dir=str(folder), num_images=count, num_cpu_threads=1, **options)
    return [Image.open(path).tobytes() for path in sorted(generate(given).glob("0*.png"))]


def called(model: str, count: int = 3, **arguments: list[Any]) -> list[bytes]:
    """Of single calls: image i with value i of each argument in turn."""
    pipe, found = load_pipeline(model), []
    for number, seed in enumerate(seeds(0, RandomStream.PREVIEW, 0, count)):
        asked = {name: values[number % len(values)] for name, values in arguments.items()}
        image = pipe(**asked, generator=torch.Generator().manual_seed(int(seed)), guidance_scale=2.0).images[0]
        found.append(image.tobytes())
    assert len(set(found)) == count
    return found


def pictures(folder: Path) -> list[Any]:
    """Its files as a caller of the pipeline gives them: floats as fractions of the range from -1 to 3."""
    paths = sorted(folder.iterdir())
    if folder.name == "bands":
        return [np.load(path) / 4 + 0.25 for path in paths]
    return [np.asarray(Image.open(path)) if folder.name == "16 bits" else Image.open(path) for path in paths]


@pytest.mark.parametrize(
    ("kind", "folder", "options", "arguments"),
    [
        ("image", "rgb", {}, {}),
        ("class+image", "labels", {"class_labels": "dog|cat|1"}, {"class_labels": ["dog", "cat", 1]}),
        ("class+image", "labels", {}, {"class_labels": [0, 1]}),
        ("vector+image", "small", {"condition_vector": "30,0.4|,0.9"},
         {"condition_vector": [{"age": 30, "angle": 0.4}, {"angle": 0.9}]}),
        ("vector", None, {"condition_vector": "30|55.5"}, {"condition_vector": [30, 55.5]}),
        ("inpaint", "grey", {}, {}), ("16 bits", "16 bits", {}, {}), ("bands", "bands", {}, {}),
    ],
)  # fmt: skip
def test_conditions_are_asked_for_in_turn(models, images, tmp_path, kind, folder, options, arguments):
    options, asked = {**options, "guidance_scale": 2.0}, dict(arguments)
    if folder:
        options["condition_images"], asked["condition_image"] = str(images[folder]), pictures(images[folder])
    if kind == "inpaint":
        options["condition_masks"], asked["condition_mask"] = str(images["masks"]), pictures(images["masks"])
    elif kind not in ("16 bits", "bands"):
        assert condition_of(load_pipeline(models[kind])) == kind
    assert sampled(models[kind], tmp_path, **options) == called(models[kind], **asked)
    settings = (tmp_path / "generation.json").read_text()
    assert ('"a.' in settings) == bool(folder)


def test_other_condition_images_are_another_folder_s(models, images, tmp_path):
    sampled(models["image"], tmp_path / "out", condition_images=str(images["rgb"]), count=1)
    (tmp_path / "rgb").mkdir()
    for path in images["rgb"].iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "rgb" / path.name)
    with pytest.raises(ConfigError, match="other condition_images"):
        sampled(models["image"], tmp_path / "out", condition_images=str(tmp_path / "rgb"), count=1)


def test_larger_label_maps_are_resized_by_nearest_pixels_and_that_is_said_once(models, images, tmp_path, capsys, monkeypatch):
    (tmp_path / "large").mkdir()
    for path in images["labels"].iterdir():
        Image.open(path).resize((48, 24), Image.Resampling.NEAREST).save(tmp_path / "large" / path.name)
    large = {"condition_images": str(tmp_path / "large"), "guidance_scale": 2.0}
    of_large = sampled(models["class+image"], tmp_path / "out", count=2, **large)
    assert "has images of 24x48; they are resized to 8x16 by nearest pixels" in capsys.readouterr().err
    assert of_large == called(models["class+image"], 2, class_labels=[0, 1], condition_image=pictures(images["labels"]))
    monkeypatch.setattr(PartialState, "is_main_process", False)
    ConditionImages(load_pipeline(models["class+image"]), large["condition_images"], "--condition_images")
    assert "resized" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("image", {}, "--condition_images is required"),
        ("image", {"condition_images": "no, ne"}, "--condition_images 'no, ne': there is no such folder"),
        ("image", {"condition_images": "rgb", "condition_masks": "masks"}, "--condition_masks is for models that inpaint"),
        ("inpaint", {"condition_images": "grey"}, "--condition_masks is required to inpaint"),
        ("class+image", {"condition_images": "beyond"}, "5"),
        ("class+image", {"condition_images": "wide"}, "label maps of 8x20, whose sides would be cut off to fit 8x16"),
        ("inpaint", {"condition_images": "grey", "condition_masks": "three"}, "3 masks for 2 images.* 'c'"),
        ("vector+image", {"condition_images": "mixed", "condition_vector": "1,1"},
         "--condition_images.* 2 different sizes.* of one: this model takes 4x8 or 8x16"),
        ("vector+image", {"condition_images": "masks", "condition_vector": "1"}, "'1' must be age,angle of each image"),
        ("vector", {"condition_vector": "30|inf"}, "'30|inf' must be age of each image in finite numbers"),
        ("vector", {}, "--condition_vector is required for a model of age.* are 40"),
        ("vector", {"condition_vector": "30", "condition_images": "rgb"}, "--condition_images does not fit"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_refused(models, images, tmp_path, kind, options, message):
    options = {name: str(images.get(value, value)) for name, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        sampled(models[kind], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
