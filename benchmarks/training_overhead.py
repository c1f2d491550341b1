"""What a run's safety and its measurements cost: checkpoints, times, memory, the check for finite numbers.

    python benchmarks/training_overhead.py --output benchmarks/results/training_overhead.json

Checkpoints: the seconds that training waits for one, and those that making it safe takes in the background, as a share of the
time of as many updates as lie between two by default. Measurements: the time of the timers and of the log, as a share of an
update. (Updates with and without them in turn differ by less than updates do among themselves.)
A real run is measured, whose updates, log lines and checkpoints are timed from outside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training import TrainingOptions, loop, train
from ddpm_pipeline.training.stop import in_any_process
from ddpm_pipeline.training.telemetry import StepTimer

INTERVAL = TrainingOptions().run.checkpoint_every  # updates between checkpoints by default


def seconds(function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


class TimedRun:
    """A run with a stopwatch at its updates, log lines and checkpoints; the median seconds of each."""

    def __init__(self, options: TrainingOptions):
        self.taken: dict[str, list[float]] = defaultdict(list)
        originals = {name: getattr(loop, name) for name in ("update", "report", "save_checkpoint")}
        self.facts: dict[str, Any] = {}

        def timed(name: str) -> Any:
            def call(run: Any, *arguments: Any) -> Any:
                began = time.perf_counter()
                result = originals[name](run, *arguments)
                self.taken[name].append(time.perf_counter() - began)
                if name == "save_checkpoint":
                    self.taken["background"].append(seconds(run.checkpoints.wait))
                elif name == "update" and not self.facts:
                    self.facts = {"parameters": run.state.num_parameters, "size": run.data.size}
                    self.taken["check"] = [seconds(finite_check, run) for _ in range(200)]
                return result

            return call

        for name in originals:
            setattr(loop, name, timed(name))
        try:
            folder = train(options)
        finally:
            for name, function in originals.items():
                setattr(loop, name, function)
        last = sorted((folder / "checkpoints").glob("step-*"))[-1]
        self.checkpoint_bytes = sum(path.stat().st_size for path in last.iterdir())

    def median(self, name: str) -> float:
        return statistics.median(self.taken[name])


def finite_check(run: Any) -> None:
    """What an update does beside computing the norm, which it does anyway."""
    losses, norm = torch.rand(run.options.optimisation.batch_size), torch.rand(())
    torch.stack([losses.isfinite().all(), norm.isfinite()]).tolist()
    in_any_process(run.accelerator, False, False)


def timers_of_an_update() -> None:
    """The timers of an update, around nothing."""
    timer = StepTimer(torch.device("cpu"))
    for part in ("data", "forward", "backward", "optimizer"):
        with timer(part):
            pass


def measure(options: TrainingOptions) -> dict[str, Any]:
    run = TimedRun(options)
    update, line = run.median("update"), run.median("report")
    timers = statistics.median(seconds(timers_of_an_update) for _ in range(1000))
    waited, background = run.median("save_checkpoint"), run.median("background")
    return {
        **run.facts,
        "batch_size": options.optimisation.batch_size,
        "update_seconds": update,
        "timer_seconds": timers,
        "log_line_seconds": line,
        "measurements_cost": (timers + line / TrainingOptions().watching.log_every) / update,
        "finite_check_seconds": run.median("check"),
        "checkpoint_mb": run.checkpoint_bytes / 1e6,
        "checkpoint_waited_seconds": waited,
        "checkpoint_background_seconds": background,
        "finite_check_cost": run.median("check") / update,
        "checkpoint_cost": waited / (INTERVAL * update),
        "checkpoint_cost_if_the_background_were_not_free": (waited + background) / (INTERVAL * update),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400, help="of the digits recipe")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        updates, repeats = arguments.updates, arguments.repeats
        digits = TrainingOptions(
            config="digits", output_dir=f"{scratch}/digits", cache_dir=f"{scratch}/cache", max_train_steps=updates,
            checkpoint_every=updates // repeats, preview_every=0, num_samples=1, log_every=max(1, updates // 8),
        )  # fmt: skip
        large = digits.with_values(
            output_dir=f"{scratch}/large", model="32", resolution=32, batch_size=1, max_train_steps=16,
            checkpoint_every=max(1, 16 // repeats), log_every=2, mixed_precision="no", num_train_timesteps=10,
        )  # fmt: skip
        measured = {"digits recipe": measure(digits), "the preset for 32 pixels, batches of 1": measure(large)}
    report = {
        "command": f"python benchmarks/training_overhead.py {' '.join(sys.argv[1:])}",
        **provenance(torch.device("cpu")),
        "interval": INTERVAL,
        "results": measured,
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
