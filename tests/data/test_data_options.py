"""The options of reading data, and the room's public names: importable without torch, and clear where an extra is missing."""

import pytest

from data_helpers import data_options
from ddpm_pipeline import data
from ddpm_pipeline.data.options import TrainingDataOptions
from ddpm_pipeline.support.errors import ConfigError
from helpers import run_python

NO_DATASETS = """
import sys
import ddpm_pipeline.data.options
from ddpm_pipeline.data import ConditionColumns, DataError, DataOptions
print(sorted({"torch", "datasets", "sklearn"} & set(sys.modules)))
sys.modules["datasets"] = None  # as if it were not installed
try:
    from ddpm_pipeline.data import load_images
except ImportError as error:
    print(error)
"""


def test_options_need_neither_torch_nor_datasets_and_reading_names_the_missing_extra():
    loaded, error = run_python(NO_DATASETS).splitlines()
    assert loaded == "[]"
    assert "datasets" in error and "pip install 'ddpm-pipeline[train]'" in error


def test_public_names():
    assert {"load_images", "open_stream", "open_data", "ImageData", "StreamData", "DataError"} <= set(dir(data))
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = data.nothing


def test_open_data_reads_as_streaming_says(tmp_path):
    given = {"resolution": 8, "split": "train[:9]", "cache_dir": str(tmp_path)}
    mapped = data.open_data(*data_options("digits", **given))
    stream = data.open_data(*data_options("digits", streaming=True, **given))
    assert isinstance(mapped, data.ImageData) and isinstance(stream, data.StreamData)
    assert mapped.pixels(range(9)).equal(stream.first(9))


def test_streaming_needs_a_resolution(tmp_path):
    with pytest.raises(ConfigError, match="--resolution"):
        data.open_stream(*data_options("digits"))
    with pytest.raises(ConfigError, match="--resolution"):
        TrainingDataOptions(streaming=True)
    assert data_options("digits", streaming=True)[0].resolution is None  # a model's may be filled in later
