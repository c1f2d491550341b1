"""What -1 and 1 mean in the data's units: exact on the levels, back and forth, and refused where it is none."""

import json

import numpy as np
import pytest
import torch

from ddpm_pipeline.ranges_alpha_ddpm import ValueRange


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_level_of_a_type_comes_back(dtype):
    value_range = ValueRange.of_type(dtype)
    levels = np.arange(value_range.num_bins, dtype=dtype).reshape(1, 1, -1)
    x = value_range.normalize(torch.from_numpy(levels))
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.allclose(x.double(), torch.linspace(-1, 1, levels.size, dtype=torch.float64).view(1, 1, -1), atol=1e-7, rtol=0)
    assert np.array_equal(value_range.restore(x), levels)


def test_8_bits_are_as_ever():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(ValueRange().normalize(levels), levels.float() / 127.5 - 1)


def test_each_channel_has_its_pair_and_values_beyond_are_clipped():
    value_range = ValueRange((-1000, 0), (3000, 100), "int16")
    values = torch.tensor([[-1000, 1000, 5000], [50, 100, -7]], dtype=torch.int16).view(2, 1, 3)
    x = value_range.normalize(values)
    assert x.flatten().tolist() == [-1, 0, 1, 0, 1, -1]
    assert value_range.restore(x).reshape(2, 3).tolist() == [[-1000, 1000, 3000], [50, 100, 0]]
    assert value_range.num_bins == (4001, 101)


def test_floats_are_not_rounded_and_are_left_as_they_were():
    value_range, values = ValueRange((0.0,), (0.5,), "float32"), torch.rand(2, 1, 4, 4) / 2
    before = values.clone()
    assert torch.allclose(value_range.denormalize(value_range.normalize(values)), values, atol=1e-7)
    assert torch.equal(values, before)
    assert value_range.num_bins is None


def test_settings_survive_json():
    value_range = ValueRange((0, -5), (9, 5), "int16")
    assert ValueRange.from_json(json.loads(json.dumps(value_range.to_json()))) == value_range


@pytest.mark.parametrize(
    "values",
    [
        {"low": [0], "high": [255], "dtype": "complex64"}, {"low": [1], "high": [1], "dtype": "uint8"},
        {"low": [0], "high": [float("inf")], "dtype": "float32"}, {"low": [0, 0], "high": [1], "dtype": "float32"},
        {"low": [0.5], "high": [9], "dtype": "int16"}, {"low": [None], "high": [1], "dtype": "uint8"}, {"low": [0]}, [0, 255],
        {"low": [0], "high": [256], "dtype": "uint8"},
        {"low": [], "high": [], "dtype": "uint8"}, {"low": None, "high": [1], "dtype": "uint8"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_range_is_refused(values):
    with pytest.raises(ValueError, match=r"(?i)value_?range"):
        ValueRange.from_json(values)


def test_a_type_without_black_and_white():
    with pytest.raises(ValueError, match="int16 has no black and white"):
        ValueRange.of_type("int16")
