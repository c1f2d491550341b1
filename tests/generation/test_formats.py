"""generate: images of any size, depth and number of channels, in files that hold them in the units of the model's data."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from datasets import load_dataset
from PIL import Image

from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, ValueRange, describe_conditions
from ddpm_pipeline.generation import GenerationOptions, generate
from ddpm_pipeline.generation.pipelines import load_pipeline
from ddpm_pipeline.support.draws import RandomStream, seeds
from ddpm_pipeline.support.errors import ConfigError
from ddpm_pipeline.support.pictures import Display, grid
from helpers import tiny_unet

KINDS = {  # of models: channels and values
    "ct": (1, ValueRange((-1024.0,), (3071.0,), "int16")),
    "tiles": (13, ValueRange((0.0,) * 13, tuple(1000.0 + 10 * band for band in range(13)), "uint16")),
    "slices": (1, ValueRange((0.0,), (4095.0,), "uint16")),
    "floats": (2, ValueRange((-3.0,), (5.0,), "float32")),
    "five": (5, ValueRange()),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """Of images of 8x16 pixels, height first."""
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in KINDS}
    for name, (channels, values) in KINDS.items():
        unet = tiny_unet(in_channels=channels, out_channels=channels, sample_size=(8, 16))
        describe_conditions(unet, value_range=values)
        AlphaDDPMPipeline(unet, AlphaDDPMScheduler(4, beta_end=0.999)).save_pretrained(folders[name])
    return folders


def asked(model: str, folder: Path, **options: Any) -> GenerationOptions:
    return GenerationOptions(model=model, output_dir=str(folder), num_images=3, num_cpu_threads=1, **options)


def called(model: str, count: int = 3) -> torch.Tensor:
    """Each image by a call of its own, in [0, 1]."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds(0, RandomStream.PREVIEW, 0, count)]
    pipe = load_pipeline(model)
    return torch.cat([pipe(generator=generator, output_type="pt").images for generator in generators])


def read(path: Path) -> np.ndarray:
    """A file as others read it, [H, W] or [H, W, C]."""
    with Image.open(path) if path.suffix == ".png" else open(path, "rb") as file:
        return np.asarray(file) if path.suffix == ".png" else (np.load if path.suffix == ".npy" else tifffile.imread)(file)


@pytest.mark.parametrize(
    ("kind", "format", "suffix"),
    [("ct", "auto", "npy"), ("tiles", "auto", "npy"), ("tiles", "tiff", "tiff"), ("slices", "auto", "png"),
     ("slices", "tiff", "tiff"), ("floats", "auto", "npy"), ("floats", "tiff", "tiff"), ("five", "auto", "npy")],
)  # fmt: skip
def test_files_hold_the_images_in_the_units_of_the_data(models, tmp_path, kind, format, suffix):
    channels, values = KINDS[kind]
    folder = generate(asked(models[kind], tmp_path, format=format))
    images = called(models[kind])
    for number, image in enumerate(images):
        found = read(folder / f"{number:06d}.{suffix}")
        assert found.dtype == values.dtype and found.shape == ((8, 16) if channels == 1 else (8, 16, channels))
        planes = found[..., None].transpose(2, 0, 1) if channels == 1 else found.transpose(2, 0, 1)
        low, high = (torch.tensor(bound).view(-1, 1, 1) for bound in (values.low, values.high))
        expected = low + image * (high - low)
        assert np.abs(planes - expected.numpy()).max() <= (3e-4 if values.dtype == "float32" else 0.5 + 1e-3)
    display = Display(stretch=values.dtype != "uint8")
    with Image.open(folder / "preview.png") as preview:
        assert preview.size == grid(images, display=display).size and preview.mode == ("L" if channels < 3 else "RGB")
    if words := display.words(channels):
        assert (folder / "preview.txt").read_text() == f"shown: {words}\n"


@pytest.mark.parametrize("format", ["png", "npy", "tiff"])
def test_a_stopped_run_continues_and_damaged_files_do_not_count(models, tmp_path, format, capsys):
    options = asked(models["slices"], tmp_path / "images", format=format)
    content = {path.name: path.read_bytes() for path in generate(options).iterdir()}
    (tmp_path / "images" / f"000000.{format}").unlink()
    damaged = tmp_path / "images" / f"000002.{format}"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    generate(options.with_values(batch_size=2, preview_channels="1"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()} == content
    assert "1 damaged images are sampled again" in capsys.readouterr().err
    (tmp_path / "images" / "preview.png").unlink()  # as if the run had been killed before it
    generate(options)
    assert "3 of 3 images exist already" in capsys.readouterr().err
    assert (tmp_path / "images" / "preview.png").read_bytes() == content["preview.png"]


def test_parquet_holds_16_bits_as_the_datasets_library_reads_them(models, tmp_path):
    folder = generate(asked(models["slices"], tmp_path / "one", format="parquet"))
    rows = load_dataset("parquet", data_files=str(folder / "images.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    generate(asked(models["slices"], tmp_path / "one", format="parquet"))  # again, now without the images of the preview
    expected = generate(asked(models["slices"], tmp_path / "files"))
    for number in range(3):
        assert (np.asarray(rows[number]["image"]) == read(expected / f"{number:06d}.png")).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("tiles", {"format": "png"}, "13 channels of uint16; use npy or tiff"),
        ("ct", {"format": "parquet"}, "1 channels of int16; use npy or tiff"),
        ("five", {"preview_channels": "6,1,1"}, "--preview_channels 6,1,1 must be channels of the images, which are 1 to 5"),
        ("five", {"preview_channels": "1,2"}, "--preview_channels 1,2 must be one channel, or three"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_sampled(models, tmp_path, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(asked(models[kind], tmp_path / "images", **options))
    assert not (tmp_path / "images").exists()
