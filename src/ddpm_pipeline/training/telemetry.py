"""What a run reports about itself: losses, times and memory, to metrics.jsonl, the tracker and the log."""

import contextlib
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.skipped import SkippedLog, SkippedRow
from ..support.atomic import write_text
from .state import Updater

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logging_to(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Within, the package's main process logs to the console and to train.log, and the other processes log errors only."""
    package = logging.getLogger(__name__.partition(".")[0])
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if accelerator.is_main_process:
        handlers.append(logging.FileHandler(folder / "train.log"))
    before = package.level
    package.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(before)
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()


def _step_of(line: str) -> float:
    """Infinite for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class StepTimer:
    """Seconds spent in the parts of an update, summed until they are taken.

    On a GPU, events are recorded in its stream and read when taken, so that nothing waits for the device in between.
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
        """The sums so far, which restart at 0."""
        if self._events:
            torch.cuda.synchronize()
            for part, start, end in self._events:
                self._seconds[part] += start.elapsed_time(end) / 1000
        taken, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return taken


def memory(device: torch.device) -> dict[str, float]:
    """GiB used by this process, and the most that its GPU held."""
    used = {"memory_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        used["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return used


class Telemetry:
    """Gathers the losses and times of updates, and reports them as lines of the log and on the progress bar."""

    def __init__(self, accelerator: Accelerator, folder: Path, updater: Updater, first_step: int, total: int):
        self.accelerator, self.updater, self.path = accelerator, updater, folder / "metrics.jsonl"
        main = accelerator.is_main_process
        if main and self.path.is_file():  # of an earlier attempt
            lines = [line for line in self.path.read_text("utf-8").splitlines() if _step_of(line) <= first_step]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        self.skipped = SkippedLog(folder) if main else None  # rows of the data
        self.timer = StepTimer(accelerator.device)
        self.bar = tqdm(total=total, initial=first_step, disable=not main, desc="training", unit="update")
        self._losses: list[torch.Tensor] = []  # one per update since the last report
        self._grad_norm = float("nan")  # of the last update
        self._spent: Counter[str] = Counter()  # seconds by part of an update
        self.restart_clock()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """A line of metrics.jsonl, which the tracker gets too."""
        self.accelerator.log(dict(metrics), step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def restart_clock(self) -> None:
        """Images per second are counted from here on."""
        self._clock = time.monotonic()

    def note_update(self, loss: torch.Tensor, grad_norm: float) -> None:
        self._losses.append(loss)
        self._grad_norm = grad_norm

    def note_skipped_rows(self, rows: list[SkippedRow]) -> None:
        """Write down rows of the data that any process left out; a collective call."""
        found = gather_object(rows)
        if self.skipped is not None:
            self.skipped.add(found)

    def report(self, done: int, batch_size: int) -> None:
        """Log the updates since the last report: the loss is a mean over all processes, times are means over updates."""
        updates = len(self._losses)  # those that were applied
        shown: dict[str, float] = {}
        if updates:
            loss = self.accelerator.reduce(torch.stack(self._losses).mean(), "mean").item()
            shown = {"loss": loss, "grad_norm": self._grad_norm}
        metrics = shown | {
            "learning_rate": self.updater.lr_scheduler.get_last_lr()[0],
            "images_per_second": updates * batch_size / (time.monotonic() - self._clock),
            "skipped_updates": self.updater.skipped,
        }
        for part, seconds in self.timer.take().items():
            metrics[f"{part}_seconds"] = seconds / max(updates, 1)
            self._spent[part] += seconds
        if self.skipped:
            metrics["skipped_rows"] = len(self.skipped)
        self.log(metrics | memory(self.accelerator.device), done)
        self._losses = []
        self.restart_clock()
        self.bar.set_postfix(shown, refresh=False)

    def summarize(self) -> None:
        """Log where the time went and what was skipped."""
        total = self._spent.total() or 1.0
        parts = ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in self._spent.most_common())
        used = ", ".join(f"{name} {gib:.2f}" for name, gib in memory(self.accelerator.device).items())
        skipped = f"{self.updater.skipped} updates and {len(self.skipped or ())} rows skipped"
        logger.info("time of updates: %s; %s; %s", parts, used, skipped)
