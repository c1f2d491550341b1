"""The fixtures of hub_fixtures.py for every test of this room, and a finished run's folder."""

from pathlib import Path

import pytest

from ddpm_pipeline import AlphaDDPMPipeline
from ddpm_pipeline.hub import export
from hub_fixtures import client, hub  # noqa: F401
from hub_models import card_of, smallest_pipeline


@pytest.fixture(scope="module")
def pipe() -> AlphaDDPMPipeline:
    return smallest_pipeline()


@pytest.fixture
def folder(pipe: AlphaDDPMPipeline, tmp_path: Path) -> Path:
    """A finished run's folder, with what does not belong on the Hub beside the model."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.png").write_bytes(b"\x89PNG\0")
    export(pipe, folder, card_of(pipe, pictures={"samples.png": "samples"}, license="apache-2.0"))
    for name in ("checkpoints/step-1/optimizer.bin", "logs/events", "train.log", "metrics.jsonl", "training_config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private\n")
    return folder
