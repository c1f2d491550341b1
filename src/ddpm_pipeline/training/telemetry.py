"""What a run reports about itself: losses, times and memory, to metrics.jsonl, the tracker and the log."""

import contextlib
import json
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..data.skipped import SkippedLog, SkippedRow
from ..support.atomic import write_text
from ..support.exceptions import describe_exception
from .forecast import Forecast, duration, time_of_day
from .state import Updater
from .trackers import SHOW

logger = logging.getLogger(__name__)

ESTIMATE_AFTER = 10  # updates
LINES_APART = 60.0  # seconds, at least, between lines of progress where no bar is seen
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}{postfix}"


class _Console(logging.Handler):
    """Writes to standard error, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def logging_to(folder: Path, accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """Within, the package's main process logs to the console, and the other processes log errors only. Yields a function to
    call once the folder is this run's: from then on train.log has all messages, also those before and those for it alone.
    """
    package, form = logging.getLogger(__name__.partition(".")[0]), logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    console, kept = _Console(), MemoryHandler(10_000, logging.CRITICAL, flushOnClose=False)
    console.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    console.setFormatter(form)
    handlers: list[logging.Handler] = [console, *([kept] if accelerator.is_main_process else [])]

    def start_file() -> None:
        if accelerator.is_main_process:
            file = logging.FileHandler(folder / "train.log", encoding="utf-8")
            file.setFormatter(form)
            kept.setTarget(file)
            kept.flush()
            kept.capacity = 1

    before = package.level
    package.setLevel(logging.DEBUG if accelerator.is_main_process else logging.ERROR)
    for handler in handlers:
        package.addHandler(handler)
    try:
        yield start_file
    finally:
        package.setLevel(before)
        for handler in handlers:
            package.removeHandler(handler)
        if kept.target is not None:
            kept.target.close()


def keep_lines(path: Path, first_step: int) -> list[str]:
    """Keep the lines of an earlier attempt up to the update that this one begins after, and return them."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) <= first_step]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return lines


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
    """Gathers the losses and times of updates, and reports them to the log, the progress bar, metrics.jsonl and the tracker."""

    def __init__(self, accelerator: Accelerator, folder: Path, updater: Updater, first_step: int, total: int):
        self.accelerator, self.updater, self.path = accelerator, updater, folder / "metrics.jsonl"
        main = accelerator.is_main_process
        if main:
            keep_lines(self.path, first_step)
        self.skipped = SkippedLog(folder) if main else None  # rows of the data
        self.timer = StepTimer(accelerator.device)
        self.bar = tqdm(total=total, initial=first_step, disable=not main or None, desc="training", bar_format=BAR)
        self._losses: list[torch.Tensor] = []  # one per update since the last report
        self._grad_norm = float("nan")  # of the last update
        self._spent: Counter[str] = Counter()  # seconds by part of an update
        self._first_step = first_step
        self._loss = self._end = ""  # as the bar shows them
        self._line_at = time.monotonic()  # of the last line in place of a bar
        self._failed: set[str] = set()
        self.restart_clock()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """A line of metrics.jsonl, which the tracker gets too."""
        with self._may_fail("the tracker"):
            self.accelerator.log(dict(metrics), step=step)
        if self.accelerator.is_main_process:
            with self._may_fail(f"writing {self.path.name}"), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def show(self, name: str, path: Path, caption: str, step: int) -> None:
        """A picture, which the tracker gets if it is one of `trackers.SHOW`; in the main process."""
        for tracker in self.accelerator.trackers:
            if tracker.name in SHOW:
                with self._may_fail("the tracker"), Image.open(path) as picture:
                    SHOW[tracker.name](tracker.tracker, name, picture, f"update {step}\n{caption}".strip(), step)

    def end_tracking(self) -> None:
        """Close the tracker, and what else accelerate has open."""
        for tracker in self.accelerator.trackers:
            with self._may_fail("the tracker"):
                tracker.finish()
        self.accelerator.trackers = []
        self.accelerator.end_training()

    @contextlib.contextmanager
    def _may_fail(self, what: str) -> Iterator[None]:
        """Within, the first error is logged, and those after it are not: the model matters more than figures of it."""
        try:
            yield
        except Exception as error:  # each tracker has its own
            if what not in self._failed:
                logger.warning("%s failed, and the run goes on: %s", what, describe_exception(error))
            self._failed.add(what)

    def restart_clock(self) -> None:
        """Images per second are counted from here on."""
        self._clock = time.monotonic()

    def note_progress(self, done: int, forecast: Forecast, batch_size: int) -> None:
        """After every update; after the first few, log how long the rest will take."""
        forecast.note_update(done)
        if forecast.pace is not None:
            left, rate = forecast.seconds_left(), 1 / forecast.pace
            when, until, images = duration(left), time_of_day(left), rate * batch_size
            speed = f"{images:.0f}" if images >= 100 else f"{images:.3g}"
            self._end = f", ends {until} ({when})"
            self.bar.set_postfix_str(f"{self._loss}{speed} images/s{self._end}", refresh=False)
            if done - self._first_step == ESTIMATE_AFTER and done < self.bar.total:
                told = "about %s to go at %.3g updates/s, until %s, with previews, evaluations and final samples"
                logger.info(told, when, rate, until)
        self.bar.update()

    def close_bar(self) -> None:
        """After the last update; what it told of the end it tells no more."""
        self.bar.set_postfix_str(self._loss.removesuffix(", "), refresh=False)
        self.bar.close()

    def note_update(self, loss: torch.Tensor, grad_norm: float) -> None:
        self._losses.append(loss)
        self._grad_norm = grad_norm

    def note_skipped_rows(self, rows: list[SkippedRow]) -> None:
        """Write down rows of the data that any process left out; a collective call."""
        found = gather_object(rows)
        if self.skipped is not None:
            with self._may_fail(f"writing {self.skipped.path.name}"):
                self.skipped.add(found)

    def report(self, done: int, batch_size: int) -> None:
        """Log the updates since the last report: the loss is a mean over all processes, times are means over updates. For the
        console where no bar is seen and the last line is old; else for train.log alone.
        """
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
        each = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if not name.endswith("_seconds"))
        told = self.bar.disable and time.monotonic() >= self._line_at + LINES_APART
        if told:
            self._line_at = time.monotonic()
        logger.log(logging.INFO if told else logging.DEBUG, "update %d of %d: %s%s", done, self.bar.total, each, self._end)
        self._losses = []
        self._loss = f"loss {shown['loss']:.3g}, " if shown else ""
        self.restart_clock()

    def summarize(self) -> None:
        """Log where the time went and what was skipped."""
        total = self._spent.total()
        parts = ", ".join(f"{part} {seconds / total:.1%}" for part, seconds in self._spent.most_common()) or "none were made"
        used = ", ".join(f"{name} {gib:.2f}" for name, gib in memory(self.accelerator.device).items())
        skipped = f"{self.updater.skipped} updates and {len(self.skipped or ())} rows skipped"
        logger.info("time of updates: %s; %s; %s", parts, used, skipped)
