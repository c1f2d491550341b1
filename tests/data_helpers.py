"""What the tests of reading data share: options from keyword arguments, and images that say which one they are."""

import io
from collections.abc import Container, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from ddpm_pipeline.data import ConditionColumns, DataOptions, ImageData, StreamData, load_images, open_stream

CONDITION = [field.name for field in fields(ConditionColumns)]


def data_options(dataset: str | Path, **options: Any) -> tuple[DataOptions, ConditionColumns]:
    """The two arguments of `load_images` and `open_stream`."""
    columns = {name: options.pop(name) for name in CONDITION if name in options}
    return DataOptions(dataset=str(dataset), **options), ConditionColumns(**columns)


def load(dataset: str | Path, **options: Any) -> ImageData:
    return load_images(*data_options(dataset, **options))


def stream_of(dataset: str | Path, **options: Any) -> StreamData:
    """Grey 8x8 images, unless the options say otherwise."""
    return open_stream(*data_options(dataset, **{"resolution": 8, "channels": 1, **options}))


def encoded(image: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def array_to_image(array: np.ndarray) -> Image.Image:
    """The picture of uint8 [H, W] or [H, W, C]."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def numbered(number: int) -> bytes:
    """The file of a grey 8x8 image that says which one it is."""
    array = np.zeros((8, 8), dtype=np.uint8)
    array[0, :2] = number % 256, number // 256
    return encoded(array)


def numbers(pixels: torch.Tensor) -> list[int]:
    return (pixels[:, 0, 0, 0].int() + 256 * pixels[:, 0, 0, 1].int()).tolist()


def parquet(path: Path, rows: Sequence[bytes | None], names: Sequence[str] | None = None, group=None, **columns) -> Path:
    """A parquet file of images as plain structs, and of other columns."""
    structs = [{"bytes": row, "path": name} for row, name in zip(rows, names or [None] * len(rows), strict=True)]
    images = pa.array(structs, pa.struct({"bytes": "binary", "path": "string"}))
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=group)
    return path


def write_numbered(folder: Path, sizes: Sequence[int], bad: Container[int] = (), group: int = 10, **columns) -> str:
    """Parquet files of so many numbered images; rows whose number is in `bad` hold no image. Columns are functions."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.cumsum([0, *sizes]).tolist()
    for index, (start, size) in enumerate(zip(starts, sizes, strict=False)):
        rows = range(start, start + size)
        images = [b"broken" if row in bad else numbered(row) for row in rows]
        values = {name: [value(row) for row in rows] for name, value in columns.items()}
        parquet(folder / f"{index:03}.parquet", images, [f"{row}.png" for row in rows], group, **values)
    return str(folder)


def rgb(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_image(path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def all_pixels(data) -> list[np.ndarray]:
    """Every image, [H, W, C]."""
    return list(data.pixels(range(len(data))).permute(0, 2, 3, 1).numpy())


def assert_holds(data, *seeds: int) -> None:
    """The images are those of `rgb(seed)`, whatever their order."""
    assert sorted(image.tobytes() for image in all_pixels(data)) == sorted(rgb(seed).tobytes() for seed in seeds)


def make_set(*seeds: int) -> Dataset:
    rows = {
        "photo": [{"bytes": encoded(rgb(seed)), "path": None} for seed in seeds],
        "kind": [seed % 2 for seed in seeds],
        "caption": [f"number {seed} \N{CAT FACE}" for seed in seeds],
        "score": [0.5 for _ in seeds],
    }
    kind = ClassLabel(names=["even", "odd"])
    types = {"photo": datasets.Image(), "kind": kind, "caption": Value("string"), "score": Value("float32")}
    return Dataset.from_dict(rows, features=Features(types))
