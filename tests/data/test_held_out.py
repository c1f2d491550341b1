"""Held-out images: a share by content, a split, a folder; never trained on, and with the classes of the training images."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_helpers import CONDITION, ConditionColumns, all_pixels, numbered, numbers, parquet, rgb, write_image
from ddpm_pipeline.data.held_out import open_training_data
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.support.errors import ConfigError, DataError


def opened(dataset, split: str, streamed: int = 5, **options):
    """The images to train on, with those held out."""
    columns = ConditionColumns(**{name: options.pop(name) for name in CONDITION if name in options})
    return open_training_data(TrainingDataOptions(str(dataset), validation_split=split, **options), columns, streamed)


def numbers_of(data) -> list[int]:
    return numbers(data.pixels(range(len(data))))


@pytest.fixture
def table(tmp_path):
    """Writes a parquet file of images that say their numbers, with labels."""
    return lambda name, rows, labels=None: parquet(
        tmp_path / f"{name}.parquet", list(map(numbered, rows)), label=labels or [row % 3 for row in rows]
    )


def test_a_share_is_of_content(table):
    """The same images are held out whatever is added, removed or renamed; copies too, also under another label."""
    data = opened(table("first", range(300)), "20%")
    held_out = set(numbers_of(data.held_out))
    assert held_out | set(numbers_of(data)) == set(range(300)) and len(data) + len(data.held_out) == 300
    assert 40 < len(held_out) < 80  # 60 ± 7
    rows = [*range(600, 250, -1), *range(7, 300), *range(20)]
    other = opened(table("second", rows, [0] * len(rows)), "0.2", condition="class")
    assert set(numbers_of(other.held_out)) & set(range(300)) == held_out - set(range(7, 20)) | held_out & set(range(20))
    assert not set(numbers_of(other.held_out)) & set(numbers_of(other))
    assert held_out < set(numbers_of(opened(table("first", range(300)), ".3").held_out))
    assert len({data.fingerprint, data.held_out.fingerprint, other.fingerprint, other.held_out.fingerprint}) == 4
    assert opened(table("first", range(300)), "20%").held_out.fingerprint == data.held_out.fingerprint


def test_training_leaves_out_what_is_held_out_elsewhere(tmp_path, caplog):
    """By its pixels, under whatever name."""
    for seed in range(10):
        write_image(tmp_path / f"photos/train/{seed}.png", rgb(seed))
        write_image(tmp_path / f"photos/test/{seed}.png", rgb(seed + 7))
    write_image(tmp_path / "apart/copy.png", rgb(2))
    write_image(tmp_path / "apart/other.png", rgb(99))
    whole = opened(tmp_path / "photos", None)
    with caplog.at_level(logging.INFO):
        data = opened(tmp_path / "photos", "test")
    assert [image.tobytes() for image in all_pixels(data)] == [rgb(seed).tobytes() for seed in range(7)]
    assert "held out (--validation_split test): 10 images; trained on: 7 of 10, which are not held out" in caplog.text
    data = opened(tmp_path / "photos", str(tmp_path / "apart"))
    assert (len(data), len(data.held_out)) == (9, 2) and data.fingerprint != whole.fingerprint
    assert numbers_of(opened(tmp_path / "photos", "train[80%:]").held_out) == numbers_of(whole)[8:]
    shutil.copy(tmp_path / "photos/test/9.png", tmp_path / "apart/copy.png")
    assert opened(tmp_path / "photos", str(tmp_path / "apart")).fingerprint == whole.fingerprint
    with pytest.raises(DataError, match=r"--validation_split train holds out 10 images, and leaves 0 of 10"):
        opened(tmp_path / "photos", "train")


def test_held_out_classes_are_those_of_training(tmp_path):
    for place in ("photos/ant/0", "photos/bee/1", "photos/cat/2", "held/cat/3", "held/bee/4"):
        write_image(tmp_path / f"{place}.png", rgb(int(place[-1])))
    data = opened(tmp_path / "photos", str(tmp_path / "held"), condition="class")
    assert data.held_out.class_names == data.class_names == ["ant", "bee", "cat"]
    assert data.held_out.column("label", range(2)).tolist() == [1, 2]
    assert all_pixels(data.held_out)[1].tobytes() == rgb(3).tobytes()
    write_image(tmp_path / "held/dog/5.png", rgb(5))
    with pytest.raises(DataError, match=r"held: its class 'dog' is not among the 3 of the training images, \['ant', 'bee'"):
        opened(tmp_path / "photos", str(tmp_path / "held"), condition="class")
    assert len(opened(tmp_path / "photos", str(tmp_path / "held")).held_out) == 3


def test_held_out_labels_are_those_of_training(tmp_path):
    """Of lists of labels, which become vectors."""
    tags = {"photos": [["a"], ["b", "c"], ["c"], None], "held": [["c"], ["a", "c"], None]}
    for number, (name, lists) in enumerate(tags.items()):
        rows = [numbered(10 * number + row) for row in range(len(lists))]
        parquet(tmp_path / f"{name}.parquet", rows, tags=lists)
    asked = {"condition": "vector", "condition_column": "tags", "max_bad_fraction": 0.5}
    data = opened(tmp_path / "photos.parquet", str(tmp_path / "held.parquet"), **asked)
    assert data.held_out.vector_names == data.vector_names == ["a", "b", "c"]
    held_out = data.held_out.vector(range(len(data.held_out))).numpy()
    assert np.array_equal(held_out, [[0, 0, 1], [1, 0, 1], [np.nan] * 3], equal_nan=True)


def test_percentiles_are_of_the_training_images_alone(tmp_path):
    """Of 16 bits; also those of condition images."""
    for number in range(10):
        for folder, most in (("images", 1000 * number), ("masks", 5000 - 100 * number)):
            write_image(
                tmp_path / f"{folder}/{number}.png", np.full((8, 8), most, np.uint16) // np.arange(1, 9, dtype=np.uint16)
            )
    asked = {"condition": "image", "condition_column": "masks", "value_range": "percentile:0,100"}
    whole, data = opened(tmp_path, None, **asked), opened(tmp_path, "train[40%:]", **asked)
    assert (len(data), len(data.held_out), whole.value_range.high, data.value_range.high) == (4, 6, (9000,), (3000,))
    assert whole.condition_images.value_range.low == (512,) and data.condition_images.value_range.low == (587,)
    assert data.held_out.value_range == data.value_range and data.held_out.pixels([5]).numpy().max() == 9000
    assert data.held_out.condition_images.value_range == data.condition_images.value_range


def test_beside_a_stream_the_first_images_are_held_out(table, tmp_path):
    data = opened(table("all", range(30)), str(table("held", range(40, 60))), streaming=True, resolution=8, channels=1)
    assert data.num_images is None and numbers_of(data.held_out) == [40, 41, 42, 43, 44]


def test_what_cannot_be_held_out_is_said(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("held").mkdir()
    for split in ("0", "100%", "1.5"):
        with pytest.raises(ConfigError, match=rf"--validation_split {split} must be above 0 and below 1"):
            TrainingDataOptions(validation_split=split)
    for split in ("10%", "train[:5]", "test+train"):
        with pytest.raises(ConfigError, match=r"is a part of the images, which --streaming cannot leave out"):
            TrainingDataOptions(validation_split=split, streaming=True, resolution=8)
    with pytest.raises(DataError, match=r"--validation_split held: .* no split 'held'\. .* folder of that name is \./held"):
        opened("digits", "held")
    with pytest.raises(DataError, match="holds out 0 images, and leaves 3 of 3"):
        opened(table("few", range(3)), "0.001")
