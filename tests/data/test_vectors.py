"""Numbers and lists of labels as vectors: from columns of all kinds, with missing values, and their statistics."""

import logging
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from data_helpers import encoded, rgb, stream_of, write_image, write_numbered
from ddpm_pipeline.data import DataError
from ddpm_pipeline.data.streamed import Position, divide, rows_of_part


@pytest.fixture
def faces(tmp_path):
    """A saved data set: ages of which one is unknown, smiles, constants and labels."""
    rows = {
        "image": [{"bytes": encoded(rgb(seed)), "path": None} for seed in range(4)],
        "age": [20, None, 40, 60],
        "smiles": [True, False, True, False],
        "height": [1.5, float("nan"), 1.5, 1.5],
        "tags": [["hat"], [], None, ["hat", "beard"]],
        "colours": [[0], [0, 1], [], [1]],
    }
    types = {"age": Value("int32"), "smiles": Value("bool"), "height": Value("float64"), "tags": List(Value("string"))}
    features = Features({"image": datasets.Image(), **types, "colours": List(ClassLabel(names=["red", "blue"]))})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "faces"))
    return tmp_path / "faces"


def test_numbers_are_told_or_not(load, faces, caplog):
    with caplog.at_level(logging.INFO):
        data = load(faces, condition="vector", condition_column="age, smiles")
    assert data.vector_names == ["age", "smiles"] and "age 1" in caplog.text
    assert np.array_equal(data.vector([3, 1]).numpy(), np.float32([[60, 0], [np.nan, 0]]), equal_nan=True)
    means, stds = data.vector_statistics
    assert means == [40, 0.5] and np.allclose(stds, [np.std([20, 40, 60]), 0.5])
    assert data.fingerprint != load(faces).fingerprint


def test_lists_of_labels_become_ones_where_an_image_has_the_label(load, faces):
    data = load(faces, condition="vector", condition_column="tags,colours")
    assert data.vector_names == ["beard", "hat", "red", "blue"]
    expected = np.float32([[0, 1, 1, 0], [0, 0, 1, 1], [np.nan, np.nan, 0, 0], [1, 1, 0, 1]])
    assert np.array_equal(data.vector(range(4)).numpy(), expected, equal_nan=True)
    assert data.vector_statistics == ([0.0] * 4, [1.0] * 4)


def test_a_constant_a_missing_column_and_a_single_label_are_refused(load, faces):
    with pytest.raises(DataError, match=r"'height' is 1.5 in all rows"):
        _ = load(faces, condition="vector", condition_column="height").vector_statistics
    with pytest.raises(DataError, match="'size' is no column"):
        load(faces, condition="vector", condition_column="age,size")
    with pytest.raises(DataError, match=r"needs columns of numbers.*which names image"):
        load(faces, condition="vector", condition_column="image")


def test_numbers_beside_second_images_from_a_metadata_file(load, tmp_path):
    for seed in range(3):
        write_image(tmp_path / "d" / "images" / f"{seed}.png", rgb(seed))
        write_image(tmp_path / "d" / "sketch" / f"{seed}.png", rgb(seed + 10))
    lines = "".join(f"images/{seed}.png,{seed / 2},sketch/{seed}.png\n" for seed in range(3))
    (tmp_path / "d" / "metadata.csv").write_text(f"file_name,angle,sketch_file_name\n{lines}")
    data = load(tmp_path / "d", condition="vector+image", condition_column="angle,sketch")
    assert data.vector([1]).tolist() == [[0.5]] and data.condition_images.channels == 3
    assert (data.condition_images.pixels([2])[0].permute(1, 2, 0).numpy() == rgb(12)).all()
    (tmp_path / "d" / "metadata.csv").unlink()
    lines = ['{"file_name": "images/0.png", "tags": ["b", "a"]}', '{"file_name": "images/1.png", "tags": []}']
    (tmp_path / "d" / "metadata.jsonl").write_text("\n".join(lines))
    data = load(tmp_path / "d", condition="vector+image", condition_column="tags,sketch")
    assert data.vector_names == ["a", "b"] and data.vector([1, 0]).tolist() == [[0, 0], [1, 1]]
    assert (data.condition_images.pixels([1])[0].permute(1, 2, 0).numpy() == rgb(11)).all()


def test_streams_read_the_same_numbers(load, tmp_path):
    folder = write_numbered(tmp_path / "tables", [6, 6], angle=lambda row: None if row == 4 else row / 2)
    asked = {"condition": "vector", "condition_column": "angle"}
    stream, mapped = stream_of(folder, **asked), load(folder, **asked)
    assert stream.vector_statistics == mapped.vector_statistics
    stored = stream.stored(20, str(tmp_path / "stored"))
    assert torch.equal(stored.vector(range(12)).nan_to_num(-1), mapped.vector(range(12)).nan_to_num(-1))
    for image in islice(rows_of_part(stream, divide(stream, 1), 0, 0, 10, Position()), 12):
        number = int(image.pixels[0, 0, 0])
        assert np.array_equal(image.vector, mapped.vector([number])[0].numpy(), equal_nan=True) and image.second is None
