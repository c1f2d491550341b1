"""Runs that train on streams."""

import json

import numpy as np
import pytest

from data_helpers import write_numbered
from ddpm_pipeline.support.errors import ConfigError, DataError
from ddpm_pipeline.training import TrainingOptions, train
from ddpm_pipeline.training.options import parse_options
from helpers import TINY_UNET
from training_helpers import metrics


def test_a_run_from_a_stream_leaves_a_model_a_card_and_the_list_of_what_it_skipped(tmp_path):
    text = lambda row: "odd" if row % 2 else "even"  # noqa: E731
    folder = write_numbered(tmp_path / "numbers", [40, 40, 40], bad={7, 80}, text=text)
    (tmp_path / "unet.json").write_text(json.dumps({
        **TINY_UNET, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "mid_block_type": None,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 4,
    }))  # fmt: skip
    options = {
        "dataset": folder, "streaming": True, "resolution": 8, "channels": 1, "max_train_steps": 16, "batch_size": 8,
        "shuffle_buffer": 16, "dataloader_num_workers": 2, "max_bad_fraction": 0.05, "num_train_timesteps": 20,
        "beta_end": 0.4, "condition": "text", "text_column": "text", "model": str(tmp_path / "unet.json"), "num_samples": 2,
        "preview_every": 0, "checkpoint_every": 0, "log_every": 4, "num_cpu_threads": 1, "mixed_precision": "no",
        "cache_dir": str(tmp_path / "cache"), "fit_noises": 0,
    }  # fmt: skip
    model = train(TrainingOptions(**options, output_dir=str(tmp_path / "model")))
    skipped = [json.loads(line) for line in (model / "skipped.jsonl").read_text().splitlines()]
    assert sorted(one["file"] for one in skipped) == ["7.png", "80.png"]
    assert metrics(model)[-1]["skipped_rows"] == 2 and np.isfinite(metrics(model)[-1]["loss"])
    card = (model / "README.md").read_text()
    assert "a stream of `numbers`" in card and "--streaming True" in card
    assert not (tmp_path / "cache").exists()  # nothing is stored
    with pytest.raises(DataError, match=r"max_bad_fraction 0\.001"):
        train(TrainingOptions(**options | {"max_bad_fraction": 0.001}, output_dir=str(tmp_path / "none")))


def test_a_stream_needs_what_it_cannot_know():
    for options, needed in [({}, "--resolution"), ({"resolution": 8}, "--max_train_steps")]:
        with pytest.raises(ConfigError, match=f"--streaming needs {needed}"):
            TrainingOptions(dataset="x", streaming=True, **options)
    with pytest.raises(ConfigError, match="--eval_samples 8 does not work with --streaming"):
        TrainingOptions(streaming=True, resolution=8, max_train_steps=3, eval_every=1, eval_samples=8)
    flags = ["--dataset", "x", "--streaming", "--resolution", "8", "--max_train_steps", "3"]
    assert parse_options(flags).data.streaming
