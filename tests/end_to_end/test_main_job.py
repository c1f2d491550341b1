"""The main job in full: minutes of training with the README's command, evaluated by a classifier of the real digits."""

import json
import sys
import time

import pytest

from helpers import run_command


@pytest.mark.slow
def test_the_main_job_draws_digits(tmp_path):
    began, model, report = time.monotonic(), str(tmp_path / "model"), tmp_path / "quality.json"
    done = run_command("accelerate", "launch", "training/train.py", "--output_dir", model, timeout=3000)
    assert done.returncode == 0, done.stderr
    print(f"main job: {time.monotonic() - began:.0f} s")
    done = run_command(sys.executable, "benchmarks/digits_quality.py", model, "--output", str(report), timeout=3000)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    print(found)
    assert found["mean_top_probability"] >= 0.95
    assert all(0.04 <= share <= 0.20 for share in found["class_shares"])
    assert found["frechet_ratio"] <= 2
    assert found["copied_share"] < 0.05
