"""Shared by several test modules: tiny models, commands in subprocesses, and what code imports."""

import ast
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel

ROOT = Path(__file__).parents[1]
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")  # on files, as Python audits them

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


def imported(tree: ast.Module) -> set[str]:
    """The top-level names of all absolute imports in a module's code, also those inside of functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def run_limited(command: Sequence[str], timeout: float, **options) -> subprocess.CompletedProcess:
    """Run a command without input and capture what it prints. Exceeding the timeout fails the test and says where it hung."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )  # fmt: skip
    try:
        printed, errors = process.communicate(timeout=timeout)
    except KeyboardInterrupt:  # does not reach a process in a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        raise
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)  # Python prints where each thread is, see run_command
        try:
            printed, errors = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, errors = process.communicate()
        pytest.fail(f"{shlex.join(command)[:500]} had not ended after {timeout} s:\n{printed}\n{errors}")
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def run_command(*command: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess:
    """Run a command from the project's root, with one thread and no network, and capture what it prints.

    Scripts of this Python's environment, such as `accelerate`, are found whether or not the environment is activated.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    settings = {"PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return run_limited(command, timeout, cwd=ROOT, env={**os.environ, **settings, **env})


def run_python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter and return what it printed. An error in it fails the test with its traceback."""
    done = run_command(sys.executable, "-c", code, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def killed_at(operation: int, folder: Path, job: Callable[[], object]) -> bool:
    """Do a job in a fork that is killed before its n-th operation on a file or folder in `folder`. Whether it came so far."""
    if not (child := os.fork()):
        left = iter(range(operation - 1, -1, -1))

        def kill(event: str, arguments: tuple) -> None:
            if event in OPERATIONS and str(arguments[0]).startswith(str(folder)) and not next(left):
                os._exit(9)

        sys.addaudithook(kill)
        try:
            AcceleratorState._reset_state(True)  # that of the process which was forked
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
