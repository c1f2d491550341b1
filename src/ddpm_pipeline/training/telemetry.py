"""What a run says of itself: losses, times, memory, as lines of metrics.jsonl and to the tracker.

Imports accelerate, psutil and torch; nothing of the package.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from .checkpoints import write_atomically


class MetricsLog:
    """Lines of metrics.jsonl, and the tracker's. Of an earlier course of the run the first `first_step` updates stay."""

    def __init__(self, accelerator: Accelerator, path: Path, first_step: int):
        self.accelerator, self.path = accelerator, path
        if accelerator.is_main_process and path.is_file():
            kept = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= first_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept))

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.accelerator.log(dict(metrics), step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")


def _step_of(line: str) -> float:
    """Infinite for a line that a sudden end cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class StepTimer:
    """Seconds that parts of an update take, summed up until they are asked for.

    On a GPU, events are recorded in its stream and read when asked, so that nothing waits for the device in between.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, part: str, on_device: bool = True) -> Iterator[None]:
        if self._on_gpu and on_device:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((part, start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[part] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The sums so far, which start anew."""
        if self._events:
            torch.cuda.synchronize()
            for part, start, end in self._events:
                self._seconds[part] += start.elapsed_time(end) / 1000
        taken, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return taken


def memory(device: torch.device) -> dict[str, float]:
    """GiB: of this process, and the most that its GPU held."""
    used = {"memory_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        used["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return used
