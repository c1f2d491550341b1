"""What a run's safety and its measurements cost: checkpoints, times, memory, the check for finite numbers.

    python benchmarks/training_overhead.py --output benchmarks/results/training_overhead.json

Checkpoints: the seconds that training waits for one, and those that making it safe takes in the background, as a share of the
time of as many updates as lie between two by default. Measurements: the time of the timers and of the log, as a share of an
update. (Updates with and without them in turn differ by less than updates do among themselves.)
Imports training/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddpm_pipeline.support.provenance import provenance
from ddpm_pipeline.training.loop import Run
from ddpm_pipeline.training.options import TrainingConfig, parse_config
from ddpm_pipeline.training.stop import in_any_process
from ddpm_pipeline.training.telemetry import StepTimer

INTERVAL = TrainingConfig.checkpoint_every  # updates between checkpoints by default


def seconds(function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def measure_updates(run: Run, updates: int) -> dict[str, float]:
    """Median seconds of an update, and of what measures it: the timers of an update and a line of the log."""
    taken, timed, lines = [], [], []
    run.model.train()
    for done in range(updates):
        taken.append(seconds(run.update, done))
        timed.append(seconds(measure_nothing, run.config.gradient_accumulation_steps))
        if (done + 1) % max(1, updates // 8) == 0:
            lines.append(seconds(run.report, done + 1))
    update, timers, line = (statistics.median(values) for values in (taken, timed, lines))
    cost = (timers + line / run.config.log_every) / update
    return {"update_seconds": update, "timer_seconds": timers, "log_line_seconds": line, "measurements_cost": cost}


def measure_nothing(passes: int) -> None:
    """The timers of an update, around nothing."""
    timer = StepTimer(torch.device("cpu"))
    for _ in range(passes):
        for part in ("data", "forward", "backward"):
            with timer(part):
                pass
    with timer("optimizer"):
        pass


def measure_checks(run: Run, repeats: int = 200) -> dict[str, float]:
    """Seconds of the check for finite numbers in an update, beside the norm that is computed anyway."""
    losses, norm = torch.rand(run.config.batch_size), torch.rand(())

    def check() -> None:
        torch.stack([losses.isfinite().all(), norm.isfinite()]).tolist()
        in_any_process(run.accelerator, False, False)

    return {"finite_check_seconds": statistics.median(seconds(check) for _ in range(repeats))}


def measure_checkpoints(run: Run, repeats: int) -> dict[str, float]:
    waited, background = [], []
    for number in range(repeats):
        waited.append(seconds(run.save_checkpoint, number + 1))
        background.append(seconds(run.checkpoints.wait))
    folder = run.folder / "checkpoints"
    size = sum(path.stat().st_size for path in next(folder.glob("step-*")).iterdir())
    return {
        "checkpoint_mb": size / 1e6,
        "checkpoint_waited_seconds": statistics.median(waited),
        "checkpoint_background_seconds": statistics.median(background),
    }


def measure(config: TrainingConfig, updates: int, repeats: int) -> dict[str, Any]:
    run = Run(config)
    result: dict[str, Any] = {
        "parameters": run.parameters, "resolution": run.config.resolution, "batch_size": config.batch_size,
        **measure_updates(run, updates), **measure_checks(run),
        **measure_checkpoints(run, repeats),
    }  # fmt: skip
    run.loader.close()
    update = result["update_seconds"]
    result["finite_check_cost"] = result["finite_check_seconds"] / update
    result["checkpoint_cost"] = result["checkpoint_waited_seconds"] / (INTERVAL * update)
    busy = result["checkpoint_waited_seconds"] + result["checkpoint_background_seconds"]
    result["checkpoint_cost_if_the_background_were_not_free"] = busy / (INTERVAL * update)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400, help="of the digits recipe")
    parser.add_argument("--repeats", type=int, default=5, help="checkpoints")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = parse_config([])
        digits = replace(
            recipe, output_dir=f"{scratch}/digits", cache_dir=f"{scratch}/cache", max_train_steps=arguments.updates
        )
        large = replace(
            digits, output_dir=f"{scratch}/large", model="32", resolution=32, batch_size=1, max_train_steps=16,
            mixed_precision=None,
        )  # fmt: skip
        measured = {
            "digits recipe": measure(digits, arguments.updates, arguments.repeats),
            "the preset for 32 pixels, batches of 1": measure(large, 16, arguments.repeats),
        }
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
