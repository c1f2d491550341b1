"""Each kind of data from files of the library that its field uses to a model on the Hub: train, resume, generate, evaluate,
push, load.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tifffile
from PIL import Image

from ddpm_pipeline.evaluation import EvaluationOptions, evaluate
from ddpm_pipeline.generation import GenerationOptions, generate, load_pipeline
from ddpm_pipeline.hub import PushOptions, push
from ddpm_pipeline.training import TrainingOptions, train
from helpers import TINY_UNET

COUNT = 12
QUICK = {
    "num_train_timesteps": 10, "beta_end": 0.6, "batch_size": 4, "mixed_precision": "no", "checkpoint_every": 2,
    "preview_every": 2, "preview_images": 4, "preview_inference_steps": 2, "num_samples": 4, "fit_noises": 0, "log_every": 1,
    "num_cpu_threads": 1, "eval_every": 2, "eval_images": 4, "objective": "bound",
}  # fmt: skip


def smooth(seed: int, height: int, width: int, channels: int) -> np.ndarray:
    """A smooth image [H, W, C] in [0, 1]."""
    phases = np.random.default_rng(seed).uniform(0, 3, (channels, 2))
    rows, columns = np.mgrid[:height, :width][..., None] / 4
    return 0.5 + 0.5 * np.sin(rows + phases[:, 0]) * np.cos(columns + phases[:, 1])


def tiles(folder: Path) -> None:
    """Tiles of 13 bands and 16 bits, as satellite images come."""
    for i in range(COUNT):
        values = (10_000 * smooth(i, 16, 16, 13)).astype(np.uint16)
        tifffile.imwrite(folder / f"{i}.tif", values, photometric="minisblack", planarconfig="contig")


def arrays(folder: Path) -> None:
    """Temperatures on a grid that is not square."""
    for i in range(COUNT):
        np.save(folder / f"{i}.npy", (250 + 60 * smooth(i, 8, 16, 1)).astype(np.float32))


def scans(folder: Path) -> None:
    """Slices of 16 bits and one channel, not square."""
    for i in range(COUNT):
        Image.fromarray((65535 * smooth(i, 8, 16, 1)[..., 0]).astype(np.uint16)).save(folder / f"{i}.png")


def maps(folder: Path) -> None:
    """Photographs with palette maps of three classes, some pixels of which are void."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i in range(COUNT):
        values = smooth(i, 8, 8, 3)
        Image.fromarray((255 * values).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        classes = (2.99 * values[..., 0]).astype(np.uint8)
        classes[0, 0] = 255
        picture = Image.fromarray(classes, "P")
        picture.putpalette([*range(256)] * 3)
        picture.save(folder / "masks" / f"{i}.png")


def numbers(folder: Path) -> None:
    """A table of pictures with an age, of which one is unknown, and a weight."""
    rows = {
        "image": [(255 * smooth(i, 8, 8, 1)[..., 0]).astype(np.uint8) for i in range(COUNT)],
        "age": [None if i == 3 else 20.0 + i for i in range(COUNT)],
        "weight": [i % 5 for i in range(COUNT)],
    }
    types = {"age": datasets.Value("float64"), "weight": datasets.Value("int64")}
    features = datasets.Features({"image": datasets.Array2D((8, 8), "uint8"), **types})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train.parquet"))


@dataclass(frozen=True)
class Kind:
    write: Callable[[Path], None]
    shape: tuple[int, int, int]  # [C, H, W]
    dtype: str
    told: dict[str, Any] = field(default_factory=dict)  # options of training
    asked: dict[str, Any] = field(default_factory=dict)  # options of generation; {} stands for the data's folder
    columns: dict[str, Any] = field(default_factory=dict)  # options of evaluation
    call: dict[str, Any] = field(default_factory=dict)  # of the pipeline


MASKS, VECTORS = {"condition_column": "masks"}, {"condition_column": "age,weight"}
KINDS = {
    "multi-band TIFF": Kind(tiles, (13, 16, 16), "uint16", {"value_range": "0,10000", "preview_channels": "4,3,2"}),
    "NumPy floats": Kind(arrays, (1, 8, 16), "float32", {"value_range": "percentile:0,100"}),
    "16-bit PNG": Kind(scans, (1, 8, 16), "uint16"),
    "label maps": Kind(
        maps, (3, 8, 8), "uint8", {"condition": "image", "condition_classes": 3, **MASKS}, {"condition_images": "{}/masks"},
        MASKS, {"condition_image": np.eye(8, dtype=np.uint8), "guidance_scale": 2.0},
    ),
    "numbers": Kind(
        numbers, (1, 8, 8), "uint8", {"condition": "vector", **VECTORS}, {"condition_vector": "25,3|30,"}, VECTORS,
        {"condition_vector": {"age": 30, "weight": None}, "guidance_scale": 2.0},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # ten timesteps do not reach noise, and figures of few images
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_data_from_its_files_to_the_hub_and_back(name, tmp_path, client):
    kind, data, cache = KINDS[name], tmp_path / "data", str(tmp_path / "cache")
    data.mkdir()
    kind.write(data)
    (tmp_path / "unet.json").write_text(json.dumps(TINY_UNET | dict.fromkeys(("sample_size", "in_channels", "out_channels"))))
    source = {"dataset": str(data), "cache_dir": cache}
    options = {**QUICK, **source, "model": str(tmp_path / "unet.json"), "output_dir": str(tmp_path / "model"), **kind.told}
    train(TrainingOptions(**options, max_train_steps=2))
    folder = train(TrainingOptions(**options, max_train_steps=3, resume="latest"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3]
    assert all(np.isfinite(value) for row in logged for value in row.values())
    assert (folder / "samples.png").is_file() and (folder / "samples" / "step-00000002.png").is_file()

    asked = {option: value.format(data) for option, value in kind.asked.items()}
    images = generate(GenerationOptions(model=str(folder), output_dir=str(tmp_path / "images"), num_images=2, **asked))
    assert len([*images.glob("00000?.*")]) == 2
    quick = {"num_images": 0, "num_likelihood_images": 2}
    found = evaluate(EvaluationOptions(model=str(folder), **source, **kind.columns, **quick))
    assert np.isfinite(found["bits_per_dim"]["total"])

    push(folder, "org/model", PushOptions(first_wait=0.01), api=client)
    pipe = load_pipeline(client.snapshot_download("org/model"))
    values = pipe(**kind.call, num_inference_steps=2, output_type="np", denormalize=True).images
    assert values.shape[1:] == (*kind.shape[1:], kind.shape[0]) and pipe.value_range.dtype == kind.dtype
    low, high = pipe.value_range.low[0], pipe.value_range.high[0]
    assert low <= values.min() < low + 0.5 * (high - low) < values.max() <= high  # in the data's own units
