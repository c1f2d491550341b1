"""What several test modules share: tiny models and commands in subprocesses."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import UNet2DModel

ROOT = Path(__file__).parents[1]

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "add_attention": False,
}


def tiny_unet(seed: int = 0, **config) -> UNet2DModel:
    """A UNet of some ten thousand parameters for 8x8 images, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(**{**TINY_UNET, **config}).eval()


def run_command(*command: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run a command from the project's root, with one thread and no network, and capture what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter; what it printed. An error in it fails the test with its traceback."""
    done = run_command(sys.executable, "-c", code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout
