"""Fixtures of the tests of training."""

import pytest

from ddpm_pipeline.training import jobs


@pytest.fixture
def no_final_pictures(monkeypatch) -> None:
    """Runs whose weights, figures or messages are looked at alone end without samples.png and process.png."""
    monkeypatch.setattr(jobs, "draw_samples", lambda run: None)
