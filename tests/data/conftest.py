"""Fixtures of the tests of reading data: no progress bars, a cache of each test's own, and the digits, read once."""

from functools import partial

import datasets
import pytest

import data_helpers


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def load(tmp_path):
    """`load_images` of a data set and options, with a cache of this test's own."""
    return partial(data_helpers.load, cache_dir=str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return data_helpers.load("digits", cache_dir=str(tmp_path_factory.mktemp("digits")))
