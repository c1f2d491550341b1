"""The main job in full: minutes of training with the README's command, judged by a classifier of the real digits."""

import time

import pytest

from digits_judge import draw_images, judge
from helpers import run_command


@pytest.mark.slow
def test_the_main_job_draws_digits(tmp_path):
    began = time.monotonic()
    done = run_command(
        "accelerate", "launch", "training/train.py", "--output_dir", str(tmp_path / "model"), timeout=3000
    )
    assert done.returncode == 0, done.stderr
    print(f"main job: {time.monotonic() - began:.0f} s")
    judgement = judge(draw_images(tmp_path / "model", 1024))
    print(judgement)
    assert judgement.mean_top_probability >= 0.95
    assert all(0.04 <= share <= 0.20 for share in judgement.class_shares)
    assert judgement.frechet_ratio <= 2
    assert judgement.copied_share < 0.05
